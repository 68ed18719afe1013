"""Kernel of the fused convolution in the Triton language, an implicit GEMM over NHWC, and its launch.

Imported for CUDA tensors only.

Rows of the product are output positions (image, row, column), columns are output channels, the reduction runs over
taps and input channels. Offsets inside of one image are int32 (`checks.check_extent` refuses larger images),
everything that grows with the batch is int64. Sums are fp32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from redpp_serve.kernels.checks import check_extent, check_programs
from redpp_serve.kernels.epilogue_kernel import add_shares, finish
from redpp_serve.kernels.fused_conv2d.heuristics import fused_conv2d_blocks, reduction_steps
from redpp_serve.kernels.shapes import alignment, conv_output_size, empty_channels_last, processors

_OP = "redpp::fused_conv2d"


@triton.jit
def fused_conv2d_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    partial,
    rows,
    height,
    width,
    out_h,
    out_w,
    in_units,
    out_units,
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
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Compute one tile of the convolution; with SPLIT, one share of its reduction, as fp32 sums in `partial`.

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
            out,
            n_out,
            HAS_BIAS,
            HAS_RESIDUAL,
            ACTIVATION,
        )


def launch_fused_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tf32: bool | None = None,
) -> Tensor:
    """Launch the kernel for arguments of `fused_conv2d` that are already checked; fp32, fp16 or bf16.

    ``tf32`` rounds the products of fp32 to tf32; None: where torch's convolutions may.
    """
    n, n_in, h, w = x.shape
    n_out, _, kernel_h, kernel_w = weight.shape
    check_extent(_OP, x.shape, padding)
    out_h, out_w = conv_output_size((h, w), (kernel_h, kernel_w), stride, padding, dilation)
    out = empty_channels_last(x, (n, n_out, out_h, out_w))
    if out.numel() == 0:
        return out

    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    addend = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    shift = None if bias is None else bias.contiguous()
    rows, taps = n * out_h * out_w, kernel_h * kernel_w
    blocks = fused_conv2d_blocks(rows, n_out, n_in, taps, x.element_size(), processors(x.device))
    steps = reduction_steps(n_in, taps, blocks.depth, blocks.flat)
    split = blocks.split > 1
    # Without shares nothing is written to `partial`.
    partial = torch.empty((blocks.split, rows, n_out), dtype=torch.float32, device=x.device) if split else out
    in_unit, out_unit = alignment(n_in), alignment(n_out)
    pointwise = taps == 1 and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    rounded = torch.backends.cudnn.allow_tf32 if tf32 is None else tf32
    precision = "tf32" if x.dtype == torch.float32 and rounded else "ieee"
    programs = triton.cdiv(rows, blocks.rows) * triton.cdiv(n_out, blocks.columns)
    check_programs(_OP, programs)
    fused_conv2d_kernel[(programs, blocks.split)](
        *(x, weight, out if shift is None else shift, out if addend is None else addend, out, partial),
        *(rows, h, w, out_h, out_w, n_in // in_unit, n_out // out_unit, *stride, *padding, *dilation),
        *(steps, triton.cdiv(steps, blocks.split), in_unit, out_unit, kernel_h, kernel_w),
        *(pointwise, blocks.flat, rows + blocks.rows >= 1 << 31, split, precision),
        *(shift is not None, addend is not None, activation, blocks.rows, blocks.columns, blocks.depth),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if split:
        add_shares(partial, shift, addend, activation, out)
    return out
