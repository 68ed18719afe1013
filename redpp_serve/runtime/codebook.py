"""Lossless storage of a weight with few distinct values: a codebook and bit-packed indices into it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_VALUES = 1 << 16


@dataclass(frozen=True)
class Packed:
    """``codebook`` (K,) of the weight's dtype, ``indices`` (bytes,) uint8 holding ``bits`` bits a weight."""

    codebook: Tensor
    indices: Tensor
    bits: int


def index_bits(values: int) -> int:
    """Storage bits of an index into ``values`` values: 1, 2, 4, 8 or 16."""
    return next(bits for bits in (1, 2, 4, 8, 16) if 1 << bits >= values)


def encode(tensor: Tensor) -> Packed | None:
    """The packed form, or None where it would not be smaller. Keeps every bit of every value."""
    if not tensor.is_floating_point() or tensor.numel() < 64:
        return None
    flat = tensor.detach().cpu().contiguous().view(-1)
    flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])  # -0.0 is not 0.0
    sample = flat[:: max(1, flat.numel() // 4096)]
    if flat.numel() > 1 << 17 and torch.unique(sample).numel() > min(2048, sample.numel() // 2):
        return None  # plainly not a codebook: spare the sort of all weights
    values, inverse = torch.unique(flat, return_inverse=True)
    if values.numel() > _MAX_VALUES:
        return None
    bits = index_bits(values.numel())
    size = values.numel() * tensor.element_size() + math.ceil(flat.numel() * bits / 8)
    if size >= flat.numel() * tensor.element_size():
        return None
    return Packed(values.view(tensor.dtype), _pack(inverse, bits), bits)


def decode(codebook: Tensor, indices: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The weight of that shape.

    Raises:
        ValueError: sizes that do not fit together, or an index past the codebook's end.
    """
    if not all(type(size) is int and size >= 0 for size in shape) or codebook.dim() != 1:
        raise ValueError(f"a codebook of {codebook.dim()} dimensions for a weight of shape {shape}")
    count = math.prod(shape)
    if type(bits) is not int or bits not in (1, 2, 4, 8, 16):
        raise ValueError(f"an index of {bits} bits")
    if indices.dtype != torch.uint8 or indices.shape != (math.ceil(count * bits / 8),):
        raise ValueError(f"{indices.numel()} index bytes of {bits} bits for {count} weights")
    if bits == 16:
        pairs = indices.view(-1, 2).long()
        flat = pairs[:, 0] + (pairs[:, 1] << 8)
    else:
        shifts = torch.arange(0, 8, bits)
        flat = (indices.long()[:, None] >> shifts & (1 << bits) - 1).view(-1)[:count]
    if count and int(flat.max()) >= codebook.numel():
        raise ValueError("an index past the end of its codebook")
    return codebook[flat].view(*shape)


def _pack(indices: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return torch.stack([indices & 255, indices >> 8], 1).view(-1).to(torch.uint8)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(indices, (0, -indices.numel() % per_byte)).view(-1, per_byte)
    return (padded << torch.arange(0, 8, bits)).sum(1).to(torch.uint8)
