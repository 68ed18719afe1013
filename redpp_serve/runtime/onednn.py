"""oneDNN's convolution and Linear on the CPU: the weight packed once, and the part of an epilogue that it can take.

The calls that torch.compile makes when it freezes a network (torch/_inductor/fx_passes/mkldnn_fusion.py), made here
at load, without a compiler on the server.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .graph import Node, Ref
from .layers import FusedLayer

# what oneDNN calls an activation: attribute, scalars, algorithm
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
    """Whether this build of torch, on this processor, has oneDNN and its fused convolution in that precision."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def onednn_conv2d(layer: FusedLayer, x_shape: tuple[int, ...]) -> tuple[Node, dict[str, Tensor]]:
    """The node that calls oneDNN for a layer, and the packed weight that it reads.

    Args:
        x_shape: (N, n_in, H, W) of the inputs to lay the weight out for; others are served as well, a little slower.
    """
    name = f"{layer.node.name}.packed"
    pack = torch.ops.mkldnn._reorder_convolution_weight
    packed = pack(layer.values.contiguous(), layer.padding, layer.stride, layer.dilation, layer.groups, list(x_shape))
    weights: tuple[Any, ...] = (Ref(name), layer.bias)
    window = layer.padding, layer.stride, layer.dilation, layer.groups
    if layer.other is None and layer.activation in _ATTRIBUTES:
        call = "onednn.conv2d", (layer.x, *weights, *window, *_ATTRIBUTES[layer.activation])
    elif layer.other is not None and layer.activation in _AFTER_SUM:
        after = _AFTER_SUM[layer.activation]
        call = "onednn.conv2d_add", (layer.x, layer.other, *weights, *window, "add", None, after, [], None)
    else:
        call = "onednn.conv2d_then", (layer.x, layer.other, *weights, *layer.geometry, layer.groups, layer.activation)
    return Node(layer.node.name, *call), {name: packed} | layer.stored_bias()


def onednn_linear(layer: FusedLayer) -> tuple[Node, dict[str, Tensor]]:
    """The node that calls oneDNN for a Linear, and the packed weight that it reads; for any number of rows."""
    name = f"{layer.node.name}.packed"
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.values.contiguous())
    weights: tuple[Any, ...] = (Ref(name), layer.bias)
    if layer.other is None and layer.activation in _ATTRIBUTES:
        call = "onednn.linear", (layer.x, *weights, *_ATTRIBUTES[layer.activation])
    else:
        call = "onednn.linear_then", (layer.x, layer.other, *weights, layer.activation)
    return Node(layer.node.name, *call), {name: packed} | layer.stored_bias()
