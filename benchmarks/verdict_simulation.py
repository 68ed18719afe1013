"""Simulate noise as servers make it, and replay the product's confidence sequences on many runs at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy import ndarray

from redpp_serve.statistics.sequences import MAXIMUM_BLOCKS, MINIMUM_BLOCKS, TARGET, best_rho2, half_width
from redpp_serve.statistics.unequal_traffic import comparable, influence

ALPHA = 0.05
RHO2 = best_rho2(TARGET, ALPHA)
Noise = Callable[[np.random.Generator, int, int], ndarray]
SIZES = np.array([1, 2, 4, 8])  # requests in a batch


def autoregression(rng: np.random.Generator, shape: tuple[int, int], phi: float) -> ndarray:
    """Stationary AR(1), (runs, steps), of standard deviation 1."""
    noise = rng.standard_normal(shape[::-1])
    noise[1:] *= math.sqrt(1 - phi**2)
    for step in range(1, len(noise)):
        noise[step] += phi * noise[step - 1]
    return noise.T


def load(rng: np.random.Generator, runs: int, steps: int) -> ndarray:
    """(runs, steps) a factor on all times and arrivals: two swings over the run, and minutes that differ.

    Its largest value is about six times its smallest.
    """
    phase = 2 * math.pi * rng.random((runs, 1))
    swing = np.sin(phase + 4 * math.pi * np.arange(steps) / steps)
    minutes = np.repeat(rng.standard_normal((runs, -(-steps // 60))), 60, axis=1)[:, :steps]
    return np.exp(0.7 * swing + 0.2 * minutes)


def drifting(rng: np.random.Generator, runs: int, steps: int) -> ndarray:
    """Log-ratio of two times under one load, each with noise of its own."""
    common = load(rng, runs, steps)
    times = [common * np.exp(rng.standard_normal((runs, steps))) for _ in range(2)]
    return np.log(times[0] / times[1]) / math.sqrt(2)


def student(freedom: int) -> Noise:
    """Independent Student t."""
    return lambda rng, runs, steps: rng.standard_t(freedom, (runs, steps)) * math.sqrt(1 - 2 / freedom)


def skewed(rng: np.random.Generator, runs: int, steps: int) -> ndarray:
    """Log-normal with sigma 1, shifted to mean 0: skewness 6."""
    return (rng.lognormal(size=(runs, steps)) - math.exp(0.5)) / math.sqrt(math.e * (math.e - 1))


def heavy_autoregression(rng: np.random.Generator, runs: int, steps: int) -> ndarray:
    """AR(1) of 0.8, each value x stretched to x + x^3 / 4: kurtosis 17."""
    x = autoregression(rng, (runs, steps), 0.8)
    return (x + x**3 / 4) / math.sqrt(1 + 1.5 + 15 / 16)


def hidden_autoregression(rng: np.random.Generator, runs: int, steps: int) -> ndarray:
    """Independent noise over an AR(1) of 0.9: the lag-1 correlation is 0.27, the long-run variance 6.4 times as large
    as the variance."""
    slow = autoregression(rng, (runs, steps), 0.9)
    return math.sqrt(0.7) * rng.standard_normal((runs, steps)) + math.sqrt(0.3) * slow


def autoregressive(phi: float) -> Noise:
    """AR(1)."""
    return lambda rng, runs, steps: autoregression(rng, (runs, steps), phi)


# Each of mean 0 and standard deviation 1.
PAIRED: dict[str, Noise] = {
    "independent": autoregressive(0.0),
    "AR(1) 0.5": autoregressive(0.5),
    "AR(1) 0.8": autoregressive(0.8),
    "Student t, 3 degrees": student(3),
    "Student t, 5 degrees": student(5),
    "log-normal, skewed": skewed,
    "drift of the load": drifting,
    "AR(1) 0.8, heavy tails": heavy_autoregression,
    "independent over AR(1) 0.9": hidden_autoregression,
}


def blocks(rows: ndarray, most: float = MAXIMUM_BLOCKS) -> Iterator[tuple[int, int, ndarray]]:
    """(rows so far, block length, sums (runs, k, columns)) at each end of a block that the sequences look at.

    The rule of ``redpp_serve.statistics.sequences.Blocks`` for all runs at once. ``rows`` is (runs, steps, columns).
    """
    sums, done, length = rows[:, :0], 0, 1
    while done + length <= rows.shape[1]:
        sums = np.concatenate([sums, rows[:, done : done + length].sum(axis=1, keepdims=True)], axis=1)
        done += length
        if sums.shape[1] == most:
            sums, length = sums[:, ::2] + sums[:, 1::2], 2 * length
        if sums.shape[1] >= MINIMUM_BLOCKS:
            yield done, length, sums


def paired_stops(values: ndarray, most: float = MAXIMUM_BLOCKS) -> ndarray:
    """(runs,) after how many of ``values`` (runs, steps) the interval first leaves 0 out; infinite if never."""
    first = np.full(len(values), math.inf)
    for done, length, sums in blocks(values[:, :, None], most):
        means = sums[:, :, 0] / length
        mean = means.mean(axis=1)
        half = half_width(means - mean[:, None], done, RHO2, ALPHA)
        first[(np.abs(mean) > half) & np.isinf(first)] = done
    return first


def t_test_stops(values: ndarray) -> ndarray:
    """The same for a t-test at 5 % that is repeated after every value from the 20th on."""
    count = np.arange(1, values.shape[1] + 1)
    mean = values.cumsum(axis=1) / count
    freedom = np.maximum(count - 1, 1)
    error = np.sqrt(np.maximum(np.square(values).cumsum(axis=1) / count - mean**2, 0.0) / freedom)
    outside = np.abs(mean) > error * (1.96 + 2.37 / freedom + 2.82 / freedom**2)  # Student's quantile, expanded
    outside[:, : MINIMUM_BLOCKS - 1] = False
    return np.where(outside.any(axis=1), outside.argmax(axis=1) + 1.0, math.inf)


def arm_stops(windows: ndarray) -> ndarray:
    """(runs,) after how many of ``windows`` (runs, steps, sizes, 4) the interval of the ratio first leaves 1 out."""
    rows = comparable(windows)
    seen = rows[:, :, 2] > 0
    order = np.argsort(~seen, axis=1, kind="stable")  # windows that say nothing go to the end, and are cut off
    rows, count = np.take_along_axis(rows, order[:, :, None], axis=1), seen.sum(axis=1)
    first = np.full(len(rows), math.inf)
    for done, _, sums in blocks(rows[:, : count.max()]):
        total = sums.sum(axis=1)
        valid = done <= count
        mean = np.log(total[valid, 0] / total[valid, 1])
        half = half_width(influence(sums[valid]), total[valid, 2], RHO2, ALPHA)
        hit = np.flatnonzero(valid)[np.abs(mean) > half]
        hit = hit[np.isinf(first[hit])]
        first[hit] = order[hit, done - 1] + 1
    return first


def split_windows(
    rng: np.random.Generator,
    runs: int,
    steps: int,
    *,
    share: float,
    rate: float,
    effect: float = 0.0,
    phi: float = 0.0,
    swings: bool = False,
    outliers: float = 0.0,
) -> ndarray:
    """Counters (runs, steps, sizes, 4) of both arms in windows of 1 s; the pruned arm takes ``share`` of requests.

    Batches are the fuller the more requests an arm receives. A batch's time is a gamma variable with a coefficient of
    variation of 0.5, longer for larger batches, times what the arm's worker and the load do in that window.

    Args:
        rng: source of everything.
        runs: experiments.
        steps: windows.
        share: of the pruned arm.
        rate: requests per second on average.
        effect: log of original's time / pruned network's time.
        phi: correlation from window to window of each arm's own slowness (standard deviation 10 %).
        swings: load moves arrivals and all times by a factor of six (``load``).
        outliers: share of batches that take 20 times as long.
    """
    busy = load(rng, runs, steps) if swings else np.ones((runs, steps))
    result = np.zeros((runs, steps, len(SIZES), 4))
    for arm, (part, speed) in enumerate(((1 - share, 1.0), (share, math.exp(-effect)))):
        arrivals = rate * part * busy
        fullness = np.log2(1 + 0.03 * arrivals)[..., None]  # requests that come while a batch is computed
        weights = np.exp(-((np.log2(SIZES) - fullness) ** 2))
        weights /= (weights * SIZES).sum(axis=-1, keepdims=True)
        counts = rng.poisson(arrivals[..., None] * weights)
        own = np.exp(0.1 * autoregression(rng, (runs, steps), phi)) * busy * speed
        slow = rng.binomial(counts, outliers) if outliers else np.zeros_like(counts)
        work = rng.gamma(4.0 * (counts - slow)) + 20 * rng.gamma(4.0 * slow)
        result[..., 2 * arm] = counts
        result[..., 2 * arm + 1] = work / 4 * (0.005 + 0.002 * SIZES) * own[..., None]
    return result
