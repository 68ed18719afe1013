"""Kernel of the codebook Linear in the Triton language, and its launch. Imported for CUDA tensors only.

Weights stay packed in memory and become values in registers, as operand A of the matrix instructions: the transposed
product (outputs x inputs) (inputs x rows). Offsets that grow with the tensors are int64. Sums are fp32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from redpp_serve.kernels.checks import check_programs
from redpp_serve.kernels.codebook_linear.decode import decode, load_words
from redpp_serve.kernels.codebook_linear.heuristics import codebook_blocks
from redpp_serve.kernels.codebook_linear.packing import GROUP_BYTES, TABLE_ROWS, decode_table
from redpp_serve.kernels.epilogue_kernel import activate, add_shares
from redpp_serve.kernels.shapes import alignment, processors

_OP = "redpp::codebook_linear"


@triton.jit
def codebook_linear_kernel(
    x,
    indices,
    table,
    codebook,
    bias,
    out,
    partial,
    rows,
    n_out,
    in_units,
    row_bytes,
    steps,
    steps_per_split,
    IN_UNIT: tl.constexpr,
    DECODE: tl.constexpr,
    TABLE_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
):
    """Compute one tile of the result; with SPLIT, one share of its reduction, as fp32 sums in `partial`.

    A step reads GROUPS groups of each output's bytes. A group's low nibbles are the weights of GROUP_BYTES neighbouring
    inputs, its high ones those of the next GROUP_BYTES.
    """
    n_in = in_units * IN_UNIT
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    pid = tl.program_id(0)
    output = pid // row_blocks * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    row = pid % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output_inside, row_inside = output < n_out, row < rows
    lane = tl.arange(0, GROUP_BYTES)
    source = indices + (output.to(tl.int64) * row_bytes)[:, None] + lane[None, :]
    inputs = x + (row.to(tl.int64) * n_in)[None, :]
    words = (
        load_words(table, tl.arange(0, BLOCK_OUTPUTS), TABLE_ROWS) if DECODE == "prmt8" or DECODE == "prmt16" else ()
    )

    first = tl.program_id(1) * steps_per_split
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], dtype=tl.float32)
    for step in range(first, min(first + steps_per_split, steps)):
        for k in tl.static_range(GROUPS):
            group = step * GROUPS + k
            stored = output_inside[:, None] & (group * GROUP_BYTES < row_bytes)
            packed = tl.load(source + group * GROUP_BYTES, mask=stored, other=0, eviction_policy="evict_first")
            low, high = decode(packed, words, table, codebook, DECODE)
            at = group * 2 * GROUP_BYTES + lane
            value = tl.load(inputs + at[:, None], mask=(at < n_in)[:, None] & row_inside[None, :], other=0.0)
            total = tl.dot(low, value, total, input_precision=PRECISION)
            at += GROUP_BYTES
            value = tl.load(inputs + at[:, None], mask=(at < n_in)[:, None] & row_inside[None, :], other=0.0)
            total = tl.dot(high, value, total, input_precision=PRECISION)

    inside = output_inside[:, None] & row_inside[None, :]
    if SPLIT:
        target = (tl.program_id(1).to(tl.int64) * rows + row)[None, :] * n_out + output[:, None]
        tl.store(partial + target, total, mask=inside)
    else:
        if HAS_BIAS:
            total += tl.load(bias + output, mask=output_inside, other=0.0).to(tl.float32)[:, None]
        target = row.to(tl.int64)[None, :] * n_out + output[:, None]
        tl.store(out + target, activate(total, ACTIVATION).to(out.dtype.element_ty), mask=inside)


def launch_codebook_linear(
    x: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, activation: str, decode: str
) -> Tensor:
    """Launch the kernel for arguments of `codebook_linear` that are already checked; fp32, fp16 or bf16."""
    n_out, (*shape, n_in) = indices.shape[0], x.shape
    rows = math.prod(shape)
    out = torch.empty((rows, n_out), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out.view(*shape, n_out)
    x, indices, values = x.reshape(rows, n_in).contiguous(), indices.contiguous(), codebook.contiguous()
    shift = None if bias is None else bias.contiguous()
    blocks = codebook_blocks(
        rows, n_out, indices.shape[1], len(codebook), x.element_size(), decode, processors(x.device)
    )
    table = values if blocks.decode == "pointer" else decode_table(codebook, blocks.decode)
    steps, split = triton.cdiv(indices.shape[1], blocks.groups * GROUP_BYTES), blocks.split > 1
    # Without shares nothing is written to `partial`.
    partial = torch.empty((blocks.split, rows, n_out), dtype=torch.float32, device=x.device) if split else out
    unit = alignment(n_in)
    precision = "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
    programs = triton.cdiv(rows, blocks.rows) * triton.cdiv(n_out, blocks.outputs)
    check_programs(_OP, programs)
    codebook_linear_kernel[(programs, blocks.split)](
        *(
            x,
            indices,
            table,
            values,
            out if shift is None else shift,
            out,
            partial,
            rows,
            n_out,
            n_in // unit,
            indices.shape[1],
        ),
        *(steps, triton.cdiv(steps, blocks.split), unit, blocks.decode, TABLE_ROWS, precision, split),
        *(bias is not None, activation, blocks.rows, blocks.outputs, blocks.groups, GROUP_BYTES),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if split:
        add_shares(partial, shift, None, activation, out)
    return out.view(*shape, n_out)
