"""What the dense convolutions share: their window, their memory format, and what they refuse."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .split_checks import FLOATS, check_steps
from .split_reference import conv_output_size

_INT32 = 1 << 31


def pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """One number for both directions, or (vertical, horizontal)."""
    return (value, value) if isinstance(value, int) else tuple(value)


def check_window(
    op: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Refuses an input, a weight and a window that make no output. Reads no values.

    Returns:
        Height and width of the output.

    Raises:
        ValueError: naming the argument, what it should be and what it is.
    """
    if x.dim() != 4 or x.dtype not in FLOATS:
        found = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"{op}: x must be (n, n_in, h, w) in fp32, fp16, bf16 or fp64, found {found}")
    if weight.dim() != 4 or min(weight.shape[2:]) <= 0:
        raise ValueError(f"{op}: weight must be (outputs, inputs, kh, kw), found {tuple(weight.shape)}")
    check_steps(op, stride, padding, dilation)
    out_h, out_w = conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    if out_h <= 0 or out_w <= 0:
        raise ValueError(
            f"{op}: the kernel {tuple(weight.shape[2:])} with dilation {tuple(dilation)} does not fit into the input "
            f"{tuple(x.shape[2:])} with padding {tuple(padding)}"
        )
    return out_h, out_w


def check_extent(op: str, shape: Sequence[int], padding: Sequence[int]) -> None:
    """Refuses images too large for the int32 arithmetic that the GPU kernels do inside of one image.

    Raises:
        ValueError: one padded image has 2^31 elements or more.
    """
    _, n_in, h, w = shape
    elements = max(1, n_in) * (h + 2 * padding[0]) * (w + 2 * padding[1])
    if elements >= _INT32:
        raise ValueError(f"{op}: x must have less than 2^31 elements per padded image on a GPU, found {elements}")


def check_programs(op: str, programs: int) -> None:
    """Refuses more programs than one launch can have.

    Raises:
        ValueError: 2^31 programs or more.
    """
    if programs >= _INT32:
        raise ValueError(f"{op}: x must need less than 2^31 tiles of output on a GPU, found {programs}")


def empty_channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised result (n, channels, h, w) whose channels are neighbours in memory."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def as_result(computed: Tensor, dtype: torch.dtype) -> Tensor:
    """`computed`, rounded to `dtype`, with the very strides of `empty_channels_last`."""
    computed = computed.to(dtype)
    result = empty_channels_last(computed, computed.shape)
    return computed if computed.stride() == result.stride() else result.copy_(computed)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a CPU, where only Triton's interpreter asks, stands for one H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
