"""Sizes of inputs that differ between requests: which ones a network was captured for."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from redpp_serve.graph.graph import InputSpec, Size


def is_varying(inputs: Sequence[InputSpec]) -> bool:
    """Return whether a size of any input differs between requests."""
    return any(spec.varying for spec in inputs)


def sizes_of(inputs: Sequence[InputSpec]) -> dict[str, Size]:
    """Return the sizes that differ between requests by their symbols, which inputs may share."""
    return {size.symbol: size for spec in inputs for _, size in spec.varying}


def resized(spec: InputSpec, sizes: Mapping[str, int]) -> InputSpec:
    """Return the same input with other sizes, by symbol, where it has them."""
    shape = list(spec.shape)
    for axis, size in spec.varying:
        shape[axis] = sizes.get(size.symbol, shape[axis])
    return replace(spec, shape=tuple(shape))


def ends(inputs: Sequence[InputSpec]) -> list[dict[str, int]]:
    """Return choices of sizes that show whether a network takes all: the smallest, the largest, one of each in turns.

    None where no size varies.
    """
    found = sizes_of(inputs)
    low, high = ({symbol: (size.low, size.high)[k] for symbol, size in found.items()} for k in (0, 1))
    turns = {symbol: (high if k % 2 else low)[symbol] for k, symbol in enumerate(found)}
    return [low, high] + ([turns] if len(found) > 1 else []) if found else []


def planned(inputs: Sequence[InputSpec]) -> list[dict[str, int]]:
    """Return the choices of sizes that a server plans for: those of the inputs' shapes, the smallest, the largest.

    One empty choice where no size varies.
    """
    middle = sizes_in(inputs, [spec.shape for spec in inputs])
    return [middle, *(end for end in ends(inputs)[:2] if end != middle)]


def all_choices(inputs: Sequence[InputSpec], most: int) -> list[dict[str, int]]:
    """Return every choice of sizes that the inputs admit; none where there are more than that many."""
    found = sizes_of(inputs)
    each = [range(size.low, size.high + 1, size.step) for size in found.values()]
    if math.prod(map(len, each)) > most:
        return []
    return [dict(zip(found, values, strict=True)) for values in itertools.product(*each)]


def sizes_in(inputs: Sequence[InputSpec], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Return the sizes that vary, by symbol, of one input of these shapes."""
    return {size.symbol: shape[axis] for spec, shape in zip(inputs, shapes, strict=True) for axis, size in spec.varying}


def closest(choices: Sequence[Mapping[str, int]], sizes: Mapping[str, int]) -> int:
    """Return the number of the choice that is nearest to some sizes, by the ratios of its sizes to them."""

    def distance(k: int) -> float:
        return sum(abs(math.log(size / choices[k][symbol])) for symbol, size in sizes.items())

    return min(range(len(choices)), key=distance)


def drawn(inputs: Sequence[InputSpec], count: int, seed: int) -> list[dict[str, int]]:
    """Draw choices of sizes: the smallest, the shapes' own and the largest first, then any that the inputs admit."""
    generator, found = random.Random(seed), sizes_of(inputs)
    chosen = planned(inputs)[:count]
    for _ in range(count - len(chosen)):
        chosen.append({symbol: generator.randrange(s.low, s.high + 1, s.step) for symbol, s in found.items()})
    return chosen


def tiled(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return inputs (n, ...) cut, or begun anew, along each axis until they have a shape (m, ...)."""
    for axis, length in enumerate(shape):
        if x.shape[axis] != length:
            x = x.index_select(axis, torch.arange(length) % x.shape[axis])
    return x


def largest(spec: InputSpec) -> tuple[int, ...]:
    """Return the shape of an input at its largest sizes."""
    return resized(spec, {size.symbol: size.high for _, size in spec.varying}).shape


def nearest(spec: InputSpec, shape: Sequence[int], *, up: bool = False) -> tuple[int, ...]:
    """Return the shape of the input's that is nearest to a shape; axes that share a symbol get the same size.

    With ``up`` it is the smallest one that holds the shape, or the largest where none does.
    """
    found = list(spec.shape)
    for axis, size in spec.varying:
        axes = [other for other, same in spec.varying if same.symbol == size.symbol]
        wanted = max(shape[other] for other in axes) if up else sum(shape[other] for other in axes) / len(axes)
        rounded = math.ceil if up else round
        steps = rounded((min(max(wanted, size.low), size.high) - size.low) / size.step)
        found[axis] = size.low + size.step * min(steps, (size.high - size.low) // size.step)
    return tuple(found)


def fits(spec: InputSpec, shape: Sequence[int]) -> bool:
    """Return whether an input may have that shape."""
    return len(shape) == len(spec.shape) and nearest(spec, shape) == tuple(shape)


def disagreement(inputs: Sequence[InputSpec], shapes: Sequence[Sequence[int]]) -> str | None:
    """Say which size differs between inputs that share its symbol; None where none does."""
    found: dict[str, int] = {}
    for spec, shape in zip(inputs, shapes, strict=True):
        for axis, size in spec.varying:
            if found.setdefault(size.symbol, shape[axis]) != shape[axis]:
                return f"{size.symbol} of {found[size.symbol]} and of {shape[axis]} in one request"
    return None


def choice_in_words(sizes: Mapping[str, int]) -> str:
    """Return a choice of sizes as users read it: ``H=32 W=64``."""
    return " ".join(f"{symbol}={size}" for symbol, size in sizes.items())


def in_words(spec: InputSpec) -> str:
    """Return a shape as users write it, with the sizes that vary: ``3xHxW, H of 32..128/32``."""
    names = {axis: size.symbol for axis, size in spec.varying}
    shape = "x".join(names.get(axis, str(length)) for axis, length in enumerate(spec.shape))
    return ", ".join([shape, *(f"{symbol} of {size}" for symbol, size in sizes_of([spec]).items())])
