"""Batch norm in inference is an affine map for each channel; here it is read, and folded when a graph is to run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .graph import Graph, Node, Ref
from .program import value_shapes

BATCH_NORM = "aten.batch_norm.default"
CONV, LINEAR = "aten.conv2d.default", "aten.linear.default"


def is_inference_norm(node: Node) -> bool:
    """Whether a node is a batch norm that normalises by stored statistics, not by those of the batch."""
    return node.op == BATCH_NORM and node.args[3] is not None and node.args[5] is False


def scale_and_shift(graph: Graph, norm: Node) -> tuple[Tensor, Tensor]:
    """The float64 (channels,) scale and shift that an inference batch norm applies to its input."""
    weight, bias, mean, variance = (graph.tensors[ref.name].double() if ref else None for ref in norm.args[1:5])
    assert mean is not None and variance is not None  # `is_inference_norm`
    scale = torch.rsqrt(variance + norm.args[7])
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def fold_batch_norm(graph: Graph) -> Graph:
    """The same function with each batch norm that alone reads a convolution or Linear folded into it.

    Done when a graph is loaded to run, never before hashing or merging: folding scales each output channel by
    its own factor, which destroys equality between channels and between a layer's weights.
    """
    tensors, changed, dropped = dict(graph.tensors), {}, set()
    for source, norm in _foldable(graph):
        weight = tensors[source.args[1].name]
        scale, shift = scale_and_shift(graph, norm)
        bias = source.args[2] if len(source.args) > 2 else None
        if bias is not None:
            shift = shift + tensors[bias.name].double() * scale
        folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        stem = source.args[1].name.removesuffix(".weight")
        if f"{stem}.folded.weight" in tensors:  # two layers share a weight, and each has a norm of its own
            stem = f"{stem}.{source.name}"
        names = f"{stem}.folded.weight", f"{stem}.folded.bias"
        tensors.update(zip(names, (folded.to(weight.dtype), shift.to(weight.dtype))))
        args = (source.args[0], Ref(names[0]), Ref(names[1]), *source.args[3:])
        changed[norm.name] = Node(norm.name, source.op, args, source.kwargs)
        dropped.add(source.name)
    nodes = tuple(changed.get(node.name, node) for node in graph.nodes if node.name not in dropped)
    return replace(graph, tensors=tensors, nodes=nodes).pruned_of_unused()


def _foldable(graph: Graph) -> list[tuple[Node, Node]]:
    """Each convolution or Linear with the batch norm that alone reads it, where all their parameters are stored."""
    users, producers = graph.users(), {node.name: node for node in graph.nodes}
    pairs = []
    for norm in graph.nodes:
        source = producers.get(norm.args[0].name) if is_inference_norm(norm) else None
        if source is None or source.op not in (CONV, LINEAR):
            continue
        if len(users[source.name]) > 1 or source.name in graph.outputs:
            continue
        parameters = [ref.name for ref in (*source.args[1:3], *norm.args[1:5]) if isinstance(ref, Ref)]
        if all(name in graph.tensors for name in parameters):  # else computed, as by weight standardization
            pairs.append((source, norm))
    # Linear puts its features last, batch norm normalises axis 1: the same axis in matrices alone
    shapes = value_shapes(graph, "cpu") if any(source.op == LINEAR for source, _ in pairs) else {}
    return [(source, norm) for source, norm in pairs if source.op != LINEAR or len(shapes[source.name]) == 2]
