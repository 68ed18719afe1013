"""What repeats in a stored weight: few distinct values, few kernels. Looked at once for as long as the weight lives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .splitting import split_weight

MOST_VALUES = 16  # that a 4-bit index names
_SAMPLE = 4096
_CHUNK = 1 << 18  # weights that are looked at at once: they stay in a cache
_INPUTS = 8  # input channels that stand for all when kernels are counted


@dataclass(frozen=True)
class Repeats:
    """``values`` (K,), ascending, K <= `MOST_VALUES`, or None where there are more.

    ``split_share`` estimates the operations of the split layer as a share of the dense layer's; None where fewer than
    half of the kernels repeat.
    """

    values: Tensor | None
    split_share: float | None


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def repeats(weight: Tensor, groups: int = 1) -> Repeats:
    """What repeats in a weight (n_out, n_in) or (n_out, n_in / groups, kh, kw)."""
    known = _known.get(weight)
    if weight.numel() == 0:
        return Repeats(None, None)
    if known is None:
        known = _known[weight] = Repeats(_values(weight), _split_share(weight, groups))
    return known


def pack_values(weight: Tensor, values: Tensor) -> Tensor:
    """The index of each weight (n_out, n_in) in the ascending values (K,), of the weight's shape, uint8."""
    flat = weight.reshape(-1)
    index = torch.zeros(flat.shape, dtype=torch.uint8, device=flat.device)
    for part, found in zip(flat.split(_CHUNK), index.split(_CHUNK)):
        for value in values[1:].tolist():  # comparisons vectorise; a search for each weight takes ten times as long
            found += (part >= value).view(torch.uint8)
    return index.view(weight.shape)


def _values(weight: Tensor) -> Tensor | None:
    """From a sample, then what of the rest is not among it: sorting all weights of a large layer takes seconds."""
    flat = weight.reshape(-1)
    values = torch.unique(flat[:: max(1, flat.numel() // _SAMPLE)])
    for part in flat.split(_CHUNK):
        if values.numel() > MOST_VALUES:
            return None
        missing = torch.ones(part.shape, dtype=torch.bool, device=part.device)
        for value in values.tolist():
            missing &= part != value
        values = torch.unique(torch.cat([values, part[missing]]))
    return values if values.numel() <= MOST_VALUES else None


def _split_share(weight: Tensor, groups: int) -> float | None:
    """From some inputs of the first group. For each output position the split has a product and a sum for each tap of
    a unique kernel, then an addition for each pair of output and input whose kernel is not zero."""
    few = weight if weight.dim() == 2 else weight.reshape(groups, -1, *weight.shape[1:])[0]
    few = few[:, :: max(1, few.shape[1] // _INPUTS)]
    if few.isnan().any():  # such a kernel equals nothing, not even itself
        return None
    split = split_weight(few)
    unique, taps = len(split.kernels), few[0, 0].numel()
    if 2 * unique > split.index.numel():
        return None
    return (2 * taps * unique + int((split.index >= 0).sum())) / (2 * few.numel())
