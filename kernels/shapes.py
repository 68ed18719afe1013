"""Sizes and memory layouts that the operators share: windows, results, precisions, and units of tiles."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def conv_output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Return the height and width that a convolution makes of a (height, width) input."""
    out_h, out_w = (
        (s + 2 * p - d * (k - 1) - 1) // st + 1
        for s, k, st, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return out_h, out_w


def pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return (vertical, horizontal) for one number that holds in both directions, or for such a pair."""
    return (value, value) if isinstance(value, int) else tuple(value)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which the references compute: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_contiguous(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Make an uninitialised contiguous result with the dtype and device of `like`."""
    return like.new_empty(tuple(shape))


def empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Make an uninitialised result (n, channels, h, w) whose channels are neighbours in memory."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def as_channels_last(computed: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `computed` to `dtype`, with the very strides of `empty_channels_last`."""
    computed = computed.to(dtype)
    result = empty_channels_last(computed, computed.shape)
    return computed if computed.stride() == result.stride() else result.copy_(computed)


def alignment(channels: int) -> int:
    """Return the largest power of two up to 16 that divides a number of channels: the width of loads and stores."""
    return min(16, channels & -channels) if channels else 16


def power_of_two(value: int, most: int) -> int:
    """Return the smallest power of two >= value, but at most `most` (itself a power of two)."""
    return min(most, 1 << max(0, value - 1).bit_length())


@cache
def processors(device: torch.device) -> int:
    """Return a device's number of multiprocessors; for a CPU, where the interpreter asks, that of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
