"""Scalar operations of the split operators, and the FLOP formulas for torch's counter.

FLOP formula of the dense convolutions for torch's counter.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from redpp_serve.kernels.codebook_linear.operator import codebook_linear_flops
from redpp_serve.kernels.fused_linear.operator import linear_flops


def conv2d_flops(x: Tensor, weight: Tensor, *rest: object, out_val: Tensor) -> int:
    """Two per multiply-accumulate, as torch counts its own convolutions: every tap at every output position.

    Serves `fused_conv2d` and `depthwise_conv2d`. Bias, residual and activation count nothing, duplicated channels
    neither: they are stored, not computed.
    """
    n, _, out_h, out_w = out_val.shape
    return 2 * n * out_h * out_w * weight.numel()


class OperationCounts(NamedTuple):
    """Operations of one call. Their sum compares with torch's counter, which has 2 per multiply-accumulate."""

    multiplications: int
    additions: int


def split_conv2d_counts(kernels: Tensor, index: Tensor, has_bias: bool, positions: int) -> OperationCounts:
    """Operations of `split_conv2d` at `positions` output positions (images x out_h x out_w), padding included.

    Multiplications: kh kw U per position. Additions per position: kh kw - 1 for each unique kernel, and for each
    output its kept terms (and bias) minus one. Signs are free. Where `index` holds no values (fake and meta tensors),
    every term counts as kept: an upper bound.
    """
    unique = kernels.shape[0]
    area = kernels[0].numel() if unique else 0
    if index.is_meta or isinstance(index, (FakeTensor, FunctionalTensor)):
        sums = index.shape[0] * max(0, index.shape[1] + has_bias - 1)
    else:
        sums = int(((index >= 0).sum(1) + int(has_bias) - 1).clamp(min=0).sum())
    return OperationCounts(positions * area * unique, positions * (max(0, area - 1) * unique + sums))


def split_linear_counts(values: Tensor, index: Tensor, has_bias: bool, rows: int) -> OperationCounts:
    """Operations of `split_linear` for `rows` input rows: a convolution with kernels of one value."""
    return split_conv2d_counts(values, index, has_bias, rows)


def register_flop_formulas() -> None:
    """Teaches `torch.utils.flop_counter.FlopCounterMode` the operators: multiplications plus additions really done.

    Call it before making the counter. A function, not a side effect of the import: torch's counter imports triton.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas = {
        torch.ops.redpp.split_conv2d: _conv2d_flops,
        torch.ops.redpp.split_linear: _linear_flops,
        torch.ops.redpp.fused_conv2d: conv2d_flops,
        torch.ops.redpp.depthwise_conv2d: conv2d_flops,
        torch.ops.redpp.fused_linear: linear_flops,
        torch.ops.redpp.codebook_linear: codebook_linear_flops,
    }
    for packet, formula in formulas.items():
        if packet not in flop_registry:
            register_flop_formula(packet, get_raw=True)(formula)


def _conv2d_flops(
    x: Tensor,
    kernels: Tensor,
    channel: Tensor,
    index: Tensor,
    sign: Tensor,
    bias: Tensor | None,
    *window: object,
    out_val: Tensor,
) -> int:
    positions = out_val.shape[0] * out_val.shape[2] * out_val.shape[3]
    return sum(split_conv2d_counts(kernels, index, bias is not None, positions))


def _linear_flops(
    x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None, *, out_val: Tensor
) -> int:
    rows = out_val.numel() // max(1, out_val.shape[-1])
    return sum(split_linear_counts(values, index, bias is not None, rows))
