"""The layers that carry the weights: 2-D convolutions and Linear, with their attributes and their cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from redpp_serve.graph.executor import value_shapes
from redpp_serve.graph.graph import Graph, Node, Ref, conv2d_geometry, once_per_graph

CONV, LINEAR = "aten.conv2d.default", "aten.linear.default"


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or Linear whose weight is a parameter of the network.

    Attributes:
        name: the weight's name without its ending.
        node: the call.
        weight: the name of its weight, (n_out, n_in / groups, kh, kw) or (n_out, n_in).
        bias: the name of its bias (n_out,), or None.
        shape: the weight's shape.
        stride: vertical and horizontal; like padding, dilation and groups that of a 1 x 1 convolution for a Linear.
        padding: vertical and horizontal.
        dilation: vertical and horizontal.
        groups: the number of groups.
        positions: output positions for one input: H * W, or the product of a Linear's extra dimensions.
    """

    name: str
    node: Node
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    positions: int

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution, not a Linear."""
        return self.node.op == CONV

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input, dense."""
        return self.positions * math.prod(self.shape)


def find_layers(graph: Graph) -> list[Layer]:
    """List all layers in order of execution; one whose weight or bias is computed or shared by two calls is none."""
    return list(_layers(graph))


def layer_calls(graph: Graph) -> list[Node]:
    """List the calls that `find_layers` describes; that needs no shapes of values."""
    users, calls = graph.users(), []
    for node in graph.nodes:
        if node.op not in (CONV, LINEAR) or not isinstance(node.args[1], Ref):
            continue
        bias = node.argument(2)
        stored = (node.args[1].name, bias.name if isinstance(bias, Ref) else None)
        if all(name in graph.tensors and len(users[name]) == 1 for name in stored if name):
            calls.append(node)
    return calls


@once_per_graph
def _layers(graph: Graph) -> list[Layer]:
    shapes = value_shapes(graph)
    layers = []
    for node in layer_calls(graph):
        weight, bias = node.args[1].name, node.argument(2)
        bias = bias.name if isinstance(bias, Ref) else None
        shape, out = tuple(graph.tensors[weight].shape), shapes[node.name]
        conv = node.op == CONV
        geometry = conv2d_geometry(node) if conv else ((1, 1), (0, 0), (1, 1), 1)
        positions = math.prod(out[2:] if conv else out[1:-1])
        layers.append(Layer(weight.removesuffix(".weight"), node, weight, bias, shape, *geometry, positions))
    return layers


def parameter_count(graph: Graph) -> int:
    """Count the floating-point values that the graph holds."""
    return sum(t.numel() for t in graph.tensors.values() if t.is_floating_point())


def mac_count(graph: Graph) -> int:
    """Count the multiply-accumulates of all layers for one input."""
    return sum(layer.macs for layer in find_layers(graph))
