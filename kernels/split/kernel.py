"""Kernels of the input-wise split in the Triton language, and their launch. Imported for CUDA tensors only.

Two launches per range of output positions: `multiply_kernel` writes every unique product once into an fp32 buffer,
`gather_sum_kernel` adds the products each output needs. A position is one (image, row, column) of the output,
counted in int64 because large batches pass 2^31. All arithmetic is fp32, whatever the precision of the tensors.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from redpp_serve.kernels.shapes import conv_output_size
from redpp_serve.kernels.split.heuristics import gather_blocks, multiply_blocks, positions_per_launch


@triton.jit
def multiply_kernel(
    x,
    kernels,
    channel,
    products,
    rows,
    start,
    stop,
    width,
    n_in,
    height,
    image_width,
    out_h,
    out_w,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Store products[row, p - start] = (kernels[row] * x[:, channel[row]]) at position p, for start <= p < stop."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    pid = tl.program_id(0)
    row = (pid % row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (pid // row_blocks).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)[None, :]
    position = column + start
    row_inside, inside = row < rows, position < stop

    plane = position % (out_h * out_w)
    image = position // (out_h * out_w)
    top = plane // out_w * stride_h - padding_h
    left = plane % out_w * stride_w - padding_w
    source = (image * n_in + tl.load(channel + row, mask=row_inside, other=0)) * height

    total = tl.zeros([BLOCK_ROWS, BLOCK_POSITIONS], dtype=tl.float32)
    for r in range(KERNEL_H):
        for s in range(KERNEL_W):
            y, z = top + r * dilation_h, left + s * dilation_w
            visible = inside & (y >= 0) & (y < height) & (z >= 0) & (z < image_width)
            tap = tl.load(kernels + row * (KERNEL_H * KERNEL_W) + (r * KERNEL_W + s), mask=row_inside, other=0.0)
            value = tl.load(x + (source + y) * image_width + z, mask=row_inside & visible, other=0.0)
            total += tap.to(tl.float32) * value.to(tl.float32)
    tl.store(products + row * width + column, total, mask=row_inside & inside)


@triton.jit
def gather_sum_kernel(
    products,
    index,
    sign,
    bias,
    out,
    start,
    stop,
    width,
    n_out,
    n_terms,
    plane,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Store out[image, o] at position p = bias[o] + sum over i of sign[o, i] * products[index[o, i], p - start]."""
    # Programs that follow each other share a position block, so the products they gather stay in L2.
    output_blocks = tl.cdiv(n_out, BLOCK_OUTPUTS)
    pid = tl.program_id(0)
    output = (pid % output_blocks).to(tl.int64) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    column = (pid // output_blocks).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    position = column + start
    output_inside, inside = output < n_out, position < stop

    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS, BLOCK_POSITIONS], dtype=tl.float32)
    for first in range(0, n_terms, BLOCK_INPUTS):
        term = first + tl.arange(0, BLOCK_INPUTS)
        pair = output[:, None] * n_terms + term[None, :]
        pair_inside = output_inside[:, None] & (term[None, :] < n_terms)
        row = tl.load(index + pair, mask=pair_inside, other=-1)
        factor = tl.load(sign + pair, mask=pair_inside, other=0).to(tl.float32)
        # A dropped kernel (row -1) is neither read nor added.
        read = (row >= 0)[:, :, None] & inside[None, None, :]
        value = tl.load(products + row.to(tl.int64)[:, :, None] * width + column[None, None, :], mask=read, other=0.0)
        total += factor[:, :, None] * value
    result = tl.sum(total, axis=1)
    if HAS_BIAS:
        result += tl.load(bias + output, mask=output_inside, other=0.0).to(tl.float32)[:, None]
    target = (position // plane)[None, :] * n_out + output[:, None]
    target = target * plane + (position % plane)[None, :]
    tl.store(out + target, result.to(out.dtype.element_ty), mask=output_inside[:, None] & inside[None, :])


def launch_split_conv2d(
    x: Tensor,
    kernels: Tensor,
    channel: Tensor,
    index: Tensor,
    sign: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Launch both kernels for arguments of `split_conv2d` that are already checked; fp32, fp16 or bf16.

    The kernels do not need `groups`: `index` and `channel` say which input each product reads.
    """
    n, n_in, h, w = x.shape
    n_out, n_terms = index.shape
    rows, kernel_h, kernel_w = kernels.shape
    out_h, out_w = conv_output_size((h, w), (kernel_h, kernel_w), stride, padding, dilation)
    out = torch.empty((n, n_out, out_h, out_w), dtype=x.dtype, device=x.device)
    positions = n * out_h * out_w
    if out.numel() == 0:
        return out

    x, kernels, channel, index, sign = (t.contiguous() for t in (x, kernels, channel, index, sign))
    shift = bias.contiguous() if bias is not None else out
    width = positions_per_launch(rows, positions)
    products = torch.empty((rows, width), dtype=torch.float32, device=x.device)
    multiply, gather = multiply_blocks(rows, width), gather_blocks(n_out, n_terms, width)
    for start in range(0, positions, width):
        stop = min(start + width, positions)
        if rows:
            grid = (triton.cdiv(rows, multiply.rows) * triton.cdiv(stop - start, multiply.positions),)
            multiply_kernel[grid](
                *(x, kernels, channel, products, rows, start, stop, width, n_in, h, w, out_h, out_w),
                *(*stride, *padding, *dilation, kernel_h, kernel_w, multiply.rows, multiply.positions),
                num_warps=multiply.warps,
            )
        grid = (triton.cdiv(n_out, gather.outputs) * triton.cdiv(stop - start, gather.positions),)
        gather_sum_kernel[grid](
            *(products, index, sign, shift, out, start, stop, width, n_out, n_terms, out_h * out_w),
            *(bias is not None, gather.outputs, gather.inputs, gather.positions),
            num_warps=gather.warps,
        )
    return out


def launch_split_linear(
    x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None
) -> Tensor:
    """Launch both kernels for a linear layer, which is a 1x1 convolution over images of one position."""
    images = x.reshape(-1, x.shape[-1], 1, 1)
    out = launch_split_conv2d(images, values.view(-1, 1, 1), channel, index, sign, bias, (1, 1), (0, 0), (1, 1), 1)
    return out.view(*x.shape[:-1], index.shape[0])
