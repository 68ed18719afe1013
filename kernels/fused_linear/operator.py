"""`redpp::fused_linear`: a dense Linear with bias, residual, activation and duplicated channels in one kernel.

On the CPU, and for fp64 everywhere, plain PyTorch runs (`fused_linear_reference`); on CUDA the Triton kernel of
`fused_conv2d`, to which a Linear is a 1x1 convolution over images of one position. Inference only: no gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.kernels.checks import FLOATS, expect
from redpp_serve.kernels.epilogue import ACTIVATIONS, check_activation
from redpp_serve.kernels.positions import check_positions, check_positions_shape, spread
from redpp_serve.kernels.registration import register

_OP = "redpp::fused_linear"


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    positions: Tensor | None = None,
    channels: int | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(x weight^T + bias, stored at `positions`, + residual).

    Args:
        x: (..., n_in); fp32, fp16, bf16 or fp64.
        weight: (n_out, n_in) in the dtype of `x`.
        bias: (n_out,) in the dtype of `x`, or None.
        residual: shape of the result, dtype of `x`; or None.
        positions: (n_out, D) int32, or None for one position each, in order: the channels of the result at which each
            computed channel is stored; -1 where it has fewer than D. Every channel of the result exactly once.
        channels: channels of the result; None: n_out.
        activation: a name of `epilogue.ACTIVATIONS`.

    Returns:
        (..., channels), contiguous. Sums are fp32 for all but fp64, rounded once; on CUDA the products of fp32 are
        rounded to tf32 where `torch.backends.cuda.matmul.allow_tf32` is on.

    Raises:
        ValueError: types, shapes or positions that do not fit together.
    """
    channels = (weight.shape[0] if weight.dim() else 0) if channels is None else channels
    return torch.ops.redpp.fused_linear(x, weight, bias, residual, positions, channels, activation)


def fused_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
) -> Tensor:
    """The operator's meaning in plain PyTorch. Half precisions are rounded once, at last."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = F.linear(x.to(work), weight.to(work), None if bias is None else bias.to(work))
    if positions is not None:
        total = spread(total, positions, channels, -1)
    if residual is not None:
        total = total + residual.to(work)
    result = ACTIVATIONS[activation](total).to(x.dtype).contiguous()
    return result.clone() if result is x else result


def linear_flops(x: Tensor, weight: Tensor, *rest: object, out_val: Tensor) -> int:
    """Two per multiply-accumulate, as torch counts its own products; a channel that is stored twice is computed once."""
    return 2 * (x.numel() // max(1, x.shape[-1])) * weight.numel()


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
) -> None:
    """Refuses what does not fit together, without reading values."""
    check_activation(_OP, activation)
    if x.dim() == 0:
        raise ValueError(f"{_OP}: x must be (..., n_in), found a scalar")
    if weight.dim() != 2:
        raise ValueError(f"{_OP}: weight must be (n_out, n_in), found {tuple(weight.shape)}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{_OP}: x must be fp32, fp16, bf16 or fp64, found {x.dtype}")
    n_out = weight.shape[0]
    expect(_OP, "weight", weight, x.device, x.dtype, (n_out, x.shape[-1]))
    if bias is not None:
        expect(_OP, "bias", bias, x.device, x.dtype, (n_out,))
    check_positions_shape(_OP, positions, n_out, channels, x.device)
    if residual is not None:
        expect(_OP, "residual", residual, x.device, x.dtype, (*x.shape[:-1], channels))


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
) -> Tensor:
    arguments = (x, weight, bias, residual, positions, channels, activation)
    _check(*arguments)
    check_positions(_OP, positions, channels)
    return fused_linear_reference(*arguments)


def _cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
) -> Tensor:
    arguments = (x, weight, bias, residual, positions, channels, activation)
    if x.dtype == torch.float64:
        return _cpu(*arguments)
    from redpp_serve.kernels.fused_linear.kernel import fused_linear_triton

    _check(*arguments)
    check_positions(_OP, positions, channels)
    with torch.cuda.device(x.device):
        return fused_linear_triton(*arguments)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
) -> Tensor:
    _check(x, weight, bias, residual, positions, channels, activation)
    return x.new_empty((*x.shape[:-1], channels))


register(
    "fused_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? positions, int channels, str activation) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
