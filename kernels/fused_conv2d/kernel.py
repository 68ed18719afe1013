"""Triton kernel of the fused convolution, an implicit GEMM over NHWC, and its launch. Imported for CUDA tensors only.

Rows of the product are output positions (image, row, column), columns are output channels, the reduction runs over
taps and input channels. Offsets inside of one image are int32 (`conv_checks.check_extent` refuses larger images),
everything that grows with the batch is int64. Sums are fp32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from redpp_serve.kernels.checks import check_extent, check_programs, conv_output_size, empty_channels_last, processors
from redpp_serve.kernels.epilogue_kernel import activate
from redpp_serve.kernels.fused_conv2d.heuristics import alignment, fused_conv2d_blocks, reduction_steps

_OP = "redpp::fused_conv2d"
_SUM_COLUMNS = 64
_SUM_ROWS = 16


@triton.jit
def store_at(
    total,
    row,
    row_inside,
    channel,
    channel_inside,
    residual,
    out,
    channels,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """out[row, channel] = activation(total + residual[row, channel])."""
    target = row.to(tl.int64)[:, None] * channels + channel[None, :]
    inside = row_inside[:, None] & channel_inside[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + target, activate(total, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    total,
    row,
    row_inside,
    column,
    column_inside,
    bias,
    residual,
    positions,
    out,
    n_out,
    channels,
    slots,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Bias, then for every channel that a column is stored at: residual, activation, store."""
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if HAS_POSITIONS:
        # Without a residual all copies of a channel are equal: its activation is computed once.
        LATER: tl.constexpr = ACTIVATION if HAS_RESIDUAL else "none"
        if not HAS_RESIDUAL:
            total = activate(total, ACTIVATION)
        for slot in range(slots):
            channel = tl.load(positions + column.to(tl.int64) * slots + slot, mask=column_inside, other=-1)
            store_at(total, row, row_inside, channel, channel >= 0, residual, out, channels, HAS_RESIDUAL, LATER)
    else:
        store_at(total, row, row_inside, column, column_inside, residual, out, n_out, HAS_RESIDUAL, ACTIVATION)


@triton.jit
def fused_conv2d_kernel(
    x,
    weight,
    bias,
    residual,
    positions,
    out,
    partial,
    rows,
    height,
    width,
    out_h,
    out_w,
    in_units,
    out_units,
    channels,
    slots,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    steps,
    steps_per_split,
    IN_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """One tile of the convolution; with SPLIT, one share of its reduction, as fp32 sums in `partial`.

    Channels come as multiples of a constant, from which the compiler learns how wide loads and stores may be.
    POINTWISE: 1x1, stride 1, no padding, so that row i of the product is row i of the input. WIDE: more rows than
    int32 counts.
    """
    n_in = in_units * IN_UNIT
    n_out = out_units * OUT_UNIT
    # Programs that follow each other share rows, so the images they read stay in L2; the weight fits it anyway.
    column_blocks = tl.cdiv(n_out, BLOCK_COLUMNS)
    pid = tl.program_id(0)
    block = pid // column_blocks
    if WIDE:
        block = block.to(tl.int64)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = pid % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_inside, column_inside = row < rows, column < n_out

    if POINTWISE:
        source = x + (row.to(tl.int64) * n_in)[:, None]
    else:
        plane = out_h * out_w
        place = (row % plane).to(tl.int32)
        top = (place // out_w * stride_h - padding_h)[:, None]
        left = (place % out_w * stride_w - padding_w)[:, None]
        source = x + ((row // plane).to(tl.int64) * height * width * n_in)[:, None]
    kernel = weight + (column.to(tl.int64) * (KERNEL_H * KERNEL_W) * n_in)[None, :]

    depth_blocks = tl.cdiv(n_in, BLOCK_DEPTH)
    lane = tl.arange(0, BLOCK_DEPTH)
    first = tl.program_id(1) * steps_per_split
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for step in range(first, min(first + steps_per_split, steps)):
        if FLAT:
            depth = step * BLOCK_DEPTH + lane
            tap = depth // n_in
            channel = depth % n_in
            depth_inside = depth < KERNEL_H * KERNEL_W * n_in
            r, s = (tap // KERNEL_W)[None, :], (tap % KERNEL_W)[None, :]
        else:
            tap = step // depth_blocks
            channel = step % depth_blocks * BLOCK_DEPTH + lane
            depth = tap * n_in + channel
            depth_inside = channel < n_in
            r, s = tap // KERNEL_W, tap % KERNEL_W
        if POINTWISE:
            offset = channel[None, :]
            visible = row_inside[:, None] & depth_inside[None, :]
        else:
            y, z = top + r * dilation_h, left + s * dilation_w
            offset = (y * width + z) * n_in + channel[None, :]
            visible = row_inside[:, None] & depth_inside[None, :]
            visible = visible & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        value = tl.load(source + offset, mask=visible, other=0.0)
        factor = tl.load(kernel + depth[:, None], mask=depth_inside[:, None] & column_inside[None, :], other=0.0)
        total = tl.dot(value, factor, total, input_precision=PRECISION)

    if SPLIT:
        target = (tl.program_id(1).to(tl.int64) * rows + row)[:, None] * n_out + column[None, :]
        tl.store(partial + target, total, mask=row_inside[:, None] & column_inside[None, :])
    else:
        finish(
            total,
            row,
            row_inside,
            column,
            column_inside,
            bias,
            residual,
            positions,
            out,
            n_out,
            channels,
            slots,
            HAS_BIAS,
            HAS_RESIDUAL,
            HAS_POSITIONS,
            ACTIVATION,
        )


@triton.jit
def add_shares_kernel(
    partial,
    bias,
    residual,
    positions,
    out,
    rows,
    out_units,
    channels,
    slots,
    OUT_UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Adds the shares of the reduction, always in the same order, and finishes the tile."""
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
        total,
        row,
        row_inside,
        column,
        column_inside,
        bias,
        residual,
        positions,
        out,
        n_out,
        channels,
        slots,
        HAS_BIAS,
        HAS_RESIDUAL,
        HAS_POSITIONS,
        ACTIVATION,
    )


def fused_conv2d_triton(
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
    tf32: bool | None = None,
) -> Tensor:
    """Launches the kernel for arguments already checked; see `fused_conv2d.fused_conv2d`. fp32, fp16 or bf16.

    Args:
        tf32: round the products of fp32 to tf32; None: where torch's convolutions may.
    """
    n, n_in, h, w = x.shape
    n_out, _, kernel_h, kernel_w = weight.shape
    check_extent(_OP, x.shape, padding)
    out_h, out_w = conv_output_size((h, w), (kernel_h, kernel_w), stride, padding, dilation)
    out = empty_channels_last(x, (n, channels, out_h, out_w))
    if out.numel() == 0:
        return out

    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    addend = out if residual is None else residual.contiguous(memory_format=torch.channels_last)
    table = out if positions is None else positions.contiguous()
    slots = 0 if positions is None else positions.shape[1]
    shift = out if bias is None else bias.contiguous()
    rows, taps = n * out_h * out_w, kernel_h * kernel_w
    scattered = positions is not None
    blocks = fused_conv2d_blocks(rows, n_out, n_in, taps, x.element_size(), scattered, processors(x.device))
    steps = reduction_steps(n_in, taps, blocks.depth, blocks.flat)
    split = blocks.split > 1
    # Without shares nothing is written to `partial`.
    partial = torch.empty((blocks.split, rows, n_out), dtype=torch.float32, device=x.device) if split else out
    in_unit, out_unit = alignment(n_in), alignment(n_out)
    pointwise = taps == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    rounded = torch.backends.cudnn.allow_tf32 if tf32 is None else tf32
    precision = "tf32" if x.dtype == torch.float32 and rounded else "ieee"
    epilogue = (bias is not None, residual is not None, scattered, activation)
    programs = triton.cdiv(rows, blocks.rows) * triton.cdiv(n_out, blocks.columns)
    check_programs(_OP, programs)
    fused_conv2d_kernel[(programs, blocks.split)](
        *(x, weight, shift, addend, table, out, partial, rows, h, w, out_h, out_w),
        *(n_in // in_unit, n_out // out_unit, channels, slots, *stride, *padding, *dilation),
        *(steps, triton.cdiv(steps, blocks.split), in_unit, out_unit, kernel_h, kernel_w),
        *(pointwise, blocks.flat, rows + blocks.rows >= 1 << 31, split, precision),
        *(*epilogue, blocks.rows, blocks.columns, blocks.depth),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if split:
        add_shares_kernel[(triton.cdiv(rows, _SUM_ROWS) * triton.cdiv(n_out, _SUM_COLUMNS),)](
            *(partial, shift, addend, table, out, rows, n_out // out_unit, channels, slots),
            *(out_unit, blocks.split, *epilogue, _SUM_ROWS, _SUM_COLUMNS),
            num_warps=4,
        )
    return out
