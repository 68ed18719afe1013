"""oneDNN's convolution on the CPU: the weight packed once, and the part of an epilogue that it can take.

The calls that torch.compile makes when it freezes a network (torch/_inductor/fx_passes/mkldnn_fusion.py), made here
at load, without a compiler on the server.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .graph import Node, Ref
from .layer_ops import ONEDNN_CONV2D, ONEDNN_CONV2D_ADD, ONEDNN_CONV2D_THEN
from .layers import FusedLayer

# what oneDNN calls an activation: attribute, scalars, algorithm
_ATTRIBUTES: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "hardsigmoid": ("hardsigmoid", [], ""),
}
_AFTER_SUM = {"none": None, "relu": "relu"}


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of torch, on this processor, has oneDNN and its fused convolution in that precision."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
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
        call = ONEDNN_CONV2D, (layer.x, *weights, *window, *_ATTRIBUTES[layer.activation])
    elif layer.other is not None and layer.activation in _AFTER_SUM:
        after = _AFTER_SUM[layer.activation]
        call = ONEDNN_CONV2D_ADD, (layer.x, layer.other, *weights, *window, "add", None, after, [], None)
    else:
        call = ONEDNN_CONV2D_THEN, (layer.x, layer.other, *weights, *layer.geometry, layer.groups, layer.activation)
    return Node(layer.node.name, *call), {name: packed}
