"""`redpp::fused_linear`: a dense Linear with bias, residual and activation in one kernel.

On the CPU, and for fp64 everywhere, plain PyTorch runs (`fused_linear_reference`); on CUDA the kernel of
`fused_conv2d`, to which a Linear is a 1x1 convolution over images of one position. Inference only: no gradients.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.kernels.checks import check_activation, check_input, expect
from redpp_serve.kernels.epilogue import ACTIVATIONS
from redpp_serve.kernels.registration import register
from redpp_serve.kernels.shapes import empty_contiguous, working_dtype

_OP = "redpp::fused_linear"


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Compute activation(x weight^T + bias + residual).

    Args:
        x: (..., n_in); fp32, fp16, bf16 or fp64.
        weight: (n_out, n_in) in the dtype of `x`.
        bias: (n_out,) in the dtype of `x`, or None.
        residual: shape of the result, dtype of `x`; or None.
        activation: a name of `epilogue.ACTIVATIONS`.

    Returns:
        (..., n_out), contiguous. Sums are fp32 for all but fp64, rounded once; on CUDA the products of fp32 are
        rounded to tf32 where `torch.backends.cuda.matmul.allow_tf32` is on.

    Raises:
        ValueError: types or shapes that do not fit together.
    """
    result: Tensor = torch.ops.redpp.fused_linear(x, weight, bias, residual, activation)
    return result


def fused_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """Compute the operator in plain PyTorch; half precisions are rounded once, at the end."""
    work = working_dtype(x.dtype)
    total = F.linear(x.to(work), weight.to(work), None if bias is None else bias.to(work))
    if residual is not None:
        total = total + residual.to(work)
    return ACTIVATIONS[activation](total).to(x.dtype).contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Sequence[int]:
    check_activation(_OP, activation)
    check_input(_OP, x, "(..., n_in)", x.dim() > 0)
    if weight.dim() != 2:
        raise ValueError(f"{_OP}: weight must be (n_out, n_in), found {tuple(weight.shape)}")
    n_out = weight.shape[0]
    shape = *x.shape[:-1], n_out
    expect(_OP, "weight", weight, x, x.dtype, (n_out, x.shape[-1]))
    expect(_OP, "bias", bias, x, x.dtype, (n_out,))
    expect(_OP, "residual", residual, x, x.dtype, shape)
    return shape


def launch_fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """Launch the kernel of `fused_conv2d` for arguments that are already checked; fp32, fp16 or bf16."""
    from redpp_serve.kernels.fused_conv2d.kernel import launch_fused_conv2d  # noqa: PLC0415 - needs triton

    rows, (n_out, n_in) = math.prod(x.shape[:-1]), weight.shape
    images, kernel = x.reshape(rows, n_in, 1, 1), weight.reshape(n_out, n_in, 1, 1)
    addend = None if residual is None else residual.reshape(rows, n_out, 1, 1)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    out = launch_fused_conv2d(images, kernel, bias, addend, activation, (1, 1), (0, 0), (1, 1), tf32)
    return out.reshape(*x.shape[:-1], n_out)


register(
    "fused_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation) -> Tensor",
    check=_check,
    reference=fused_linear_reference,
    kernel=__name__,
    allocate=empty_contiguous,
)
