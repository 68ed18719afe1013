"""Replay the guardrails' answers after every request, on many runs at once; counts and bounds are the product's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy import ndarray

from benchmarks.verdict_simulation import ALPHA, autoregression
from redpp_serve.statistics.guardrails import MINIMUM_TIMES, QUANTILE, share_bounds

SHARE = 9  # requests of the original for each of the pruned arm
EVERY = 5  # requests of the pruned arm from one question about errors to the next
MAX_GAP, MAX_RATIO, LIMIT = 0.01, 1.5, 0.99
BOUNDS = 0.001 * 2.0 ** (np.arange(1, 25) / 2)  # seconds

bounds = cache(share_bounds)


def _edges(hits: ndarray, trials: ndarray, alpha: float) -> tuple[ndarray, ndarray]:
    """``share_bounds`` of counts (runs, n) after ``trials`` (n,)."""
    low, high = np.empty(hits.shape), np.empty(hits.shape)
    for column, total in enumerate(trials.tolist()):
        counts, where = np.unique(hits[:, column], return_inverse=True)
        found = np.array([bounds(int(count), total, alpha) for count in counts])
        low[:, column], high[:, column] = found[where].T
    return low, high


def first(hit: ndarray) -> ndarray:
    """(runs,) after how many requests of the pruned arm ``hit`` (runs, n) first holds; infinite if never."""
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1.0, math.inf)


def turning_points(trials: ndarray, found: Callable[[int, int], bool]) -> ndarray:
    """For each number of trials the smallest number of hits for which ``found(hits, trials)``; it never falls."""
    result, hits = [], 0
    for total in trials.tolist():
        while hits <= total and not found(hits, total):
            hits += 1
        result.append(hits)
    return np.array(result)


def error_stops(
    rng: np.random.Generator, runs: int, steps: int, rate: float, gap: float, *, outages: bool = False
) -> tuple[ndarray, ndarray]:
    """First advice to roll back and first "kept", where the original fails at ``rate`` and the pruned arm ``gap`` more
    often. With ``outages`` half of both arms' requests fail now and then, for 20 requests of the pruned arm.

    Asked after every ``EVERY`` requests of the pruned arm: two counts make many bounds.
    """
    trials = np.arange(1, steps + 1)
    if outages:
        down = np.repeat(rng.random((runs, -(-steps // 20))) < 0.02, 20, axis=1)[:, :steps]
        rate = np.where(down, 0.5, rate)
    asked = slice(EVERY - 1, None, EVERY)
    errors_a = rng.binomial(SHARE, rate, (runs, steps)).cumsum(axis=1)[:, asked]
    errors_b = rng.binomial(1, rate + gap, (runs, steps)).cumsum(axis=1)[:, asked]
    low_a, high_a = _edges(errors_a, SHARE * trials[asked], ALPHA / 2)
    low_b, high_b = _edges(errors_b, trials[asked], ALPHA / 2)
    return EVERY * first(low_b - high_a > MAX_GAP), EVERY * first(high_b - low_a <= MAX_GAP)


def agreement_stops(rng: np.random.Generator, runs: int, steps: int, share: float) -> tuple[ndarray, ndarray]:
    """First advice to roll back and first "kept", where a pair agrees with chance ``share``."""
    hits, trials = rng.binomial(1, share, (runs, steps)).cumsum(axis=1), np.arange(1, steps + 1)
    open_ = turning_points(trials, lambda k, n: bounds(k, n, ALPHA)[1] >= LIMIT)
    sure = turning_points(trials, lambda k, n: bounds(k, n, ALPHA)[0] >= LIMIT)
    return first(hits < open_), first(hits >= sure)


def p99_stops(
    rng: np.random.Generator, runs: int, steps: int, ratio: float, phi: float = 0.0, *, spread: float = 0.4
) -> tuple[ndarray, ndarray]:
    """First advice to roll back and first "kept": log-normal times of 10 ms, the pruned arm's ``ratio`` times as long.

    With ``phi`` half of the variance is a load that both arms share, AR(1) from one request of the pruned arm, and the
    nine of the original beside it, to the next.
    """
    trials = np.arange(1, steps + 1)
    shared = autoregression(rng, (runs, steps), phi) * math.sqrt(0.5)
    bands = []
    for scale, count in ((1.0, SHARE), (ratio, 1)):
        own = rng.standard_normal((runs, steps, count)) * math.sqrt(0.5)
        times = 0.010 * scale * np.exp(spread * (own + shared[:, :, None]))
        beyond = turning_points(count * trials, lambda k, n: bounds(k, n, ALPHA / 2)[0] > 1 - QUANTILE)
        within = turning_points(count * trials, lambda k, n: bounds(k, n, ALPHA / 2)[1] >= 1 - QUANTILE)
        low, high = np.zeros((runs, steps), dtype=int), np.zeros((runs, steps), dtype=int)
        for bound in BOUNDS:
            over = (times > bound).sum(axis=2).cumsum(axis=1)
            low += over >= beyond
            high += over >= within
        edges = np.concatenate([[0.0], BOUNDS, [math.inf]])
        bands.append((edges[low], edges[high + 1]))
    (low_a, high_a), (low_b, high_b) = bands
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = np.where((low_a > 0) & np.isfinite(high_b), high_b / low_a, math.inf)
    enough = trials >= MINIMUM_TIMES
    kept = worst <= MAX_RATIO * math.sqrt(2) * (1 + 1e-9)
    return first((low_b / high_a > MAX_RATIO) & enough), first(kept & enough)
