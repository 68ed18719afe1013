"""Buffers that show what a kernel reads or writes outside of its tensors, and tensors too large for real memory."""

import ctypes
import math
import mmap
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.support.interpreting import poisoned

_GUARD = 256  # elements on either side


def surrounded(tensor: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """Copy a tensor, with its strides, amid NaN (integers: their largest value); return it and a check of those."""
    span = (
        1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    )
    fill = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((span + 2 * _GUARD,), fill, dtype=tensor.dtype, device=tensor.device)
    inner = buffer.as_strided(tensor.shape, tensor.stride(), _GUARD)
    once = tuple(slice(0, 1 if step == 0 else None) for step in tensor.stride())  # of an expanded tensor
    inner[once].copy_(tensor[once])

    def intact() -> bool:
        around = torch.cat([buffer[:_GUARD], buffer[_GUARD + span :]])
        return bool((around.isnan() if tensor.is_floating_point() else around == fill).all())

    return inner, intact


def run_guarded(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function with NaN around every tensor that goes in and around every one that it allocates on a device.

    What is allocated is NaN until it is written.

    Raises:
        AssertionError: something around a tensor changed.
    """
    guards: list[Callable[[], bool]] = []
    empty = torch.empty

    def guarded(tensor: Tensor) -> Tensor:
        inner, intact = surrounded(tensor)
        guards.append(intact)
        return inner

    def guarded_empty(*args: Any, **options: Any) -> Tensor:
        return guarded(empty(*args, **options)) if options.get("device") is not None else empty(*args, **options)

    inputs = [guarded(value) if isinstance(value, Tensor) else value for value in arguments]
    with poisoned(), patch.object(torch, "empty", guarded_empty):
        found = function(*inputs)
    assert all(intact() for intact in guards), "written outside of a tensor"
    return found


def far_memory(shape: tuple[int, ...]) -> Tensor:
    """Reserve zeros in fp16 that are not backed by memory: only pages that are touched take any."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # NORESERVE
    return torch.frombuffer(mmap.mmap(-1, 2 * math.prod(shape), flags=flags), dtype=torch.float16).view(shape)


def at_page_end(tensor: Tensor) -> Tensor:
    """Copy a contiguous (or channels_last) tensor so that its last byte lies before memory that nobody may read.

    A load beyond it, even of values that are then dropped, ends the process.
    """
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return (
            at_page_end(tensor.permute(0, 2, 3, 1).flatten())
            .view(*(tensor.shape[k] for k in (0, 2, 3, 1)))
            .permute(0, 3, 1, 2)
        )
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    pages = -(-size // page) * page
    buffer = mmap.mmap(-1, pages + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + pages), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    bytes_there = torch.frombuffer(buffer, dtype=torch.uint8, count=size, offset=pages - size)
    return bytes_there.view(tensor.dtype).view(tensor.shape).copy_(tensor)
