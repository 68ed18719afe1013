"""Scrapes the metrics once a second in the background, and keeps what the page shows."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from redpp_serve.ab.exporter import AB_FAMILIES
from redpp_serve.dashboard.view import Shown, page_data, rounded
from redpp_serve.dashboard.window import KEPT_S, REQUESTS, History, percentile_ratio
from redpp_serve.errors import RedppError
from redpp_serve.handlers.metrics import FAMILIES
from redpp_serve.metrics_reader import Key, Limits, Reading, Unreadable, merged, read
from redpp_serve.report.data import Report
from redpp_serve.report.folder import read_report
from redpp_serve.variants import NAMES

WINDOWS = (10, 60, 300, 900)  # seconds that the page offers
_STOP_S = 5.0
_TREND_S = 10.0  # span behind each point of a curve
_POINTS = 300  # of a curve on the page; all are kept
_LIMITS = Limits(seconds=2.0)
_ALL = {**FAMILIES, **AB_FAMILIES}


class Target:
    """A metrics URL and its last answer.

    The first scrape adds nothing: what it counts happened before.

    Attributes:
        last: the last good reading.
        serves: whether a scrape has shown one of the model's versions.
        problem: why the last scrape failed; empty after a good one.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.last: Reading | None = None
        self.serves = False
        self.problem = "not asked yet"

    def scrape(self, model: str) -> dict[Key, float]:
        """Ask the URL, and return what its counters gained since the last answer."""
        try:
            now = read(self.url, model, _ALL, _LIMITS)
        except Unreadable as error:
            self.problem = str(error)
            return {}
        before, self.last, self.problem = self.last, now, ""
        self.serves = self.serves or any(sample.key.variant for sample in now.samples)
        return now.since(before).gained if before else {}

    @property
    def up(self) -> bool:
        """Whether the last scrape succeeded."""
        return not self.problem


class Collector:
    """The numbers of one packaged model.

    Args:
        folder: written by `package`; its report.json is read again when it changes.
        model: served name.
        urls: returns the metrics URLs. It is asked again while one of them does not answer, as a server that was
            restarted has other ports; a RedppError then means that nothing has changed.
        every_s: seconds from scrape to scrape.
        server: returns the kind of server that runs, or None; it is asked when ``urls`` is.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        urls: Callable[[], list[str]],
        every_s: float = 1.0,
        server: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._folder, self._model, self._urls, self._every_s = folder, model, urls, every_s
        self._targets = [Target(url) for url in urls()]
        self._ask_server, self._server = server, server()
        self._history = History()
        self._trend: deque[tuple[int, float, dict[str, float | None]]] = deque()
        self._number, self._served_at = 0, math.nan
        self._report: tuple[int, Report] = (0, Report.from_json({}))
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrape", daemon=True)

    def start(self) -> None:
        """Begin to scrape; the first answer is there on return."""
        self.step(time.monotonic())
        self._thread.start()

    def stop(self) -> None:
        """End the thread; one that hangs on an address that answers in drops is left behind."""
        self._stop.set()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.step(time.monotonic())

    def step(self, now: float) -> None:
        """Scrape every address once; ``now`` is in seconds of a clock that never falls."""
        if not all(target.up for target in self._targets):
            self._look_again()
        gained: dict[Key, float] = {}
        for target in self._targets:
            for key, value in target.scrape(self._model).items():
                gained[key] = gained.get(key, 0.0) + value
        with self._lock:
            served = any(target.serves and target.up for target in self._targets)
            if served or math.isnan(self._served_at):
                self._served_at = now
            self._history.add(now, gained)
            self._number += 1
            self._trend.append((self._number, now, self._point() if served else {}))
            while self._trend[0][1] < now - KEPT_S:
                self._trend.popleft()

    def _look_again(self) -> None:
        try:
            urls = self._urls()
        except RedppError:
            return
        self._server = self._ask_server()
        known = {target.url: target for target in self._targets}
        self._targets = [known.get(url) or Target(url) for url in urls]

    def _point(self) -> dict[str, float | None]:
        """Compute a point of each curve; a server that does not answer leaves a gap instead."""
        window = self._history.window(_TREND_S)
        ratio = percentile_ratio(window, 0.5)
        point: dict[str, float | None] = {"speedup pruned": ratio and ratio.value}
        for variant in NAMES:
            p50 = window.quantile("redpp_handler_seconds", variant, 0.5)
            cpu = window.rate("redpp_worker_cpu_seconds_total", variant)
            point[f"p50 {variant}"] = p50 and 1000 * p50.value
            point[f"throughput {variant}"] = window.rate(REQUESTS, variant, "ok")
            point[f"cpu {variant}"] = None if cpu is None else 100 * cpu
        return point

    def data(self, seconds: int = 60) -> dict[str, Any]:
        """Return what the page shows, in plain JSON types without NaN.

        Args:
            seconds: the window of the numbers; the curves always show all that is kept.
        """
        report, when = self._read_report()
        with self._lock:
            targets = list(self._targets)
            now = self._trend[-1][1] if self._trend else 0.0
            shown = Shown(
                model=self._model,
                window=self._history.window(seconds),
                values=merged(target.last for target in targets if target.last and target.up),
                report=report,
                report_time=when,
                server=self._server,
                problems={target.url: target.problem for target in targets},
                serving={target.url for target in targets if target.serves},
                others={name for target in targets if target.last for name in target.last.others},
                down_s=now - self._served_at if self._trend else 0.0,
            )
            curves = self._curves(now)
        return {**page_data(shown), "window": seconds, "windows": list(WINDOWS), "curves": curves}

    def _curves(self, now: float) -> dict[str, Any]:
        stride = math.ceil(len(self._trend) / _POINTS) or 1
        points = [(at, point) for number, at, point in self._trend if number % stride == 0]
        found: dict[str, Any] = {"seconds": [round(at - now, 1) for at, _ in points], "speedup": {}}
        for curve, variants in {"p50": NAMES, "throughput": NAMES, "cpu": NAMES, "speedup": NAMES[1:]}.items():
            found[curve] = {v: [rounded(point.get(f"{curve} {v}")) for _, point in points] for v in variants}
        return found

    def _read_report(self) -> tuple[Report, str]:
        """Return the folder's report and when it was written; the last good one where it cannot be read."""
        path = self._folder / "report.json"
        try:
            written = path.stat().st_mtime_ns
            if written != self._report[0]:
                self._report = (written, read_report(self._folder))
        except (OSError, RedppError):
            pass
        written, report = self._report
        return report, datetime.fromtimestamp(written / 1e9).strftime("%Y-%m-%d %H:%M") if written else ""
