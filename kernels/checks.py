"""What the dense convolutions share: their window, their memory format, and what they refuse.

What the split operators refuse, with the offending argument named. Values are checked once per set of tensors.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# index tensor -> what was found good with it: weak references to channel and sign, and `_fingerprint`.
_accepted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def conv_output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width a convolution makes of a (height, width) input."""
    out_h, out_w = (
        (s + 2 * p - d * (k - 1) - 1) // st + 1 for s, k, st, p, d in zip(size, kernel, stride, padding, dilation)
    )
    return out_h, out_w


def check_conv2d_shapes(
    x: Tensor,
    kernels: Tensor,
    channel: Tensor,
    index: Tensor,
    sign: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Refuses arguments whose types, shapes or devices do not fit together. Reads no values.

    Raises:
        ValueError: naming the argument, what it should be and what it is.
    """
    op = "redpp::split_conv2d"
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be (n, n_in, h, w), found {tuple(x.shape)}")
    if kernels.dim() != 3 or min(kernels.shape[1:]) <= 0:
        raise ValueError(f"{op}: kernels must be (unique, kh, kw), found {tuple(kernels.shape)}")
    check_steps(op, stride, padding, dilation)
    if groups <= 0 or x.shape[1] % groups != 0:
        raise ValueError(f"{op}: groups must be a divisor of the {x.shape[1]} inputs, found {groups}")
    _check_split(op, x, "kernels", kernels, channel, index, sign, bias, x.shape[1] // groups)
    if index.shape[0] % groups != 0:
        raise ValueError(f"{op}: groups must be a divisor of the {index.shape[0]} outputs, found {groups}")
    out_h, out_w = conv_output_size(x.shape[2:], kernels.shape[1:], stride, padding, dilation)
    if out_h <= 0 or out_w <= 0:
        raise ValueError(
            f"{op}: the kernel {tuple(kernels.shape[1:])} with dilation {tuple(dilation)} does not fit into the input "
            f"{tuple(x.shape[2:])} with padding {tuple(padding)}"
        )


def check_steps(op: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> None:
    """Refuses what is no (vertical, horizontal) step of a window.

    Raises:
        ValueError: naming what it should be and what it is.
    """
    pairs = all(len(value) == 2 for value in (stride, padding, dilation))
    if not pairs or min(stride) <= 0 or min(dilation) <= 0 or min(padding) < 0:
        raise ValueError(
            f"{op}: stride and dilation must be positive and padding not negative, each (vertical, horizontal), "
            f"found {tuple(stride)}, {tuple(dilation)} and {tuple(padding)}"
        )


def check_linear_shapes(
    x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None
) -> None:
    """As `check_conv2d_shapes`, for the linear layer."""
    op = "redpp::split_linear"
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (..., n_in), found a scalar")
    if values.dim() != 1:
        raise ValueError(f"{op}: values must be (unique,), found {tuple(values.shape)}")
    _check_split(op, x, "values", values, channel, index, sign, bias, x.shape[-1])


def check_values(op: str, unique: int, n_in: int, channel: Tensor, index: Tensor, sign: Tensor, groups: int) -> None:
    """Refuses a split that refers to kernels, inputs or signs that do not exist.

    Costs one pass over `index` (and on CUDA a synchronisation), so the answer is remembered for as long as the three
    tensors live unchanged. Tensors made under `torch.inference_mode` keep no version: changes to them go unseen.

    Raises:
        ValueError: naming the argument, the limits and the value found.
    """
    known = _accepted.get(index)
    key = (op, unique, n_in, groups, version(channel), version(index), version(sign))
    if known is not None and known[0]() is channel and known[1]() is sign and known[2] == key:
        return
    if unique and not (channel[0] >= 0 and channel[-1] < n_in and (channel[1:] >= channel[:-1]).all()):
        raise ValueError(f"{op}: channel must be non-decreasing within 0..{n_in - 1}")
    if index.numel():
        _check_pairs(op, unique, channel, index, sign, groups)
    _accepted[index] = (TensorWeakRef(channel), TensorWeakRef(sign), key)


def _check_pairs(op: str, unique: int, channel: Tensor, index: Tensor, sign: Tensor, groups: int) -> None:
    low, high = (int(v) for v in index.aminmax())
    if low < -1 or high >= unique:
        raise ValueError(f"{op}: index must lie within -1..{unique - 1} ({unique} rows), found {low}..{high}")
    used = index >= 0
    if not ((sign.abs() == 1) | ((sign == 0) & ~used)).all():
        raise ValueError(
            f"{op}: sign must be +1 or -1 (0 only where index is -1), found values {sign.unique().tolist()[:8]}"
        )
    n_out, per_group = index.shape
    group = torch.arange(n_out, device=index.device) // (n_out // groups)
    reads = group.unsqueeze(1) * per_group + torch.arange(per_group, device=index.device)
    if not (channel[index[used].long()] == reads[used]).all():
        raise ValueError(
            f"{op}: index refers to a kernel of another input: channel[index[o, i]] must be input i of o's group"
        )


def _check_split(
    op: str,
    x: Tensor,
    name: str,
    kernels: Tensor,
    channel: Tensor,
    index: Tensor,
    sign: Tensor,
    bias: Tensor | None,
    per_group: int,
) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be fp32, fp16, bf16 or fp64, found {x.dtype}")
    if index.dim() != 2:
        raise ValueError(f"{op}: index must be (n_out, inputs per group), found {tuple(index.shape)}")
    if per_group == 0:
        raise ValueError(f"{op}: x must have inputs, found {tuple(x.shape)}")
    n_out = index.shape[0]
    expect(op, name, kernels, x.device, x.dtype, kernels.shape)
    expect(op, "channel", channel, x.device, torch.int64, kernels.shape[:1])
    expect(op, "index", index, x.device, torch.int32, (n_out, per_group))
    expect(op, "sign", sign, x.device, torch.int8, index.shape)
    if bias is not None:
        expect(op, "bias", bias, x.device, x.dtype, (n_out,))


def expect(op: str, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Refuses a tensor of another device, dtype or shape, naming the argument, what it should be and what it is.

    Raises:
        ValueError: see above.
    """
    if tensor.device != device or tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(
            f"{op}: {name} must be {dtype} of shape {tuple(shape)} on {device}, "
            f"found {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def version(tensor: Tensor) -> int:
    """Changes with each change in place; tensors made under `torch.inference_mode` keep no version and give 0."""
    return 0 if tensor.is_inference() else tensor._version


_INT32 = 1 << 31


def pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """One number for both directions, or (vertical, horizontal)."""
    return (value, value) if isinstance(value, int) else tuple(value)


def check_window(
    op: str, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
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
