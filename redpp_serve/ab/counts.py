"""Second by second: what users got, and what the server's counters say, into the state folder.

The server's counters for both arms: read from its metrics, and cut into windows of time.

What users got, arm by arm, counted from the gateway's access log.
"""

from __future__ import annotations

import http.client
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from redpp_serve.ab.gateway import switched
from redpp_serve.ab.state import COUNTS, GATEWAY, WINDOWS, Lines, read_json, write_json
from redpp_serve.errors import RedppError
from redpp_serve.variants import NAMES

_BATCHES, _SECONDS, _BUCKETS = "redpp_batches_total", "redpp_batch_seconds_total", "redpp_handler_seconds_bucket"
_TIMEOUT_S = 5.0
Window = dict[int, list[float]]  # batch size -> [batches, their seconds] of the original, then of the pruned version
_ROUNDING_S = 1e-6  # sums over the workers' files, in any order


@dataclass
class Counters:
    """Totals since the server started, or differences of two of them.

    Attributes:
        batches: arm -> requests in a batch -> [batches, their seconds in the handler].
        buckets: arm -> upper bound of the handler's time for a batch, seconds (``inf`` last) -> batches up to it.
    """

    batches: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {arm: {} for arm in NAMES})
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: {arm: {} for arm in NAMES})

    def histogram(self) -> tuple[list[float], list[int], list[int]]:
        """Finite bounds that both arms have, then each arm's cumulative counts, one more: the last is of all."""
        bounds = sorted(set(self.buckets["original"]) & set(self.buckets["pruned"]))
        original, pruned = ([int(self.buckets[arm][bound]) for bound in bounds] for arm in NAMES)
        return [bound for bound in bounds if math.isfinite(bound)], original, pruned


def read_counters(text: str, model: str) -> Counters:
    """From what Prometheus scrapes; samples of other models and metrics are left out.

    Raises:
        RedppError: not the text of metrics.
    """
    from prometheus_client.parser import text_string_to_metric_families

    counters = Counters()
    try:
        for family in text_string_to_metric_families(_relevant(text)):
            for sample in family.samples:
                _add(counters, sample.name, sample.labels, sample.value, model)
    except (ValueError, KeyError) as error:
        raise RedppError(
            f"metrics that cannot be read: {error}",
            "the metrics of a server of this project",
            "see whether another program took the server's port",
        ) from error
    return counters


def scrape(url: str, model: str) -> Counters:
    """The counters at a metrics URL now.

    Raises:
        OSError, http.client.HTTPException: nobody answers there.
        RedppError: no metrics.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", parts.path)
        return read_counters(connection.getresponse().read().decode(errors="replace"), model)
    finally:
        connection.close()


def _relevant(text: str) -> str:
    """Only the lines needed: Triton has many more, of its own."""
    kept = (_BATCHES, _SECONDS, _BUCKETS)
    return "\n".join(line for line in text.splitlines() if line.startswith(kept)) + "\n"


def _add(counters: Counters, name: str, labels: Mapping[str, str], value: float, model: str) -> None:
    arm = labels.get("variant")
    if labels.get("model") != model or arm not in NAMES:
        return
    if name == _BUCKETS:
        bound = float(labels["le"])
        counters.buckets[arm][bound] = counters.buckets[arm].get(bound, 0.0) + value
    elif name in (_BATCHES, _SECONDS):
        row = counters.batches[arm].setdefault(int(labels["batch"]), [0.0, 0.0])
        row[name == _SECONDS] += value


class Windows:
    """Cuts totals into windows, and sums what happened since the first of them.

    A total that falls is that of a server that was started anew: the window is left out for both arms, also where
    other totals have already passed what they were, and counting goes on from there.
    Seconds whose batches are not counted yet, read between the two, wait for the next window.
    """

    def __init__(self, first: Counters) -> None:
        self._last = first
        self.since = Counters()  # differences, over the whole experiment
        self.divided = Counters()  # of them those while users were divided: their arms' tails may be compared

    def cut(self, now: Counters, *, divided: bool = True) -> Window:
        """Since the last cut, for every batch size: [batches, seconds] of the original, then of the pruned version.

        ``divided``: whether users were, all this time.
        """
        window: Window = {}
        if self._anew(now):
            self._last = now
            return window
        for index, arm in enumerate(NAMES):
            for size, row in now.batches[arm].items():
                last = self._last.batches[arm].get(size, [0.0, 0.0])
                count, seconds = row[0] - last[0], row[1] - last[1]
                if count == 0:
                    now.batches[arm][size] = last  # seconds that came too early are counted next time
                else:
                    window.setdefault(size, [0.0] * 4)[2 * index : 2 * index + 2] = [count, max(seconds, 0.0)]
            self._grow(arm, now, self.since)
            if divided:
                self._grow(arm, now, self.divided)
        self._last = now
        return window

    def _grow(self, arm: str, now: Counters, into: Counters) -> None:
        last, total = self._last.buckets[arm], into.buckets[arm]
        grown = {bound: count - last.get(bound, 0.0) for bound, count in now.buckets[arm].items()}
        for bound, count in grown.items():
            total[bound] = total.get(bound, 0.0) + count

    def _anew(self, now: Counters) -> bool:
        """Whether anything has fallen: batches, their seconds, or batches of any range of times."""
        for arm in NAMES:
            then, times = self._last.batches[arm], now.batches[arm]
            for size, (count, seconds) in then.items():
                row = times.get(size, [0.0, 0.0])
                if row[0] < count or row[1] < seconds - _ROUNDING_S:
                    return True
            bounds = sorted(self._last.buckets[arm].keys() | now.buckets[arm].keys())
            grown = [now.buckets[arm].get(bound, 0.0) - self._last.buckets[arm].get(bound, 0.0) for bound in bounds]
            if any(after < before for before, after in zip([0.0, *grown], grown)):
                return True
        return False


def as_json(counters: Counters) -> dict[str, Any]:
    """For `from_json`; JSON's keys are strings."""
    return {arm: {repr(bound): count for bound, count in counters.buckets[arm].items()} for arm in NAMES}


def from_json(document: Mapping[str, Mapping[str, float]]) -> Counters:
    """The buckets that `as_json` wrote."""
    counters = Counters()
    for arm in NAMES:
        counters.buckets[arm] = {float(bound): count for bound, count in document[arm].items()}
    return counters


_COUNTERS = ("requests", "errors", "refused", "abandoned", "by_header")
_LEFT = 499


class Traffic:
    """Counts of users' requests; memory is bounded whatever their number.

    Attributes:
        requests: arm -> how many.
        errors: arm -> those answered with a status of 500 or above, also where the server did not answer at all.
        refused: arm -> those answered with 400 to 498: the user's mistake.
        abandoned: arm -> those whose sender left before there was an answer, nginx's 499: of a version that hangs,
            users with a shorter patience than the gateway's see nothing else.
        by_header: arm -> those whose sender asked for the arm, and which no split has chosen.
    """

    def __init__(self, document: dict[str, Any] | None = None) -> None:
        given = document or {}
        counters = (Counter(given.get(name, {})) for name in _COUNTERS)
        self.requests, self.errors, self.refused, self.abandoned, self.by_header = counters
        times = given.get("milliseconds", {})
        self._milliseconds = {arm: Counter({int(k): n for k, n in times.get(arm, {}).items()}) for arm in NAMES}

    def take(self, lines: Iterable[dict[str, Any]]) -> None:
        """Count lines of the access log; those that went to no arm are left out."""
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
                self._milliseconds[arm][_rounded(round(1000 * line["upstream_time"]))] += 1

    def percentile_ms(self, arm: str, q: float) -> float | None:
        """The ``q`` quantile (0..1) of the server's time for good requests as the gateway sees it, to 1 ms."""
        counts = self._milliseconds[arm]
        rank, seen = q * counts.total(), 0
        for milliseconds in sorted(counts):
            seen += counts[milliseconds]
            if seen >= rank:
                return float(milliseconds)
        return None

    def share(self, arm: str) -> float | None:
        """The arm's share of all requests; None before the first."""
        total = self.requests.total()
        return self.requests[arm] / total if total else None

    def to_json(self) -> dict[str, Any]:
        """For the constructor."""
        return {**{name: getattr(self, name) for name in _COUNTERS}, "milliseconds": self._milliseconds}


def _rounded(milliseconds: int) -> int:
    """Three digits: no more different values than 900 a power of ten."""
    step = max(1, 10 ** (len(str(milliseconds)) - 3))
    return milliseconds // step * step


# After this many windows of about a second they become longer, so that the file grows slowly in the second week.
_SHORT_WINDOWS, _LONG_WINDOW_S = 50_000, 10.0


@dataclass(frozen=True)
class Totals:
    """Counts over the whole A/B test.

    Attributes:
        traffic: what users got.
        counters: the server's counters.
        divided: the part of ``counters`` from times when users were divided, so that the arms' loads are comparable.
    """

    traffic: Traffic
    counters: Counters
    divided: Counters

    def to_json(self) -> dict[str, Any]:
        """Return the form that `from_json` reads; it holds the buckets of the counters."""
        return {"users": self.traffic.to_json(), "buckets": as_json(self.counters), "divided": as_json(self.divided)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Totals:
        """Read what `to_json` returned."""
        return cls(Traffic(document["users"]), from_json(document["buckets"]), from_json(document["divided"]))


class CountSource(Protocol):
    """Where an `evidence.Evidence` gets its counts: the supervisor's memory, or the files that it writes."""

    def totals(self) -> Totals | None:
        """Return the counts as of now; None before the first."""

    def new_windows(self) -> list[Window]:
        """Return the windows that were cut since the last call."""


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
        metrics_url: the server's.
        model: the served name.
    """

    def __init__(self, state: Path, access_log: Path, metrics_url: str, model: str) -> None:
        self._state, self._url, self._model = state, metrics_url, model
        self._traffic, self._log = Traffic(), Lines(access_log)
        self._old: Lines | None = None
        self._windows: Windows | None = None
        self._written, self._cut_at = 0, 0.0
        self._new: list[Window] = []
        self._divided = True

    def count(self) -> list[str]:
        """Take in what has happened since the last call; sentences about what could not be read."""
        for lines in filter(None, (self._old, self._log)):
            self._traffic.take(lines.new())
        self._old = None
        try:
            self._cut()
            problems = []
        except (OSError, http.client.HTTPException, RedppError) as error:
            problems = [f"the server's metrics cannot be read: {error}"]
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
        """The access log was put aside: nginx may write a few more lines to the old one."""
        self._old, self._log = self._log, Lines(self._log.path)
        self._old.path = self._log.path.with_suffix(".log.1")

    def _cut(self) -> None:
        now = scrape(self._url, self._model)
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
