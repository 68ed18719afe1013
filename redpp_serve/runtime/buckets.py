"""`Bucket`: the requests that one choice of a plan serves, by their number and, where sizes vary, by their sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from redpp_serve.graph.graph import InputSpec
from redpp_serve.graph.sizes import choice_in_words, closest, resized, sizes_in

Sizes = tuple[tuple[str, int], ...]  # by symbol; empty for the sizes that the inputs' shapes name
AS_DECLARED: Sizes = ()


class Bucket(NamedTuple):
    """Requests that one choice serves.

    Attributes:
        batch: the largest number of inputs.
        sizes: the sizes that vary, which theirs are nearest to.
    """

    batch: int
    sizes: Sizes = AS_DECLARED

    def __str__(self) -> str:
        return f"batch={self.batch}" + (f" {choice_in_words(dict(self.sizes))}" if self.sizes else "")


def buckets(batches: Sequence[int], sizes: Sequence[Sizes], inputs: Sequence[InputSpec]) -> tuple[Bucket, ...]:
    """Return a bucket for each batch size and choice of sizes.

    Batches at large sizes hold no more values than the largest at the first sizes does: what is run to choose engines
    and kernels then takes no more memory than that.
    """
    values = {each: sum(math.prod(resized(spec, dict(each)).shape) for spec in inputs) for each in sizes}
    most = batches[-1] * values[sizes[0]]
    every = (Bucket(batch, each) for batch in batches for each in sizes)
    return tuple(b for b in every if b.batch == batches[0] or b.batch * values[b.sizes] <= most)


def as_sizes(choice: Mapping[str, int]) -> Sizes:
    """Return a choice of sizes as a bucket holds it."""
    return tuple(choice.items())


def nearest_sizes(sizes: Sequence[Sizes], inputs: Sequence[InputSpec], shapes: Sequence[Sequence[int]]) -> Sizes:
    """Return the choice that is nearest to inputs of some shapes, without the batch."""
    if len(sizes) == 1:
        return sizes[0]
    return sizes[closest([dict(each) for each in sizes], sizes_in(inputs, shapes))]
