"""Kernel of the depthwise convolution over NHWC in the Triton language, and its launch.

Imported for CUDA tensors only.

Bound by memory: threads hold neighbouring channels, so that loads and stores are wide, and a program's output rows
share the input rows that they have in common. Sums are fp32. Offsets inside of one image are int32
(`checks.check_extent` refuses larger images), those between images int64.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from redpp_serve.kernels.checks import check_extent, check_programs
from redpp_serve.kernels.depthwise_conv2d.heuristics import depthwise_blocks
from redpp_serve.kernels.epilogue_kernel import activate
from redpp_serve.kernels.shapes import alignment, conv_output_size, empty_channels_last, processors

_OP = "redpp::depthwise_conv2d"


@triton.jit
def load_row(x, y, z, height, width, channel, inside, channels):
    """Load the values at (row y, columns z) of one image as fp32, 0 outside of it; (columns, channels)."""
    visible = (y >= 0) & (y < height) & ((z >= 0) & (z < width))[:, None] & inside[None, :]
    return tl.load(x + (y * width + z)[:, None] * channels + channel[None, :], mask=visible, other=0.0).to(tl.float32)


@triton.jit
def add_tap(total, value, taps, inside, R: tl.constexpr, offset_s, stride_r, KERNEL_H: tl.constexpr):
    """Return total + value * the window's row R; `total` where the window has no such row."""
    if R >= 0 and R < KERNEL_H:
        tap = tl.load(taps + (R * stride_r + offset_s), mask=inside, other=0.0)
        total += value * tap.to(tl.float32)[None, :]
    return total


@triton.jit
def store_row(
    total, bias, out, y, z, channel, inside, out_h, out_w, channels, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Finish and store one row of outputs of one image."""
    if HAS_BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = (y * out_w + z)[:, None] * channels + channel[None, :]
    visible = (y < out_h) & (z < out_w)[:, None] & inside[None, :]
    tl.store(out + target, activate(total, ACTIVATION).to(out.dtype.element_ty), mask=visible)


@triton.jit
def depthwise_conv2d_kernel(
    x,
    weight,
    bias,
    out,
    height,
    width,
    out_h,
    out_w,
    channel_units,
    weight_row_units,
    weight_column_units,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    UNIT: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    STRIDE_H: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Compute ROWS (1 or 4) rows x BLOCK_COLUMNS columns x BLOCK_CHANNELS channels of one image.

    Channels, and the steps between the weight's rows and columns, come as multiples of a constant, from which the
    compiler learns how wide loads and stores may be. WEIGHT_STRIDE: the step between channels of the weight.
    """
    channels = channel_units * UNIT
    channel_blocks, column_blocks = tl.cdiv(channels, BLOCK_CHANNELS), tl.cdiv(out_w, BLOCK_COLUMNS)
    row_blocks = tl.cdiv(out_h, ROWS)
    pid = tl.program_id(0)
    channel = pid % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    pid = pid // channel_blocks
    z = pid % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    pid = pid // column_blocks
    y = pid % row_blocks * ROWS
    image = (pid // row_blocks).to(tl.int64)
    x += image * height * width * channels
    out += image * out_h * out_w * channels
    inside = channel < channels
    top, left = y * STRIDE_H - padding_h, z * stride_w - padding_w
    taps = weight + channel * WEIGHT_STRIDE
    weight_row, weight_column = weight_row_units * WEIGHT_UNIT, weight_column_units * WEIGHT_UNIT

    total0 = tl.zeros([BLOCK_COLUMNS, BLOCK_CHANNELS], dtype=tl.float32)
    if ROWS == 1:
        for r in range(KERNEL_H):
            for s in range(KERNEL_W):
                row, columns = top + r * dilation_h, left + s * dilation_w
                value = load_row(x, row, columns, height, width, channel, inside, channels)
                tap = tl.load(taps + (r * weight_row + s * weight_column), mask=inside, other=0.0)
                total0 += value * tap.to(tl.float32)[None, :]
        store_row(total0, bias, out, y, z, channel, inside, out_h, out_w, channels, HAS_BIAS, ACTIVATION)
    else:
        total1, total2, total3 = total0, total0, total0
        for i in tl.static_range(3 * STRIDE_H + KERNEL_H):
            for s in tl.static_range(KERNEL_W):
                offset = s * weight_column
                value = load_row(x, top + i, left + s * dilation_w, height, width, channel, inside, channels)
                total0 = add_tap(total0, value, taps, inside, i, offset, weight_row, KERNEL_H)
                total1 = add_tap(total1, value, taps, inside, i - STRIDE_H, offset, weight_row, KERNEL_H)
                total2 = add_tap(total2, value, taps, inside, i - 2 * STRIDE_H, offset, weight_row, KERNEL_H)
                total3 = add_tap(total3, value, taps, inside, i - 3 * STRIDE_H, offset, weight_row, KERNEL_H)
        store_row(total0, bias, out, y, z, channel, inside, out_h, out_w, channels, HAS_BIAS, ACTIVATION)
        store_row(total1, bias, out, y + 1, z, channel, inside, out_h, out_w, channels, HAS_BIAS, ACTIVATION)
        store_row(total2, bias, out, y + 2, z, channel, inside, out_h, out_w, channels, HAS_BIAS, ACTIVATION)
        store_row(total3, bias, out, y + 3, z, channel, inside, out_h, out_w, channels, HAS_BIAS, ACTIVATION)


def launch_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Launch the kernel for arguments of `depthwise_conv2d` that are already checked; fp32, fp16 or bf16."""
    n, channels, h, w = x.shape
    kernel_h, kernel_w = weight.shape[2:]
    check_extent(_OP, x.shape, padding)
    out_h, out_w = conv_output_size((h, w), (kernel_h, kernel_w), stride, padding, dilation)
    out = empty_channels_last(x, (n, channels, out_h, out_w))
    if out.numel() == 0:
        return out

    x = x.contiguous(memory_format=torch.channels_last)
    shift = out if bias is None else bias.contiguous()
    blocks = depthwise_blocks(
        *(n, channels, (out_h, out_w), (kernel_h, kernel_w), stride[0], dilation[0]),
        *(x.element_size(), processors(x.device)),
    )
    unit = alignment(channels)
    programs = n * triton.cdiv(out_h, blocks.rows) * triton.cdiv(out_w, blocks.columns)
    programs *= triton.cdiv(channels, blocks.channels)
    check_programs(_OP, programs)
    between_channels, _, between_rows, between_columns = weight.stride()
    weight_unit = alignment(between_rows | between_columns)
    depthwise_conv2d_kernel[(programs,)](
        *(x, weight, shift, out, h, w, out_h, out_w, channels // unit),
        *(between_rows // weight_unit, between_columns // weight_unit, stride[1], *padding, *dilation),
        *(unit, between_channels, weight_unit, stride[0], kernel_h, kernel_w, bias is not None, activation),
        *(blocks.rows, blocks.columns, blocks.channels),
        num_warps=blocks.warps,
    )
    return out
