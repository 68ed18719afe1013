"""What users got, from the gateway's access log, and what the server's counters say, second by second.

`Counting` writes both into the A/B test's state folder: windows of the counters line by line, totals as a whole.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redpp_serve.ab.gateway import switched
from redpp_serve.ab.state import COUNTS, GATEWAY, WINDOWS, Lines, read_json, write_json
from redpp_serve.handlers.metrics import FAMILIES
from redpp_serve.metrics_reader import Key, Reading, Unreadable, read
from redpp_serve.variants import NAMES

_BATCHES, _SECONDS, _TIMES = "redpp_batches_total", "redpp_batch_seconds_total", "redpp_handler_seconds"
_COUNTED = {name: FAMILIES[name] for name in (_BATCHES, _SECONDS, _TIMES)}
_COLUMNS = {
    (variant, name): 2 * i + j for i, variant in enumerate(NAMES) for j, name in enumerate((_BATCHES, _SECONDS))
}
_LEFT = 499  # nginx's status where the sender left before there was an answer
# After this many windows of about a second they become longer, so that the file grows slowly in the second week.
_SHORT_WINDOWS, _LONG_WINDOW_S = 50_000, 10.0

Window = dict[int, list[float]]  # batch size -> [batches, their seconds] of the original, then of the pruned version


def scrape(url: str, model: str) -> Reading:
    """Read the counters of batches and their times at a server's metrics URL.

    Raises:
        Unreadable: there are no metrics.
    """
    return read(url, model, _COUNTED)


@dataclass
class HandlerTimes:
    """Histograms of the handler's time for a batch.

    Attributes:
        buckets: version -> upper bound in seconds (``inf`` last) -> number of batches up to it.
    """

    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: {name: {} for name in NAMES})

    def add(self, gained: Mapping[Key, float]) -> None:
        """Add what a reading has gained."""
        for key, gain in gained.items():
            if key.name == f"{_TIMES}_bucket":
                counts, bound = self.buckets[key.variant], float(key.detail)
                counts[bound] = counts.get(bound, 0.0) + gain

    def histogram(self) -> tuple[list[float], list[int], list[int]]:
        """Return the finite bounds that both versions have, then each version's cumulative counts, the last of all."""
        bounds = sorted(set(self.buckets["original"]) & set(self.buckets["pruned"]))
        original, pruned = ([int(self.buckets[name][bound]) for bound in bounds] for name in NAMES)
        return [bound for bound in bounds if math.isfinite(bound)], original, pruned

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads; JSON's keys are strings."""
        return {name: {repr(bound): count for bound, count in counts.items()} for name, counts in self.buckets.items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Mapping[str, float]]) -> HandlerTimes:
        """Read what `to_json` wrote."""
        return cls({name: {float(bound): count for bound, count in document[name].items()} for name in NAMES})


class Windows:
    """Cuts the server's counters into windows, and sums what happened since the first of them.

    A counter that falls is that of a server that was restarted: the window is left out for both versions, also where
    other counters have already passed their former values, and counting goes on from there.
    Seconds whose batches are not counted yet, read between the two, wait for the next window.

    Attributes:
        since: times over the whole A/B test.
        divided: the times while users were divided; only then may the versions' tails be compared.
    """

    def __init__(self, first: Reading) -> None:
        self._last = first
        self._waiting: dict[int, list[float]] = {}
        self.since, self.divided = HandlerTimes(), HandlerTimes()

    def cut(self, now: Reading, *, divided: bool = True) -> Window:
        """Return batch size -> [batches, seconds] of the original, then of the pruned version, since the last cut.

        Args:
            now: the counters.
            divided: whether users were divided all this time.
        """
        (gained, restarted), self._last = now.since(self._last), now
        if restarted:
            self._waiting.clear()
            return {}
        for key, gain in gained.items():
            if (column := _COLUMNS.get((key.variant, key.name))) is not None:
                self._waiting.setdefault(int(key.detail), [0.0] * 4)[column] += gain
        window: Window = {}
        for size, row in self._waiting.items():
            for first in (0, 2):
                if row[first]:
                    window.setdefault(size, [0.0] * 4)[first : first + 2] = row[first : first + 2]
                    row[first : first + 2] = [0.0, 0.0]
        for times in (self.since, self.divided) if divided else (self.since,):
            times.add(gained)
        return window


COUNTERS = ("requests", "errors", "refused", "abandoned", "by_header")


class Traffic:
    """Counts of users' requests by version, in bounded memory.

    Attributes:
        requests: all requests.
        errors: those answered with a status of 500 or above, also where the server did not answer at all.
        refused: those answered with 400 to 498: the user's mistake.
        abandoned: those whose sender left before there was an answer. If a version hangs, users whose patience is
            shorter than the gateway's see nothing else.
        by_header: those whose sender asked for the version, and which no split has chosen.
    """

    def __init__(self, document: Mapping[str, Any] | None = None) -> None:
        given = document or {}
        counters = (Counter(given.get(name, {})) for name in COUNTERS)
        self.requests, self.errors, self.refused, self.abandoned, self.by_header = counters
        times = given.get("milliseconds", {})
        self._milliseconds = {name: Counter({int(k): n for k, n in times.get(name, {}).items()}) for name in NAMES}

    def take(self, lines: Iterable[dict[str, Any]]) -> None:
        """Count lines of the access log; those that went to neither version are left out."""
        for line in lines:
            arm, status = line["arm"], line["status"]
            if arm not in NAMES:
                continue
            self.requests[arm] += 1
            self.errors[arm] += status >= 500
            self.refused[arm] += 400 <= status < _LEFT
            self.abandoned[arm] += status == _LEFT
            self.by_header[arm] += line["chosen_by"] == "header"
            if line["upstream_time"] is not None and status < 400:
                self._milliseconds[arm][_three_digits(round(1000 * line["upstream_time"]))] += 1

    def percentile_ms(self, arm: str, q: float) -> float | None:
        """Return the ``q`` quantile (0..1) of the server's time for good requests as the gateway sees it, to 1 ms."""
        counts = self._milliseconds[arm]
        rank, seen = q * counts.total(), 0
        for milliseconds in sorted(counts):
            seen += counts[milliseconds]
            if seen >= rank:
                return float(milliseconds)
        return None

    def share(self, arm: str) -> float | None:
        """Return the version's share of all requests; None before the first."""
        total = self.requests.total()
        return self.requests[arm] / total if total else None

    def to_json(self) -> dict[str, Any]:
        """Return the document that the constructor reads."""
        return {**{name: getattr(self, name) for name in COUNTERS}, "milliseconds": self._milliseconds}


def _three_digits(milliseconds: int) -> int:
    """Keep three digits, so that there are no more different values than 900 per power of ten."""
    step = int(10 ** max(len(str(milliseconds)) - 3, 0))
    return milliseconds // step * step


@dataclass(frozen=True)
class Totals:
    """Counts over the whole A/B test.

    Attributes:
        traffic: what users got.
        times: the handlers' times.
        divided: the part of ``times`` from when users were divided, so that the versions' loads are comparable.
    """

    traffic: Traffic
    times: HandlerTimes
    divided: HandlerTimes

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads."""
        return {"users": self.traffic.to_json(), "buckets": self.times.to_json(), "divided": self.divided.to_json()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Totals:
        """Read what `to_json` returned."""
        times, divided = (HandlerTimes.from_json(document[name]) for name in ("buckets", "divided"))
        return cls(Traffic(document["users"]), times, divided)


class WrittenCounts:
    """The counts of another process, as `Counting` writes them to the state folder."""

    def __init__(self, state: Path) -> None:
        self._path, self._windows = state / COUNTS, Lines(state / WINDOWS)

    def totals(self) -> Totals | None:
        """Read the counts; None before the first."""
        document = read_json(self._path)
        return Totals.from_json(document) if document else None

    def new_windows(self) -> list[Window]:
        """Read the windows that were added since the last call."""
        return [{int(size): row for size, row in line["batches"].items()} for line in self._windows.new()]


class Counting:
    """Counts what users got and reads the server's counters: in memory, and in files for other processes.

    Args:
        state: the test's state folder.
        access_log: the gateway's.
        counters: reads the server's counters, such as `scrape` of its metrics URL.
    """

    def __init__(self, state: Path, access_log: Path, counters: Callable[[], Reading]) -> None:
        self._state, self._counters = state, counters
        self._traffic, self._log = Traffic(), Lines(access_log)
        self._old: Lines | None = None
        self._windows: Windows | None = None
        self._written, self._cut_at = 0, 0.0
        self._new: list[Window] = []
        self._divided = True

    def count(self) -> list[str]:
        """Take in what has happened since the last call; return sentences about what could not be read."""
        for lines in filter(None, (self._old, self._log)):
            self._traffic.take(lines.new())
        self._old = None
        problems = []
        try:
            self._cut()
        except Unreadable as error:
            problems.append(f"the server's metrics cannot be read: {error}")
        if totals := self.totals():
            write_json(self._state / COUNTS, totals.to_json())
        return problems

    def totals(self) -> Totals | None:
        """Return the counts as of the last call of `count`; None before the server's metrics were read."""
        if self._windows is None:
            return None
        return Totals(self._traffic, self._windows.since, self._windows.divided)

    def new_windows(self) -> list[Window]:
        """Return the windows that were cut since the last call."""
        new, self._new = self._new, []
        return new

    def put_aside(self) -> None:
        """Go on with a new access log; nginx may still write a few lines to the old one, which was put aside."""
        self._old, self._log = self._log, Lines(self._log.path)
        self._old.path = self._log.path.with_suffix(".log.1")

    def _cut(self) -> None:
        now = self._counters()
        if self._windows is None:
            self._windows = Windows(now)
            return
        if self._written >= _SHORT_WINDOWS and time.monotonic() - self._cut_at < _LONG_WINDOW_S:
            return
        self._cut_at = time.monotonic()
        divided, self._divided = self._divided, switched(self._state / GATEWAY) is None
        window = self._windows.cut(now, divided=divided and self._divided)
        if window:
            self._new.append(window)
            with (self._state / WINDOWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "batches": window}) + "\n")
            self._written += 1
