"""A fused layer of a graph with its stored tensors, and its forms: the calls of kernels that can run it.

A form is a node, and the weight as that kernel reads it. The forms for oneDNN are the calls that torch.compile makes
when it freezes a network (torch/_inductor/fx_passes/mkldnn_fusion.py), made here at load, without a compiler on the
server: the weight is packed once, and oneDNN takes the part of the epilogue that it can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redpp_serve import kernels
from redpp_serve.graph.graph import Graph, Node, Ref
from redpp_serve.graph.operators import FUSED_CONV2D, FUSED_LINEAR
from redpp_serve.graph.weights import pack_values, repeats, split_weight
from redpp_serve.kernels.shapes import conv_output_size


@dataclass(frozen=True)
class FusedLayer:
    """A node ``fused.conv2d`` or ``fused.linear``; a linear layer has the geometry of a 1 x 1 convolution.

    Attributes:
        node: the node.
        x: the input.
        other: the summand, or None.
        weight: the stored weight.
        bias: the stored bias, or None.
        activation: a name of `kernels.epilogue.ACTIVATIONS`.
        values: the weight, (n_out, n_in) or (n_out, n_in / groups, kh, kw).
        bias_values: the bias (n_out,), or None.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        dilation: (vertical, horizontal).
        groups: groups of channels.
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
        """The name of the layer's weight, as the user knows it: without the suffixes that loading adds."""
        return self.weight.name.removesuffix(".weight").removesuffix(".folded")

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution."""
        return self.node.op == FUSED_CONV2D

    @property
    def is_depthwise(self) -> bool:
        """Whether each group has one input and one output."""
        return self.is_conv and self.values.shape[1] == 1 and self.values.shape[0] == self.groups > 1

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Stride, padding, dilation."""
        return self.stride, self.padding, self.dilation

    def stored_bias(self) -> dict[str, Tensor]:
        """Return the bias by its name, if there is one."""
        return {} if self.bias is None or self.bias_values is None else {self.bias.name: self.bias_values}

    def rows(self, x_shape: tuple[int, ...]) -> int:
        """Return the rows of the matrix product for an input: output positions of all images, or vectors."""
        shape = self.result_shape(x_shape)
        return math.prod(shape) // max(1, self.values.shape[0])

    def result_shape(self, x_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the layer's result for an input of a shape."""
        if not self.is_conv:
            return (*x_shape[:-1], self.values.shape[0])
        size = conv_output_size(x_shape[2:], self.values.shape[2:], *self.geometry)
        return (x_shape[0], self.values.shape[0], *size)


def fused_layers(graph: Graph) -> list[FusedLayer]:
    """Return the layers of a fused graph that have a choice of kernels, in order of execution."""
    return [fused_layer(graph, node) for node in graph.nodes if node.op in (FUSED_CONV2D, FUSED_LINEAR)]


def fused_layer(graph: Graph, node: Node) -> FusedLayer:
    """Return the layer of a node that `passes.fuse_epilogues` made."""
    x, other, weight, bias, *rest = node.args
    geometry, activation = rest[:-1], rest[-1]
    stored = graph.tensors[weight.name], None if bias is None else graph.tensors[bias.name]
    return FusedLayer(node, x, other, weight, bias, activation, *stored, *geometry)


Form = tuple[Node, dict[str, Tensor]]  # the node, and by name what it reads beside its input and its summand


def plain(layer: FusedLayer) -> Form:
    """Call the library, then the epilogue: the node as it is."""
    return layer.node, _stored(layer)


def cudnn(layer: FusedLayer) -> Form:
    """Call cuDNN's convolution with bias, ReLU and, if there is one, the summand."""
    window = *layer.geometry, layer.groups
    if layer.other is None:
        return _form(layer, "cudnn.conv2d_relu", (layer.x, layer.weight, layer.bias, *window), _stored(layer))
    args = layer.x, layer.weight, layer.other, 1.0, layer.bias, *window
    return _form(layer, "cudnn.conv2d_add_relu", args, _stored(layer))


def fused(layer: FusedLayer) -> Form:
    """Call `kernels.fused_conv2d` or `kernels.fused_linear`."""
    args = layer.x, layer.weight, layer.bias, layer.other, layer.activation
    if layer.is_conv:
        return _form(layer, "redpp.fused_conv2d", (*args, *layer.geometry), _stored(layer))
    return _form(layer, "redpp.fused_linear", args, _stored(layer))


def depthwise(layer: FusedLayer) -> Form:
    """Call `kernels.depthwise_conv2d`; for a layer without a summand."""
    args = layer.x, layer.weight, layer.bias, layer.activation, *layer.geometry
    return _form(layer, "redpp.depthwise_conv2d", args, _stored(layer))


def codebook(layer: FusedLayer, decode: str) -> Form:
    """Call `kernels.codebook_linear`; for a weight of at most 16 distinct values."""
    values = repeats(layer.values).values
    assert values is not None
    indices, book = f"{layer.node.name}.indices", f"{layer.node.name}.codebook"
    tensors = {indices: kernels.pack_indices(pack_values(layer.values, values)), book: values}
    refs = Ref(indices), Ref(book), layer.bias
    if layer.other is None:
        return _form(layer, "redpp.codebook_linear", (layer.x, *refs, layer.activation, decode), tensors)
    args = layer.x, layer.other, *refs, decode, layer.activation
    return _form(layer, "redpp.codebook_linear_then", args, tensors)


def split(layer: FusedLayer) -> Form:
    """Call `kernels.split_conv2d` or `kernels.split_linear`."""
    parts = split_weight(layer.values, layer.groups)
    unique = parts.kernels if layer.is_conv else parts.kernels.view(-1)
    forms = {"kernels": unique, "channel": parts.channel, "index": parts.index, "sign": parts.sign}
    tensors = {f"{layer.node.name}.split_{part}": tensor.contiguous() for part, tensor in forms.items()}
    args: tuple[Any, ...] = (layer.x, layer.other, *map(Ref, tensors), layer.bias)
    if layer.is_conv:
        args = (*args, *layer.geometry, layer.groups)
    op = "redpp.split_conv2d_then" if layer.is_conv else "redpp.split_linear_then"
    return _form(layer, op, (*args, layer.activation), tensors)


def _form(layer: FusedLayer, op: str, args: tuple[Any, ...], tensors: dict[str, Tensor]) -> Form:
    return Node(layer.node.name, op, args), tensors | layer.stored_bias()


def _stored(layer: FusedLayer) -> dict[str, Tensor]:
    return {layer.weight.name: layer.values} | layer.stored_bias()


# activation -> its attribute, scalars and algorithm in oneDNN
_ATTRIBUTES: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "hardsigmoid": ("hardsigmoid", [], ""),
    "sigmoid": ("sigmoid", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}
_AFTER_SUM = {"none": None, "relu": "relu"}


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether torch, on this processor, has oneDNN and its fused convolution in a precision."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def onednn_conv2d(layer: FusedLayer, x_shape: tuple[int, ...]) -> Form:
    """Call oneDNN's convolution with a packed weight.

    Args:
        layer: a convolution.
        x_shape: (N, n_in, H, W) of the inputs to lay the weight out for; others are served as well, a little slower.
    """
    name = f"{layer.node.name}.packed"
    pack = torch.ops.mkldnn._reorder_convolution_weight
    packed = pack(layer.values.contiguous(), layer.padding, layer.stride, layer.dilation, layer.groups, list(x_shape))
    refs, window = (Ref(name), layer.bias), (layer.padding, layer.stride, layer.dilation, layer.groups)
    if layer.other is None and layer.activation in _ATTRIBUTES:
        return _form(layer, "onednn.conv2d", (layer.x, *refs, *window, *_ATTRIBUTES[layer.activation]), {name: packed})
    if layer.other is not None and layer.activation in _AFTER_SUM:
        after = _AFTER_SUM[layer.activation]
        sum_args: tuple[Any, ...] = (layer.x, layer.other, *refs, *window, "add", None, after, [], None)
        return _form(layer, "onednn.conv2d_add", sum_args, {name: packed})
    rest = layer.x, layer.other, *refs, *layer.geometry, layer.groups, layer.activation
    return _form(layer, "onednn.conv2d_then", rest, {name: packed})


def onednn_linear(layer: FusedLayer) -> Form:
    """Call oneDNN's Linear with a packed weight, for any number of rows."""
    name = f"{layer.node.name}.packed"
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.values.contiguous())
    refs = Ref(name), layer.bias
    if layer.other is None and layer.activation in _ATTRIBUTES:
        return _form(layer, "onednn.linear", (layer.x, *refs, *_ATTRIBUTES[layer.activation]), {name: packed})
    return _form(layer, "onednn.linear_then", (layer.x, layer.other, *refs, layer.activation), {name: packed})
