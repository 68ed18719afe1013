"""Intervals and verdicts for latencies: skewed, autocorrelated, and looked at while they come in.

Percentiles of a histogram's counts: as exact as its buckets are narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple, Protocol

import numpy
from numpy.typing import ArrayLike


class Quantile(NamedTuple):
    """An interpolated percentile, and the edges of the bucket that it lies in; ``high`` is inf above the last edge."""

    value: float
    low: float
    high: float


def quantile(cumulative: Mapping[float, float], share: float) -> Quantile | None:
    """Interpolate linearly within the bucket that holds a share of the observations, as Prometheus does.

    Args:
        cumulative: upper edge of a bucket (inf for the last) -> observations up to it.
        share: 0 to 1.

    Returns:
        None without observations. Above the last finite edge, that edge.
    """
    edges = sorted(cumulative)
    total = cumulative[edges[-1]] if edges else 0.0
    if total <= 0:
        return None
    low = below = 0.0
    for edge in edges:
        upto = cumulative[edge]
        if upto >= share * total and upto > below:
            if math.isinf(edge):
                return Quantile(low, low, edge)
            return Quantile(low + (edge - low) * max(share * total - below, 0.0) / (upto - below), low, edge)
        low, below = edge, max(upto, below)
    return Quantile(low, low, math.inf)  # only where a scrape caught the buckets half-written


def measured(cumulative: Mapping[float, float], share: float) -> float | None:
    """The value of `quantile`; None also where it lies above the last finite edge, and so is not known."""
    found = quantile(cumulative, share)
    return None if found is None or math.isinf(found.high) else found.value


# While the interval is wider than this factor, its mean and noise are too rough for a forecast.
_FORESEEN = 2.0
RESAMPLES = 1000
# Resampled values held at once, so that memory stays near 32 MB per arm however long the run was.
CHUNK_VALUES = 1 << 22


class Estimate(NamedTuple):
    """A number and its confidence interval."""

    value: float
    low: float
    high: float


def percentile_interval(
    values: ArrayLike, q: float, rng: numpy.random.Generator, level: float = 0.95, *, block: int | None = None
) -> Estimate:
    """The ``q`` quantile (0..1) of ``values`` (n,) and its moving-block bootstrap interval, in the unit of ``values``.

    ``block`` is the number of consecutive values resampled together (Kuensch 1989); default: cube root of n.
    """
    array = numpy.asarray(values, dtype=numpy.float64)
    draws = numpy.concatenate([numpy.quantile(array[index], q, axis=1) for index in _resamples(array.size, block, rng)])
    return Estimate(float(numpy.quantile(array, q)), *_middle(draws, level))


def ratio_interval(
    a: ArrayLike,
    b: ArrayLike,
    q: float,
    rng: numpy.random.Generator,
    pairs: bool = True,
    level: float = 0.95,
    *,
    block: int | None = None,
) -> Estimate:
    """quantile(a) / quantile(b) and its moving-block bootstrap interval.

    Args:
        a: positive values (n,), in order of time.
        b: positive values; with ``pairs`` also (n,), ``b[i]`` measured together with ``a[i]``.
        q: which quantile, 0..1.
        rng: source of the resamples.
        pairs: resample pairs, which keeps what both arms share (load, input); else each arm on its own.
        level: coverage of the interval.
        block: consecutive values resampled together; default: cube root of n.
    """
    top, bottom = numpy.asarray(a, dtype=numpy.float64), numpy.asarray(b, dtype=numpy.float64)
    if pairs and top.size != bottom.size:
        raise ValueError(f"pairs need equally many values, got {top.size} and {bottom.size}")
    draws = []
    for index in _resamples(top.size, block, rng):
        other = index if pairs else _moving_blocks(bottom.size, block, len(index), rng)
        draws.append(numpy.quantile(top[index], q, axis=1) / numpy.quantile(bottom[other], q, axis=1))
    value = float(numpy.quantile(top, q) / numpy.quantile(bottom, q))
    return Estimate(value, *_middle(numpy.concatenate(draws), level))


def mean_interval(values: ArrayLike, rng: numpy.random.Generator, level: float = 0.95) -> Estimate:
    """Mean of a few independent ``values`` (n >= 2,) with a bootstrap interval.

    The percentile bootstrap is too narrow for few values: it forgets n/(n-1) and that the variance is estimated. Both
    are put back by stretching it about the mean (Hesterberg 2015, section 5.3), with the first terms of the
    Cornish-Fisher expansion for Student's quantile.
    """
    array = numpy.asarray(values, dtype=numpy.float64)
    mean, freedom = float(array.mean()), array.size - 1
    low, high = _middle(array[rng.integers(0, array.size, (RESAMPLES, array.size))].mean(axis=1), level)
    z = NormalDist().inv_cdf((1 + level) / 2)
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    stretch = student / z * math.sqrt(array.size / freedom)
    return Estimate(mean, mean + (low - mean) * stretch, mean + (high - mean) * stretch)


def _resamples(n: int, block: int | None, rng: numpy.random.Generator) -> Iterator[numpy.ndarray]:
    """Indices (rows, n) of ``RESAMPLES`` resamples, in chunks."""
    if n == 0:
        raise ValueError("an interval needs at least one value")
    rows = max(1, CHUNK_VALUES // n)
    for first in range(0, RESAMPLES, rows):
        yield _moving_blocks(n, block, min(rows, RESAMPLES - first), rng)


def _moving_blocks(n: int, block: int | None, rows: int, rng: numpy.random.Generator) -> numpy.ndarray:
    length = min(n, block or round(n ** (1 / 3)))
    starts = rng.integers(0, n - length + 1, (rows, -(-n // length), 1))
    return (starts + numpy.arange(length)).reshape(rows, -1)[:, :n]


def _middle(draws: numpy.ndarray, level: float) -> tuple[float, float]:
    low, high = numpy.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Evidence(Protocol):
    """What a verdict rests on: ``RatioSequence`` for pairs, ``ArmSequence`` for arms of unequal traffic."""

    alpha: float
    unit: str

    @property
    def mean(self) -> float:
        """Of log(time of baseline / time of candidate)."""

    @property
    def basis(self) -> str:
        """What the interval rests on, in words."""

    @property
    def missing(self) -> str:
        """What the first interval still waits for, in words; empty where there is one."""

    def interval(self) -> tuple[float, float]:
        """Of the mean."""

    def needed(self, margin: float) -> int | None:
        """How many more ``unit`` a decision likely takes; None where it cannot be said."""


@dataclass(frozen=True)
class Verdict:
    """A decision in words about baseline's time / candidate's time (above 1: the candidate is faster).

    Attributes:
        kind: "faster", "slower", "equivalent" or "undecided".
        text: one sentence without its full stop.
        low: lower bound of the ratio, valid at all times at once; 0 while there is none.
        high: upper bound; infinite while there is none.
        mean: the ratio itself; None while there is no interval.
        needed: how many more observations a decision likely takes; 0 once decided, None where it cannot be said.
        unit: what ``needed`` counts, such as "pairs".
    """

    kind: str
    text: str
    low: float
    high: float
    mean: float | None = None
    needed: int | None = None
    unit: str = "pairs"


def verdict(sequence: Evidence, margin: float = 0.02, *, baseline: str, candidate: str, measure: str) -> Verdict:
    """Decide between two arms from log(time of ``baseline`` / time of ``candidate``).

    Equivalent: the whole interval lies within 1/(1+margin) to 1+margin. Else faster or slower: the interval leaves
    out 1. Else undecided. ``measure`` ends the statement, such as "end to end".
    """
    low, high = (math.exp(min(bound, 700.0)) if bound < math.inf else bound for bound in sequence.interval())
    if math.isinf(high) or low <= 0:
        text = f"no decision {measure} between {candidate} and {baseline}: {sequence.basis}, {sequence.missing}"
        return Verdict("undecided", text, 0.0, math.inf, unit=sequence.unit)
    ratio = math.exp(sequence.mean)

    def basis(start: float, end: float, digits: int = 2) -> str:
        level = f"{100 * (1 - sequence.alpha):.3g} % confidence sequence"
        return f"({level} {start:.{digits}f} to {end:.{digits}f} from {sequence.basis})"

    needed: int | None = 0
    if 1 / (1 + margin) < low and high < 1 + margin:
        kind, text = "equivalent", f"{candidate} is as fast as {baseline} {measure} within {100 * margin:g} %"
        text = f"{text} {basis(low, high, 3)}"
    elif low > 1:
        kind, text = "faster", f"{candidate} is {ratio:.2f} times as fast as {baseline} {measure} {basis(low, high)}"
    elif high < 1:
        kind, text = "slower", f"{candidate} takes {1 / ratio:.2f} times as long as {baseline} {measure}"
        text = f"{text} {basis(1 / high, 1 / low)}"
    else:
        kind, text = "undecided", f"no decision {measure} yet: {candidate} is {ratio:.2f} times as fast as {baseline}"
        needed = sequence.needed(margin) if high < _FORESEEN * low else None
        more = f": about {rounded(needed)} more {sequence.unit} are likely needed" if needed else ""
        text = f"{text} {basis(low, high)}; measure longer{more}"
    return Verdict(kind, text, low, high, ratio, needed, sequence.unit)


def rounded(count: int) -> str:
    """A forecast with the two digits that it can have at most: 1234 is "1,200"."""
    digits = max(len(str(count)) - 2, 0)
    return f"{round(count, -digits):,}"
