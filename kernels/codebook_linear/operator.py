"""`redpp::codebook_linear`: a Linear whose weights are 4-bit indices into at most 16 values.

On the CPU, and for fp64 everywhere, plain PyTorch runs (`codebook_linear_reference`); on CUDA a kernel in the Triton
language that reads a quarter of the bytes of a half-precision weight. Inference only: no gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.kernels.checks import check_activation, check_input, check_once, expect
from redpp_serve.kernels.codebook_linear.heuristics import check_decode
from redpp_serve.kernels.codebook_linear.packing import MOST_VALUES, packed_bytes, unpack_indices
from redpp_serve.kernels.epilogue import ACTIVATIONS
from redpp_serve.kernels.registration import register
from redpp_serve.kernels.shapes import empty_contiguous, working_dtype

_OP = "redpp::codebook_linear"
_BLOCK_ELEMENTS = 1 << 20  # decoded at a time by the reference: 4 MiB in fp32 stay in a cache


def codebook_linear(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    decode: str = "auto",
) -> Tensor:
    """Compute activation(x weight^T + bias) with weight = codebook[index].

    Args:
        x: (..., n_in); fp32, fp16, bf16 or fp64.
        indices: (n_out, bytes) uint8, from `packing.pack_indices`.
        codebook: (K,) in the dtype of `x`, 1 <= K <= 16.
        bias: (n_out,) in the dtype of `x`, or None.
        activation: a name of `epilogue.ACTIVATIONS`.
        decode: how the GPU turns indices into values: ``prmt8`` (K <= 8) or ``prmt16`` (byte permutations in
            registers), ``pair`` (a table of all bytes), each for fp16 and bf16, ``pointer`` (the codebook itself, any
            dtype), or ``auto``. On the CPU all give the same.

    Returns:
        (..., n_out), contiguous. Sums are fp32 for all but fp64, rounded once; on CUDA the products of fp32 are
        rounded to tf32 where `torch.backends.cuda.matmul.allow_tf32` is on.

    Raises:
        ValueError: types, shapes, indices or a strategy that do not fit together.
    """
    result: Tensor = torch.ops.redpp.codebook_linear(x, indices, codebook, bias, activation, decode)
    return result


def codebook_linear_reference(
    x: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, activation: str, decode: str
) -> Tensor:
    """Compute the operator in plain PyTorch, a block of outputs at a time, whatever the strategy `decode`.

    Half precisions are rounded once, at the end.
    """
    work = working_dtype(x.dtype)
    n_in = x.shape[-1]
    rows, values = x.to(work), codebook.to(work)
    block = max(1, _BLOCK_ELEMENTS // max(1, n_in))
    parts = [F.linear(rows, values[unpack_indices(part, n_in).int()]) for part in torch.split(indices, block)]
    total = torch.cat(parts, -1) if parts else rows.new_zeros((*rows.shape[:-1], 0))
    if bias is not None:
        total = total + bias.to(work)
    return ACTIVATIONS[activation](total).to(x.dtype)


def _check(
    x: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, activation: str, decode: str
) -> Sequence[int]:
    check_activation(_OP, activation)
    check_input(_OP, x, "(..., n_in)", x.dim() > 0)
    if codebook.dim() != 1 or not 1 <= len(codebook) <= MOST_VALUES:
        raise ValueError(f"{_OP}: codebook must hold 1 to {MOST_VALUES} values, found {tuple(codebook.shape)}")
    expect(_OP, "codebook", codebook, x, x.dtype, codebook.shape)
    n_out = indices.shape[0] if indices.dim() else 0
    expect(_OP, "indices", indices, x, torch.uint8, (n_out, packed_bytes(x.shape[-1])))
    expect(_OP, "bias", bias, x, x.dtype, (n_out,))
    if x.device.type == "cuda" and x.dtype != torch.float64:
        check_decode(_OP, decode, len(codebook), x.element_size())
    else:
        check_decode(_OP, decode, 1, 2)  # its name alone
    return *x.shape[:-1], n_out


def _check_values(x: Tensor, indices: Tensor, codebook: Tensor, *rest: Any) -> None:
    if len(codebook) < MOST_VALUES and indices.numel():
        check_once(_check_indices, (len(codebook),), indices)


def _check_indices(values: int, indices: Tensor) -> None:
    largest = max(int((indices & 15).max()), int((indices >> 4).max()))
    if largest >= values:
        raise ValueError(f"{_OP}: indices must be below the codebook's {values} values, found {largest}")


register(
    "codebook_linear",
    "(Tensor x, Tensor indices, Tensor codebook, Tensor? bias, str activation, str decode) -> Tensor",
    check=_check,
    reference=codebook_linear_reference,
    kernel="redpp_serve.kernels.codebook_linear.kernel",
    allocate=empty_contiguous,
    check_values=_check_values,
)
