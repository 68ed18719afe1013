"""`redpp::split_conv2d` and `redpp::split_linear`: layers from the unique kernels of each input channel.

With U unique kernels in all, `kernels[index[o, i]]` times `sign[o, i]` is the kernel between the i-th input of o's
group and output o; index -1 stands for a kernel of zeros, which is dropped. A kernel and its negative share a row.
Every product is computed once for all outputs (RED++, arXiv 2110.01397, input-wise splitting); the result differs
from the dense layer only by the order of additions.

On the CPU, and for fp64 everywhere, the reference runs; on CUDA kernels in the Triton language. Inference only: no
gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from redpp_serve.kernels.checks import check_input, check_once, check_window, expect
from redpp_serve.kernels.registration import register
from redpp_serve.kernels.shapes import empty_contiguous, pair
from redpp_serve.kernels.split.reference import split_conv2d_reference, split_linear_reference

_CONV2D = "redpp::split_conv2d"
_LINEAR = "redpp::split_linear"


def split_conv2d(
    x: Tensor,
    kernels: Tensor,
    channel: Tensor,
    index: Tensor,
    sign: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Compute a convolution, each unique product once.

    Args:
        x: (n, n_in, h, w); fp32, fp16, bf16 or fp64, in any memory format.
        kernels: (U, kh, kw), dtype of `x`: the unique kernels of input channel 0, then of channel 1, and so on.
        channel: (U,) int64, non-decreasing: the input channel each kernel multiplies.
        index: (n_out, n_in / groups) int32: row of `kernels`, or -1 for a kernel of zeros.
        sign: (n_out, n_in / groups) int8: +1 or -1; 0 is allowed where `index` is -1.
        bias: (n_out,) in the dtype of `x`, or None.
        stride: one number, or (vertical, horizontal).
        padding: one number, or (vertical, horizontal).
        dilation: one number, or (vertical, horizontal).
        groups: as in `torch.nn.functional.conv2d`.

    Returns:
        (n, n_out, out_h, out_w), contiguous.

    Raises:
        ValueError: types, shapes or values that do not fit together.
    """
    window = pair(stride), pair(padding), pair(dilation)
    result: Tensor = torch.ops.redpp.split_conv2d(x, kernels, channel, index, sign, bias, *window, groups)
    return result


def split_linear(
    x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute a linear layer, each unique product once.

    Args:
        x: (..., n_in); fp32, fp16, bf16 or fp64.
        values: (U,) in the dtype of `x`: the unique magnitudes of input 0, then of input 1, and so on.
        channel: (U,) int64, non-decreasing: the input each value multiplies.
        index: (n_out, n_in) int32: row of `values`, or -1 for a zero weight.
        sign: (n_out, n_in) int8: +1 or -1; 0 is allowed where `index` is -1.
        bias: (n_out,) in the dtype of `x`, or None.

    Returns:
        (..., n_out), contiguous.

    Raises:
        ValueError: types, shapes or values that do not fit together.
    """
    result: Tensor = torch.ops.redpp.split_linear(x, values, channel, index, sign, bias)
    return result


def _check_conv2d(x: Tensor, kernels: Tensor, *rest: Any) -> Sequence[int]:
    *split, stride, padding, dilation, groups = rest
    check_input(_CONV2D, x, "(n, n_in, h, w)", x.dim() == 4)
    if kernels.dim() != 3 or min(kernels.shape[1:]) <= 0:
        raise ValueError(f"{_CONV2D}: kernels must be (unique, kh, kw), found {tuple(kernels.shape)}")
    if groups <= 0 or x.shape[1] % groups != 0:
        raise ValueError(f"{_CONV2D}: groups must be a divisor of the {x.shape[1]} inputs, found {groups}")
    size = check_window(_CONV2D, x, kernels.shape[1:], stride, padding, dilation)
    n_out = _check_split(_CONV2D, x, x.shape[1] // groups, "kernels", kernels, *split)
    if n_out % groups != 0:
        raise ValueError(f"{_CONV2D}: groups must be a divisor of the {n_out} outputs, found {groups}")
    return x.shape[0], n_out, *size


def _check_linear(x: Tensor, values: Tensor, *split: Any) -> Sequence[int]:
    check_input(_LINEAR, x, "(..., n_in)", x.dim() > 0)
    if values.dim() != 1:
        raise ValueError(f"{_LINEAR}: values must be (unique,), found {tuple(values.shape)}")
    return *x.shape[:-1], _check_split(_LINEAR, x, x.shape[-1], "values", values, *split)


def _check_split(
    op: str,
    x: Tensor,
    per_group: int,
    name: str,
    kernels: Tensor,
    channel: Tensor,
    index: Tensor,
    sign: Tensor,
    bias: Tensor | None,
) -> int:
    """Refuse parts of a split that do not fit together, and return the number of outputs."""
    if index.dim() != 2:
        raise ValueError(f"{op}: index must be (n_out, inputs per group), found {tuple(index.shape)}")
    if per_group == 0:
        raise ValueError(f"{op}: x must have inputs, found {tuple(x.shape)}")
    n_out = index.shape[0]
    expect(op, name, kernels, x, x.dtype, kernels.shape)
    expect(op, "channel", channel, x, torch.int64, kernels.shape[:1])
    expect(op, "index", index, x, torch.int32, (n_out, per_group))
    expect(op, "sign", sign, x, torch.int8, index.shape)
    expect(op, "bias", bias, x, x.dtype, (n_out,))
    return n_out


def _check_conv2d_values(x: Tensor, kernels: Tensor, channel: Tensor, index: Tensor, sign: Tensor, *rest: Any) -> None:
    check_once(check_pairs, (_CONV2D, len(kernels), x.shape[1], rest[-1]), index, channel, sign)


def _check_linear_values(x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, *rest: Any) -> None:
    check_once(check_pairs, (_LINEAR, len(values), x.shape[-1], 1), index, channel, sign)


def check_pairs(op: str, unique: int, n_in: int, groups: int, index: Tensor, channel: Tensor, sign: Tensor) -> None:
    """Refuse a split that refers to kernels, inputs or signs that do not exist; reads the values once.

    Raises:
        ValueError: naming the argument, the limits and the value found.
    """
    if unique and not (channel[0] >= 0 and channel[-1] < n_in and (channel[1:] >= channel[:-1]).all()):
        raise ValueError(f"{op}: channel must be non-decreasing within 0..{n_in - 1}")
    if not index.numel():
        return
    low, high = (int(v) for v in index.aminmax())
    if low < -1 or high >= unique:
        raise ValueError(f"{op}: index must lie within -1..{unique - 1} ({unique} rows), found {low}..{high}")
    used = index >= 0
    if not ((sign.abs() == 1) | ((sign == 0) & ~used)).all():
        raise ValueError(
            f"{op}: sign must be +1 or -1 (0 only where index is -1), found values {torch.unique(sign).tolist()[:8]}"
        )
    n_out, per_group = index.shape
    group = torch.arange(n_out, device=index.device) // (n_out // groups)
    reads = group.unsqueeze(1) * per_group + torch.arange(per_group, device=index.device)
    if not (channel[index[used].long()] == reads[used]).all():
        raise ValueError(
            f"{op}: index refers to a kernel of another input: channel[index[o, i]] must be input i of o's group"
        )


register(
    "split_conv2d",
    "(Tensor x, Tensor kernels, Tensor channel, Tensor index, Tensor sign, Tensor? bias, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    check=_check_conv2d,
    reference=split_conv2d_reference,
    kernel="redpp_serve.kernels.split.kernel",
    allocate=empty_contiguous,
    check_values=_check_conv2d_values,
)
register(
    "split_linear",
    "(Tensor x, Tensor values, Tensor channel, Tensor index, Tensor sign, Tensor? bias) -> Tensor",
    check=_check_linear,
    reference=split_linear_reference,
    kernel="redpp_serve.kernels.split.kernel",
    allocate=empty_contiguous,
    check_values=_check_linear_values,
)
