"""A fused layer as the call of one kernel: the node, and the weight in the form that the kernel reads."""

from __future__ import annotations

from torch import Tensor

from .. import kernels
from .graph import Node, Ref
from .layers import FusedLayer
from .splitting import split_weight
from .weights import pack_values, repeats

Form = tuple[Node, dict[str, Tensor]]  # the node, and by name what it reads beside its input and its summand


def plain(layer: FusedLayer) -> Form:
    """The library's call with a separate epilogue: the node as it is."""
    return layer.node, _stored(layer)


def cudnn(layer: FusedLayer) -> Form:
    """cuDNN's convolution with bias, ReLU and, if there is one, the summand."""
    window = *layer.geometry, layer.groups
    if layer.other is None:
        call = "cudnn.conv2d_relu", (layer.x, layer.weight, layer.bias, *window)
    else:
        call = "cudnn.conv2d_add_relu", (layer.x, layer.weight, layer.other, 1.0, layer.bias, *window)
    return Node(layer.node.name, *call), _stored(layer)


def fused(layer: FusedLayer) -> Form:
    """`kernels.fused_conv2d` or `kernels.fused_linear`."""
    n_out = layer.values.shape[0]
    args = layer.x, layer.weight, layer.bias, layer.other, None, n_out, layer.activation
    if layer.is_conv:
        return Node(layer.node.name, "redpp.fused_conv2d", (*args, *layer.geometry)), _stored(layer)
    return Node(layer.node.name, "redpp.fused_linear", args), _stored(layer)


def depthwise(layer: FusedLayer) -> Form:
    """`kernels.depthwise_conv2d`; for a layer without a summand."""
    args = layer.x, layer.weight, layer.bias, layer.activation, *layer.geometry
    return Node(layer.node.name, "redpp.depthwise_conv2d", args), _stored(layer)


def codebook(layer: FusedLayer, decode: str) -> Form:
    """`kernels.codebook_linear`; for a weight of at most 16 distinct values."""
    values = repeats(layer.values).values
    assert values is not None
    indices, book = f"{layer.node.name}.indices", f"{layer.node.name}.codebook"
    refs = Ref(indices), Ref(book), layer.bias
    if layer.other is None:
        call = "redpp.codebook_linear", (layer.x, *refs, layer.activation, decode)
    else:
        call = "redpp.codebook_linear_then", (layer.x, layer.other, *refs, decode, layer.activation)
    tensors = {indices: kernels.pack_indices(pack_values(layer.values, values)), book: values}
    return Node(layer.node.name, *call), tensors | layer.stored_bias()


def split(layer: FusedLayer) -> Form:
    """`kernels.split_conv2d` or `kernels.split_linear`."""
    parts = split_weight(layer.values, layer.groups)
    unique = parts.kernels if layer.is_conv else parts.kernels.view(-1)
    tensors = dict(zip((f"{layer.node.name}.split_{part}" for part in ("kernels", "channel", "index", "sign")),
                       (unique.contiguous(), parts.channel, parts.index.contiguous(), parts.sign.contiguous())))  # fmt: skip
    args = layer.x, layer.other, *map(Ref, tensors), layer.bias
    if layer.is_conv:
        call = "redpp.split_conv2d_then", (*args, *layer.geometry, layer.groups, layer.activation)
    else:
        call = "redpp.split_linear_then", (*args, layer.activation)
    return Node(layer.node.name, *call), tensors | layer.stored_bias()


def _stored(layer: FusedLayer) -> dict[str, Tensor]:
    return {layer.weight.name: layer.values} | layer.stored_bias()
