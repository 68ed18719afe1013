"""An interval for a running mean that holds at all times at once, also where neighbouring values are correlated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from numpy.typing import ArrayLike

from redpp_serve.errors import RedppError

# Before this many blocks the estimated variance is too rough for any statement.
MINIMUM_BLOCKS = 20
# At this many blocks neighbours are joined two by two: later there are always half to all of them, each twice as long.
MAXIMUM_BLOCKS = 96
# Values near which an interval is tightest. Within 10 % of the tightest for its size from 800 to 20 000 values.
TARGET = 2000.0
# Relative differences of times that are rounding errors: blocks this much alike have no correlation.
NOTHING = 1e-12
# A decision that would take more values than this is no forecast.
FORESEEABLE = 1e8


def best_rho2(target: float, alpha: float) -> float:
    """The mixture's rho^2 that makes the sequence tightest near ``target`` values.

    Waudby-Smith et al., arXiv 2103.06476, appendix B.2: (-2 log alpha + log(-2 log alpha + 1)) / t.
    """
    return (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / target


def half_width(influence: ArrayLike, values: ArrayLike, rho2: float, alpha: float) -> numpy.ndarray:
    """Half the width (...,) of a confidence sequence for the mean of blocks.

    It is the sequential t-test with a normal mixture over the effect (Lai 1976; Wang and Ramdas, arXiv 2310.03722),
    exact for independent normal blocks: with k blocks and x = values * rho^2,
    half^2 = s^2 (a - 1) / (1 - a / (1 + x)), where a = ((1 + x) / alpha^2)^(1/k) and s^2 is the blocks' mean square.
    For large k this is the mixture for a known variance (Robbins 1970). Two changes admit blocks that are not
    independent. With r the lag-1 correlation of the blocks, corrected for its bias (Kendall 1954) and never below 0,
    s^2 grows by f = (1 + r) / (1 - r), the long-run variance of a first-order autoregression; and k shrinks by f, the
    number of independent blocks that tell as much.

    Args:
        influence: (..., k) each block's mean minus the mean of all blocks, in order of time.
        values: (...,) how many observations all blocks hold together; the mixture's clock.
        rho2: the mixture's parameter (``best_rho2``).
        alpha: chance, over all times, that the interval ever misses.
    """
    centred, clock = numpy.asarray(influence, dtype=numpy.float64), numpy.asarray(values, dtype=numpy.float64) * rho2
    blocks = centred.shape[-1]
    squares = numpy.square(centred).sum(axis=-1)
    growth = _growth(centred, squares)
    power = numpy.exp(numpy.minimum((numpy.log1p(clock) - 2 * math.log(alpha)) * growth / blocks, 700.0))
    room = 1 - power / (1 + clock)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        half = numpy.sqrt(squares / blocks * growth * (power - 1) / room)
    return numpy.where(room > 0, half, math.inf)


def _growth(centred: numpy.ndarray, squares: numpy.ndarray) -> numpy.ndarray:
    """(1 + r) / (1 - r) of blocks (..., k) with these sums of squares; 1 where all blocks are alike."""
    blocks = centred.shape[-1]
    products = (centred[..., 1:] * centred[..., :-1]).sum(axis=-1)
    varied = squares > blocks * NOTHING**2
    lag1 = numpy.divide(products, squares, out=numpy.zeros_like(squares), where=varied)
    lag1 = numpy.clip(lag1 + (1 + 3 * lag1) / blocks, 0.0, 1 - 1 / blocks)
    return numpy.where(varied, (1 + lag1) / (1 - lag1), 1.0)


def values_needed(mean: float, spread: float, margin: float, rho2: float, alpha: float) -> float | None:
    """How many values in all a decision likely takes, if mean and noise stay what they are.

    Args:
        mean: of the log-ratios so far.
        spread: long-run standard deviation of one value: the mean's standard error times sqrt(values).
        margin: relative difference that counts as none; its log bounds equivalence.
        rho2: of the sequence.
        alpha: of the sequence.

    Returns:
        The smaller number of the two for superiority and for equivalence; None where it is beyond ``FORESEEABLE``.
    """
    distance = max(abs(mean), math.log1p(margin) - abs(mean))

    def wide(values: float) -> bool:
        clock = values * rho2
        return 2 * (clock + 1) / clock / values * math.log(math.sqrt(clock + 1) / alpha) * spread**2 >= distance**2

    low = high = float(MINIMUM_BLOCKS)
    while wide(high):
        low, high = high, 2 * high
        if high > FORESEEABLE:
            return None
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (middle, high) if wide(middle) else (low, middle)
    return math.ceil(high)


class Blocks:
    """Sums of consecutive rows over blocks whose length doubles, so that their number stays below a bound.

    Feeding rows one at a time or all at once gives the same sums to the last bit.

    Args:
        columns: how many numbers a row holds.
        block: rows in a block at first.
    """

    def __init__(self, columns: int, block: int = 1) -> None:
        self.length = block
        self._columns = columns
        self._sums: list[list[float]] = []
        self._waiting: list[list[float]] = []

    def __len__(self) -> int:
        return len(self._sums)

    @property
    def sums(self) -> numpy.ndarray:
        """(blocks, columns) of the finished blocks, in order of time."""
        return numpy.array(self._sums, dtype=numpy.float64).reshape(-1, self._columns)

    def extend(self, rows: Sequence[list[float]]) -> None:
        """Take in rows in order of time; an unfinished block waits."""
        first = 0
        while first < len(rows):
            taken = rows[first : first + self.length - len(self._waiting)]
            self._waiting.extend(taken)
            first += len(taken)
            if len(self._waiting) == self.length:
                self._finish()

    def _finish(self) -> None:
        self._sums.append([math.fsum(column) for column in zip(*self._waiting, strict=True)])
        self._waiting.clear()
        if len(self._sums) == MAXIMUM_BLOCKS:
            pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
            self._sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
            self.length *= 2


class RatioSequence:
    """An interval for the mean of log-ratios, one per pair, that holds at all times at once: one may look, and stop,
    whenever one likes.

    Pairs come from concurrent requests on a machine with other work, so neighbours are correlated, over times that
    nobody knows beforehand. The mean is taken over blocks of consecutive values whose length doubles as data comes in
    (48 to 96 of them): in the long run they are far longer than any correlation. What correlation neighbouring
    blocks keep, above all early, enters the width as that of a first-order autoregression (``half_width``). Between
    the ends of two blocks nothing changes. ``benchmarks/verdicts.py`` measures how often the interval ever misses.

    Args:
        alpha: chance, over the whole run, that the interval ever misses the mean.
        block: values in a block at first; take the number of concurrent requests.
        target: number of values near which the interval is tightest (``best_rho2``).
    """

    unit = "pairs"

    def __init__(self, alpha: float = 0.05, block: int = 1, target: float = TARGET) -> None:
        self.alpha, self.block = alpha, block
        self.rho2 = best_rho2(target, alpha)
        self._blocks = Blocks(1, block)

    @property
    def blocks(self) -> int:
        """How many finished blocks there are."""
        return len(self._blocks)

    @property
    def values(self) -> int:
        """How many values the interval rests on; an unfinished block waits."""
        return len(self._blocks) * self._blocks.length

    @property
    def basis(self) -> str:
        """What the interval rests on, in words."""
        return f"{self.values} pairs"

    @property
    def missing(self) -> str:
        """What the first interval still waits for, in words; empty where there is one."""
        if len(self._blocks) < MINIMUM_BLOCKS:
            return f"at least {MINIMUM_BLOCKS * self.block} needed"
        return "too few or too unsteady for an interval yet" if math.isinf(self.interval()[1]) else ""

    @property
    def means(self) -> numpy.ndarray:
        """(blocks,) means of the finished blocks."""
        return self._blocks.sums[:, 0] / self._blocks.length

    @property
    def mean(self) -> float:
        """Mean of the finished blocks; 0 before the first."""
        return float(self.means.mean()) if len(self._blocks) else 0.0

    @property
    def variance(self) -> float:
        """Long-run variance of one value: that of the mean is this over ``values``. At least two blocks."""
        return self._blocks.length * long_run_variance(self.means)

    def update(self, values: ArrayLike) -> None:
        """Take in values in order of time.

        Raises:
            RedppError: a value is NaN or infinite; nothing is taken in.
        """
        array = numpy.ravel(numpy.asarray(values, dtype=numpy.float64))
        if not numpy.isfinite(array).all():
            bad = array[~numpy.isfinite(array)][0]
            raise RedppError(f"a log-ratio of {bad}", "finite numbers", "leave failed or unmeasured requests out")
        self._blocks.extend(array[:, None].tolist())

    def interval(self) -> tuple[float, float]:
        """(low, high) around the mean; infinite before ``MINIMUM_BLOCKS`` blocks."""
        if len(self._blocks) < MINIMUM_BLOCKS:
            return -math.inf, math.inf
        means = self.means
        mean = float(means.mean())
        half = float(half_width(means - mean, self.values, self.rho2, self.alpha))
        return mean - half, mean + half

    def needed(self, margin: float) -> int | None:
        """How many more values a decision likely takes (``values_needed``); None where it cannot be said."""
        if len(self._blocks) < MINIMUM_BLOCKS:
            return None
        spread = math.sqrt(self.variance)
        total = values_needed(self.mean, spread, margin, self.rho2, self.alpha)
        return None if total is None else max(math.ceil(total - self.values), self._blocks.length)


def long_run_variance(means: numpy.ndarray) -> float:
    """Of block means (k >= 2,), corrected for their lag-1 correlation as in ``half_width``."""
    centred = means - means.mean()
    squares = numpy.square(centred).sum()
    return float(squares / (len(means) - 1) * _growth(centred, numpy.asarray(squares)))
