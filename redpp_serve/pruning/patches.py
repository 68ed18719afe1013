"""The patches that convolutions read, as the rows of a matrix: what a layer's output is linear in.

A transposed convolution is a convolution over its input with zeros between the positions, by the flipped kernel.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.graph.layers import Window


def patches(value: Tensor, window: Window, kernel: tuple[int, ...], picks: Tensor, transposed: bool = False) -> Tensor:
    """Return the patches behind some output positions, (samples, channels * taps), taps side by side.

    Args:
        value: the input, (N, channels, ...).
        window: how the convolution moves over it.
        kernel: the size of the kernel.
        picks: the output positions, numbered image by image and row by row, (samples,) int64.
        transposed: whether the convolution is a transposed one.
    """
    dims = len(kernel)
    if transposed:
        value, window = _with_zeros_between(value, window, kernel)
    else:
        value = F.pad(value, [n for n in reversed(window.padding) for _ in range(2)])
    for d, (size, step, dilation) in enumerate(zip(kernel, window.stride, window.dilation, strict=True)):
        value = value.unfold(2 + d, dilation * (size - 1) + 1, step)[..., ::dilation]
    places = value.shape[2 : 2 + dims]
    count = math.prod(places)
    rows = value.movedim(1, 1 + dims)[(picks // count, *torch.unravel_index(picks % count, places))]
    return (rows.flip(tuple(range(2, 2 + dims))) if transposed else rows).flatten(1)


def _with_zeros_between(value: Tensor, window: Window, kernel: tuple[int, ...]) -> tuple[Tensor, Window]:
    """Return the padded input and the window of the convolution that equals a transposed one."""
    sizes = [(n - 1) * step + 1 for n, step in zip(value.shape[2:], window.stride, strict=True)]
    wide = value.new_zeros(*value.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, step) for step in window.stride))] = value
    pads: list[int] = []
    for size, padding, dilation, more in zip(
        kernel, window.padding, window.dilation, window.output_padding, strict=True
    ):
        front = dilation * (size - 1) - padding
        pads = [front, front + more, *pads]
    return F.pad(wide, pads), replace(window, stride=(1,) * len(kernel))
