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

_CHUNK = 1 << 22
_DRAWS = 1 << 14
_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Split:
    """A weight (n_out, n_in / groups, kh, kw) as unique kernels for each input channel.

    ``kernels`` (U, kh, kw), the input channel of each in ``channel`` (U,) int64, and for each pair the row of
    ``kernels`` (-1: all zero) in ``index`` and its ``sign``, both shaped (n_out, n_in / groups).
    """

    kernels: Tensor
    channel: Tensor
    index: Tensor
    sign: Tensor

    def rebuild(self) -> Tensor:
        """The weight again, bit by bit (a zero's sign apart)."""
        padded = torch.cat([self.kernels, self.kernels.new_zeros(1, *self.kernels.shape[1:])])
        return padded[self.index.long()] * self.sign[..., None, None].to(padded.dtype)


@dataclass(frozen=True)
class Counts:
    """Operations for one input and stored bytes."""

    multiplications: int
    additions: int
    bytes: int


def split_weight(weight: Tensor, groups: int = 1) -> Split:
    """Split a weight; a Linear's (n_out, n_in) counts as 1 x 1. Raises nothing; the result is checked bit by bit."""
    if weight.dim() == 2:
        weight = weight[..., None, None]
    n_out, n_in, kh, kw = weight.shape
    flat = (
        weight.reshape(groups, n_out // groups, n_in, kh * kw)
        .transpose(0, 1)
        .reshape(n_out // groups, groups * n_in, -1)
    )
    parts, offset = [], 0
    for start in range(0, flat.shape[1], max(1, _CHUNK // flat[:, 0].numel())):
        block = flat[:, start : start + max(1, _CHUNK // flat[:, 0].numel())]
        kernels, channel, index, sign = _split_block(block)
        parts.append((kernels, channel + start, torch.where(index >= 0, index + offset, index), sign))
        offset += len(kernels)
    kernels, channel = (torch.cat([p[k] for p in parts]) for k in (0, 1))
    index, sign = (
        torch.cat([p[k] for p in parts], 1).view(n_out // groups, groups, n_in).transpose(0, 1).reshape(n_out, n_in)
        for k in (2, 3)
    )
    return Split(kernels.view(-1, kh, kw), channel, index.to(torch.int32), sign)


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
    for block in columns.split(max(1, _CHUNK // n_out), 1):
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


def _split_block(block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unique kernels of (n_out, inputs, taps): kernels (U, taps), their input, index and sign (n_out, inputs)."""
    n_out, inputs, taps = block.shape
    nonzero = block != 0
    first = nonzero.to(torch.uint8).argmax(2, keepdim=True)
    sign = block.gather(2, first)[..., 0].sign()
    canonical = block * sign[..., None] + 0.0  # + 0.0 turns -0.0 into 0.0
    for attempt in range(4):
        key = _fingerprint(canonical, attempt)
        ordered, order = key.sort(dim=0, stable=True)
        fresh = torch.ones_like(ordered, dtype=torch.bool)
        fresh[1:] = ordered[1:] != ordered[:-1]
        fresh &= sign.gather(0, order) != 0
        fresh_t, order_t = fresh.T.reshape(-1), order.T.reshape(-1)  # input by input
        number = (fresh_t.cumsum(0) - 1).view(inputs, n_out)
        index = torch.empty_like(number).scatter_(1, order.T, number).T
        index = torch.where(sign != 0, index, -1)
        chosen = fresh_t.nonzero().view(-1)
        channel = chosen // n_out
        kernels = canonical[order_t[chosen], channel]
        if len(kernels) == 0 or torch.equal(kernels[index.clamp_min(0)] * sign.abs()[..., None], canonical):
            return kernels, channel, index, sign.to(torch.int8)
    raise AssertionError("four fingerprints collided")


def _fingerprint(values: Tensor, attempt: int) -> Tensor:
    """A 64-bit fingerprint of the last dimension; zero kernels sort together like any other."""
    bits = values.contiguous().view(_INT[values.element_size()]).long()
    if bits.shape[-1] == 1:
        return bits[..., 0]
    generator = torch.Generator().manual_seed(attempt)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[-1],), generator=generator) | 1
    mixed = bits * -7046029254386353131  # odd constant of Weyl's sequence, 2^64 / golden ratio
    mixed = mixed ^ mixed >> 29
    return (mixed * factors).sum(-1)


def _bits(used: Tensor) -> Tensor:
    """Bits (columns,) of an index into what each column of (n_out, columns) holds: sign and zero are told apart."""
    ordered = used.sort(0).values
    choices = 1 + (ordered[1:] != ordered[:-1]).sum(0)
    return torch.log2(choices.double()).ceil().long()
