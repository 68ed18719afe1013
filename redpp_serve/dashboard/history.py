"""What the counters gained over the last minutes, in bounded memory."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from redpp_serve.dashboard.scraping import Key
from redpp_serve.statistics.intervals import Quantile, quantile

KEPT_S = 900.0
MAX_KEYS = 4096  # more come only from a server that invents labels; they are left out


class Window:
    """Gains of the counters over a span of seconds.

    Args:
        gains: of each series over the whole span.
        span: seconds.
        steps: (scrapes, series) the same from scrape to scrape; None: one scrape.
    """

    def __init__(self, gains: Mapping[Key, float], span: float, steps: np.ndarray | None = None) -> None:
        self._gains, self.span = gains, span
        self._steps = np.array([list(gains.values())]) if steps is None else steps

    def each(self, keys: Sequence[Key]) -> np.ndarray:
        """(scrapes, keys): what the counters gained from scrape to scrape."""
        places = {key: i for i, key in enumerate(self._gains)}
        found = np.zeros((len(self._steps), len(keys)))
        for i, key in enumerate(keys):
            if key in places:
                found[:, i] = self._steps[:, places[key]]
        return found

    def total(self, name: str, variant: str, detail: str = "") -> float:
        """What one counter gained."""
        return self._gains.get(Key(name, variant, detail), 0.0)

    def rate(self, name: str, variant: str, detail: str = "") -> float | None:
        """Gain in a second; None for an empty span."""
        return self.total(name, variant, detail) / self.span if self.span > 0 else None

    def details(self, name: str, variant: str) -> dict[str, float]:
        """Telling label -> gain above zero, for one counter's series."""
        return {k.detail: v for k, v in self._gains.items() if k.name == name and k.variant == variant and v > 0}

    def buckets(self, name: str, variant: str) -> dict[float, float]:
        """Upper edge -> observations up to it."""
        wanted = (f"{name}_bucket", variant)
        return {float(k.detail): v for k, v in self._gains.items() if (k.name, k.variant) == wanted}

    def quantile(self, name: str, variant: str, share: float) -> Quantile | None:
        """A percentile of a histogram; None without observations."""
        return quantile(self.buckets(name, variant), share)

    def mean(self, name: str, variant: str) -> float | None:
        """The exact mean of what a histogram observed; None without observations."""
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
        """Take the gains since the last call; ``time`` in seconds, never falling."""
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
        """The gains of about the last so many seconds, or since the first snapshot where that is later."""
        if not self._times:
            return Window({}, 0.0)
        now = self._times[-1]
        start = max(bisect_right(self._times, now - seconds + 1e-6) - 1, 0)
        if start + 1 < len(self._times) and self._times[start + 1] + self._times[start] < 2 * (now - seconds):
            start += 1  # scrapes are not quite a second apart: the nearest one counts
        totals = np.zeros((len(self._times) - start, len(self._places)))
        for row, snapshot in zip(totals, islice(self._snapshots, start, None)):
            row[: len(snapshot)] = snapshot  # a series that was not there yet stood at zero
        gains = dict(zip(self._places, (totals[-1] - totals[0]).tolist()))
        return Window(gains, now - self._times[start], np.diff(totals, axis=0))
