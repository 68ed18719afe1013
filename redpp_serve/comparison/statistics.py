"""Intervals and verdicts for latencies: skewed, autocorrelated, and looked at while they come in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy
from numpy.typing import ArrayLike

RESAMPLES = 1000
# Resampled values held at once, so that memory stays near 32 MB per arm however long the run was.
CHUNK_VALUES = 1 << 22
# Before this many blocks the estimated variance is too rough for an asymptotic interval.
MINIMUM_BLOCKS = 20


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


def best_rho2(blocks: float, alpha: float) -> float:
    """The mixture's rho^2 that makes the sequence tightest near ``blocks`` observations.

    Waudby-Smith et al., arXiv 2103.06476, appendix B.2: (-2 log alpha + log(-2 log alpha + 1)) / t.
    """
    return (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / blocks


def half_width(blocks: ArrayLike, variance: ArrayLike, rho2: float, alpha: float) -> numpy.ndarray:
    """Half the width of the normal-mixture confidence sequence (Robbins 1970; arXiv 2103.06476, theorem 2.2).

    sqrt(variance * 2 (t rho^2 + 1) / (t^2 rho^2) * log(sqrt(t rho^2 + 1) / alpha)) after t = ``blocks``.
    """
    t, spread = numpy.asarray(blocks, dtype=numpy.float64), numpy.asarray(variance, dtype=numpy.float64)
    mixed = t * rho2 + 1
    return numpy.sqrt(spread * 2 * mixed / (t * t * rho2) * numpy.log(numpy.sqrt(mixed) / alpha))


class ConfidenceSequence:
    """An interval for a running mean that holds at all times at once, so one may look, and stop, whenever one likes.

    Meant for paired log-ratios, log(time of a / time of b). They come from concurrent requests, so neighbours are
    correlated: ``block`` consecutive values are averaged first (take the concurrency), and what correlation is left
    between neighbouring blocks enters the variance as gamma_0 + 2 max(gamma_1, 0). Correlation over longer times than
    two blocks is not seen: take longer blocks there.

    Args:
        alpha: chance, over the whole run, that the interval ever misses the mean (asymptotically).
        block: values averaged to one observation.
        target: number of observations near which the interval is tightest; it sets rho (``best_rho2``). The default
            is within 15 % of the tightest from 100 to 20 000 blocks, and cautious early, where the variance is still
            rough: simulations of 2000 blocks missed in 4 % (independent) to 5 % (AR(1) of 0.5, blocks of 4) of runs.
    """

    def __init__(self, alpha: float = 0.05, block: int = 1, target: float = 500.0) -> None:
        self.alpha, self.block = alpha, block
        self.rho2 = best_rho2(target, alpha)
        self.blocks, self.mean = 0, 0.0
        self._squares = self._products = self._last = 0.0
        self._waiting: list[float] = []

    @property
    def values(self) -> int:
        """How many values the interval rests on; an unfinished block waits."""
        return self.blocks * self.block

    @property
    def variance(self) -> float:
        """Long-run variance of the block means (Bartlett 1950, one lag); at least two blocks."""
        covariance = max(self._products / (self.blocks - 1), 0.0)
        return self._squares / (self.blocks - 1) + 2 * covariance

    def update(self, values: ArrayLike) -> None:
        """Take in values in order of time."""
        self._waiting.extend(numpy.ravel(values).astype(float).tolist())
        whole = len(self._waiting) // self.block * self.block
        for first in range(0, whole, self.block):
            self._observe(math.fsum(self._waiting[first : first + self.block]) / self.block)
        del self._waiting[:whole]

    def _observe(self, value: float) -> None:
        """Welford's update of mean and squares, and of the products of neighbours."""
        self.blocks += 1
        before = value - self.mean
        self.mean += before / self.blocks
        after = value - self.mean
        self._squares += before * after
        if self.blocks > 1:
            self._products += after * (self._last - self.mean)
        self._last = value

    def interval(self) -> tuple[float, float]:
        """(low, high) around the mean; infinite before ``MINIMUM_BLOCKS`` blocks."""
        if self.blocks < MINIMUM_BLOCKS:
            return -math.inf, math.inf
        half = float(half_width(self.blocks, self.variance, self.rho2, self.alpha))
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Verdict:
    """A decision in words; ``low`` and ``high`` bound baseline's time / candidate's time (above 1: faster)."""

    kind: str
    text: str
    low: float
    high: float


def verdict(
    sequence: ConfidenceSequence, margin: float = 0.02, *, baseline: str, candidate: str, measure: str
) -> Verdict:
    """Decide between two arms from paired log-ratios, log(time of ``baseline`` / time of ``candidate``).

    Equivalent: the whole interval lies within 1/(1+margin) to 1+margin. Else faster or slower: the interval leaves
    out 1. Else undecided. ``measure`` ends the statement, such as "end to end".
    """
    low, high = (math.exp(bound) for bound in sequence.interval())
    ratio, pairs = math.exp(sequence.mean), sequence.values
    if math.isinf(high):
        needed = MINIMUM_BLOCKS * sequence.block
        text = f"no decision {measure} between {candidate} and {baseline}: {pairs} pairs, at least {needed} needed"
        return Verdict("undecided", text, low, high)

    def basis(start: float, end: float, digits: int = 2) -> str:
        level = f"{100 * (1 - sequence.alpha):g} % confidence sequence"
        return f"({level} {start:.{digits}f} to {end:.{digits}f} from {pairs} pairs)"

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
        text = f"{text} {basis(low, high)}; measure longer"
    return Verdict(kind, text, low, high)
