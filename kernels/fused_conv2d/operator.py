"""`redpp::fused_conv2d`: a dense convolution with bias, residual and activation in one kernel.

On the CPU, and for fp64 everywhere, plain PyTorch runs (`fused_conv2d_reference`); on CUDA a kernel in the Triton
language. Inference only: no gradients.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.kernels.checks import check_activation, check_conv_weight, check_input, check_window, expect
from redpp_serve.kernels.epilogue import ACTIVATIONS
from redpp_serve.kernels.registration import register
from redpp_serve.kernels.shapes import as_channels_last, conv_output_size, empty_channels_last, pair, working_dtype

_OP = "redpp::fused_conv2d"


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Compute activation(convolution + bias + residual).

    Args:
        x: (n, n_in, h, w); fp32, fp16, bf16 or fp64. Any memory format; channels_last is read as it is.
        weight: (n_out, n_in, kh, kw) in the dtype of `x`. On CUDA, channels_last saves a copy per call.
        bias: (n_out,) in the dtype of `x`, or None.
        residual: shape of the result, dtype of `x`; or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        stride: one number, or (vertical, horizontal).
        padding: one number, or (vertical, horizontal).
        dilation: one number, or (vertical, horizontal).

    Returns:
        (n, n_out, out_h, out_w), channels_last. Sums are fp32 for all but fp64, rounded once; on CUDA the products of
        fp32 are rounded to tf32 where `torch.backends.cudnn.allow_tf32` is on.

    Raises:
        ValueError: types or shapes that do not fit together, or images too large for the GPU kernel.
    """
    window = pair(stride), pair(padding), pair(dilation)
    result: Tensor = torch.ops.redpp.fused_conv2d(x, weight, bias, residual, activation, *window)
    return result


def fused_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, *window: Sequence[int]
) -> Tensor:
    """Compute the operator in plain PyTorch; half precisions are rounded once, at the end.

    ``window`` is stride, padding and dilation.
    """
    work = working_dtype(x.dtype)
    if 0 in (*x.shape, *weight.shape):  # torch refuses or misreads a convolution without channels
        size = conv_output_size(x.shape[2:], weight.shape[2:], *window)
        total = torch.zeros((x.shape[0], weight.shape[0], *size), dtype=work, device=x.device)
    else:
        stride, padding, dilation = map(list, window)
        total = F.conv2d(x.to(work), weight.to(work), None, stride, padding, dilation)
    if bias is not None:
        total = total + bias.to(work).view(1, -1, 1, 1)
    if residual is not None:
        total = total + residual.to(work)
    return as_channels_last(ACTIVATIONS[activation](total), x.dtype)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, *window: Sequence[int]
) -> Sequence[int]:
    check_activation(_OP, activation)
    check_input(_OP, x, "(n, n_in, h, w)", x.dim() == 4)
    check_conv_weight(_OP, weight)
    n_out, _, *kernel = weight.shape
    size = check_window(_OP, x, kernel, *window)
    expect(_OP, "weight", weight, x, x.dtype, (n_out, x.shape[1], *kernel))
    expect(_OP, "bias", bias, x, x.dtype, (n_out,))
    shape = x.shape[0], n_out, *size
    expect(_OP, "residual", residual, x, x.dtype, shape)
    return shape


register(
    "fused_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, "
    "int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    check=_check,
    reference=fused_conv2d_reference,
    kernel="redpp_serve.kernels.fused_conv2d.kernel",
    allocate=empty_channels_last,
)
