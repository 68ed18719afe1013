"""Exact input-wise splitting (RED++, arXiv 2110.01397) and what it costs.

For each input channel the kernels that its outputs use are stored once; an output picks its kernel by index. All-zero
kernels are dropped and a kernel shares the storage of its negative (stored indices name sign and zero too). Two readings of the method's unit are counted:
the k x k kernel of one (output, input) pair, which `split_weight` builds, and the scalar weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.layers import Layer
from ..runtime.splitting import SPLIT_CHUNK, Split, split_weight

__all__ = ["Counts", "Split", "count_dense", "count_kernels", "count_scalars", "expected_kernels", "split_weight"]
_DRAWS = 1 << 14


@dataclass(frozen=True)
class Counts:
    """Operations for one input and stored bytes."""

    multiplications: int
    additions: int
    bytes: int


def count_dense(layer: Layer, element_size: int = 4) -> Counts:
    """Cost of the layer as it is. Additions are those of the sum over inputs; a bias is left out everywhere."""
    size = math.prod(layer.shape)
    return Counts(layer.macs, layer.positions * (size - layer.shape[0]), size * element_size)


def count_kernels(layer: Layer, split: Split, element_size: int = 4) -> Counts:
    """Cost of the split whose unit is the kernel of a pair."""
    taps = split.kernels[0].numel() if len(split.kernels) else 1
    unique = len(split.kernels)
    used = (split.index >= 0).sum(1)
    sums = int((used - 1).clamp_min(0).sum())
    n_out = split.index.shape[0] // layer.groups
    used_as = (split.index.long() * 2 + (split.sign < 0)).view(layer.groups, n_out, -1)
    bits = n_out * sum(int(_bits(group).sum()) for group in used_as)
    return Counts(
        layer.positions * unique * taps,
        layer.positions * ((taps - 1) * unique + sums),
        unique * taps * element_size + -(-bits // 8),
    )


def count_scalars(layer: Layer, weight: Tensor, element_size: int = 4) -> Counts:
    """Cost of the split whose unit is the scalar weight: distinct magnitudes in each column of the im2col matrix."""
    n_out = layer.shape[0] // layer.groups
    columns = weight.reshape(layer.groups, n_out, -1).transpose(0, 1).reshape(n_out, -1)
    unique = 0
    bits = 0
    for block in columns.split(max(1, SPLIT_CHUNK // n_out), 1):
        ordered = block.abs().sort(0).values
        fresh = torch.cat([ordered[:1] != 0, (ordered[1:] != ordered[:-1])]).sum(0)
        unique += int(fresh.sum())
        bits += n_out * int(_bits(block).sum())
    used = (weight.reshape(layer.shape[0], -1) != 0).sum(1)
    sums = int((used - 1).clamp_min(0).sum())
    return Counts(layer.positions * unique, layer.positions * sums, unique * element_size + -(-bits // 8))


def expected_kernels(layer: Layer, frequencies: Tensor, values: Tensor) -> float:
    """Unique kernels to expect in one layer when its weights are drawn independently with these frequencies (K,).

    The sum over kernels k, up to sign and zero left out, of 1 - (1 - p_k)^n_out. Over scalars (1 x 1) it is taken as
    it stands; there are too many k x k kernels, so it is the mean of (1 - (1 - p_k)^n_out) / p_k over kernels drawn
    with a fixed seed.
    """
    n_out, taps = layer.shape[0] // layer.groups, math.prod(layer.shape[2:])
    inputs = layer.shape[1] * layer.groups
    magnitudes, group = torch.unique(values.abs(), return_inverse=True)
    p = torch.zeros(len(magnitudes), dtype=torch.float64).index_add_(0, group, frequencies.double())
    if taps == 1:
        p = p[magnitudes != 0]
        return inputs * float((1 - (1 - p) ** n_out).sum())
    drawn = torch.multinomial(frequencies, _DRAWS * taps, True, generator=torch.Generator().manual_seed(0)).view(
        _DRAWS, taps
    )
    negative = torch.where(values[:, None] == -values, frequencies, 0.0).sum(1)  # how likely each value's negative is
    p = (frequencies[drawn].prod(1) + negative[drawn].prod(1)).clamp_max(1.0)
    seen = -torch.expm1(n_out * torch.log1p(-p)) / p
    return inputs * float(torch.where((values[drawn] != 0).any(1), seen, 0.0).mean())


def _bits(used: Tensor) -> Tensor:
    """Bits (columns,) of an index into what each column of (n_out, columns) holds: sign and zero are told apart."""
    ordered = used.sort(0).values
    choices = 1 + (ordered[1:] != ordered[:-1]).sum(0)
    return torch.log2(choices.double()).ceil().long()
