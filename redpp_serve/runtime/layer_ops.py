"""The operators that loading puts into a graph, never a file: layers with their epilogue, and the kernels for them.

``fused.conv2d`` and ``fused.linear`` say in plain PyTorch what a layer computes; every other operator here computes
the same for some device, and `candidates` says where each may stand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels  # noqa: F401 - defines torch.ops.redpp
from ..kernels.epilogue import ACTIVATIONS

FUSED_CONV2D, FUSED_LINEAR = "fused.conv2d", "fused.linear"


def fused_conv2d(
    x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int, activation: str,
) -> Tensor:  # fmt: skip
    """``activation(conv2d(x, weight) + bias + other)``, (N, n_in, H, W) to (N, n_out, H', W')."""
    return _finish(F.conv2d(x, weight, bias, stride, padding, dilation, groups), other, activation)


def fused_linear(x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(x W^T + bias + other)``, (..., n_in) to (..., n_out)."""
    return _finish(F.linear(x, weight, bias), other, activation)


def resolve_layer_op(op: str) -> Callable[..., Any] | None:
    """The callable behind one of these names; None for any other name."""
    if op in _PLAIN:
        return _PLAIN[op]
    if op not in _LIBRARY:
        return None
    family, name, overload = _LIBRARY[op]
    return getattr(getattr(getattr(torch.ops, family), name), overload)


def _finish(y: Tensor, other: Tensor | None, activation: str) -> Tensor:
    """The epilogue of a result that nobody else holds: in place where torch can."""
    y = y if other is None else y.add_(other)
    return _IN_PLACE.get(activation, ACTIVATIONS[activation])(y)


def _onednn_conv2d_then(
    x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int], groups: int, activation: str,
) -> Tensor:  # fmt: skip
    """As `fused_conv2d` with a packed weight: the sum inside oneDNN's convolution, the activation after it."""
    call = torch.ops.mkldnn._convolution_pointwise
    if other is None:
        y = call.default(x, weight, bias, padding, stride, dilation, groups, "none", [], "")
    else:
        y = call.binary(x, other, weight, bias, padding, stride, dilation, groups, "add", None, None, [], None)
    return _finish(y, None, activation)


def _onednn_linear_then(
    x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """As `fused_linear` with a packed weight: the sum inside oneDNN's product, the activation after it."""
    call = torch.ops.mkldnn._linear_pointwise
    if other is None:
        return _finish(call.default(x, weight, bias, "none", [], ""), None, activation)
    return _finish(call.binary(x, other, weight, bias, "add"), None, activation)


def _codebook_linear_then(
    x: Tensor, other: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, decode: str, activation: str
) -> Tensor:
    """`kernels.codebook_linear` with a summand."""
    return _finish(torch.ops.redpp.codebook_linear(x, indices, codebook, bias, "none", decode), other, activation)


def _split_conv2d_then(
    x: Tensor, other: Tensor | None, kernels: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None,
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int, activation: str,
) -> Tensor:  # fmt: skip
    """`kernels.split_conv2d` with an epilogue."""
    call = torch.ops.redpp.split_conv2d
    return _finish(call(x, kernels, channel, index, sign, bias, stride, padding, dilation, groups), other, activation)


def _split_linear_then(
    x: Tensor, other: Tensor | None, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    """`kernels.split_linear` with an epilogue."""
    return _finish(torch.ops.redpp.split_linear(x, values, channel, index, sign, bias), other, activation)


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": partial(F.hardtanh_, min_val=0.0, max_val=6.0),
    "silu": partial(F.silu, inplace=True),
    "sigmoid": torch.sigmoid_,
    "hardswish": partial(F.hardswish, inplace=True),
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
}
_PLAIN: dict[str, Callable[..., Any]] = {
    FUSED_CONV2D: fused_conv2d,
    FUSED_LINEAR: fused_linear,
    "onednn.conv2d_then": _onednn_conv2d_then,
    "onednn.linear_then": _onednn_linear_then,
    "redpp.codebook_linear_then": _codebook_linear_then,
    "redpp.split_conv2d_then": _split_conv2d_then,
    "redpp.split_linear_then": _split_linear_then,
}
# operators that are called as they are: namespace, name and overload in torch.ops
_LIBRARY = {
    "onednn.conv2d": ("mkldnn", "_convolution_pointwise", "default"),
    "onednn.conv2d_add": ("mkldnn", "_convolution_pointwise", "binary"),
    "onednn.linear": ("mkldnn", "_linear_pointwise", "default"),
    "cudnn.conv2d_relu": ("aten", "cudnn_convolution_relu", "default"),
    "cudnn.conv2d_add_relu": ("aten", "cudnn_convolution_add_relu", "default"),
    "redpp.fused_conv2d": ("redpp", "fused_conv2d", "default"),
    "redpp.fused_linear": ("redpp", "fused_linear", "default"),
    "redpp.depthwise_conv2d": ("redpp", "depthwise_conv2d", "default"),
    "redpp.codebook_linear": ("redpp", "codebook_linear", "default"),
}
