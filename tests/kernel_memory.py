"""Buffers that show what a kernel reads or writes outside of its tensors, and tensors too large for real memory."""

import math
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

_GUARD = 256  # elements on either side


def surrounded(tensor: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A copy with the same strides amid NaN (integers: their largest value), and whether that is still there."""
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
    fill = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((span + 2 * _GUARD,), fill, dtype=tensor.dtype)
    inner = buffer.as_strided(tensor.shape, tensor.stride(), _GUARD).copy_(tensor)

    def intact() -> bool:
        around = torch.cat([buffer[:_GUARD], buffer[_GUARD + span :]])
        return bool((around.isnan() if tensor.is_floating_point() else around == fill).all())

    return inner, intact


def far_memory(shape: tuple[int, ...]) -> Tensor:
    """Zeros in fp16 that are reserved, not backed by memory: only pages that are touched take any."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # NORESERVE
    return torch.frombuffer(mmap.mmap(-1, 2 * math.prod(shape), flags=flags), dtype=torch.float16).view(shape)
