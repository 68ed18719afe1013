"""A fused node of a graph with its stored tensors at hand: what `candidates` looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .graph import Graph, Node, Ref
from .layer_ops import FUSED_CONV2D, FUSED_LINEAR


@dataclass(frozen=True)
class FusedLayer:
    """A node ``fused.conv2d`` or ``fused.linear``.

    ``x``, ``other`` (the summand, or None), ``weight`` and ``bias`` are references; ``values`` (n_out, n_in) or
    (n_out, n_in / groups, kh, kw) is the stored weight, ``bias_values`` (n_out,) the stored bias. Of a Linear, the geometry is that of a 1 x 1 convolution.
    """

    node: Node
    x: Ref
    other: Ref | None
    weight: Ref
    bias: Ref | None
    activation: str
    values: Tensor
    bias_values: Tensor | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def name(self) -> str:
        """What the user calls the layer: the name of its weight, without what loading added."""
        return self.weight.name.removesuffix(".weight").removesuffix(".folded")

    @property
    def is_conv(self) -> bool:
        return self.node.op == FUSED_CONV2D

    @property
    def is_depthwise(self) -> bool:
        """One input and one output to each group."""
        return self.is_conv and self.values.shape[1] == 1 and self.values.shape[0] == self.groups > 1

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Stride, padding, dilation."""
        return self.stride, self.padding, self.dilation

    def stored_bias(self) -> dict[str, Tensor]:
        """The bias by its name, if there is one."""
        return {} if self.bias is None or self.bias_values is None else {self.bias.name: self.bias_values}

    def rows(self, x_shape: tuple[int, ...]) -> int:
        """Rows of the matrix product for an input of this shape: output positions of all images, or vectors."""
        shape = self.result_shape(x_shape)
        return math.prod(shape) // max(1, self.values.shape[0])

    def result_shape(self, x_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the layer's result for an input of this shape."""
        if not self.is_conv:
            return (*x_shape[:-1], self.values.shape[0])
        out = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in
               zip(x_shape[2:], self.values.shape[2:], *self.geometry)]  # fmt: skip
        return (x_shape[0], self.values.shape[0], *out)


def fused_layers(graph: Graph) -> list[FusedLayer]:
    """The layers of a fused graph that have a choice of kernels, in order of execution."""
    return [fused_layer(graph, node) for node in graph.nodes if node.op in (FUSED_CONV2D, FUSED_LINEAR)]


def fused_layer(graph: Graph, node: Node) -> FusedLayer:
    """The layer of a node that `fusion` made."""
    x, other, weight, bias, *rest = node.args
    geometry, activation = rest[:-1], rest[-1]
    stored = graph.tensors[weight.name], None if bias is None else graph.tensors[bias.name]
    return FusedLayer(node, x, other, weight, bias, activation, *stored, *geometry)

