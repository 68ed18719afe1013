"""Confidence sequences: intervals for a running mean that hold at all times at once, despite correlated neighbours."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from redpp_serve.errors import RedppError

# With fewer blocks the estimated variance is too rough for any statement.
MINIMUM_BLOCKS = 20
# At this number of blocks neighbours are joined in pairs: from then on there are half to all of them, twice as long.
MAXIMUM_BLOCKS = 96
# Number of values near which an interval is tightest. From 800 to 20,000 values it is within 10 % of the tightest.
TARGET = 2000.0
# Relative differences of times that are rounding errors: blocks this much alike have no correlation.
NOTHING = 1e-12
# A decision that would take more values than this gets no forecast.
FORESEEABLE = 1e8


def best_rho2(target: float, alpha: float) -> float:
    """Return the mixture's rho^2 that makes the sequence tightest near ``target`` values.

    Waudby-Smith et al., arXiv 2103.06476, appendix B.2: (-2 log alpha + log(-2 log alpha + 1)) / t.
    """
    return (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / target


def half_width(influence: ArrayLike, values: ArrayLike, rho2: float, alpha: float) -> np.ndarray:
    """Return half the width (...,) of a confidence sequence for the mean of blocks.

    It is the sequential t-test with a normal mixture over the effect (Lai 1976; Wang and Ramdas, arXiv 2310.03722),
    exact for independent normal blocks: with k blocks and x = values * rho^2,
    half^2 = s^2 (a - 1) / (1 - a / (1 + x)), where a = ((1 + x) / alpha^2)^(1/k) and s^2 is the blocks' mean square.
    For large k this is the mixture for a known variance (Robbins 1970). Two changes admit blocks that are not
    independent. With r the lag-1 correlation of the blocks, corrected for its bias (Kendall 1954) and never below 0,
    s^2 grows by f = (1 + r) / (1 - r), the long-run variance of a first-order autoregression; and k shrinks by f, the
    number of independent blocks that tell as much.

    Args:
        influence: (..., k) each block's mean minus the mean of all blocks, in order of time.
        values: (...,) number of observations in all blocks together; the mixture's clock.
        rho2: the mixture's parameter (``best_rho2``).
        alpha: chance, over all times, that the interval ever misses.
    """
    centred, clock = np.asarray(influence, dtype=np.float64), np.asarray(values, dtype=np.float64) * rho2
    blocks = centred.shape[-1]
    squares = np.square(centred).sum(axis=-1)
    growth = _growth(centred, squares)
    power = np.exp(np.minimum((np.log1p(clock) - 2 * math.log(alpha)) * growth / blocks, 700.0))
    room = 1 - power / (1 + clock)
    with np.errstate(divide="ignore", invalid="ignore"):
        half = np.sqrt(squares / blocks * growth * (power - 1) / room)
    return np.where(room > 0, half, math.inf)


def _growth(centred: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return (1 + r) / (1 - r) of blocks (..., k) with these sums of squares; 1 where all blocks are alike."""
    blocks = centred.shape[-1]
    products = (centred[..., 1:] * centred[..., :-1]).sum(axis=-1)
    varied = squares > blocks * NOTHING**2
    lag1 = np.divide(products, squares, out=np.zeros_like(squares), where=varied)
    lag1 = np.clip(lag1 + (1 + 3 * lag1) / blocks, 0.0, 1 - 1 / blocks)
    return np.where(varied, (1 + lag1) / (1 - lag1), 1.0)


def long_run_variance(means: np.ndarray) -> float:
    """Return the variance of block means (k >= 2,), corrected for their lag-1 correlation as in ``half_width``."""
    centred = means - means.mean()
    squares = np.square(centred).sum()
    return float(squares / (len(means) - 1) * _growth(centred, np.asarray(squares)))


def values_needed(mean: float, spread: float, margin: float, rho2: float, alpha: float) -> float | None:
    """Forecast the total number of values for a decision, if mean and noise stay what they are.

    Args:
        mean: of the log-ratios so far.
        spread: long-run standard deviation of one value: the mean's standard error times sqrt(values).
        margin: relative difference that counts as none; its log bounds equivalence.
        rho2: of the sequence.
        alpha: of the sequence.

    Returns:
        The smaller of the numbers for superiority and for equivalence; None where it is beyond ``FORESEEABLE``.
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
    """Sums of consecutive rows over blocks whose length doubles, so that their number stays bounded.

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
    def sums(self) -> np.ndarray:
        """(blocks, columns) of the finished blocks, in order of time."""
        return np.array(self._sums, dtype=np.float64).reshape(-1, self._columns)

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


class ConfidenceSequence(ABC):
    """An interval for a mean of log(time of the original / time of the pruned version), valid at all times at once.

    One may look at it, and stop, at any time.

    Attributes:
        alpha: chance, over the whole run, that the interval ever misses.
        rho2: the mixture's parameter (``best_rho2``).
        unit: what observations are called in texts.
    """

    unit: str

    def __init__(self, alpha: float, target: float, blocks: Blocks) -> None:
        self.alpha, self.rho2 = alpha, best_rho2(target, alpha)
        self._blocks = blocks

    @property
    def blocks(self) -> int:
        """The number of finished blocks."""
        return len(self._blocks)

    @property
    @abstractmethod
    def values(self) -> float:
        """The number of values behind the interval; an unfinished block waits."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """The mean of the finished blocks; 0 before the first."""

    @property
    @abstractmethod
    def basis(self) -> str:
        """The data behind the interval, in words."""

    @property
    def missing(self) -> str:
        """The reason why there is no interval yet, in words; empty where there is one."""
        if not self._enough:
            return self._shortage()
        return "too few or too unsteady for an interval yet" if math.isinf(self.interval()[1]) else ""

    def interval(self) -> tuple[float, float]:
        """Return (low, high) around the mean; infinite while there is too little to compare."""
        if not self._enough:
            return -math.inf, math.inf
        half = float(half_width(self._influence(), self.values, self.rho2, self.alpha))
        return self.mean - half, self.mean + half

    def needed(self, margin: float) -> int | None:
        """Forecast how many more observations a decision takes (``values_needed``); None where nothing can be said."""
        if not self._enough:
            return None
        spread = math.sqrt(long_run_variance(self._influence()) * self.values / len(self._blocks))
        total = values_needed(self.mean, spread, margin, self.rho2, self.alpha)
        return None if total is None else self._more(total)

    @property
    def _enough(self) -> bool:
        return len(self._blocks) >= MINIMUM_BLOCKS

    @abstractmethod
    def _influence(self) -> np.ndarray:
        """Each finished block's mean minus the mean of all, (blocks,)."""

    @abstractmethod
    def _shortage(self) -> str: ...

    @abstractmethod
    def _more(self, total: float) -> int:
        """Return the number of observations still missing to ``total`` values."""


class RatioSequence(ConfidenceSequence):
    """The sequence of paired requests: each value is the log-ratio of one pair.

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
        super().__init__(alpha, target, Blocks(1, block))
        self._first_block = block

    @property
    def values(self) -> int:
        """The number of pairs behind the interval; an unfinished block waits."""
        return len(self._blocks) * self._blocks.length

    @property
    def mean(self) -> float:
        """The mean log-ratio of the finished blocks; 0 before the first."""
        return float(self._means.mean()) if len(self._blocks) else 0.0

    @property
    def basis(self) -> str:
        """The data behind the interval, in words."""
        return f"{self.values} pairs"

    def update(self, values: ArrayLike) -> None:
        """Take in values in order of time.

        Raises:
            RedppError: a value is NaN or infinite; nothing is taken in.
        """
        array = np.ravel(np.asarray(values, dtype=np.float64))
        if not np.isfinite(array).all():
            bad = array[~np.isfinite(array)][0]
            raise RedppError(f"a log-ratio of {bad}", "finite numbers", "leave failed or unmeasured requests out")
        self._blocks.extend(array[:, None].tolist())

    @property
    def _means(self) -> np.ndarray:
        means: np.ndarray = self._blocks.sums[:, 0] / self._blocks.length
        return means

    def _influence(self) -> np.ndarray:
        centred: np.ndarray = self._means - self._means.mean()
        return centred

    def _shortage(self) -> str:
        return f"at least {MINIMUM_BLOCKS * self._first_block} needed"

    def _more(self, total: float) -> int:
        return max(math.ceil(total - self.values), self._blocks.length)
