"""`redpp::depthwise_conv2d`: one kernel per channel, with bias and activation in the same pass over memory.

On the CPU, and for fp64 everywhere, plain PyTorch runs (`depthwise_conv2d_reference`); on CUDA a kernel in the Triton
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

_OP = "redpp::depthwise_conv2d"


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Compute activation(convolution of every channel with its own kernel + bias).

    Args:
        x: (n, channels, h, w); fp32, fp16, bf16 or fp64. Any memory format; channels_last is read as it is.
        weight: (channels, 1, kh, kw) in the dtype of `x`, in any memory layout.
        bias: (channels,) in the dtype of `x`, or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        stride: one number, or (vertical, horizontal).
        padding: one number, or (vertical, horizontal).
        dilation: one number, or (vertical, horizontal).

    Returns:
        (n, channels, out_h, out_w), channels_last. Sums are fp32 for all but fp64, rounded once.

    Raises:
        ValueError: types or shapes that do not fit together, or images too large for the GPU kernel.
    """
    window = pair(stride), pair(padding), pair(dilation)
    result: Tensor = torch.ops.redpp.depthwise_conv2d(x, weight, bias, activation, *window)
    return result


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *window: Sequence[int]
) -> Tensor:
    """Compute the operator in plain PyTorch; half precisions are rounded once, at the end.

    ``window`` is stride, padding and dilation.
    """
    n, channels, *size = x.shape
    if channels == 0:  # torch refuses a convolution without channels
        return empty_channels_last(x, (n, 0, *conv_output_size(size, weight.shape[2:], *window)))
    work = working_dtype(x.dtype)
    shift = None if bias is None else bias.to(work)
    stride, padding, dilation = map(list, window)
    total = F.conv2d(x.to(work), weight.to(work), shift, stride, padding, dilation, channels)
    return as_channels_last(ACTIVATIONS[activation](total), x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *window: Sequence[int]) -> Sequence[int]:
    check_activation(_OP, activation)
    check_input(_OP, x, "(n, channels, h, w)", x.dim() == 4)
    check_conv_weight(_OP, weight)
    n, channels = x.shape[:2]
    size = check_window(_OP, x, weight.shape[2:], *window)
    expect(_OP, "weight", weight, x, x.dtype, (channels, 1, *weight.shape[2:]))
    expect(_OP, "bias", bias, x, x.dtype, (channels,))
    return n, channels, *size


register(
    "depthwise_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    check=_check,
    reference=depthwise_conv2d_reference,
    kernel="redpp_serve.kernels.depthwise_conv2d.kernel",
    allocate=empty_channels_last,
)
