"""TensorRT is used where it is named, on a GPU, and where ONNX Runtime offers it; a stand-in takes its place here."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from redpp_serve.engines import ENGINES, ON_CPU
from redpp_serve.engines import engine as engine_module
from redpp_serve.engines.onnx_builder import write_onnx
from redpp_serve.engines.sessions import TENSORRT, OnnxRuntimeSession, tensorrt_options
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.quantization import symmetric
from redpp_serve.runtime.engine_choice import _candidates, check_engine_here
from redpp_serve.runtime.engine_network import Candidate, Network

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
ALL = [TENSORRT, "CUDAExecutionProvider", "CPUExecutionProvider"]
GRAPH = Graph(
    (InputSpec("x", (3, 4, 4)),), {"w": torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0))},
    (Node("y", "fused.conv2d", (Ref("x"), None, Ref("w"), None, [1, 1], [0, 0], [1, 1], 1, "relu")),), ("y",),
)  # fmt: skip


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Let ONNX Runtime's package for GPUs be installed, with these providers."""

    def offer(providers: list[str]) -> None:
        monkeypatch.setattr(engine_module, "_installed", lambda _: "1.26.0")
        monkeypatch.setattr(engine_module, "execution_providers", lambda: providers)

    return offer


def network(device: torch.device, *precisions: str) -> Network:
    described = {"precision": {"ranges": {"x": [-1.0, 3.0]}}}
    return Network(LoadedArtifact(GRAPH, described), GRAPH, precisions or ("fp32",), device)


def test_it_is_a_candidate_on_a_gpu_where_it_is_named(offered: Any) -> None:
    offered(ALL)
    found, left_out = _candidates(network(GPU, "fp32", "fp16", "tf32", "int8"), "tensorrt")
    assert found == [Candidate("tensorrt", precision) for precision in ("fp32", "fp16", "int8")] and not left_out
    assert _candidates(network(GPU), "auto") == ([], {})
    check_engine_here("tensorrt", GPU)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_precisions_that_it_does_not_serve(precision: str, offered: Any) -> None:
    offered(ALL)
    found, left_out = _candidates(network(GPU, precision), "tensorrt")
    assert not found and left_out == {"tensorrt": f"it does not serve {precision} on this processor"}


def test_a_processor_is_refused(offered: Any) -> None:
    offered(ALL)
    assert _candidates(network(CPU), "tensorrt") == ([], {"tensorrt": "it serves on cuda, not on cpu"})
    assert not any(c.engine == "tensorrt" for c in _candidates(network(CPU), "auto")[0])
    with pytest.raises(RedppError, match=r"--engine tensorrt on cpu: it serves on cuda.*Expected: a cuda device.*do: "):
        check_engine_here("tensorrt", CPU)


@pytest.mark.parametrize("providers", [ALL[1:], ALL[2:], ["AzureExecutionProvider"]])
def test_an_onnx_runtime_without_it_is_refused(providers: list[str], offered: Any) -> None:
    offered(providers)
    with pytest.raises(RedppError, match=rf"offers {', '.join(providers)}, not {TENSORRT} \(pip install"):
        check_engine_here("tensorrt", GPU)


def test_a_missing_package_is_refused() -> None:
    with pytest.raises(RedppError, match=r"onnxruntime-gpu is not installed \(pip install onnxruntime-gpu onnx"):
        check_engine_here("tensorrt", GPU)


@pytest.mark.parametrize("engine", [*ON_CPU, "auto", "redpp", "torch-compile"])
def test_engines_for_the_processor_stay_off_the_gpu(engine: str, offered: Any) -> None:
    offered(ALL)
    found, left_out = _candidates(network(GPU), engine)
    assert not found and left_out == ({engine: "it serves on cpu, not on cuda"} if engine in ON_CPU else {})
    check_engine_here(engine, CPU)


@pytest.mark.parametrize(
    ("precision", "fp16", "int8"), [("fp32", "False", "False"), ("fp16", "True", "False"), ("int8", "True", "True")]
)
def test_precisions_are_options_of_the_provider(
    precision: str, fp16: str, int8: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    runtime = stand_in(ALL)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    ENGINES["tensorrt"].session(Path("model.onnx"), precision, 2, 1)
    (first, given), second, last = runtime.providers  # type: ignore[attr-defined]
    assert (first, second, last) == (TENSORRT, (ALL[1], {"device_id": "1"}), ALL[2])
    assert given == tensorrt_options(precision, 1) and all(isinstance(value, str) for value in given.values())
    assert (given["device_id"], given["trt_fp16_enable"], given["trt_int8_enable"]) == ("1", fp16, int8)
    assert given["trt_engine_cache_path"] == str(tmp_path / "redpp-serve" / "tensorrt")


def test_falling_back_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", stand_in(ALL[2:]))
    with pytest.raises(RuntimeError, match="runs it with CPUExecutionProvider, not with TensorrtExecutionProvider"):
        ENGINES["tensorrt"].session(Path("model.onnx"), "fp32", 1)


def test_its_eight_bits_are_signed_and_lie_about_zero(tmp_path: Path) -> None:
    made = network(GPU, "int8")
    model = onnx.load(made.model(Candidate("tensorrt", "int8")))
    (level,) = [
        onnx.numpy_helper.to_array(i)
        for i in model.graph.initializer
        if i.name == next(n for n in model.graph.node if n.op_type == "QuantizeLinear").input[2]
    ]
    assert level.dtype == np.int8 and level == 0
    made.forget_models()
    quantized, x = made.in_int8(True), torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    session = OnnxRuntimeSession(write_onnx(quantized, tmp_path, signed=True), "int8", 1)
    torch.testing.assert_close(torch.from_numpy(session([x.numpy()])[0]), Program(quantized)(x)[0])
    assert symmetric({"a": (-1.0, 3.0), "b": (0.0, 0.0)}) == {"a": (-3.0, 3.0), "b": (0.0, 0.0)}


def stand_in(used: list[str]) -> ModuleType:
    """Return an ONNX Runtime that notes the providers that it is given and says which ones it uses."""
    module = ModuleType("onnxruntime")

    def session(_: Any, options: Any, providers: list[Any]) -> Any:
        module.providers = providers  # type: ignore[attr-defined]
        return SimpleNamespace(get_inputs=list, get_providers=lambda: used)

    options = SimpleNamespace(add_session_config_entry=lambda *_: None)
    vars(module).update(SessionOptions=lambda: options, InferenceSession=session)
    return module
