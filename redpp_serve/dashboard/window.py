"""What the counters gained over the last minutes, in bounded memory, and the speed-ups that follow from it."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from redpp_serve.metrics_reader import Key
from redpp_serve.statistics.intervals import Quantile, quantile
from redpp_serve.statistics.unequal_traffic import comparable, influence
from redpp_serve.variants import NAMES

HANDLER, NETWORK, BATCH = "redpp_handler_seconds", "redpp_inference_seconds", "redpp_batch_size"
REQUESTS = "redpp_requests_total"
_BATCHES, _SECONDS = "redpp_batches_total", "redpp_batch_seconds_total"
KEPT_S = 900.0
MAX_KEYS = 4096  # more come only from a server that invents labels; they are left out
_LEAST = 5  # scrapes with both versions before their spread says anything


class Window:
    """Gains of the counters over a span of seconds.

    Args:
        gains: of each series over the whole span.
        span: seconds.
        steps: (scrapes, series) the same from scrape to scrape; by default there was one scrape.
    """

    def __init__(self, gains: Mapping[Key, float], span: float, steps: np.ndarray | None = None) -> None:
        self._gains, self.span = gains, span
        self._steps = np.array([list(gains.values())]) if steps is None else steps

    def each(self, keys: Sequence[Key]) -> np.ndarray:
        """Return what the counters gained from scrape to scrape, (scrapes, keys)."""
        places = {key: i for i, key in enumerate(self._gains)}
        found = np.zeros((len(self._steps), len(keys)))
        for i, key in enumerate(keys):
            if key in places:
                found[:, i] = self._steps[:, places[key]]
        return found

    def total(self, name: str, variant: str, detail: str = "") -> float:
        """Return what one counter gained."""
        return self._gains.get(Key(name, variant, detail), 0.0)

    def rate(self, name: str, variant: str, detail: str = "") -> float | None:
        """Return the gain per second; None for an empty span."""
        return self.total(name, variant, detail) / self.span if self.span > 0 else None

    def details(self, name: str, variant: str) -> dict[str, float]:
        """Return detail -> gain above zero of one counter's series."""
        return {k.detail: v for k, v in self._gains.items() if (k.name, k.variant) == (name, variant) and v > 0}

    def buckets(self, name: str, variant: str) -> dict[float, float]:
        """Return upper edge -> observations up to it."""
        wanted = (f"{name}_bucket", variant)
        return {float(k.detail): v for k, v in self._gains.items() if (k.name, k.variant) == wanted}

    def quantile(self, name: str, variant: str, share: float) -> Quantile | None:
        """Return a percentile of a histogram; None without observations."""
        return quantile(self.buckets(name, variant), share)

    def mean(self, name: str, variant: str) -> float | None:
        """Return the exact mean of what a histogram observed; None without observations."""
        count = self.total(f"{name}_count", variant)
        return self.total(f"{name}_sum", variant) / count if count > 0 else None


class History:
    """Running totals of gains, and how they stood at each scrape of the last `KEPT_S` seconds."""

    def __init__(self) -> None:
        self._places: dict[Key, int] = {}
        self._totals = array("d")
        self._times: deque[float] = deque()
        self._snapshots: deque[array[float]] = deque()

    def add(self, time: float, gains: Mapping[Key, float]) -> None:
        """Take in the gains since the last call; ``time`` is in seconds and never falls."""
        for key, gain in gains.items():
            place = self._places.get(key)
            if place is None:
                if len(self._places) >= MAX_KEYS:
                    continue
                place = self._places[key] = len(self._places)
                self._totals.append(0.0)
            self._totals[place] += gain
        self._times.append(time)
        self._snapshots.append(self._totals[:])
        while self._times[0] < time - KEPT_S:
            self._times.popleft()
            self._snapshots.popleft()

    def window(self, seconds: float) -> Window:
        """Return the gains of about the last ``seconds``, or since the first snapshot where that is later."""
        if not self._times:
            return Window({}, 0.0)
        now = self._times[-1]
        start = max(bisect_right(self._times, now - seconds + 1e-6) - 1, 0)
        if start + 1 < len(self._times) and self._times[start + 1] + self._times[start] < 2 * (now - seconds):
            start += 1  # scrapes are not quite a second apart: the nearest one counts
        totals = np.zeros((len(self._times) - start, len(self._places)))
        for row, snapshot in zip(totals, islice(self._snapshots, start, None), strict=True):
            row[: len(snapshot)] = snapshot  # a series that was not there yet stood at zero
        gains = dict(zip(self._places, (totals[-1] - totals[0]).tolist(), strict=True))
        return Window(gains, now - self._times[start], np.diff(totals, axis=0))


class Ratio(NamedTuple):
    """Time of the original / time of the pruned version, above 1 where the latter is faster.

    Attributes:
        value: the ratio.
        original: the original's time, seconds.
        pruned: the pruned version's.
        low: the least ratio that the width of the buckets admits; None where nothing is left open.
        high: the largest.
    """

    value: float
    original: float
    pruned: float
    low: float | None = None
    high: float | None = None


def percentile_ratio(window: Window, share: float) -> Ratio | None:
    """Compare a percentile of the handler's time; None where a version had no traffic."""
    original, pruned = (window.quantile(HANDLER, variant, share) for variant in NAMES)
    if not original or not pruned or original.value <= 0 or pruned.value <= 0:
        return None
    high = original.high / pruned.low if pruned.low > 0 else math.inf
    return Ratio(original.value / pruned.value, original.value, pruned.value, original.low / pruned.high, high)


def network_ratio(window: Window) -> Ratio | None:
    """Compare the mean time of one run of the network, batch sizes as they came."""
    original, pruned = (window.mean(NETWORK, variant) for variant in NAMES)
    return Ratio(original / pruned, original, pruned) if original and pruned else None


def equal_batch_ratio(window: Window) -> Ratio | None:
    """Compare the mean handler time at equal batch size, weighted as in an A/B test.

    None where no size was seen in both versions.
    """
    strata = _strata(window).sum(axis=0)
    if not strata.size:
        return None
    original, pruned = comparable(strata).tolist()[:2]
    weight = float(comparable(strata[:, [0, 0, 2, 2]])[0])  # as many "seconds" as batches: their weighted number
    return Ratio(original / pruned, original / weight, pruned / weight) if original > 0 and pruned > 0 else None


def noise(window: Window) -> float | None:
    """Return the standard error of log(`equal_batch_ratio`) from its spread over the scrapes, taken as independent.

    None where fewer than `_LEAST` of them hold both versions.
    """
    sums = comparable(_strata(window))
    sums = sums[(sums[:, :2] > 0).all(axis=1)]
    return float(influence(sums).std(ddof=1)) / math.sqrt(len(sums)) if len(sums) >= _LEAST else None


def _strata(window: Window) -> np.ndarray:
    """(scrapes, batch sizes, 4) as in `ArmWindow`."""
    sizes = list(window.details(_BATCHES, "original"))
    keys = [Key(name, variant, size) for size in sizes for variant in NAMES for name in (_BATCHES, _SECONDS)]
    gains = window.each(keys)
    return gains.reshape(len(gains), len(sizes), 4)
