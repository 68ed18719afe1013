"""From a stored graph to the programs that serve it: folded, fused, in its precision, with the kernels of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, Node
from redpp_serve.graph.passes import fold_batch_norm, fuse_epilogues, in_precision
from redpp_serve.runtime.candidates import Candidate, candidates, with_kernels
from redpp_serve.runtime.fused_layer import fused_layers


def serving_graph(graph: Graph, device: torch.device, precision: str = "fp32") -> Graph:
    """The graph with batch norm folded, epilogues fused, in a precision, on the device; images channels-last.

    Raises:
        RedppError: see `precision.in_precision`.
    """
    graph = in_precision(fuse_epilogues(fold_batch_norm(graph)), precision)
    return graph.with_tensors({name: channels_last(tensor.to(device)) for name, tensor in graph.tensors.items()})


def layer_inputs(graph: Graph, device: torch.device, precision: str = "fp32") -> dict[str, tuple[int, ...]]:
    """The shape of each fused layer's input at batch size 1, by the layer's name, from a run on zeros.

    Raises:
        RedppError: the network does not run in this precision.
    """
    try:
        shapes = {i.name: (1, *i.shape) for i in graph.inputs} | value_shapes(graph, str(device))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if precision in ("fp32", "tf32"):
            raise
        raise RedppError(
            f"the network does not run in {precision} on {device}: {str(error).splitlines()[0][:200]}",
            f"a network whose every operator takes {precision}",
            "serve it with precision fp32 (or tf32 on a GPU)",
        ) from error
    return {layer.node.name: shapes[layer.x.name] for layer in fused_layers(graph)}


def planned_programs(
    graph: Graph,
    batches: Sequence[int],
    kernel: Callable[[str, int], str],
    inputs: Mapping[str, tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[int, Program]:
    """A program for each batch bucket; equal ones are one program, and each form of a weight exists once.

    Args:
        graph: of `serving_graph`.
        kernel: the name of the kernel that runs a layer at a batch size, as in a plan.
        inputs: of `layer_inputs`.
        dtype: of the precision.
    """
    made: dict[tuple[str, str], Candidate] = {}
    forms: dict[str, Tensor] = {}
    programs: dict[tuple[str, ...], Program] = {}
    found = {}
    for batch in batches:
        chosen = {name: kernel(name, batch) for name in inputs}
        for name, wanted in chosen.items():
            if (name, wanted) not in made:
                options = candidates(graph, graph.node(name), inputs[name], device, dtype)
                made[name, wanted] = _once(next(c for c in options if c.kernel == wanted), forms)
        key = tuple(chosen.values())
        if key not in programs:
            programs[key] = Program(with_kernels(graph, {name: made[name, k] for name, k in chosen.items()})).eval()
        found[batch] = programs[key]
    return found


def serving_program(graph: Graph, device: torch.device) -> Program:
    """A stored graph as one program with the dense kernels, in its own precision; nothing is timed."""
    graph = serving_graph(graph, device)
    inputs = layer_inputs(graph, device)
    return planned_programs(graph, (1,), lambda name, batch: "dense", inputs, device, torch.float32)[1]


def channels_last(tensor: Tensor) -> Tensor:
    """Images in channels-last layout; other tensors as they are."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _once(candidate: Candidate, forms: dict[str, Tensor]) -> Candidate:
    """The candidate with one result for all calls; a form that another kernel of the layer has made is shared."""
    node, tensors = candidate.make()
    tensors = {name: forms.setdefault(name, tensor) for name, tensor in tensors.items()}

    def make() -> tuple[Node, dict[str, Tensor]]:
        return node, tensors

    return Candidate(candidate.kernel, candidate.worth_timing, candidate.reason, make)
