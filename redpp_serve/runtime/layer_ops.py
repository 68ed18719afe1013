"""The operators that loading puts into a graph, never a file: layers with their epilogue, and the kernels for them.

``fused.conv2d`` and ``fused.linear`` say in plain PyTorch what a layer computes; every other operator here computes
the same for some device, and `candidates` says where each may stand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels  # noqa: F401 - defines torch.ops.redpp
from ..kernels.epilogue import ACTIVATIONS

FUSED_CONV2D, FUSED_LINEAR = "fused.conv2d", "fused.linear"
ONEDNN_CONV2D, ONEDNN_CONV2D_ADD, ONEDNN_CONV2D_THEN = "onednn.conv2d", "onednn.conv2d_add", "onednn.conv2d_then"


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
    if op in _ONEDNN:
        return getattr(torch.ops.mkldnn._convolution_pointwise, _ONEDNN[op])
    return None


def _finish(y: Tensor, other: Tensor | None, activation: str) -> Tensor:
    y = y if other is None else y + other
    return y if activation == "none" else ACTIVATIONS[activation](y)


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


_PLAIN: dict[str, Callable[..., Any]] = {
    FUSED_CONV2D: fused_conv2d, FUSED_LINEAR: fused_linear, ONEDNN_CONV2D_THEN: _onednn_conv2d_then,
}  # fmt: skip
_ONEDNN = {ONEDNN_CONV2D: "default", ONEDNN_CONV2D_ADD: "binary"}  # overloads of torch.ops.mkldnn._convolution_pointwise
