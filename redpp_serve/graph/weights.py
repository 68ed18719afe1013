"""What repeats in a stored weight: few distinct values, and few distinct kernels.

Both are lossless views of a weight. `encode` packs one with few values as a codebook and indices, which is how an
artifact stores it. `split_weight` gives the unique kernels of each input channel (RED++, arXiv 2110.01397, input-wise
splitting). `repeats` says what a kernel could make use of; it looks once for as long as the weight lives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MOST_VALUES = 16  # that a 4-bit index can name
SPLIT_CHUNK = 1 << 22  # weights to split at a time
_MOST_STORED = 1 << 16  # values that a codebook may hold
_BITS = (1, 2, 4, 8, 16)
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size
_SAMPLE = 4096
_CHUNK = 1 << 18  # weights to compare at a time: they stay in a cache
_INPUTS = 8  # input channels that represent all when kernels are counted


@dataclass(frozen=True)
class Packed:
    """A weight as a codebook and indices into it.

    Attributes:
        codebook: (K,) distinct values, of the weight's dtype.
        indices: (bytes,) uint8, the index of each weight in row-major order, lowest bits first.
        bits: size of an index.
    """

    codebook: Tensor
    indices: Tensor
    bits: int


def index_bits(values: int) -> int:
    """Return the storage bits of an index into ``values`` values: 1, 2, 4, 8 or 16."""
    return next(bits for bits in _BITS if 1 << bits >= values)


def encode(tensor: Tensor) -> Packed | None:
    """Pack a weight with every bit of every value; return None where that would not be smaller."""
    if not tensor.is_floating_point() or tensor.numel() < 64:
        return None
    flat = tensor.detach().cpu().contiguous().view(-1)
    flat = flat.view(_INTEGER[flat.element_size()])  # -0.0 is not 0.0
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    if flat.numel() > 1 << 17 and torch.unique(sample).numel() > min(2048, sample.numel() // 2):
        return None  # plainly not a codebook: spare the sort of all weights
    values, inverse = torch.unique(flat, return_inverse=True)
    if values.numel() > _MOST_STORED:
        return None
    bits = index_bits(values.numel())
    size = values.numel() * tensor.element_size() + math.ceil(flat.numel() * bits / 8)
    if size >= flat.numel() * tensor.element_size():
        return None
    return Packed(values.view(tensor.dtype), _pack(inverse, bits), bits)


def decode(codebook: Tensor, indices: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Unpack a weight of that shape.

    Raises:
        ValueError: sizes that do not fit together, or an index past the codebook's end.
    """
    if not all(type(size) is int and size >= 0 for size in shape) or codebook.dim() != 1:
        raise ValueError(f"a codebook of {codebook.dim()} dimensions for a weight of shape {shape}")
    count = math.prod(shape)
    if type(bits) is not int or bits not in _BITS:
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


@dataclass(frozen=True)
class KernelSplit:
    """A weight (n_out, n_in / groups, *kernel) as unique kernels for each input channel, up to their sign.

    Attributes:
        kernels: (U, *kernel), none of them all zero, input channel by input channel.
        channel: (U,) int64, the input channel that each kernel belongs to.
        index: (n_out, n_in / groups) int32, for each pair of output and input the row of ``kernels``; -1 for all zero.
        sign: (n_out, n_in / groups) int8, the sign of each pair's kernel; 0 for all zero.
    """

    kernels: Tensor
    channel: Tensor
    index: Tensor
    sign: Tensor

    def rebuild(self) -> Tensor:
        """Return the weight, equal bit by bit but for the sign of zeros."""
        padded = torch.cat([self.kernels, self.kernels.new_zeros(1, *self.kernels.shape[1:])])
        sign = self.sign.view(*self.sign.shape, *[1] * (padded.dim() - 1))
        return padded[self.index.long()] * sign.to(padded.dtype)


def split_weight(weight: Tensor, groups: int = 1) -> KernelSplit:
    """Split a weight, checked bit by bit; a Linear's (n_out, n_in) counts as 1 x 1."""
    if weight.dim() == 2:
        weight = weight[..., None, None]
    (n_out, n_in), kernel = weight.shape[:2], weight.shape[2:]
    flat = (
        weight.reshape(groups, n_out // groups, n_in, math.prod(kernel))
        .transpose(0, 1)
        .reshape(n_out // groups, groups * n_in, -1)
    )
    parts, offset, step = [], 0, max(1, SPLIT_CHUNK // flat[:, 0].numel())
    for start in range(0, flat.shape[1], step):
        kernels, channel, index, sign = _split_block(flat[:, start : start + step])
        parts.append((kernels, channel + start, torch.where(index >= 0, index + offset, index), sign))
        offset += len(kernels)
    kernels, channel = (torch.cat([p[k] for p in parts]) for k in (0, 1))
    index, sign = (
        torch.cat([p[k] for p in parts], 1).view(n_out // groups, groups, n_in).transpose(0, 1).reshape(n_out, n_in)
        for k in (2, 3)
    )
    return KernelSplit(kernels.view(-1, *kernel), channel, index.to(torch.int32), sign)


def _split_block(block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split (n_out, inputs, taps) into kernels (U, taps), their input (U,), index and sign (n_out, inputs)."""
    n_out, inputs, _ = block.shape
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
    """Hash the last dimension to 64 bits; zero kernels sort together like any other."""
    bits = values.contiguous().view(_INTEGER[values.element_size()]).long()
    if bits.shape[-1] == 1:
        return bits[..., 0]
    generator = torch.Generator().manual_seed(attempt)
    factors = torch.randint(-(2**62), 2**62, (bits.shape[-1],), generator=generator) | 1
    mixed = bits * -7046029254386353131  # odd constant of Weyl's sequence, 2^64 / golden ratio
    mixed = mixed ^ mixed >> 29
    return (mixed * factors).sum(-1)


@dataclass(frozen=True)
class Repeats:
    """What a kernel could make use of in a weight.

    Attributes:
        values: its distinct values (K,), ascending; None where there are more than `MOST_VALUES`.
        split_share: the estimated operations of the split layer, as a share of the dense layer's; None where fewer
            than half of the kernels repeat.
    """

    values: Tensor | None
    split_share: float | None


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def repeats(weight: Tensor, groups: int = 1) -> Repeats:
    """Find what repeats in a weight (n_out, n_in) or (n_out, n_in / groups, kh, kw)."""
    if weight.numel() == 0:
        return Repeats(None, None)
    if weight not in _known:
        _known[weight] = Repeats(_values(weight), _split_share(weight, groups))
    found: Repeats = _known[weight]
    return found


def pack_values(weight: Tensor, values: Tensor) -> Tensor:
    """Return the index of each weight (n_out, n_in) in the ascending values (K,), uint8 of the weight's shape."""
    flat = weight.reshape(-1)
    index = torch.zeros(flat.shape, dtype=torch.uint8, device=flat.device)
    for part, counts in zip(torch.split(flat, _CHUNK), torch.split(index, _CHUNK), strict=True):
        for value in values[1:].tolist():  # comparisons vectorize; a search for each weight takes ten times as long
            counts.add_((part >= value).view(torch.uint8))
    return index.view(weight.shape)


def _values(weight: Tensor) -> Tensor | None:
    """Collect distinct values from a sample, then scan the rest for values that the sample missed.

    Sorting all weights of a large layer would take seconds.
    """
    flat = weight.reshape(-1)
    values = torch.unique(flat[:: max(1, flat.numel() // _SAMPLE)])
    for part in torch.split(flat, _CHUNK):
        if values.numel() > MOST_VALUES:
            return None
        missing = torch.ones(part.shape, dtype=torch.bool, device=part.device)
        for value in values.tolist():
            missing &= part != value
        values = torch.unique(torch.cat([values, part[missing]]))
    return values if values.numel() <= MOST_VALUES else None


def _split_share(weight: Tensor, groups: int) -> float | None:
    """Estimate from some inputs of the first group.

    For each output position the split layer has a product and a sum for each tap of a unique kernel, then an addition
    for each pair of output and input whose kernel is not zero.
    """
    few = weight if weight.dim() == 2 else weight.reshape(groups, -1, *weight.shape[1:])[0]
    few = few[:, :: max(1, few.shape[1] // _INPUTS)]
    if few.isnan().any():  # such a kernel equals nothing, not even itself
        return None
    split = split_weight(few)
    unique, taps = len(split.kernels), few[0, 0].numel()
    if 2 * unique > split.index.numel():
        return None
    return (2 * taps * unique + int((split.index >= 0).sum())) / (2 * few.numel())
