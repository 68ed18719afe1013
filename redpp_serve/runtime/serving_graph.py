"""A stored graph as it is served: folded, fused, in its precision, as one program for each batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, Node, Ref
from redpp_serve.graph.passes import fold_batch_norm, fuse_epilogues, in_precision, precision_dtype
from redpp_serve.graph.sizes import resized
from redpp_serve.runtime.candidates import Candidate, candidates, signature, with_kernels
from redpp_serve.runtime.fused_layer import fused_layers

_Bucket = TypeVar("_Bucket")  # whatever tells the programs apart


@dataclass(frozen=True)
class PlanContext:
    """A network on the device that serves it: everything that the choice of its kernels depends on.

    Attributes:
        graph: the result of `serving_graph`.
        device: where the graph's tensors are.
        precision: the precision that the graph is in.
        inputs: the result of `layer_inputs`.
        find: finds the kernels that can run a layer.
    """

    graph: Graph
    device: torch.device
    precision: str
    inputs: Mapping[str, tuple[int, ...]]
    find: Callable[[Graph, Node, tuple[int, ...], torch.device, torch.dtype], list[Candidate]] = candidates

    @classmethod
    def prepare(cls, graph: Graph, device: torch.device, precision: str = "fp32") -> PlanContext:
        """Make a stored graph ready for a device.

        Raises:
            RedppError: the network does not run in this precision.
        """
        graph = serving_graph(graph, device, precision)
        return cls(graph, device, precision, layer_inputs(graph, device, precision))

    def at(self, sizes: Mapping[str, int]) -> PlanContext:
        """Return the same network with inputs of other sizes, by symbol."""
        inputs = tuple(resized(spec, sizes) for spec in self.graph.inputs)
        if inputs == self.graph.inputs:
            return self
        graph = replace(self.graph, inputs=inputs)
        return replace(self, graph=graph, inputs=layer_inputs(graph, self.device, self.precision))

    def x_shape(self, node: Node, batch: int) -> tuple[int, ...]:
        """Return the shape of a fused layer's input."""
        first, *rest = self.inputs[node.name]
        return (first * batch, *rest)

    def candidates(self, node: Node, batch: int) -> list[Candidate]:
        """Return the kernels that can run a fused layer; the dense one comes first."""
        return self.find(self.graph, node, self.x_shape(node, batch), self.device, precision_dtype(self.precision))

    def signature(self, node: Node, batch: int) -> str:
        """Return `candidates.signature` of a fused layer."""
        return signature(self.graph, node, self.x_shape(node, batch), precision_dtype(self.precision))


_PAIRS = ("aten.view_as_complex.default",)  # it takes pairs that lie side by side alone
# On the CPU torch's kernel for channels-last loses digits where means are large.
_GROUP_NORMS = ("aten.group_norm.default", "aten.native_group_norm.default")


def serving_graph(graph: Graph, device: torch.device, precision: str = "fp32") -> Graph:
    """Fold batch norms, fuse epilogues, cast to a precision and move to a device, with images channels-last.

    Raises:
        RedppError: the graph cannot be cast to the precision.
    """
    graph = in_precision(fuse_epilogues(fold_batch_norm(graph)), precision)
    graph = _row_by_row(graph, _PAIRS if device.type != "cpu" else (*_PAIRS, *_GROUP_NORMS))
    return graph.with_tensors({name: channels_last(tensor.to(device)) for name, tensor in graph.tensors.items()})


def _row_by_row(graph: Graph, ops: Sequence[str]) -> Graph:
    """Lay out what these operators read row by row."""
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op in ops:
            plain = Node(f"{node.name}.plain", "aten.contiguous.default", node.args[:1])
            nodes += [plain, node.with_arguments({0: Ref(plain.name)})]
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def layer_inputs(graph: Graph, device: torch.device, precision: str = "fp32") -> dict[str, tuple[int, ...]]:
    """Find the shape of each fused layer's input at batch size 1 in a run on zeros; keys are names of nodes.

    Raises:
        RedppError: the network does not run in this precision.
    """
    try:
        shapes = {i.name: (1, *i.shape) for i in graph.inputs} | value_shapes(graph, str(device))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        whole = precision in ("fp32", "tf32")
        raise RedppError(
            f"the network does not run in {precision} on {device}: {(str(error).splitlines() or ['?'])[0][:200]}",
            "a network that redpp-serve packaged" if whole else f"a network whose every operator takes {precision}",
            "package the model again" if whole else "serve it with precision fp32 (or tf32 on a GPU)",
        ) from error
    return {layer.node.name: shapes[layer.x.name] for layer in fused_layers(graph)}


def planned_programs(
    context: PlanContext, buckets: Sequence[_Bucket], kernel: Callable[[str, _Bucket], str]
) -> dict[_Bucket, Program]:
    """Build a program for each bucket; equal ones are one program, and each form of a weight exists once.

    Args:
        context: the network.
        buckets: the buckets, such as batch sizes.
        kernel: returns the kernel that runs a layer (by its node's name) in a bucket, as `Plan.kernel` does.
    """
    made: dict[tuple[str, str], Candidate] = {}
    forms: dict[str, Tensor] = {}
    programs: dict[tuple[str, ...], Program] = {}
    found = {}
    for bucket in buckets:
        chosen = {name: kernel(name, bucket) for name in context.inputs}
        for name, wanted in chosen.items():
            if (name, wanted) not in made:
                options = context.candidates(context.graph.node(name), 1)
                made[name, wanted] = _once(next(c for c in options if c.kernel == wanted), forms)
        key = tuple(chosen.values())
        if key not in programs:
            choice = {name: made[name, wanted] for name, wanted in chosen.items()}
            programs[key] = Program(with_kernels(context.graph, choice)).eval()
        found[bucket] = programs[key]
    return found


def serving_program(graph: Graph, device: torch.device) -> Program:
    """Build one program of a stored graph with the dense kernels, in its own precision, without timing anything."""
    return dense_program(PlanContext.prepare(graph, device))


def dense_program(context: PlanContext) -> Program:
    """Build one program of a network with the dense kernels."""
    return planned_programs(context, (1,), lambda name, batch: "dense")[1]


def batch_buckets(batch_size: int) -> list[int]:
    """Return the batch sizes to be ready for: the largest, and the powers of two below it."""
    return sorted({2**k for k in range(batch_size.bit_length()) if 2**k < batch_size} | {batch_size})


def bucket_for(buckets: Sequence[int], rows: int) -> int:
    """Return the smallest of the ascending buckets that holds that many rows, or the largest if none does."""
    return next((bucket for bucket in buckets if bucket >= rows), buckets[-1])


def chunks(rows: int, largest: int) -> Iterator[slice]:
    """Yield consecutive ranges of at most ``largest`` rows; one empty range for no rows."""
    for start in range(0, max(1, rows), largest):
        yield slice(start, min(rows, start + largest))


def channels_last(tensor: Tensor) -> Tensor:
    """Lay images out channels-last; return other tensors as they are."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _once(candidate: Candidate, forms: dict[str, Tensor]) -> Candidate:
    """Make a candidate's node and tensors now, sharing any form that another kernel of the layer has made."""
    node, tensors = candidate.make()
    shared = {name: forms.setdefault(name, tensor) for name, tensor in tensors.items()}
    return Candidate(candidate.kernel, candidate.worth_timing, candidate.reason, lambda: (node, shared))
