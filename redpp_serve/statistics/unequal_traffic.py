"""Speed of two arms that receive unequal shares of live traffic, from counters per window and batch size.

Why no plain ratio of the arms' means will do: under a 90:10 split the larger arm fills larger batches, and both arms'
times move with the load of the day. So only batches of one size in one window of time are compared. In such a stratum
with n_a and n_b batches that took s_a and s_b seconds, n_b s_a / (n_a + n_b) and n_a s_b / (n_a + n_b) have the same
mean if the arms are equally fast, whatever the size, the load and the counts are; their sums' quotient is the
estimate of Mantel and Haenszel. No logarithm and no quotient is taken within a stratum, so one batch there is as good
as a hundred: a mean of logs over few batches would be biased, and differently for unequal counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy

from redpp_serve.errors import RedppError
from redpp_serve.statistics.intervals import Verdict, verdict
from redpp_serve.statistics.sequences import (
    MINIMUM_BLOCKS,
    TARGET,
    Blocks,
    best_rho2,
    half_width,
    long_run_variance,
    values_needed,
)

# What both arms did within one window of time: requests in a batch -> (batches of the original, seconds that they
# took in the handler, batches of the pruned, their seconds). Differences of the counters, not their totals.
ArmWindow = Mapping[int, tuple[float, float, float, float]]


class ArmSequence:
    """An interval for log(time of the original / time of the pruned) of a batch that holds at all times at once.

    Windows in which no batch size was seen in both arms say nothing about the ratio and are only counted. The others
    are joined to blocks whose length doubles, as in ``RatioSequence``. A block's influence on the logarithm of the
    quotient of the sums so far takes the place of a value. A window counts as one value, or as less where its weight
    n_a n_b / (n_a + n_b), about the number of batches in the smaller arm, is below 1 (``comparable``).

    Take windows that are short against changes of the load and long enough to hold batches of both arms: 1 to 10 s.

    Args:
        alpha: chance, over the whole run, that the interval ever misses.
        target: number of full windows near which the interval is tightest.
    """

    unit = "windows"

    def __init__(self, alpha: float = 0.05, target: float = TARGET) -> None:
        self.alpha = alpha
        self.rho2 = best_rho2(target, alpha)
        self.windows = 0
        self.batches, self.compared = [0.0, 0.0], [0.0, 0.0]
        self._blocks = Blocks(3)

    def update(self, windows: Iterable[ArmWindow]) -> None:
        """Take in windows in order of time.

        Raises:
            RedppError: a count or a time is negative, not finite, or a time without a batch; the windows before it
                are taken in.
        """
        for window in windows:
            for size, counters in window.items():
                _check(size, counters)
            self.windows += 1
            for count_a, _, count_b, _ in window.values():
                self.batches = [self.batches[0] + count_a, self.batches[1] + count_b]
                if count_a and count_b:
                    self.compared = [self.compared[0] + count_a, self.compared[1] + count_b]
            row = comparable(numpy.array(list(window.values()), dtype=numpy.float64).reshape(-1, 4))
            if row[2]:
                self._blocks.extend([row.tolist()])

    @property
    def _sums(self) -> numpy.ndarray:
        """(3,) of all finished blocks, as ``comparable``."""
        return self._blocks.sums.sum(axis=0)

    @property
    def values(self) -> float:
        """How many full windows the interval rests on."""
        return float(self._sums[2])

    @property
    def mean(self) -> float:
        """Log of the ratio; 0 before it can be formed."""
        top, bottom, _ = self._sums
        return math.log(top / bottom) if top > 0 and bottom > 0 else 0.0

    @property
    def basis(self) -> str:
        """What the interval rests on, in words."""
        (a, b), (all_a, all_b) = self.compared, self.batches
        share = "" if (a, b) == (all_a, all_b) else f" with a counterpart of {all_a:.0f} and {all_b:.0f}"
        return f"{a:.0f} and {b:.0f} batches{share} in {self.windows} windows"

    @property
    def missing(self) -> str:
        """What the first interval still waits for, in words; empty where there is one."""
        for arm, count in zip(("original", "pruned network"), self.batches, strict=True):
            if not count:
                return f"the {arm} has no traffic"
        if not self.compared[0]:
            return "no batch size was seen in both arms within one window"
        if not self._sums[:2].all() and len(self._blocks) >= MINIMUM_BLOCKS:
            return "no time was measured"
        if self._few:
            return f"at least {MINIMUM_BLOCKS} windows with traffic on both arms needed"
        return "too few or too unsteady for an interval yet" if math.isinf(self.interval()[1]) else ""

    @property
    def _few(self) -> bool:
        top, bottom, _ = self._sums
        return len(self._blocks) < MINIMUM_BLOCKS or top <= 0 or bottom <= 0

    def interval(self) -> tuple[float, float]:
        """(low, high) around the mean; infinite while there is too little to compare."""
        if self._few:
            return -math.inf, math.inf
        half = float(half_width(influence(self._blocks.sums), self.values, self.rho2, self.alpha))
        return self.mean - half, self.mean + half

    def needed(self, margin: float) -> int | None:
        """How many more windows like those so far a decision likely takes; None where it cannot be said."""
        if self._few:
            return None
        spread = math.sqrt(long_run_variance(influence(self._blocks.sums)) * self.values / len(self._blocks))
        total = values_needed(self.mean, spread, margin, self.rho2, self.alpha)
        return None if total is None else max(math.ceil((total / self.values - 1) * self.windows), 1)


def comparable(window: numpy.ndarray) -> numpy.ndarray:
    """(..., 3): the original's seconds and the pruned network's, weighted and summed over the sizes, and how much of
    a full window this is: the sum of the weights, at most 1.

    A window with more weight is brought down to 1 in all three. What moves from window to window, the load of the
    machine and of each worker, does not average out over the batches within one; and hours of heavy load, with more
    batches and longer ones, would otherwise make up nearly all of the sums.

    Args:
        window: (..., sizes, 4) counters as in ``ArmWindow``.
    """
    count_a, seconds_a, count_b, seconds_b = numpy.moveaxis(window, -1, 0)
    both = (count_a > 0) & (count_b > 0)
    share = numpy.divide(count_a, count_a + count_b, out=numpy.zeros(both.shape), where=both)
    rows = numpy.where(both, ((1 - share) * seconds_a, share * seconds_b, share * count_b), 0.0)
    top, bottom, weight = rows.sum(axis=-1)
    return numpy.stack([top, bottom, weight], axis=-1) / numpy.maximum(weight, 1.0)[..., None]


def influence(sums: numpy.ndarray) -> numpy.ndarray:
    """(..., k) each block's part in the log of the ratio, as a value whose mean over the blocks is 0.

    Args:
        sums: (..., k, 3) of ``comparable`` over blocks; the first two columns add up to more than 0.
    """
    shares = sums[..., :2] / sums[..., :2].sum(axis=-2, keepdims=True)
    return sums.shape[-2] * (shares[..., 0] - shares[..., 1])


def _check(size: int, counters: tuple[float, float, float, float]) -> None:
    count_a, seconds_a, count_b, seconds_b = counters
    sound = all(math.isfinite(x) and x >= 0 for x in counters)
    if not sound or (seconds_a and not count_a) or (seconds_b and not count_b):
        raise RedppError(
            f"batches of {size} with the counters {counters}",
            "counts and seconds of 0 or more, and no seconds without a batch",
            "pass differences between two readings; leave out the window in which a server was restarted",
        )


def split_verdict(
    windows: Iterable[ArmWindow],
    margin: float = 0.02,
    alpha: float = 0.05,
    *,
    baseline: str = "original",
    candidate: str = "pruned",
    measure: str = "in the handler",
) -> Verdict:
    """Decide between two arms under live traffic, from windows in order of time.

    ``Verdict.needed`` counts windows. Who looks often keeps an ``ArmSequence`` and passes it to ``verdict``.
    """
    sequence = ArmSequence(alpha)
    sequence.update(windows)
    return verdict(sequence, margin, baseline=baseline, candidate=candidate, measure=measure)
