"""Confidence intervals of latencies, which are skewed and autocorrelated, and percentiles of a histogram's counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
RESAMPLES = 1000
# Resampled values held at once, which keeps memory near 32 MB per version however long the run was.
CHUNK_VALUES = 1 << 22


class Estimate(NamedTuple):
    """A number and its confidence interval."""

    value: float
    low: float
    high: float


def percentile_interval(values: ArrayLike, q: float, rng: np.random.Generator, *, block: int | None = None) -> Estimate:
    """Estimate a quantile with a moving-block bootstrap interval (Kuensch 1989).

    Args:
        values: (n,) in order of time.
        q: which quantile, 0 to 1.
        rng: source of the resamples.
        block: number of consecutive values resampled together; by default the cube root of n.
    """
    array = np.asarray(values, dtype=np.float64)
    draws = np.concatenate([np.quantile(array[index], q, axis=1) for index in _resamples(array.size, block, rng)])
    return Estimate(float(np.quantile(array, q)), *_middle(draws))


def ratio_interval(
    a: ArrayLike, b: ArrayLike, q: float, rng: np.random.Generator, *, block: int | None = None
) -> Estimate:
    """Estimate quantile(a) / quantile(b) with a moving-block bootstrap interval.

    Pairs are resampled together, which keeps what both share, such as the load of the machine and the input.

    Args:
        a: positive values (n,), in order of time.
        b: positive values (n,); ``b[i]`` was measured together with ``a[i]``.
        q: which quantile, 0 to 1.
        rng: source of the resamples.
        block: number of consecutive pairs resampled together; by default the cube root of n.
    """
    top, bottom = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if top.size != bottom.size:
        raise ValueError(f"pairs need equally many values, got {top.size} and {bottom.size}")
    draws = [
        np.quantile(top[index], q, axis=1) / np.quantile(bottom[index], q, axis=1)
        for index in _resamples(top.size, block, rng)
    ]
    return Estimate(float(np.quantile(top, q) / np.quantile(bottom, q)), *_middle(np.concatenate(draws)))


def mean_interval(values: ArrayLike, rng: np.random.Generator) -> Estimate:
    """Estimate the mean of a few independent ``values`` (n >= 2,) with a bootstrap interval.

    The percentile bootstrap is too narrow for few values: it omits the factor n/(n-1) and ignores that the variance is
    estimated. Stretching it about the mean restores both (Hesterberg 2015, section 5.3), with the first terms of the
    Cornish-Fisher expansion for Student's quantile.
    """
    array = np.asarray(values, dtype=np.float64)
    mean, freedom = float(array.mean()), array.size - 1
    low, high = _middle(array[rng.integers(0, array.size, (RESAMPLES, array.size))].mean(axis=1))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    stretch = student / z * math.sqrt(array.size / freedom)
    return Estimate(mean, mean + (low - mean) * stretch, mean + (high - mean) * stretch)


def _resamples(n: int, block: int | None, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the indices (rows, n) of ``RESAMPLES`` moving-block resamples, in chunks."""
    if n == 0:
        raise ValueError("an interval needs at least one value")
    length = min(n, block or round(n ** (1 / 3)))
    rows = max(1, CHUNK_VALUES // n)
    for first in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - first)
        starts = rng.integers(0, n - length + 1, (count, -(-n // length), 1))
        yield (starts + np.arange(length)).reshape(count, -1)[:, :n]


def _middle(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class Quantile(NamedTuple):
    """An interpolated percentile with the edges of its bucket; ``high`` is infinite above the last finite edge."""

    value: float
    low: float
    high: float


def quantile(cumulative: Mapping[float, float], share: float) -> Quantile | None:
    """Interpolate linearly within the bucket that holds a share of the observations, as Prometheus does.

    Args:
        cumulative: number of observations up to each bucket's upper edge; the last edge is infinite.
        share: 0 to 1.

    Returns:
        The percentile, or None without observations. Above the last finite edge its value is that edge.
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


def finite_quantile(cumulative: Mapping[float, float], share: float) -> float | None:
    """Return the value of `quantile`, or None where it lies above the last finite edge and so is not known."""
    found = quantile(cumulative, share)
    return None if found is None or math.isinf(found.high) else found.value
