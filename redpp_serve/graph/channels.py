"""Inner channels: those that one layer alone produces and whose every reader is known, so that they may go.

The walk follows a layer's output through operators that treat each channel by itself, up to the layers that sum
over the channels. Whatever else it meets (a residual add, a concat, an output) closes the channels, with a reason.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..runtime.batch_norm import is_inference_norm
from ..runtime.graph import Graph, Node, Ref
from ..runtime.program import value_shapes
from .layers import Layer, find_layers

ELEMENTWISE = frozenset(
    f"aten.{op}.default"
    for op in ("relu", "relu6", "hardtanh", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu",
               "elu", "selu", "mish", "softplus", "clone", "contiguous")
)  # fmt: skip
POOLING = frozenset(f"aten.{op}.default" for op in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"))
FLATTENING = frozenset({"aten.flatten.using_ints", "aten.reshape.default"})
_REASONS = {
    "aten.add.Tensor": "joins a residual stream",
    "aten.cat.default": "is concatenated with other channels",
    "aten.mul.Tensor": "is multiplied with another stream",
    "aten.layer_norm.default": "is normalised across channels",
    "aten.group_norm.default": "is normalised across channels",
}


@dataclass(frozen=True)
class InnerChannels:
    """A set of channels with one producer and known consumers.

    ``per_channel`` names the tensors whose dimension 0 is the channel (the producer's weight and bias, batch norms,
    depthwise weights). ``consumers`` read ``value``s; each channel owns ``columns`` consecutive columns of a
    consumer's weight (1, or H * W behind a flatten).
    """

    producer: Layer
    depthwise: tuple[Layer, ...]
    per_channel: tuple[str, ...]
    consumers: tuple[tuple[Layer, int], ...]

    @property
    def channels(self) -> int:
        return self.producer.shape[0]


def find_inner_channels(graph: Graph, exclude: Sequence[str] = ()) -> tuple[list[InnerChannels], dict[str, str]]:
    """All inner channels in order of execution, and for each other layer the reason why its outputs stay.

    Args:
        graph: a captured network.
        exclude: shell patterns of layer names that must not change.
    """
    layers = {layer.node.name: layer for layer in find_layers(graph)}
    users, shapes = graph.users(), value_shapes(graph)
    found, closed = [], {}
    for layer in layers.values():
        try:
            inner = _walk(graph, layer, layers, users, shapes)
            touched = (inner.producer, *inner.depthwise, *(c for c, _ in inner.consumers))
            for other in touched:
                if excluded(other, exclude):
                    raise _Closed("excluded" if other is layer else f"its reader {other.name} is excluded")
            found.append(inner)
        except _Closed as reason:
            closed[layer.name] = str(reason)
    return found, closed


def excluded(layer: Layer, patterns: Sequence[str]) -> bool:
    """Whether a shell pattern names the layer."""
    return any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns)


def unmatched(graph: Graph, patterns: Sequence[str]) -> list[str]:
    """A line for each pattern that names no layer."""
    names = [layer.name for layer in find_layers(graph)]
    return [f"--exclude {p} names no layer" for p in patterns if not fnmatch.filter(names, p)]


class _Closed(Exception):
    """Why a walk ended: these channels are left alone."""


def _walk(
    graph: Graph,
    start: Layer,
    layers: dict[str, Layer],
    users: dict[str, list[Node]],
    shapes: dict[str, tuple[int, ...]],
) -> InnerChannels:
    if start.groups != 1:
        depthwise = start.groups == start.shape[0]
        raise _Closed("depthwise: its channels are those of its input" if depthwise else "grouped convolution")
    per_channel = [start.weight, *([start.bias] if start.bias else [])]
    depthwise, consumers = [], []
    pending = [(start.node.name, 1)]  # (value, columns that one channel owns in it)
    while pending:
        value, columns = pending.pop(0)
        if value in graph.outputs:
            raise _Closed("is an output of the network")
        if not users.get(value):
            raise _Closed("is not read")
        for node in users[value]:
            layer = layers.get(node.name) if node.args[0] == Ref(value) else None
            dims = len(shapes[value])
            axis = 1 if start.is_conv else dims - 1
            if layer and axis != (1 if layer.is_conv else dims - 1):
                raise _Closed(f"is read by {layer.name} along another axis")
            if layer and layer.groups == 1:
                consumers.append((layer, columns))
            elif layer and layer.groups == layer.shape[0] == start.shape[0]:
                depthwise.append(layer)
                per_channel += [layer.weight, *([layer.bias] if layer.bias else [])]
                pending.append((node.name, 1))
            else:
                second = axis == 1 and columns == 1
                spread = math.prod(shapes[value][2:])
                if second and _flattens(node, value, shapes):
                    pending.append((node.name, spread))
                    continue
                per_channel += _channelwise_tensors(graph, node, value, second, dims, users)
                pending.append((node.name, columns))
    return InnerChannels(start, tuple(depthwise), tuple(per_channel), tuple(consumers))


def _flattens(node: Node, value: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a node puts everything but the batch into one dimension, a channel's values side by side.

    Capture has run the graph at several batch sizes, so a reshape that ends in (1, everything) keeps the batch.
    """
    flat = (1, math.prod(shapes[value][1:]))
    return node.args[0] == Ref(value) and node.op in FLATTENING and len(shapes[value]) > 2 and shapes.get(node.name) == flat


def _channelwise_tensors(
    graph: Graph, node: Node, value: str, second: bool, dims: int, users: dict[str, list[Node]]
) -> list[str]:
    """The per-channel tensors of a node that treats each channel by itself; raises `_Closed` for any other node.

    ``second`` says whether dimension 1 of the ``dims`` of the value is the channel.
    """
    if node.args[0] == Ref(value):
        if node.op in ELEMENTWISE:
            return []
        if is_inference_norm(node) and second:
            names = [ref.name for ref in node.args[1:5] if ref]
            if any(name not in graph.tensors or len(users[name]) > 1 for name in names):
                raise _Closed("its batch norm is shared or computed")
            return names
        spatial = second and dims == 4
        if spatial and node.op in POOLING:
            return []
        if spatial and node.op == "aten.mean.dim" and sorted(d % 4 for d in node.args[1]) == [2, 3]:
            return []
    layer = node.args[1].name.removesuffix(".weight") if node.op.startswith("aten.conv") else node.name
    if node.op == "aten.conv2d.default":
        raise _Closed(f"is read by a grouped convolution ({layer})")
    raise _Closed(_REASONS.get(node.op, f"is read by {node.op.split('.')[1]} ({layer}), whose coupling is not known"))
