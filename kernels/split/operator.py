"""`redpp::split_conv2d` and `redpp::split_linear`: layers from the unique kernels of each input channel.

With U unique kernels in all, `kernels[index[o, i]]` times `sign[o, i]` is the kernel between the i-th input of o's
group and output o; index -1 stands for a kernel of zeros, which is dropped. A kernel and its negative share a row.
Every product is computed once for all outputs (RED++, arXiv 2110.01397, input-wise splitting); the result differs
from the dense layer only by the order of additions.

On the CPU, and for fp64 everywhere, the reference runs; on CUDA the Triton kernels. Inference only: no gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from redpp_serve.kernels.checks import check_conv2d_shapes, check_linear_shapes, check_values, conv_output_size, pair
from redpp_serve.kernels.registration import register
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
    """Convolution that computes each unique product once.

    Args:
        x: (n, n_in, h, w); fp32, fp16, bf16 or fp64, in any memory format.
        kernels: (U, kh, kw), dtype of `x`: the unique kernels of input channel 0, then of channel 1, and so on.
        channel: (U,) int64, non-decreasing: the input channel each kernel multiplies.
        index: (n_out, n_in / groups) int32: row of `kernels`, or -1 for a kernel of zeros.
        sign: (n_out, n_in / groups) int8: +1 or -1; 0 is allowed where `index` is -1.
        bias: (n_out,) in the dtype of `x`, or None.
        stride, padding, dilation: one number, or (vertical, horizontal).
        groups: as in `torch.nn.functional.conv2d`.

    Returns:
        (n, n_out, out_h, out_w), contiguous.

    Raises:
        ValueError: types, shapes or values that do not fit together.
    """
    pairs = pair(stride), pair(padding), pair(dilation)
    return torch.ops.redpp.split_conv2d(x, kernels, channel, index, sign, bias, *pairs, groups)


def split_linear(
    x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Linear layer that computes each unique product once.

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
    return torch.ops.redpp.split_linear(x, values, channel, index, sign, bias)


def _conv2d_cpu(
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
) -> Tensor:
    check_conv2d_shapes(x, kernels, channel, index, sign, bias, stride, padding, dilation, groups)
    check_values(_CONV2D, kernels.shape[0], x.shape[1], channel, index, sign, groups)
    return split_conv2d_reference(x, kernels, channel, index, sign, bias, stride, padding, dilation, groups)


def _conv2d_cuda(
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
) -> Tensor:
    if x.dtype == torch.float64:
        return _conv2d_cpu(x, kernels, channel, index, sign, bias, stride, padding, dilation, groups)
    from redpp_serve.kernels.split.kernel import split_conv2d_triton

    check_conv2d_shapes(x, kernels, channel, index, sign, bias, stride, padding, dilation, groups)
    check_values(_CONV2D, kernels.shape[0], x.shape[1], channel, index, sign, groups)
    with torch.cuda.device(x.device):
        return split_conv2d_triton(x, kernels, channel, index, sign, bias, stride, padding, dilation)


def _conv2d_fake(
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
) -> Tensor:
    check_conv2d_shapes(x, kernels, channel, index, sign, bias, stride, padding, dilation, groups)
    size = conv_output_size(x.shape[2:], kernels.shape[1:], stride, padding, dilation)
    return x.new_empty((x.shape[0], index.shape[0], *size))


def _linear_cpu(x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None) -> Tensor:
    check_linear_shapes(x, values, channel, index, sign, bias)
    check_values(_LINEAR, values.shape[0], x.shape[-1], channel, index, sign, 1)
    return split_linear_reference(x, values, channel, index, sign, bias)


def _linear_cuda(
    x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None
) -> Tensor:
    if x.dtype == torch.float64:
        return _linear_cpu(x, values, channel, index, sign, bias)
    from redpp_serve.kernels.split.kernel import split_linear_triton

    check_linear_shapes(x, values, channel, index, sign, bias)
    check_values(_LINEAR, values.shape[0], x.shape[-1], channel, index, sign, 1)
    with torch.cuda.device(x.device):
        return split_linear_triton(x, values, channel, index, sign, bias)


def _linear_fake(
    x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None
) -> Tensor:
    check_linear_shapes(x, values, channel, index, sign, bias)
    return x.new_empty((*x.shape[:-1], index.shape[0]))


register(
    "split_conv2d",
    "(Tensor x, Tensor kernels, Tensor channel, Tensor index, Tensor sign, Tensor? bias, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    cpu=_conv2d_cpu,
    cuda=_conv2d_cuda,
    fake=_conv2d_fake,
)
register(
    "split_linear",
    "(Tensor x, Tensor values, Tensor channel, Tensor index, Tensor sign, Tensor? bias) -> Tensor",
    cpu=_linear_cpu,
    cuda=_linear_cuda,
    fake=_linear_fake,
)
