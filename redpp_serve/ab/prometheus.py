"""Exact counts of a served model by windows of time, from the counters that a Prometheus has scraped.

PromQL's ``increase`` would not do: it extrapolates to the window's edges, so that counts are no whole numbers of
requests and the bounds of `statistics`, which count trials, would not hold. Here each gain is the difference of two
values that were scraped, so every request counts once or not at all, whatever restarts and scales meanwhile:

* A server is a target: all labels but those of the model, of its versions and of the metric. Counters of one target
  begin again together. Where one has fallen, all of them count from zero, and what came between the last scrape and the
  restart is lost.
* A target that is new counts from its second value on: nobody knows when its first requests came.
* Times of a window in which a target came, came back or restarted are left out for both versions; its requests count.
* Windows lie on a grid from the start of the test on. A watcher that is started again reads them once more and has the
  same counts, and so the same verdict.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from redpp_serve.ab.counts import COUNTED, Stratum, Totals, Traffic, Window, Windows
from redpp_serve.errors import RedppError
from redpp_serve.handlers.metrics import FAMILIES
from redpp_serve.metrics_reader import Gains, Key, Reading, Sample, Unreadable, by_sample_name, to_sample
from redpp_serve.variants import NAMES

_REQUESTS = "redpp_requests_total"
_WANTED = by_sample_name({**COUNTED, _REQUESTS: FAMILIES[_REQUESTS]})
# Labels that do not tell one server from another.
_OF_THE_METRIC = {"__name__", "le", "model", "version", "variant", *(x for f in _WANTED.values() for x in f.labels)}
_LARGEST_ANSWER, _TIMEOUT_S = 256 << 20, 30.0
_WINDOWS_AT_ONCE = 120  # of one answer, which has a few hundred series
_BEHIND_WINDOWS, _BEHIND_S = 4, 60.0

Labels = Mapping[str, str]
Target = tuple[tuple[str, str], ...]


class Prometheus:
    """The HTTP API of a Prometheus, or of what answers in its place.

    Args:
        url: its address, with its path where it has one.
        token_file: holds a bearer token, and is read at every request, since such tokens are renewed; None for none.

    Raises:
        RedppError: the address is none.
    """

    def __init__(self, url: str, token_file: Path | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RedppError(
                f"--prometheus {url}", "http:// or https:// with a host", "write for example http://127.0.0.1:9090"
            )
        self.url, self._token_file = url.rstrip("/"), token_file
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def now(self, expression: str) -> list[tuple[Labels, float, float]]:
        """Return the labels, the time and the value of each element of an expression's vector now.

        Raises:
            Unreadable: there is no answer, or another one.
        """
        rows = self._ask("query", query=expression)
        return [(row["metric"], float(row["value"][0]), float(row["value"][1])) for row in rows]

    def over(self, selector: str, start: float, end: float, step: float) -> Iterator[tuple[Labels, float, float]]:
        """Yield the labels, the time and the value of each series at each step that it has one for.

        Raises:
            Unreadable: there is no answer, or another one.
        """
        rows = self._ask("query_range", query=selector, start=f"{start:.3f}", end=f"{end:.3f}", step=f"{step:g}")
        for row in rows:
            for at, value in row["values"]:
                yield row["metric"], float(at), float(value)

    def _ask(self, what: str, **parameters: str) -> list[dict[str, Any]]:
        request = urllib.request.Request(f"{self.url}/api/v1/{what}", urllib.parse.urlencode(parameters).encode())
        try:
            if self._token_file:
                request.add_header("Authorization", f"Bearer {self._token_file.read_text(encoding='utf-8').strip()}")
            with self._opener.open(request, timeout=_TIMEOUT_S) as reply:
                data = reply.read(_LARGEST_ANSWER)
            rows: list[dict[str, Any]] = json.loads(data)["data"]["result"]
        except urllib.error.HTTPError as error:
            with error:
                why = error.read(500).decode(errors="replace")
            raise Unreadable(f"{self.url} answers {error.code}: {_reason(why)}") from error
        except (OSError, HTTPException) as error:
            raise Unreadable(f"{self.url} does not answer: {getattr(error, 'reason', error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise Unreadable(f"{self.url} does not answer as a Prometheus does") from error
        return rows


def _reason(body: str) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return " ".join(body.split())


class PrometheusCounts:
    """Counts a test's windows; what `evidence.Evidence` takes in.

    Args:
        prometheus: where the counters are.
        model: the served name.
        matchers: more label matchers of PromQL, such as ``namespace="a"``; empty for none.
        start: when the test began, on Prometheus' clock.
        window_s: length of a window, at least the time between two scrapes.

    Attributes:
        silent: arms that had numbers, and have none for long, while the other arm has.
    """

    def __init__(self, prometheus: Prometheus, model: str, matchers: str, start: float, window_s: float) -> None:
        self._prometheus, self._model, self._start, self._window_s = prometheus, model, start, window_s
        self._labels = ",".join([f"model={json.dumps(model)}", *filter(None, [matchers])])
        self._at: float | None = None
        self._last: dict[Target, Reading] = {}
        self._present: set[Target] = set()
        self._known: set[str] = set()
        self._traffic, self._windows = Traffic(), Windows(Reading())
        self._new: list[Window] = []
        self.silent: set[str] = set()

    def totals(self) -> Totals:
        """Return the counts so far."""
        return Totals(self._traffic, self._windows.since, self._windows.divided)

    def new_windows(self) -> list[Window]:
        """Return the windows that were cut since the last call."""
        new, self._new = self._new, []
        return new

    def count(self, split_of: Callable[[float, float], str | None]) -> None:
        """Take in the windows that are complete by now.

        Args:
            split_of: returns the split that was in force from one time to another; None where it changed.

        Raises:
            Unreadable: Prometheus is away, has nothing of the model, or is behind.
        """
        newest = self._newest()
        at = self._start if self._at is None else self._at
        while (steps := min(math.floor((newest - at) / self._window_s), _WINDOWS_AT_ONCE)) >= 1:
            end = at + steps * self._window_s
            first = at if self._at is None else at + self._window_s
            for moment, readings in self._readings(first, end):
                self._take(readings, split_of(moment - self._window_s, moment))
                self._at = moment
            self._at = at = end

    def _newest(self) -> float:
        """Return the time of the newest scrape.

        Raises:
            Unreadable: there is none, or it is long ago.
        """
        scraped = self._prometheus.now(f"max by (variant) (timestamp({_REQUESTS}{{{self._labels}}}))")
        if not scraped:
            others = self._prometheus.now(f"count by (model) ({_REQUESTS})")
            names = ", ".join(sorted(str(labels.get("model")) for labels, _, _ in others)) or "no model"
            raise Unreadable(f"{self._prometheus.url} has no {_REQUESTS}{{{self._labels}}} now; it has {names}")
        now, newest = scraped[0][1], max(value for _, _, value in scraped)
        most = max(_BEHIND_WINDOWS * self._window_s, _BEHIND_S)
        if now - newest > most:
            raise Unreadable(f"{self._prometheus.url} is behind: its newest numbers are {now - newest:.0f} s old")
        fresh = {labels.get("variant") for labels, _, at in scraped if now - at <= most}
        self.silent = {arm for arm in NAMES if arm not in fresh and arm in self._known}
        return newest

    def _readings(self, first: float, end: float) -> Iterator[tuple[float, dict[Target, Reading]]]:
        """Yield each window's end, and what the targets have counted by then."""
        names = "|".join(sorted(_WANTED))
        samples: dict[int, dict[Target, list[Sample]]] = {}
        selector = f'{{__name__=~"{names}",{self._labels}}}'
        for labels, at, value in self._prometheus.over(selector, first, end, self._window_s):
            name = labels.get("__name__", "")
            if name in _WANTED and (sample := to_sample(name, _WANTED[name], labels, value)):
                step = round((at - first) / self._window_s)
                samples.setdefault(step, {}).setdefault(_target(labels), []).append(sample)
        for step in sorted(samples):
            readings = {target: Reading(tuple(found)) for target, found in samples[step].items()}
            self._refuse_twice(readings)
            yield first + step * self._window_s, readings

    def _refuse_twice(self, readings: Mapping[Target, Reading]) -> None:
        """Refuse to count one server twice: the bounds of errors would be tighter than they are.

        Raises:
            Unreadable: two targets have the same instance and variant.
        """
        seen: dict[tuple[str, str], Target] = {}
        for target, reading in readings.items():
            instance = dict(target).get("instance", "")
            for variant in {sample.key.variant for sample in reading.samples} if instance else ():
                other = seen.setdefault((instance, variant), target)
                if other != target:
                    apart = sorted({name for name, _ in set(target) ^ set(other)})
                    raise Unreadable(
                        f"{self._prometheus.url} has {instance} more than once, with other values of "
                        f"{', '.join(apart)}: choose one of them by --match"
                    )

    def _take(self, readings: Mapping[Target, Reading], split: str | None) -> None:
        gained: dict[Key, float] = {}
        torn = not readings.keys() <= self._present
        for target, now in readings.items():
            gains = now.since(self._last.get(target, now))
            if gains.restarted:
                torn, gains = True, now.since(Reading())
            for key, gain in gains.gained.items():
                gained[key] = gained.get(key, 0.0) + gain
            self._last[target] = now
            self._known |= {sample.key.variant for sample in now.samples}
        self._present = set(readings)
        self._add_requests(gained, split)
        if window := self._windows.add(Gains(gained, torn), split):
            self._new.append(window)

    def _add_requests(self, gained: Mapping[Key, float], split: str | None) -> None:
        traffic = self._traffic
        for key, gain in gained.items():
            count, arm = round(gain), key.variant
            if key.name != _REQUESTS or not count:
                continue
            traffic.requests[arm] += count
            traffic.judged[arm] += count
            if key.detail == "error":
                traffic.errors[arm] += count
                traffic.faults[arm] += count
            traffic.refused[arm] += count * (key.detail == "bad_request")
            if split:
                stratum = traffic.strata.setdefault(split, Stratum())
                stratum.judged[arm] += count
                stratum.faults[arm] += count * (key.detail == "error")


def only_model(prometheus: Prometheus, matchers: str) -> str:
    """Return the name of the one model that Prometheus has counters of.

    Raises:
        RedppError: it has none, or several.
    """
    try:
        rows = prometheus.now(f"count by (model) ({_REQUESTS}{{{matchers}}})")
    except Unreadable as error:
        raise RedppError(str(error), "a Prometheus, or --model", "see that it runs, or name the model") from error
    names = sorted({labels["model"] for labels, _, _ in rows if labels.get("model")})
    if len(names) == 1:
        return names[0]
    found = "several models: " + ", ".join(names) if names else f"no {_REQUESTS}"
    raise RedppError(f"{prometheus.url} has {found}", "one model", "name it by --model, or by --package its folder")


def _target(labels: Labels) -> Target:
    return tuple(sorted(pair for pair in labels.items() if pair[0] not in _OF_THE_METRIC))
