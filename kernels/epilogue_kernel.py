"""The end of a layer in the Triton language: bias, residual, activation and store, also after a shared reduction."""

import triton
import triton.language as tl
from torch import Tensor

from redpp_serve.kernels.shapes import alignment

_ROWS, _COLUMNS = 16, 64  # the tile of a program that adds shares


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply ``epilogue.ACTIVATIONS[ACTIVATION]`` to a block of fp32 values."""
    if ACTIVATION == "none":
        result = x
    elif ACTIVATION == "relu":
        result = tl.where(x < 0.0, 0.0, x)  # NaN stays NaN, as in torch
    elif ACTIVATION == "relu6":
        result = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACTIVATION == "silu":
        result = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        result = x * tl.sigmoid(2.0 * inner)  # (1 + tanh(a)) / 2 = sigmoid(2 a)
    elif ACTIVATION == "sigmoid":
        result = tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "hardswish" or ACTIVATION == "hardsigmoid")
        gate = x / 6.0 + 0.5
        gate = tl.where(gate < 0.0, 0.0, tl.where(gate > 1.0, 1.0, gate))
        result = x * gate if ACTIVATION == "hardswish" else gate
    return result


@triton.jit
def finish(
    total,
    row,
    row_inside,
    column,
    column_inside,
    bias,
    residual,
    out,
    n_out,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store out[row, column] = activation(total + bias[column] + residual[row, column]) for one tile."""
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    target = row.to(tl.int64)[:, None] * n_out + column[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + target, activate(total, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_shares_kernel(
    partial,
    bias,
    residual,
    out,
    rows,
    out_units,
    OUT_UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Add the shares of a reduction, always in the same order, and finish the tile."""
    n_out = out_units * OUT_UNIT
    column_blocks = tl.cdiv(n_out, BLOCK_COLUMNS)
    pid = tl.program_id(0)
    row = (pid // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = pid % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_inside, column_inside = row < rows, column < n_out
    inside = row_inside[:, None] & column_inside[None, :]
    source = partial + row[:, None] * n_out + column[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for share in range(SPLIT):
        total += tl.load(source + tl.full([], share, tl.int64) * rows * n_out, mask=inside, other=0.0)
    finish(
        total, row, row_inside, column, column_inside, bias, residual, out, n_out, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
    )


def add_shares(partial: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, out: Tensor) -> None:
    """Launch the addition of a shared reduction's fp32 sums, with the layer's epilogue.

    Args:
        partial: (shares, rows, n_out), fp32.
        bias: (n_out,), contiguous, or None.
        residual: laid out as `out`, or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        out: memory of rows x n_out results, whose outputs are neighbours.
    """
    split, rows, n_out = partial.shape
    unit = alignment(n_out)
    add_shares_kernel[(triton.cdiv(rows, _ROWS) * triton.cdiv(n_out, _COLUMNS),)](
        *(partial, out if bias is None else bias, out if residual is None else residual, out, rows, n_out // unit),
        *(unit, split, bias is not None, residual is not None, activation, _ROWS, _COLUMNS),
        num_warps=4,
    )
