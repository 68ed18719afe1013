"""Entries of a graph's integer inputs: where they lie in a value, and what has been read of their values.

Entries are noted one by one, so that the columns of a table each get their own range.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_INT64 = torch.iinfo(torch.int64)


@dataclass(frozen=True)
class Entries:
    """A value whose elements are ``scale * entry + shift`` of entries of integer inputs.

    Attributes:
        place: the number of the entry, over all inputs from 1 on; 0 for a constant.
        scale: of each element.
        shift: of each element; for a constant its value.
        whole: whether the type is an integer one.
        any_read: whether other integers are read as well, as behind a clamp.
    """

    place: Tensor
    scale: Tensor
    shift: Tensor
    whole: bool = True
    any_read: bool = False

    @classmethod
    def of_input(cls, first: int, shape: tuple[int, ...]) -> Entries:
        """Return the entries of an input of this shape, numbered from ``first`` on."""
        place = torch.arange(first, first + math.prod(shape)).reshape(1, *shape)
        return cls(place, torch.ones_like(place), torch.zeros_like(place))

    @classmethod
    def of_constant(cls, constant: Tensor) -> Entries:
        """Return a constant, which has no entries, only shifts."""
        zeros = torch.zeros(constant.shape, dtype=torch.int64)
        return cls(zeros, zeros, constant.long(), not constant.is_floating_point())

    def moved(self, change: Callable[[Tensor], Tensor]) -> Entries:
        """Return the same entries, rearranged as ``change`` rearranges a tensor."""
        return replace(self, place=change(self.place), scale=change(self.scale), shift=change(self.shift))

    def calculated(self, op: str, constant: int | Tensor, from_constant: bool) -> Entries:
        """Return the entries behind a sum, a difference (also ``from_constant``) or a product with a constant."""
        value = constant.long() if isinstance(constant, Tensor) else torch.tensor(constant)
        if op == "mul":
            scale, shift = self.scale * value, self.shift * value
        elif op == "add":
            scale, shift = self.scale, self.shift + value
        elif from_constant:
            scale, shift = -self.scale, value - self.shift
        else:
            scale, shift = self.scale, self.shift - value
        shape = torch.broadcast_shapes(self.place.shape, value.shape)
        return replace(self, place=self.place.expand(shape), scale=scale.expand(shape), shift=shift.expand(shape))


@dataclass
class Reading:
    """What the calls of a graph tell of each entry of its inputs.

    Attributes:
        low, high: the integers that it holds, as far as a call says.
        lowest, highest: the integers that the network can read.
        used: whether a call reads it at all.
        mask: whether it is compared with zero or one, cast to a boolean, or taken from one.
        number: whether it is calculated with, other than by a product with a computed value or a sum over entries.
    """

    low: Tensor
    high: Tensor
    lowest: Tensor
    highest: Tensor
    used: Tensor
    mask: Tensor
    number: Tensor

    @classmethod
    def of_nothing(cls, total: int) -> Reading:
        """Return what is known of entries before any call was read."""
        low, high = torch.full((total,), _INT64.min), torch.full((total,), _INT64.max)
        none = torch.zeros(total, dtype=torch.bool)
        return cls(low, high, low.clone(), high.clone(), none, none.clone(), none.clone())

    def part(self, start: int, count: int) -> Reading:
        """Return what is known of the entries of one input, in row-major order."""
        return Reading(**{key: value[start : start + count] for key, value in vars(self).items()})

    def note(self, entries: Entries, use: str) -> None:
        """Note that entries are used as a ``mask`` or a ``number``, or in a way that tells neither."""
        places = entries.place.flatten()
        self.used[places] = True
        if use:
            getattr(self, use)[places] = True

    def limit(self, entries: Entries, low: int | None, high: int | None, lowest: int | None = None) -> None:
        """Note that elements lie between two numbers, the lowest of which the network can read may be another one."""
        self._narrow(entries, low, high, (self.low, self.high))
        if lowest is not None and not entries.any_read:
            self._narrow(entries, lowest, high, (self.lowest, self.highest))
        self.used[entries.place.flatten()] = True

    def read_rows(self, entries: Entries, low: int, high: int, lowest: int) -> None:
        """Note that elements are rows of a table; several tables in one begin at the shifts of their entries."""
        self.limit(entries, low, high, lowest)
        starts = entries.shift[(entries.place > 0) & (entries.scale == 1)].unique().tolist()
        for start, after in itertools.pairwise([*starts, high + 1]):
            if start >= 0:
                mine = (entries.shift == start) & (entries.scale == 1)
                self.limit(replace(entries, scale=entries.scale * mine, any_read=True), start, after - 1)

    def _narrow(self, entries: Entries, bottom: int | None, top: int | None, ends: tuple[Tensor, Tensor]) -> None:
        """Lower and raise the ends of entries so far that no element lies below the bottom or above the top."""
        place, scale, shift = (part.flatten() for part in (entries.place, entries.scale, entries.shift))
        read = (place > 0) & (scale != 0)
        place, scale, shift = place[read], scale[read], shift[read]
        for bound, rising in ((bottom, scale > 0), (top, scale < 0)):
            if bound is not None:
                least, most = -((shift - bound) // scale), (bound - shift) // scale
                ends[0].scatter_reduce_(0, place[rising], least[rising], "amax")
                ends[1].scatter_reduce_(0, place[~rising], most[~rising], "amin")
