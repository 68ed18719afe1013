"""Model repositories for Triton's own back ends: the configuration through Triton's protobuf, and checked models."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from redpp_serve.cli import main
from redpp_serve.errors import RedppError
from redpp_serve.exporting.formats import FORMATS
from redpp_serve.exporting.triton import BACK_ENDS, export_repository, native_config
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec, Size
from redpp_serve.options import Serving
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.packaging.triton_repository import ANY_SIZE, to_text

IMAGE, SCALAR, ANSWER = InputSpec("x", (3, 8, 8)), InputSpec("age", (), "int64"), InputSpec("output_0", (5,))


def parsed(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def config_of(to: str, *inputs: InputSpec) -> model_config_pb2.ModelConfig:
    return parsed(to_text(native_config(BACK_ENDS[to], "tiny", inputs or (IMAGE,), (ANSWER,), Serving(4, 3, 2))))


def parameters(config: model_config_pb2.ModelConfig) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def test_onnx_runtime_batches_and_keeps_to_its_threads() -> None:
    config = config_of("triton-onnxruntime", IMAGE, SCALAR)
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 4)
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert parameters(config) == {
        "intra_op_thread_count": "2",
        "inter_op_thread_count": "1",
        "execution_mode": "0",
        "enable_mem_arena": "1",
        "enable_mem_pattern": "0",
    }
    assert [list(entry.dims) for entry in config.input] == [[3, 8, 8], [1]] and config.input[1].HasField("reshape")
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 2, 4]


def test_openvino_takes_each_request_alone_instead_of_padding_it() -> None:
    config = config_of("triton-openvino")
    assert (config.backend, config.max_batch_size, config.HasField("dynamic_batching")) == ("openvino", 0, False)
    assert parameters(config) == {"INFERENCE_NUM_THREADS": "2", "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    assert [list(entry.dims) for entry in (*config.input, *config.output)] == [[-1, 3, 8, 8], [-1, 5]]
    (warmup,) = config.model_warmup
    assert warmup.batch_size == 1 and list(warmup.inputs["x"].dims) == [1, 3, 8, 8]


def test_sizes_that_vary_are_free_in_either_configuration() -> None:
    image = InputSpec("x", (3, 8, 8), varying=((1, Size("H", 4, 16)), (2, Size("W", 4, 16))))
    mask = InputSpec("mask", (ANY_SIZE, ANY_SIZE), "int64")
    for to, batch in (("triton-onnxruntime", []), ("triton-openvino", [-1])):
        config = parsed(to_text(native_config(BACK_ENDS[to], "tiny", (image,), (mask,), Serving(4, 3, 2))))
        assert [list(entry.dims) for entry in (*config.input, *config.output)] == [
            [*batch, 3, -1, -1],
            [*batch, -1, -1],
        ]
        assert list(config.model_warmup[0].inputs["x"].dims) == ([1] if batch else []) + [3, 8, 8]


@pytest.mark.parametrize("to", BACK_ENDS)
def test_both_versions_are_served_on_the_processor(to: str) -> None:
    config = config_of(to)
    assert config.version_policy.WhichOneof("policy_choice") == "all"
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert (config.name, config.input[0].name, config.output[0].name) == ("tiny", "x", "output_0")
    with pytest.raises(RedppError, match="bfloat16"):
        config_of(to, InputSpec("x", (3,), "bfloat16"))


@pytest.mark.parametrize("to", BACK_ENDS)
def test_a_repository_holds_checked_models_of_both_versions(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setitem(BACK_ENDS, to, replace(BACK_ENDS[to], format=FORMATS["pt2"]))
    out, warnings = export_repository(packaged, to, tmp_path / "repository")
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == {
        "small/config.pbtxt",
        "small/1/model.pt2",
        "small/2/model.pt2",
        "small/warmup/input_0",
    }
    config = parsed((out / "small" / "config.pbtxt").read_text())
    assert (config.name, config.max_batch_size) == ("small", 4 if BACK_ENDS[to].batches else 0)
    x = torch.from_numpy(np.fromfile(out / "small" / "warmup" / "input_0", np.float32).reshape(1, 1, 12, 12))
    for number, version in (("1", "original"), ("2", "pruned")):
        with torch.no_grad():
            (expected,) = Program(read_artifact(packaged / f"{version}.mar").graph)(x)
        assert torch.equal(FORMATS["pt2"].open(out / "small" / number / "model.pt2")([x])[0], expected)
    assert warnings and ("AMX" in " ".join(warnings)) == (to == "triton-openvino")
    with pytest.raises(RedppError, match="not empty"):
        export_repository(packaged, to, out)


def test_a_model_that_fails_leaves_nothing(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FORMATS["pt2"]
    wrong = replace(right, open=lambda path: lambda inputs: [y + 1 for y in right.open(path)(inputs)])
    monkeypatch.setitem(BACK_ENDS, "triton-openvino", replace(BACK_ENDS["triton-openvino"], format=wrong))
    with pytest.raises(RedppError, match="computes something else"):
        export_repository(packaged, "triton-openvino", tmp_path / "new" / "repository")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_the_back_end_lacks(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to = "triton-openvino"
    monkeypatch.setitem(BACK_ENDS, to, replace(BACK_ENDS[to], format=FORMATS["pt2"]))
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(packaged), "--to", to]) == 0
    printed = capsys.readouterr()
    assert "pinning" in printed.err and "bf16" in printed.err and "versions 1 (original) and 2 (pruned)" in printed.out
    assert (tmp_path / "small_triton_openvino" / "small" / "config.pbtxt").is_file()


@pytest.mark.skipif(not find_spec("onnxruntime"), reason="no ONNX Runtime")
def test_onnx_runtime_has_the_names_of_the_configuration(packaged: Path, tmp_path: Path) -> None:
    import onnxruntime

    out, _ = export_repository(packaged, "triton-onnxruntime", tmp_path / "repository")
    config = parsed((out / "small" / "config.pbtxt").read_text())
    for number in "12":
        session = onnxruntime.InferenceSession(str(out / "small" / number / "model.onnx"))
        assert [entry.name for entry in session.get_inputs()] == [entry.name for entry in config.input]
        assert [entry.name for entry in session.get_outputs()] == [entry.name for entry in config.output]
