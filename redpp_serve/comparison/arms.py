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

from redpp_serve.comparison.sequences import (
    MINIMUM_BLOCKS,
    TARGET,
    Blocks,
    best_rho2,
    half_width,
    long_run_variance,
    values_needed,
)
from redpp_serve.comparison.statistics import Verdict, verdict
from redpp_serve.errors import RedppError

# What both arms did within one window of time: requests in a batch -> (batches of the original, seconds that they
# took in the handler, batches of the pruned, their seconds). Differences of the counters, not their totals.
ArmWindow = Mapping[int, tuple[float, float, float, float]]
# Independent comparisons that make the first interval: the quotient of two sums is far from normal before.
MINIMUM_WEIGHT = 50.0


class ArmSequence:
    """An interval for log(time of the original / time of the pruned) of a batch that holds at all times at once.

    Windows in which no batch size was seen in both arms say nothing about the ratio and are only counted. The others
    are joined to blocks whose length doubles, as in ``RatioSequence``. A block's influence on the logarithm of the
    quotient of the sums so far takes the place of a value, and the strata's weight n_a n_b / (n_a + n_b), about the
    number of batches in the smaller arm, that of the number of values.

    Take windows that are short against changes of the load and long enough to hold batches of both arms: 1 to 10 s.

    Args:
        alpha: chance, over the whole run, that the interval ever misses.
        target: weight near which the interval is tightest.
    """

    unit = "windows"

    def __init__(self, alpha: float = 0.05, target: float = TARGET) -> None:
        self.alpha = alpha
        self.rho2 = best_rho2(target, alpha)
        self.windows, self.compared_windows = 0, 0
        self.batches, self.compared = [0.0, 0.0], [0.0, 0.0]
        self._blocks = Blocks(3)

    def update(self, windows: Iterable[ArmWindow]) -> None:
        """Take in windows in order of time.

        Raises:
            RedppError: a count or a time is negative, not finite, or a time without a batch; the windows before it
                are taken in.
        """
        for window in windows:
            top, bottom, weight = 0.0, 0.0, 0.0
            for size in window:
                _check(size, window[size])
            self.windows += 1
            for count_a, seconds_a, count_b, seconds_b in window.values():
                self.batches[0] += count_a
                self.batches[1] += count_b
                if count_a and count_b:
                    share = count_a / (count_a + count_b)
                    top, bottom = top + (1 - share) * seconds_a, bottom + share * seconds_b
                    weight += share * count_b
                    self.compared[0] += count_a
                    self.compared[1] += count_b
            if weight:
                self.compared_windows += 1
                self._blocks.extend([[top, bottom, weight]])

    @property
    def _sums(self) -> numpy.ndarray:
        """(3,) of all finished blocks: the original's seconds, the pruned network's, the weight."""
        return self._blocks.sums.sum(axis=0)

    @property
    def values(self) -> float:
        """The weight that the interval rests on."""
        return float(self._sums[2])

    @property
    def mean(self) -> float:
        """Log of the ratio; 0 before it can be formed."""
        top, bottom, _ = self._sums
        return math.log(top / bottom) if top > 0 and bottom > 0 else 0.0

    @property
    def influence(self) -> numpy.ndarray:
        """(blocks,) each block's part in the log of the ratio, as a value whose mean over the blocks is 0."""
        sums = self._blocks.sums
        return len(sums) * (sums[:, 0] / sums[:, 0].sum() - sums[:, 1] / sums[:, 1].sum())

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
        if not self.compared_windows:
            return "no batch size was seen in both arms within one window"
        if self._few:
            return f"at least {MINIMUM_BLOCKS} windows and a weight of {MINIMUM_WEIGHT:g} batches per arm needed"
        return "too few or too unsteady for an interval yet" if math.isinf(self.interval()[1]) else ""

    @property
    def _few(self) -> bool:
        top, bottom, weight = self._sums
        return len(self._blocks) < MINIMUM_BLOCKS or weight < MINIMUM_WEIGHT or top <= 0 or bottom <= 0

    def interval(self) -> tuple[float, float]:
        """(low, high) around the mean; infinite while there is too little to compare."""
        if self._few:
            return -math.inf, math.inf
        half = float(half_width(self.influence, self.values, self.rho2, self.alpha))
        return self.mean - half, self.mean + half

    def needed(self, margin: float) -> int | None:
        """How many more windows like those so far a decision likely takes; None where it cannot be said."""
        if self._few:
            return None
        spread = math.sqrt(long_run_variance(self.influence) * self.values / len(self._blocks))
        total = values_needed(self.mean, spread, margin, self.rho2, self.alpha)
        return None if total is None else max(math.ceil((total / self.values - 1) * self.windows), 1)


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
    candidate: str = "redpp",
    measure: str = "in the handler",
) -> Verdict:
    """Decide between two arms under live traffic, from windows in order of time.

    ``Verdict.needed`` counts windows. Who looks often keeps an ``ArmSequence`` and passes it to ``verdict``.
    """
    sequence = ArmSequence(alpha)
    sequence.update(windows)
    return verdict(sequence, margin, baseline=baseline, candidate=candidate, measure=measure)
