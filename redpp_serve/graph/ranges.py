"""The integers that inputs hold: drawing them, and telling which ones a network cannot read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from redpp_serve.graph.graph import InputSpec, Ranges

BOTH = ((0, 1),)  # the integers that almost every network can read


def spread(ranges: Ranges, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of each entry of a shape, as int64 tensors of that shape."""
    pairs = torch.tensor(ranges, dtype=torch.int64)
    place = torch.arange(math.prod(shape)) % len(pairs)
    low, high = pairs[place].unbind(1)
    return low.reshape(shape), high.reshape(shape)


def blank(spec: InputSpec, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Make inputs (batch, *shape) of zeros, or of the integers nearest to zero that the network can read."""
    made = torch.zeros(batch, *spec.shape, dtype=getattr(torch, spec.dtype), device=device)
    if any(low > 0 or high < 0 for low, high in spec.limits):
        made += torch.zeros((), dtype=torch.int64).clamp(*spread(spec.limits, spec.shape)).to(made)
    return made


def random_integers(spec: InputSpec, batch: int, generator: torch.Generator) -> Tensor:
    """Draw inputs (batch, *shape), each integer of its range equally likely; 0 and 1 where the range is unknown.

    Each row of zeros and ones has both: a mask that hides everything has no meaning.
    """
    shape, dtype = (batch, *spec.shape), getattr(torch, spec.dtype)
    ranges = spec.ranges or BOTH
    if len(ranges) == 1:
        ((least, most),) = ranges
        drawn = torch.randint(least, most + 1, shape, generator=generator)
        if ranges == BOTH and shape[-1] > 1:
            drawn[..., torch.randperm(shape[-1], generator=generator)[:2]] = torch.tensor([0, 1])
        return drawn.to(dtype)
    low, high = spread(ranges, spec.shape)
    share = torch.rand(shape, generator=generator, dtype=torch.float64)
    return torch.minimum(low + (share * (high - low + 1)).long(), high).to(dtype)


def outside(spec: InputSpec, x: Tensor) -> str | None:
    """Say which integers of x (..., *shape) the network cannot read; None where it can read all."""
    if not spec.limits or not x.numel():
        return None
    if len(spec.limits) == 1:
        ((lowest, highest),) = spec.limits
        least, most = int(x.min()), int(x.max())
        fits = lowest <= least and most <= highest
        return None if fits else f"values from {least} to {most}, expected {lowest} to {highest}"
    low, high = spread(spec.limits, spec.shape)
    wrong = (x < low) | (x > high)
    if not bool(wrong.any()):
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    place = first[len(first) - len(spec.shape) :]
    return f"value {int(x[first])} at {list(place)}, expected {int(low[place])} to {int(high[place])}"


def unknown_integers(inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """Return the inputs of integers of which nobody knows which ones they hold."""
    return tuple(spec for spec in inputs if spec.holds_integers and not spec.ranges)


def in_words(ranges: Ranges) -> str:
    """Return ranges as users write them: ``0..9`` or ``0..9,0..99``; the first few where there are many."""
    shown = ",".join(f"{low}..{high}" for low, high in ranges[:8])
    return shown + (f" and {len(ranges) - 8} more" if len(ranges) > 8 else "")
