"""Scrapes the metrics once a second in the background, and turns what is kept into the page's data."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from redpp_serve.dashboard import figures
from redpp_serve.dashboard.experiment import experiment
from redpp_serve.dashboard.history import KEPT_S, History
from redpp_serve.dashboard.scraping import VARIANTS, Key, Target, merged
from redpp_serve.dashboard.speedups import HANDLER, percentile_ratio
from redpp_serve.dashboard.words import headline, source_text
from redpp_serve.errors import RedppError
from redpp_serve.report.data import Report
from redpp_serve.report.folder import read_report

EVERY_S = 1.0
WINDOWS = (10, 60, 300, 900)  # seconds that the page offers
_STOP_S = 5.0
_TREND_S = 10.0  # span behind each point of a curve
_POINTS = 300  # of a curve on the page; all are kept
_CURVES = ("p50", "throughput", "cpu")


class Collector:
    """The numbers of one packaged model.

    Args:
        folder: written by `package`; its report.json is read again when it changes.
        model: served name.
        urls: says where the metrics are; asked again while one of them does not answer, as a server that was started
            again has other ports. A RedppError then means: as before.
    """

    def __init__(self, folder: Path, model: str, urls: Callable[[], list[str]]) -> None:
        self._folder, self._model, self._urls = folder, model, urls
        self._targets = [Target(url) for url in urls()]
        self._history = History()
        self._trend: deque[tuple[int, float, dict[str, float | None]]] = deque()
        self._number, self._served_at = 0, math.nan
        self._report: tuple[int, Report] = (0, Report.from_json({}))
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrape", daemon=True)

    def start(self) -> None:
        """Begin to scrape; the first answer is there when it returns."""
        self.step(time.monotonic())
        self._thread.start()

    def stop(self) -> None:
        """End the thread; returns when it has ended, or hangs on an address that answers in drops."""
        self._stop.set()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.step(time.monotonic())

    def step(self, now: float) -> None:
        """Scrape every address once; ``now`` in seconds of a clock that never falls."""
        if any(target.problem for target in self._targets):
            self._look_again()
        gained: dict[Key, float] = {}
        for target in self._targets:
            for key, value in target.scrape(self._model).items():
                gained[key] = gained.get(key, 0.0) + value
        with self._lock:
            served = any(target.serves and not target.problem for target in self._targets)
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
        known = {target.url: target for target in self._targets}
        self._targets = [known.get(url) or Target(url) for url in urls]

    def _point(self) -> dict[str, float | None]:
        """Of the curves; a server that does not answer leaves a gap instead."""
        window = self._history.window(_TREND_S)
        point: dict[str, float | None] = {}
        for variant in VARIANTS:
            p50 = window.quantile(HANDLER, variant, 0.5)
            cpu = window.rate("redpp_worker_cpu_seconds_total", variant)
            point[f"p50 {variant}"] = p50 and 1000 * p50.value
            point[f"throughput {variant}"] = window.rate("redpp_requests_total", variant, "ok")
            point[f"cpu {variant}"] = None if cpu is None else 100 * cpu
        ratio = percentile_ratio(window, 0.5)
        point["speedup"] = ratio and ratio.value
        return point

    def data(self, seconds: int = 60) -> dict[str, Any]:
        """What the page shows, in plain JSON types without NaN.

        Args:
            seconds: the window of the numbers; the curves always show all that is kept.
        """
        with self._lock:
            window, targets = self._history.window(seconds), list(self._targets)
            now = self._trend[-1][1] if self._trend else 0.0
            gauges = merged(target.gauges for target in targets)
            curves = self._curves(now)
            down_s = now - self._served_at if self._trend else 0.0
        report, when = self._read_report()
        return {
            "model": self._model,
            "window": seconds,
            "windows": list(WINDOWS),
            "span": round(window.span, 1),
            "headline": headline(self._model, window, targets, down_s)._asdict(),
            "sources": [{"url": t.url, "up": not t.problem, "text": source_text(t)} for t in targets],
            "speedups": figures.speedup_tiles(window),
            "latency": figures.latency_rows(window),
            "traffic": figures.traffic_rows(window),
            "workers": figures.worker_rows(window, gauges),
            "network": figures.model_rows(gauges, report),
            "left": figures.left_shares(gauges, report),
            "batches": figures.batch_shares(window),
            "curves": curves,
            "experiment": experiment(gauges, window),
            "compare": figures.compare_card(report, when),
        }

    def _curves(self, now: float) -> dict[str, Any]:
        stride = math.ceil(len(self._trend) / _POINTS) or 1
        points = [(at, point) for number, at, point in self._trend if number % stride == 0]
        found: dict[str, Any] = {"seconds": [round(at - now, 1) for at, _ in points]}
        for curve in _CURVES:
            found[curve] = {v: [figures.rounded(point.get(f"{curve} {v}")) for _, point in points] for v in VARIANTS}
        found["speedup"] = {"pruned": [figures.rounded(point.get("speedup")) for _, point in points]}
        return found

    def _read_report(self) -> tuple[Report, str]:
        """The folder's report and when it was written; the last good one where it cannot be read."""
        path = self._folder / "report.json"
        try:
            written = path.stat().st_mtime_ns
            if written != self._report[0]:
                self._report = (written, read_report(self._folder))
        except (OSError, RedppError):
            pass
        written, report = self._report
        return report, datetime.fromtimestamp(written / 1e9).strftime("%Y-%m-%d %H:%M") if written else ""
