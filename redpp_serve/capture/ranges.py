"""Read from a graph which integers its inputs hold: rows of an embedding, classes of a one-hot code, masks, bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from redpp_serve.capture.entries import Reading
from redpp_serve.capture.following import read_entries
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec, Ranges
from redpp_serve.graph.ranges import in_words

BYTES = ((0, 255),)
LEAST_PICTURE = 8  # pixels on each side
_INT64 = torch.iinfo(torch.int64)


def with_ranges(graph: Graph) -> Graph:
    """Return the same graph with ranges and limits at its integer inputs, where they follow from what reads them.

    Ranges that the user gave stay.

    Raises:
        RedppError: the network cannot read the integers that the user gave.
    """
    if not any(spec.holds_integers for spec in graph.inputs):
        return graph
    readings = read_entries(graph)
    return replace(graph, inputs=tuple(_informed(spec, readings.get(spec.name)) for spec in graph.inputs))


def is_picture(shape: Sequence[int]) -> bool:
    """Return whether a shape is that of a picture: (1, 3 or 4, height, width), or the same with the channels last."""
    if len(shape) != 3:
        return False
    first = shape[0] in (1, 3, 4) and min(shape[1:]) >= LEAST_PICTURE
    return first or (shape[2] in (1, 3, 4) and min(shape[:2]) >= LEAST_PICTURE)


def _informed(spec: InputSpec, reading: Reading | None) -> InputSpec:
    if reading is None:
        return spec
    limits = _compressed(reading.lowest, reading.highest, spec.shape)
    if limits == ((_INT64.min, _INT64.max),):
        limits = ()
    if spec.ranges:
        _check_given(spec, reading)
        return replace(spec, limits=limits)
    return replace(spec, ranges=_ranges(spec, reading), limits=limits)


def _check_given(spec: InputSpec, reading: Reading) -> None:
    pairs = torch.tensor(spec.ranges)[torch.arange(len(reading.lowest)) % len(spec.ranges)]
    wrong = (pairs[:, 0] < reading.lowest) | (pairs[:, 1] > reading.highest)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise RedppError(
            f"--input gives {in_words(spec.ranges)} for {spec.name}",
            f"{int(reading.lowest[at])}..{int(reading.highest[at])}, which is what the network can read there",
            "correct the range, or leave it out: it is read from the network",
        )


def _ranges(spec: InputSpec, reading: Reading) -> Ranges:
    """Return the ranges of an input; none where one of its entries tells nothing."""
    bounded = (reading.low > _INT64.min) & (reading.high < _INT64.max) & (reading.low <= reading.high)
    if is_picture(spec.shape) and bool((~bounded & reading.number & ~reading.mask).all()):
        return BYTES
    mask = reading.mask & ~reading.number if "mask" not in spec.name.lower() else torch.ones_like(bounded)
    if not bool((bounded | mask | ~reading.used).all()):
        return ()
    low, high = reading.low.where(bounded, 0), reading.high.where(bounded, 1)  # for masks, and what nobody reads
    return _compressed(low, high, spec.shape)


def _compressed(low: Tensor, high: Tensor, shape: Sequence[int]) -> Ranges:
    """Return the pairs of all entries, in row-major order, as the shortest ones that come again and again."""
    pairs = torch.stack([low, high], dim=1)
    for axis in range(len(shape), -1, -1):
        size = math.prod(shape[axis:])
        parts = pairs.reshape(-1, size, 2)
        if bool((parts == parts[:1]).all()):
            return tuple((int(a), int(b)) for a, b in pairs[:size].tolist())
    raise AssertionError("the whole shape is one part")
