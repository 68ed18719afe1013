"""A weight as the unique kernels of each input channel (RED++, arXiv 2110.01397, input-wise splitting), bit by bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT_CHUNK = 1 << 22  # weights that are looked at at once
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
    for start in range(0, flat.shape[1], max(1, SPLIT_CHUNK // flat[:, 0].numel())):
        block = flat[:, start : start + max(1, SPLIT_CHUNK // flat[:, 0].numel())]
        kernels, channel, index, sign = _split_block(block)
        parts.append((kernels, channel + start, torch.where(index >= 0, index + offset, index), sign))
        offset += len(kernels)
    kernels, channel = (torch.cat([p[k] for p in parts]) for k in (0, 1))
    index, sign = (
        torch.cat([p[k] for p in parts], 1).view(n_out // groups, groups, n_in).transpose(0, 1).reshape(n_out, n_in)
        for k in (2, 3)
    )
    return Split(kernels.view(-1, kh, kw), channel, index.to(torch.int32), sign)


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
