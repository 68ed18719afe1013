"""Make the arms of `benchmarks.cpu`: a network and its pruned form in every runtime that a CPU server could use."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from redpp_serve.graph.artifact import build
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.runtime.model import ServingModel

Call = Callable[[Tensor], Tensor]
PEERS = ("compiled", "onnx")  # each for the original and, with the suffix, for the pruned network
PRUNED = "_pruned"


@dataclass(frozen=True)
class Arm:
    """``build`` gives the call for inputs of one batch size (N, ...) -> (N, classes); ``graph`` says what is right."""

    name: str
    graph: Graph
    build: Callable[[Tensor], Call]


def arms(module: nn.Module, original: Graph, pruned: Graph, plan_seconds: float) -> list[Arm]:
    """All arms; the first is what TorchServe's own handler runs: the module as it is, called eagerly.

    ``original`` and ``pruned`` are this project's runtime with its plan, ``dense`` is it without a choice of kernels.
    """
    found = [Arm("stock", original, lambda x: module)]
    for suffix, graph in (("", original), (PRUNED, pruned)):
        found += [
            Arm("pruned" if suffix else "original", graph, lambda x, g=graph: _served(g, len(x), plan_seconds)),
            Arm(f"dense{suffix}", graph, lambda x, g=graph: _served(g, len(x), 0.0)),
            Arm(f"compiled{suffix}", graph, lambda x, g=graph, s=suffix: _compiled(Program(g) if s else module, x)),
            Arm(f"onnx{suffix}", graph, lambda x, g=graph, s=suffix: _onnx(Program(g) if s else module, x)),
        ]
    return found


def served(graph: Graph, batch: int, plan_seconds: float) -> ServingModel:
    """The graph as a worker would hold it, planned here and now."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.redpp"
        path.write_bytes(build(graph, {}).data)
        model = ServingModel(path, "cpu", batch=batch, plan_seconds=plan_seconds, cache=None)
    model.warm_up()
    return model


def _served(graph: Graph, batch: int, plan_seconds: float) -> Call:
    model = served(graph, batch, plan_seconds)
    return lambda x: model(x)[0]


def _compiled(module: nn.Module, example: Tensor) -> Call:
    """Frozen weights, as a server would have them; compiled for this batch size alone, which is its best case."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    inductor.freezing = True
    call = torch.compile(module.eval(), dynamic=False, mode="max-autotune")
    call(example)
    return lambda x: _first(call(x))


def _onnx(module: nn.Module, example: Tensor) -> Call:
    """ONNX Runtime with its full graph optimisation and as many threads as torch has."""
    import onnxruntime

    exported = torch.export.export(module.eval(), (example,), strict=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(exported, dynamo=True, verbose=False).save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
