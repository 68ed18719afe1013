"""The layout of packed 4-bit indices, and the tables that decoding reads.

Weights of an output are cut into groups of `GROUP`; byte j of a group holds the index of its weight j in the low nibble
and that of weight j + GROUP / 2 in the high one. So a block of bytes becomes two blocks of weights, each with
neighbouring inputs, whatever the tile. The last group is filled up with index 0.
"""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from redpp_serve.kernels.checks import version

GROUP = 128
GROUP_BYTES = GROUP // 2
MOST_VALUES = 16
TABLE_ROWS = 128  # copies of the permutations' table: one for each row of a tile

# codebook -> (version, its tables by strategy)
_tables: MutableMapping[Tensor, tuple[int, dict[str, Tensor]]] = WeakTensorKeyDictionary()


def packed_bytes(n_in: int) -> int:
    """Return the number of bytes of one output's packed indices."""
    return -(-n_in // GROUP) * GROUP_BYTES


def pack_indices(index: Tensor) -> Tensor:
    """Pack indices (n_out, n_in) of any integer dtype, 0..15, into (n_out, packed bytes) uint8.

    Raises:
        ValueError: another shape or dtype, or an index outside of 0..15.
    """
    if index.dim() != 2 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"pack_indices: index must be integers (n_out, n_in), found {index.dtype} {tuple(index.shape)}"
        )
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < MOST_VALUES):
        raise ValueError(f"pack_indices: index must lie within 0..15, found {int(index.min())}..{int(index.max())}")
    padded = torch.nn.functional.pad(index.to(torch.uint8), (0, -index.shape[1] % GROUP))
    low, high = padded.view(len(index), padded.shape[1] // GROUP, 2, GROUP_BYTES).unbind(2)
    return (low | high << 4).reshape(len(index), packed_bytes(index.shape[1]))


def unpack_indices(indices: Tensor, n_in: int) -> Tensor:
    """Invert `pack_indices`: (n_out, packed bytes) to (n_out, n_in), both uint8."""
    groups = indices.view(len(indices), indices.shape[1] // GROUP_BYTES, 1, GROUP_BYTES)
    return torch.cat([groups & 15, groups >> 4], 2).view(len(indices), 2 * indices.shape[1])[:, :n_in]


def decode_table(codebook: Tensor, decode: str) -> Tensor:
    """Return the table that a strategy reads instead of the codebook, made once for an unchanged codebook.

    Args:
        codebook: (K,) of a dtype of 2 bytes.
        decode: ``pair``, ``prmt8`` or ``prmt16``.

    Returns:
        For ``pair`` (256,) int32, a byte's two values. Else (8, `TABLE_ROWS`) int32: words of the
        values' low bytes and then of their high bytes, four values to a word.
    """
    if codebook.is_cuda and torch.cuda.is_current_stream_capturing():
        return _table(codebook, decode)  # filled by the graph alone, so of no use to other calls
    known = _tables.get(codebook)
    if known is None or known[0] != version(codebook):
        known = _tables[codebook] = (version(codebook), {})
    kind = "pair" if decode == "pair" else "words"
    if kind not in known[1]:
        known[1][kind] = _table(codebook, decode)
    return known[1][kind]


def _table(codebook: Tensor, decode: str) -> Tensor:
    bits = torch.zeros(MOST_VALUES, dtype=torch.int32, device=codebook.device)
    bits[: len(codebook)] = codebook.view(torch.int16).to(torch.int32) & 0xFFFF
    return _pairs(bits) if decode == "pair" else _words(bits)


def _pairs(bits: Tensor) -> Tensor:
    byte = torch.arange(256, device=bits.device)
    return bits[byte & 15] | bits[byte >> 4] << 16


def _words(bits: Tensor) -> Tensor:
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=bits.device)
    halves = [(part.view(4, 4) << shifts).sum(1, dtype=torch.int32) for part in (bits & 255, bits >> 8)]
    return torch.cat(halves).view(8, 1).repeat(1, TABLE_ROWS)
