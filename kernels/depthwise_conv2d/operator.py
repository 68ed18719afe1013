"""`redpp::depthwise_conv2d`: one kernel per channel, with bias and activation in the same pass over memory.

On the CPU, and for fp64 everywhere, plain PyTorch runs; on CUDA a Triton kernel. Inference only: no gradients.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.kernels.checks import as_result, check_window, empty_channels_last, expect, pair
from redpp_serve.kernels.epilogue import ACTIVATIONS, check_activation
from redpp_serve.kernels.registration import register

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
    """activation(convolution of every channel with its own kernel + bias).

    Args:
        x: (n, channels, h, w); fp32, fp16, bf16 or fp64. Any memory format; channels_last is read as it is.
        weight: (channels, 1, kh, kw) in the dtype of `x`, in any memory layout.
        bias: (channels,) in the dtype of `x`, or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        stride, padding, dilation: one number, or (vertical, horizontal).

    Returns:
        (n, channels, out_h, out_w), channels_last. Sums are fp32 for all but fp64, rounded once.

    Raises:
        ValueError: types or shapes that do not fit together, or images too large for the GPU kernel.
    """
    return torch.ops.redpp.depthwise_conv2d(x, weight, bias, activation, pair(stride), pair(padding), pair(dilation))


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Refuses what does not fit together; height and width of the output."""
    check_activation(_OP, activation)
    size = check_window(_OP, x, weight, stride, padding, dilation)
    expect(_OP, "weight", weight, x.device, x.dtype, (x.shape[1], 1, *weight.shape[2:]))
    if bias is not None:
        expect(_OP, "bias", bias, x.device, x.dtype, (x.shape[1],))
    return size


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    out_h, out_w = _check(x, weight, bias, activation, stride, padding, dilation)
    if x.numel() == 0 and x.shape[1] == 0:  # torch refuses a convolution without channels
        return empty_channels_last(x, (x.shape[0], 0, out_h, out_w))
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    shift = None if bias is None else bias.to(work)
    total = F.conv2d(x.to(work), weight.to(work), shift, list(stride), list(padding), list(dilation), x.shape[1])
    return as_result(ACTIVATIONS[activation](total), x.dtype)


def _cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    if x.dtype == torch.float64:
        return _cpu(x, weight, bias, activation, stride, padding, dilation)
    from redpp_serve.kernels.depthwise_conv2d.kernel import depthwise_conv2d_triton

    _check(x, weight, bias, activation, stride, padding, dilation)
    with torch.cuda.device(x.device):
        return depthwise_conv2d_triton(x, weight, bias, activation, stride, padding, dilation)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = _check(x, weight, bias, activation, stride, padding, dilation)
    return empty_channels_last(x, (x.shape[0], x.shape[1], *size))


register(
    "depthwise_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
