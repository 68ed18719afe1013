"""The server's counters for both arms: read from its metrics, and cut into windows of time."""

from __future__ import annotations

import http.client
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from redpp_serve.errors import RedppError

from .split import ARMS

_BATCHES, _SECONDS, _BUCKETS = "redpp_batches_total", "redpp_batch_seconds_total", "redpp_handler_seconds_bucket"
_TIMEOUT_S = 5.0
_ROUNDING_S = 1e-6  # sums over the workers' files, in any order


@dataclass
class Counters:
    """Totals since the server started, or differences of two of them.

    Attributes:
        batches: arm -> requests in a batch -> [batches, their seconds in the handler].
        buckets: arm -> upper bound of the handler's time for a batch, seconds (``inf`` last) -> batches up to it.
    """

    batches: dict[str, dict[int, list[float]]] = field(default_factory=lambda: {arm: {} for arm in ARMS})
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: {arm: {} for arm in ARMS})

    def histogram(self) -> tuple[list[float], list[int], list[int]]:
        """Finite bounds that both arms have, then each arm's cumulative counts, one more: the last is of all."""
        bounds = sorted(set(self.buckets["original"]) & set(self.buckets["redpp"]))
        original, redpp = ([int(self.buckets[arm][bound]) for bound in bounds] for arm in ARMS)
        return [bound for bound in bounds if math.isfinite(bound)], original, redpp


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
        raise RedppError(f"metrics that cannot be read: {error}", "the metrics of a server of this project",
                         "see whether another program took the server's port") from error  # fmt: skip
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
    if labels.get("model") != model or arm not in ARMS:
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

    def cut(self, now: Counters, *, divided: bool = True) -> dict[int, list[float]]:
        """Since the last cut, for every batch size: [batches, seconds] of the original, then of the pruned version.

        ``divided``: whether users were, all this time.
        """
        window: dict[int, list[float]] = {}
        if self._anew(now):
            self._last = now
            return window
        for index, arm in enumerate(ARMS):
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
        for arm in ARMS:
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
    return {arm: {repr(bound): count for bound, count in counters.buckets[arm].items()} for arm in ARMS}


def from_json(document: Mapping[str, Mapping[str, float]]) -> Counters:
    """The buckets that `as_json` wrote."""
    counters = Counters()
    for arm in ARMS:
        counters.buckets[arm] = {float(bound): count for bound, count in document[arm].items()}
    return counters
