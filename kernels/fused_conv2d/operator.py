"""`redpp::fused_conv2d`: a dense convolution with bias, residual, activation and duplicated channels in one kernel.

On the CPU, and for fp64 everywhere, plain PyTorch runs (`fused_conv2d_reference`); on CUDA a Triton kernel.
Inference only: no gradients.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.kernels.checks import as_result, check_window, empty_channels_last, expect, pair
from redpp_serve.kernels.epilogue import ACTIVATIONS, check_activation
from redpp_serve.kernels.positions import check_positions, check_positions_shape, spread
from redpp_serve.kernels.registration import register

_OP = "redpp::fused_conv2d"


def fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    positions: Tensor | None = None,
    channels: int | None = None,
    activation: str = "none",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """activation(convolution + bias, stored at `positions`, + residual).

    Args:
        x: (n, n_in, h, w); fp32, fp16, bf16 or fp64. Any memory format; channels_last is read as it is.
        weight: (n_out, n_in, kh, kw) in the dtype of `x`. On CUDA, channels_last saves a copy per call.
        bias: (n_out,) in the dtype of `x`, or None.
        residual: shape of the result, dtype of `x`; or None.
        positions: (n_out, D) int32, or None for one position each, in order: the channels of the result at which each
            computed channel is stored; -1 where it has fewer than D. Every channel of the result exactly once.
        channels: channels of the result; None: n_out.
        activation: a name of `epilogue.ACTIVATIONS`.
        stride, padding, dilation: one number, or (vertical, horizontal).

    Returns:
        (n, channels, out_h, out_w), channels_last. Sums are fp32 for all but fp64, rounded once; on CUDA the products
        of fp32 are rounded to tf32 where `torch.backends.cudnn.allow_tf32` is on.

    Raises:
        ValueError: types, shapes or positions that do not fit together, or images too large for the GPU kernel.
    """
    channels = (weight.shape[0] if weight.dim() else 0) if channels is None else channels
    window = pair(stride), pair(padding), pair(dilation)
    return torch.ops.redpp.fused_conv2d(x, weight, bias, residual, positions, channels, activation, *window)


def fused_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: tuple[int, int],
) -> Tensor:
    """The operator's meaning in plain PyTorch; `size` is (out_h, out_w). Half precisions are rounded once, at last."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if 0 in (*x.shape, *weight.shape):  # torch refuses or misreads a convolution without channels
        total = torch.zeros((x.shape[0], weight.shape[0], *size), dtype=work, device=x.device)
    else:
        total = F.conv2d(x.to(work), weight.to(work), None, list(stride), list(padding), list(dilation))
    if bias is not None:
        total = total + bias.to(work).view(1, -1, 1, 1)
    if positions is not None:
        total = spread(total, positions, channels, 1)
    if residual is not None:
        total = total + residual.to(work)
    return as_result(ACTIVATIONS[activation](total), x.dtype)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Refuses what does not fit together, without reading values; height and width of the output."""
    check_activation(_OP, activation)
    size = check_window(_OP, x, weight, stride, padding, dilation)
    n_out = weight.shape[0]
    expect(_OP, "weight", weight, x.device, x.dtype, (n_out, x.shape[1], *weight.shape[2:]))
    if bias is not None:
        expect(_OP, "bias", bias, x.device, x.dtype, (n_out,))
    check_positions_shape(_OP, positions, n_out, channels, x.device)
    if residual is not None:
        expect(_OP, "residual", residual, x.device, x.dtype, (x.shape[0], channels, *size))
    return size


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    arguments = (x, weight, bias, residual, positions, channels, activation, stride, padding, dilation)
    size = _check(*arguments)
    check_positions(_OP, positions, channels)
    return fused_conv2d_reference(*arguments, size)


def _cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    arguments = (x, weight, bias, residual, positions, channels, activation, stride, padding, dilation)
    if x.dtype == torch.float64:
        return _cpu(*arguments)
    from redpp_serve.kernels.fused_conv2d.kernel import fused_conv2d_triton

    _check(*arguments)
    check_positions(_OP, positions, channels)
    with torch.cuda.device(x.device):
        return fused_conv2d_triton(*arguments)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = _check(x, weight, bias, residual, positions, channels, activation, stride, padding, dilation)
    return empty_channels_last(x, (x.shape[0], channels, *size))


register(
    "fused_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? positions, int channels, str activation, "
    "int[2] stride, int[2] padding, int[2] dilation) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
