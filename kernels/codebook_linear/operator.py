"""`redpp::codebook_linear`: a Linear whose weights are 4-bit indices into at most 16 values.

On the CPU, and for fp64 everywhere, plain PyTorch runs (`codebook_linear_reference`); on CUDA a Triton kernel that
reads a quarter of the bytes of a half-precision weight. Inference only: no gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from redpp_serve.kernels.checks import FLOATS, expect, version
from redpp_serve.kernels.codebook_linear.heuristics import check_decode
from redpp_serve.kernels.codebook_linear.packing import MOST_VALUES, packed_bytes, unpack_indices
from redpp_serve.kernels.epilogue import ACTIVATIONS, check_activation
from redpp_serve.kernels.registration import register

_OP = "redpp::codebook_linear"
_BLOCK_ELEMENTS = 1 << 20  # decoded at a time by the reference: 4 MiB in fp32 stay in a cache

# indices -> (version, number of values) that they were found good with.
_accepted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def codebook_linear(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    decode: str = "auto",
) -> Tensor:
    """activation(x weight^T + bias) with weight = codebook[index].

    Args:
        x: (..., n_in); fp32, fp16, bf16 or fp64.
        indices: (n_out, bytes) uint8, from `codebook_packing.pack_indices`.
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
    return torch.ops.redpp.codebook_linear(x, indices, codebook, bias, activation, decode)


def codebook_linear_reference(
    x: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """The operator's meaning in plain PyTorch, a block of outputs at a time. Half precisions are rounded once, at last."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    n_in = x.shape[-1]
    rows, values = x.to(work), codebook.to(work)
    block = max(1, _BLOCK_ELEMENTS // max(1, n_in))
    parts = [F.linear(rows, values[unpack_indices(part, n_in).int()]) for part in indices.split(block)]
    total = torch.cat(parts, -1) if parts else rows.new_zeros((*rows.shape[:-1], 0))
    if bias is not None:
        total = total + bias.to(work)
    return ACTIVATIONS[activation](total).to(x.dtype)


def codebook_linear_flops(x: Tensor, indices: Tensor, *rest: object, out_val: Tensor) -> int:
    """Two per multiply-accumulate of the Linear that it stands for; decoding counts nothing."""
    return 2 * out_val.numel() * x.shape[-1]


def _check(x: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, activation: str, decode: str) -> None:
    """Refuses what does not fit together, without reading values."""
    check_activation(_OP, activation)
    if x.dim() == 0 or x.dtype not in FLOATS:
        raise ValueError(f"{_OP}: x must be (..., n_in) in fp32, fp16, bf16 or fp64, found {x.dtype} {tuple(x.shape)}")
    if codebook.dim() != 1 or not 1 <= len(codebook) <= MOST_VALUES:
        raise ValueError(f"{_OP}: codebook must hold 1 to {MOST_VALUES} values, found {tuple(codebook.shape)}")
    expect(_OP, "codebook", codebook, x.device, x.dtype, codebook.shape)
    n_out = indices.shape[0] if indices.dim() else 0
    expect(_OP, "indices", indices, x.device, torch.uint8, (n_out, packed_bytes(x.shape[-1])))
    if bias is not None:
        expect(_OP, "bias", bias, x.device, x.dtype, (n_out,))
    if x.device.type == "cuda" and x.dtype != torch.float64:
        check_decode(_OP, decode, len(codebook), x.element_size())
    else:
        check_decode(_OP, decode, 1, 2)  # its name alone


def check_indices(indices: Tensor, values: int) -> None:
    """Refuses an index past the codebook's end.

    On CUDA this synchronises, so the answer is remembered for as long as the tensor lives unchanged. Tensors made
    under `torch.inference_mode` keep no version: changes to them go unseen.

    Raises:
        ValueError: with the largest index found.
    """
    key = (version(indices), values)
    if values == MOST_VALUES or not indices.numel() or _accepted.get(indices) == key:
        return
    largest = max(int((indices & 15).max()), int((indices >> 4).max()))
    if largest >= values:
        raise ValueError(f"{_OP}: indices must be below the codebook's {values} values, found {largest}")
    _accepted[indices] = key


def _cpu(x: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, activation: str, decode: str) -> Tensor:
    _check(x, indices, codebook, bias, activation, decode)
    check_indices(indices, len(codebook))
    return codebook_linear_reference(x, indices, codebook, bias, activation)


def _cuda(x: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, activation: str, decode: str) -> Tensor:
    if x.dtype == torch.float64:
        return _cpu(x, indices, codebook, bias, activation, decode)
    from redpp_serve.kernels.codebook_linear.kernel import codebook_linear_triton

    _check(x, indices, codebook, bias, activation, decode)
    check_indices(indices, len(codebook))
    with torch.cuda.device(x.device):
        return codebook_linear_triton(x, indices, codebook, bias, activation, decode)


def _fake(x: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, activation: str, decode: str) -> Tensor:
    _check(x, indices, codebook, bias, activation, decode)
    return x.new_empty((*x.shape[:-1], indices.shape[0]))


register(
    "codebook_linear",
    "(Tensor x, Tensor indices, Tensor codebook, Tensor? bias, str activation, str decode) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
