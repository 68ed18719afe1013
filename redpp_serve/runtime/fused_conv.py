"""oneDNN's convolution with its epilogue, as an operator that only loading puts into a graph, never a file."""

from __future__ import annotations

import torch
from torch import Tensor


def available() -> bool:
    """Whether this build of torch has oneDNN and its fused convolution."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def fused_conv2d(
    x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, activation: str, scalars: list[float],
) -> Tensor:  # fmt: skip
    """``activation(conv2d(x, weight) + bias + other)``, (N, n_in, H, W) to (N, n_out, H', W'), float32 on the CPU."""
    call = torch.ops.mkldnn._convolution_pointwise
    if other is None:
        return call.default(x, weight, bias, padding, stride, dilation, groups, activation, scalars, "")
    after = None if activation == "none" else activation
    return call.binary(x, other, weight, bias, padding, stride, dilation, groups, "add", None, after, scalars, None)
