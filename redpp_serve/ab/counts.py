"""What users got, from the gateway's access log, and what the server's counters say, second by second.

`Counting` writes both into the A/B test's state folder: windows of the counters line by line, totals as a whole.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from redpp_serve.ab.gateway import Division, divided_now, division
from redpp_serve.ab.state import COUNTS, GATEWAY, WINDOWS, Lines, read_json, write_json
from redpp_serve.handlers.metrics import FAMILIES
from redpp_serve.metrics_reader import Gains, Key, Reading, Unreadable, read
from redpp_serve.variants import NAMES

_BATCHES, _SECONDS, _TIMES = "redpp_batches_total", "redpp_batch_seconds_total", "redpp_handler_seconds"
COUNTED = {name: FAMILIES[name] for name in (_BATCHES, _SECONDS, _TIMES)}
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
    return read(url, model, COUNTED)


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
        divided: split -> the times while it was in force; only then may the versions' tails be compared.
    """

    def __init__(
        self, first: Reading, since: HandlerTimes | None = None, divided: dict[str, HandlerTimes] | None = None
    ) -> None:
        self._last = first
        self._waiting: dict[int, list[float]] = {}
        self.since, self.divided = since or HandlerTimes(), divided or {}

    def cut(self, now: Reading, split: str | None = None) -> Window:
        """Return batch size -> [batches, seconds] of the original, then of the pruned version, since the last cut.

        Args:
            now: the counters.
            split: the split that was in force all this time; None where it changed, or users were not divided.
        """
        gains, self._last = now.since(self._last), now
        return self.add(gains, split)

    def add(self, gains: Gains, split: str | None = None) -> Window:
        """Cut as `cut` does, where it is known what the counters have gained since the last time."""
        if gains.restarted:
            self._waiting.clear()
            return {}
        for key, gain in gains.gained.items():
            if (column := _COLUMNS.get((key.variant, key.name))) is not None:
                self._waiting.setdefault(int(key.detail), [0.0] * 4)[column] += gain
        window: Window = {}
        for size, row in self._waiting.items():
            for first in (0, 2):
                if row[first]:
                    window.setdefault(size, [0.0] * 4)[first : first + 2] = row[first : first + 2]
                    row[first : first + 2] = [0.0, 0.0]
        self.since.add(gains.gained)
        if split:
            self.divided.setdefault(split, HandlerTimes()).add(gains.gained)
        return window


COUNTERS = ("requests", "errors", "refused", "abandoned", "by_header", "failed_over", "judged", "faults")
_RETRY_S, _MOST_FAILED = 10.0, 10_000  # see `Retries`
_PATIENCE_MS, _ENOUGH = 1000.0, 20  # before so many good answers a user who leaves within this time says nothing


@dataclass
class Stratum:
    """What was judged while one split was in force: both arms had the same hours then, in constant shares.

    Attributes:
        judged: arm -> requests that say something of it.
        faults: arm -> those that it failed.
    """

    judged: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, arm: str, fault: bool) -> None:
        """Add a request."""
        self.judged[arm] += 1
        self.faults[arm] += fault

    @classmethod
    def from_json(cls, document: Mapping[str, Mapping[str, int]]) -> Stratum:
        """Read what ``vars`` returned."""
        return cls(Counter(document["judged"]), Counter(document["faults"]))


class Retries:
    """Knows what a user sends soon after a version has failed them, such as the retries of a client library.

    A user's fault counts once in `_RETRY_S` seconds. Meanwhile nothing of that user's counts, good or bad, so that what
    is left has the same rate of faults.
    """

    def __init__(self) -> None:
        self._failed: dict[tuple[str, str], float] = {}

    def repeats(self, line: Mapping[str, Any], fault: bool) -> bool:
        """Take a line of the access log in order of time, and return True if it is of such a request."""
        if not (user := line.get("user")):
            return False
        key, at = (user, line["arm"]), datetime.fromisoformat(line["time"]).timestamp()
        if at - self._failed.get(key, -math.inf) < _RETRY_S:
            return True
        if fault:
            if len(self._failed) >= _MOST_FAILED:
                self._failed = {key: since for key, since in self._failed.items() if at - since < _RETRY_S}
            self._failed[key] = at
        return False


class Traffic:
    """Counts of users' requests by version, in bounded memory.

    Attributes:
        requests: all requests.
        errors: those answered with a status of 500 or above, also where the server did not answer at all.
        refused: those answered with 400 to 498: the user's mistake.
        abandoned: those whose sender left before there was an answer. If a version hangs, users whose patience is
            shorter than the gateway's see nothing else.
        by_header: those whose sender asked for the version, and which no split has chosen.
        failed_over: those that the other version answered, since this one was dead or failed.
        judged: those that say something of the version: not those that chose it, those without a valid token, those
            that the other version failed as well, nor those of a user whom it has failed just before, see `Retries`.
        faults: those of ``judged`` that the version failed: errors, failed over, or abandoned by a user who had waited
            longer than an answer takes.
        strata: split -> the part of ``judged`` and ``faults`` that was divided by it.
    """

    def __init__(self, document: Mapping[str, Any] | None = None) -> None:
        given = document or {}
        counters = (Counter(given.get(name, {})) for name in COUNTERS)
        self.requests, self.errors, self.refused, self.abandoned, self.by_header, *others = counters
        self.failed_over, self.judged, self.faults = others
        self.strata = {split: Stratum.from_json(counts) for split, counts in given.get("strata", {}).items()}
        self._retries = Retries()
        times = given.get("milliseconds", {})
        self._milliseconds = {name: Counter({int(k): n for k, n in times.get(name, {}).items()}) for name in NAMES}

    def take(self, lines: Iterable[dict[str, Any]], splits: Mapping[str, str] = MappingProxyType({})) -> None:
        """Count lines of the access log; those that went to neither version are left out.

        Args:
            lines: as nginx has written them.
            splits: what the log calls a split -> the split.
        """
        for line in lines:
            arm, status = line["arm"], line["status"]
            if arm not in NAMES:
                continue
            waited_ms = None if line["upstream_time"] is None else round(1000 * line["upstream_time"])
            by_header, over = line["chosen_by"] == "header", line["answered_by"] != arm and status < _LEFT
            left = status == _LEFT
            self.requests[arm] += 1
            self.errors[arm] += status >= 500
            self.refused[arm] += 400 <= status < _LEFT
            self.abandoned[arm] += left
            self.by_header[arm] += by_header
            self.failed_over[arm] += over
            fault = status >= 500 or over or (left and (waited_ms or 0) >= self.patience_ms)
            both = status >= 500 and line["answered_by"] != arm  # a request that no version answers tells none apart
            if not by_header and line["admitted"] and not both and not self._retries.repeats(line, fault):
                self.judged[arm] += 1
                self.faults[arm] += fault
                if line["chosen_by"] == "split" and (split := splits.get(line.get("step", ""))):
                    self.strata.setdefault(split, Stratum()).add(arm, fault)
            if waited_ms is not None and status < 400 and not over:
                self._milliseconds[arm][_three_digits(waited_ms)] += 1

    @property
    def patience_ms(self) -> float:
        """How long a user has to wait before leaving says something: the time of nearly all good answers."""
        known = [arm for arm in NAMES if self._milliseconds[arm].total() >= _ENOUGH]
        return min((self.percentile_ms(arm, 0.99) or 0.0 for arm in known), default=_PATIENCE_MS)

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
        strata = {split: vars(stratum) for split, stratum in self.strata.items()}
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "milliseconds": self._milliseconds,
            "strata": strata,
        }


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
        divided: split -> the part of ``times`` from when users were divided by it.
    """

    traffic: Traffic
    times: HandlerTimes
    divided: dict[str, HandlerTimes]

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads."""
        divided = {split: times.to_json() for split, times in self.divided.items()}
        return {"users": self.traffic.to_json(), "buckets": self.times.to_json(), "divided": divided}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Totals:
        """Read what `to_json` returned."""
        divided = {split: HandlerTimes.from_json(times) for split, times in document["divided"].items()}
        return cls(Traffic(document["users"]), HandlerTimes.from_json(document["buckets"]), divided)


class WrittenCounts:
    """The counts of another process, as `Counting` writes them to the state folder."""

    def __init__(self, state: Path) -> None:
        self._path, self._windows = state / COUNTS, Lines(state / WINDOWS)

    def totals(self) -> Totals | None:
        """Read the counts; None before the first."""
        document = read_json(self._path)
        return Totals.from_json(document) if document else None

    def log_place(self) -> Sequence[int]:
        """Read how far the access log is counted."""
        document = read_json(self._path)
        return document["log"] if document else (0, -1)

    def splits(self) -> dict[str, str]:
        """Read what the access log calls the last splits -> the splits."""
        document = read_json(self._path)
        return document["splits"] if document else {}

    def new_windows(self) -> list[Window]:
        """Read the windows that were added since the last call."""
        return [{int(size): row for size, row in line["batches"].items()} for line in self._windows.new()]


class Counting:
    """Counts what users got and reads the server's counters: in memory, and in files for other processes.

    It goes on from what another process has written there before it was killed.

    Args:
        state: the test's state folder.
        access_log: the gateway's.
        counters: reads the server's counters, such as `scrape` of its metrics URL.
    """

    def __init__(self, state: Path, access_log: Path, counters: Callable[[], Reading]) -> None:
        self._state, self._counters = state, counters
        written = WrittenCounts(state)
        self._before = written.totals()
        self._traffic = self._before.traffic if self._before else Traffic()
        self._log = Lines(access_log, written.log_place())
        self._old: Lines | None = None
        self._windows: Windows | None = None
        self._new: list[Window] = written.new_windows()
        self._written, self._cut_at = len(self._new), 0.0
        self._splits = written.splits()
        self._division = self._look() if self._before is None else None

    def count(self) -> list[str]:
        """Take in what has happened since the last call; return sentences about what could not be read."""
        lines = [line for log in filter(None, (self._old, self._log)) for line in log.new()]
        if now := division(self._state / GATEWAY):  # after the lines, so that no line is of a later split
            self._splits[now.label] = str(now.split)
        self._traffic.take(lines, self._splits)
        self._old = None
        problems = []
        try:
            self._cut()
        except Unreadable as error:
            problems.append(f"the server's metrics cannot be read: {error}")
        if totals := self.totals():
            write_json(self._state / COUNTS, {**totals.to_json(), "log": self._log.place, "splits": self._splits})
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

    def _look(self) -> Division | None:
        return divided_now(self._state / GATEWAY)

    def _cut(self) -> None:
        now = self._counters()
        if self._windows is None:
            counted = (self._before.times, self._before.divided) if self._before else ()
            self._windows = Windows(now, *counted)
            return
        if self._written >= _SHORT_WINDOWS and time.monotonic() - self._cut_at < _LONG_WINDOW_S:
            return
        self._cut_at = time.monotonic()
        before, self._division = self._division, self._look()
        same = self._division and self._division == before
        window = self._windows.cut(now, str(self._division.split) if self._division and same else None)
        if window:
            self._new.append(window)
            with (self._state / WINDOWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "batches": window}) + "\n")
            self._written += 1
