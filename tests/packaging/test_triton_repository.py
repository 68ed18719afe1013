"""The Triton repository: its configuration through Triton's own protobuf, equal bytes, and self-contained versions."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref, Size
from redpp_serve.options import Serving
from redpp_serve.packaging.mar import serving_sources
from redpp_serve.packaging.output_folder import write_files
from redpp_serve.packaging.trials import run_trials, try_model
from redpp_serve.packaging.triton_repository import (
    ANY_SIZE,
    TYPES,
    build_repository,
    output_specs,
    to_json,
    to_text,
    triton_config,
)
from tests.packaging.test_mar import STOCK
from tests.support.served import SHAPE, VARIANTS, artifact, expected, npy

IMAGE, ANSWER = InputSpec("x", SHAPE), InputSpec("output_0", (5,))
CONFIG = triton_config("tiny", (IMAGE,), (ANSWER,), Serving(4, 3, 1))
X = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


def parsed(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def repository() -> dict[str, bytes]:
    artifacts = {variant: artifact(version) for version, variant in VARIANTS.items()}
    return build_repository("tiny", artifacts, CONFIG, [X])


def right(version: str) -> dict[str, np.ndarray]:
    return {"output_0": np.array(expected(version, torch.from_numpy(X)))}


def test_the_configuration_as_triton_reads_it() -> None:
    config = parsed(to_text(CONFIG))
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "python", 4)
    assert config.version_policy.WhichOneof("policy_choice") == "all"
    (given,), (answer,), (group,) = config.input, config.output, config.instance_group
    assert (given.name, given.data_type, list(given.dims)) == ("x", model_config_pb2.TYPE_FP32, [3, 8, 8])
    assert (answer.name, answer.data_type, list(answer.dims)) == ("output_0", model_config_pb2.TYPE_FP32, [5])
    assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_AUTO)
    batching = config.dynamic_batching
    assert list(batching.preferred_batch_size) == [4] and batching.max_queue_delay_microseconds == 3000
    assert not batching.HasField("default_queue_policy")  # it makes Triton 2.51 stall, see triton_config
    assert config.parameters["threads"].string_value == "1"
    warm = {sample.batch_size: sample.inputs["x"] for sample in config.model_warmup}
    assert list(warm) == [1, 2, 4]
    assert all(
        (i.input_data_file, list(i.dims), i.data_type) == ("input_0", [3, 8, 8], model_config_pb2.TYPE_FP32)
        for i in warm.values()
    )


def test_what_a_model_is_given_is_the_same_configuration() -> None:
    """The trial hands this to the model, where Triton hands over what it parsed."""
    theirs = json_format.MessageToDict(parsed(to_text(CONFIG)), preserving_proto_field_name=True)
    mine = to_json(CONFIG)
    assert (
        mine["parameters"]
        == theirs["parameters"]
        == {"threads": {"string_value": "1"}, "precision": {"string_value": "auto"}, "engine": {"string_value": "auto"}}
    )
    assert [s["batch_size"] for s in mine["model_warmup"]] == [s["batch_size"] for s in theirs["model_warmup"]]
    assert mine["model_warmup"][0]["inputs"]["x"]["input_data_file"] == "input_0"
    assert mine["dynamic_batching"]["preferred_batch_size"] == theirs["dynamic_batching"]["preferred_batch_size"]


def test_several_inputs_and_outputs_of_other_types_and_without_dimensions() -> None:
    inputs = (InputSpec("tokens", (5,), "int64"), InputSpec("mask", (5,), "bool"), InputSpec("half", (2,), "bfloat16"))
    outputs = (InputSpec("output_0", (), "int64"), InputSpec("output_1", (2, 3), "float16"))
    config = parsed(to_text(triton_config("m", inputs, outputs, Serving(16, 0, 2))))
    kinds = [model_config_pb2.DataType.Name(i.data_type) for i in config.input]
    assert kinds == ["TYPE_INT64", "TYPE_BOOL", "TYPE_FP32"]
    assert [list(o.dims) for o in config.output] == [[1], [2, 3]]
    assert [o.HasField("reshape") for o in config.output] == [True, False] and not config.output[0].reshape.shape
    assert {k: v.input_data_file for k, v in config.model_warmup[0].inputs.items()} == {
        "tokens": "input_0",
        "mask": "input_1",
        "half": "input_2",
    }
    with pytest.raises(RedppError, match="'output_0' of dtype complex64"):
        triton_config("m", inputs, (InputSpec("output_0", (2,), "complex64"),), Serving(1, 0, 1))


def test_sizes_that_vary_are_left_open() -> None:
    side = Size("S", 8, 24, 8)
    inputs = (InputSpec("x", (3, 16, 16), varying=((1, side), (2, side))),)
    config = parsed(to_text(triton_config("m", inputs, (InputSpec("output_0", (4, -1, -1)),), Serving(4, 1, 1))))
    assert list(config.input[0].dims) == [3, -1, -1] and list(config.output[0].dims) == [4, -1, -1]
    assert list(config.model_warmup[0].inputs["x"].dims) == [3, 16, 16]


def test_every_type_is_one_of_tritons() -> None:
    assert set(TYPES.values()) <= set(model_config_pb2.DataType.keys())


def test_any_text_survives() -> None:
    for text in ("plain", 'quote " and \\ slash', "line\nbreak\ttab", "Größe 模型", "\x00\x7f"):
        assert parsed(to_text({"name": text})).name == text


def test_equal_input_gives_equal_bytes_and_all_that_serving_needs() -> None:
    found = repository()
    assert found == repository() and list(found) == list(repository())
    assert found["tiny/config.pbtxt"].decode() == to_text(CONFIG)
    assert found["tiny/warmup/input_0"] == X.tobytes()
    for number, version in (("1", "1.0"), ("2", "2.0")):
        assert found[f"tiny/{number}/model.redpp"] == artifact(version)
        assert {path: found[f"tiny/{number}/{path}"] for path in serving_sources()} == serving_sources()
    assert found["tiny/1/model.py"] == found["tiny/2/model.py"]
    with pytest.raises(RedppError, match="model name"):
        build_repository("../x", {}, {}, [])


@pytest.mark.exhaustive
def test_both_versions_answer_as_the_networks_do_in_a_trial(tmp_path: Path) -> None:
    write_files(tmp_path, repository())
    trials = [
        try_model(tmp_path / "tiny" / n, to_json(CONFIG), npy(X), right(v)) for n, v in (("1", "1.0"), ("2", "2.0"))
    ]
    results = run_trials(trials)
    assert [r["archive"] for r in results] == ["triton version 1", "triton version 2"]
    assert not list(tmp_path.rglob("__pycache__"))
    wrong = try_model(tmp_path / "tiny" / "2", to_json(CONFIG), npy(X), right("1.0"))
    with pytest.raises(RedppError, match="handler of triton version 2 failed.*other outputs"):
        run_trials([wrong])
    with pytest.raises(RedppError, match="triton version 1 failed.*NaN"):
        run_trials([try_model(tmp_path / "tiny" / "1", to_json(CONFIG), npy(X * np.nan), right("1.0"))])


@pytest.mark.exhaustive
def test_a_version_serves_where_the_project_is_not_installed(tmp_path: Path) -> None:
    """The same barrier as for the archive, then the stand-in for the back end."""
    write_files(tmp_path, repository())
    folder = tmp_path / "tiny" / "1"
    (tmp_path / "x.npy").write_bytes(npy(X))
    source = files("redpp_serve.packaging.trials").joinpath("triton_python_backend_utils.py").read_text()
    (tmp_path / "triton_python_backend_utils.py").write_text(source)
    (tmp_path / "config.json").write_text(json.dumps(to_json(CONFIG)))
    barrier = STOCK[: STOCK.index("import handler")]
    (tmp_path / "stock.py").write_text(
        barrier
        + """
sys.path.insert(0, str(folder.parent.parent))
import numpy, torch
import triton_python_backend_utils as backend
import model
served = model.TritonPythonModel()
served.initialize({"model_config": Path("config.json").read_text(), "model_name": "tiny", "model_version": "1",
                   "model_instance_kind": "CPU", "model_instance_device_id": "0"})
(response,) = served.execute([backend.InferenceRequest({"x": torch.from_numpy(numpy.load("x.npy"))[None]})])
print(json.dumps(response.output_tensors()[0].held[0].tolist()))
served.finalize()
loaded = [Path(m.__file__).resolve() for n, m in sys.modules.items() if n.startswith("redpp_serve") and m.__file__]
assert len(loaded) > 8 and all(path.is_relative_to(folder) for path in loaded), loaded
"""
    )
    result = subprocess.run(
        [sys.executable, "stock.py", str(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == pytest.approx(expected("1.0", torch.from_numpy(X)), rel=1e-4, abs=1e-5)


def with_outputs(width: int, name: str, *, inputs: tuple[InputSpec, ...] = (InputSpec("x", (6,)),)) -> Graph:
    """A network that gives the first columns of its input, and the places of its largest numbers."""
    first = Node("first", "aten.slice.Tensor", (Ref("x"), -1, 0, width))
    places = Node("places", "aten.argmax.default", (Ref("x"), 1))
    return Graph(inputs, {}, (first, places), ("first", "places"), output_names=(name, "labels"))


def test_outputs_that_differ_between_the_variants_are_refused() -> None:
    same = {"original": with_outputs(5, "logits"), "pruned": with_outputs(5, "logits")}
    assert output_specs(same) == (InputSpec("logits", (5,)), InputSpec("labels", (), "int64"))
    for other in (with_outputs(4, "logits"), with_outputs(5, "scores")):
        with pytest.raises(RedppError, match="outputs .* of the pruned network"):
            output_specs({**same, "pruned": other})


def test_outputs_whose_sizes_vary_with_the_inputs() -> None:
    sizes = ((0, Size("H", 2, 9)), (1, Size("W", 8, 8)))
    graph = with_outputs(5, "map", inputs=(InputSpec("x", (4, 8), varying=sizes),))
    assert output_specs({"original": graph, "pruned": graph}) == (
        InputSpec("map", (ANY_SIZE, 5)),
        InputSpec("labels", (8,), "int64"),
    )
