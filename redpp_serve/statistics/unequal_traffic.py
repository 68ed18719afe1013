"""Relative speed of two versions that receive unequal shares of live traffic, from counters per window and batch size.

The plain ratio of the versions' mean times will not do: under a 90:10 split the busier version fills larger batches,
and both versions' times follow the load of the day. So only batches of one size in one window of time are compared.
In such a stratum with n_a and n_b batches that took s_a and s_b seconds, n_b s_a / (n_a + n_b) and
n_a s_b / (n_a + n_b) have the same mean if the versions are equally fast, whatever the size, the load and the counts
are; the quotient of their sums is the estimate of Mantel and Haenszel. No logarithm and no quotient is taken within a
stratum, so one batch there is as good as a hundred: a mean of logs over few batches would be biased, and differently
for unequal counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from redpp_serve.errors import RedppError
from redpp_serve.statistics.sequences import MINIMUM_BLOCKS, TARGET, Blocks, ConfidenceSequence

# What both versions did within one window of time: requests in a batch -> (batches of the original, their seconds in
# the handler, batches of the pruned version, their seconds). Differences of the counters, not their totals.
ArmWindow = Mapping[int, tuple[float, float, float, float]]


class ArmSequence(ConfidenceSequence):
    """The sequence of live traffic: the mean is log(time of the original / time of the pruned version) of a batch.

    Windows in which no batch size was seen in both versions say nothing about the ratio and are only counted. The
    others are joined to blocks whose length doubles, as in ``RatioSequence``. A block's influence on the logarithm of
    the quotient of the sums so far takes the place of a value. A window counts as one value, or as less where its
    weight n_a n_b / (n_a + n_b), about the number of batches of the rarer version, is below 1 (``comparable``).

    Take windows that are short against changes of the load and long enough to hold batches of both: 1 to 10 s.

    Args:
        alpha: chance, over the whole run, that the interval ever misses.
        target: number of full windows near which the interval is tightest.
    """

    unit = "windows"

    def __init__(self, alpha: float = 0.05, target: float = TARGET) -> None:
        super().__init__(alpha, target, Blocks(3))
        self.windows = 0
        self.batches, self.compared = [0.0, 0.0], [0.0, 0.0]

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
            row = comparable(np.array(list(window.values()), dtype=np.float64).reshape(-1, 4))
            if row[2]:
                self._blocks.extend([row.tolist()])

    @property
    def _sums(self) -> np.ndarray:
        """(3,) of all finished blocks, as in ``comparable``."""
        sums: np.ndarray = self._blocks.sums.sum(axis=0)
        return sums

    @property
    def values(self) -> float:
        """The number of full windows behind the interval."""
        return float(self._sums[2])

    @property
    def mean(self) -> float:
        """The log of the ratio; 0 before it can be formed."""
        top, bottom, _ = self._sums
        return math.log(top / bottom) if top > 0 and bottom > 0 else 0.0

    @property
    def basis(self) -> str:
        """The data behind the interval, in words."""
        (a, b), (all_a, all_b) = self.compared, self.batches
        share = "" if (a, b) == (all_a, all_b) else f" with a counterpart of {all_a:.0f} and {all_b:.0f}"
        return f"{a:.0f} and {b:.0f} batches{share} in {self.windows} windows"

    @property
    def _enough(self) -> bool:
        return super()._enough and bool((self._sums[:2] > 0).all())

    def _influence(self) -> np.ndarray:
        return influence(self._blocks.sums)

    def _shortage(self) -> str:
        for version, count in zip(("original", "pruned version"), self.batches, strict=True):
            if not count:
                return f"the {version} has no traffic"
        if not self.compared[0]:
            return "no batch size was seen in both versions within one window"
        if super()._enough:
            return "no time was measured"
        return f"{len(self._blocks)} of {MINIMUM_BLOCKS} windows with traffic on both versions"

    def _more(self, total: float) -> int:
        """Count windows like those so far."""
        return max(math.ceil((total / self.values - 1) * self.windows), 1)


def comparable(window: np.ndarray) -> np.ndarray:
    """Return (..., 3): both versions' seconds, weighted and summed over the sizes, and the weight, at most 1.

    The weight says how much of a full window this is. A window with more is brought down to 1 in all three. What moves
    from window to window, the load of the machine and of each worker, does not average out over the batches within
    one; and hours of heavy load, with more batches and longer ones, would otherwise make up nearly all of the sums.

    Args:
        window: (..., sizes, 4) counters as in ``ArmWindow``.
    """
    count_a, seconds_a, count_b, seconds_b = np.moveaxis(window, -1, 0)
    both = (count_a > 0) & (count_b > 0)
    share = np.divide(count_a, count_a + count_b, out=np.zeros(both.shape), where=both)
    rows = np.where(both, ((1 - share) * seconds_a, share * seconds_b, share * count_b), 0.0)
    top, bottom, weight = rows.sum(axis=-1)
    scaled: np.ndarray = np.stack([top, bottom, weight], axis=-1) / np.maximum(weight, 1.0)[..., None]
    return scaled


def influence(sums: np.ndarray) -> np.ndarray:
    """Return each block's part (..., k) in the log of the ratio, as a value whose mean over the blocks is 0.

    Args:
        sums: (..., k, 3) of ``comparable`` over blocks; the first two columns add up to more than 0.
    """
    shares = sums[..., :2] / sums[..., :2].sum(axis=-2, keepdims=True)
    parts: np.ndarray = sums.shape[-2] * (shares[..., 0] - shares[..., 1])
    return parts


def _check(size: int, counters: tuple[float, float, float, float]) -> None:
    count_a, seconds_a, count_b, seconds_b = counters
    sound = all(math.isfinite(x) and x >= 0 for x in counters)
    if not sound or (seconds_a and not count_a) or (seconds_b and not count_b):
        raise RedppError(
            f"batches of {size} with the counters {counters}",
            "counts and seconds of 0 or more, and no seconds without a batch",
            "pass differences between two readings; leave out the window in which a server was restarted",
        )
