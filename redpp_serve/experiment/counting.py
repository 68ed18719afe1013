"""Second by second: what users got, and what the server's counters say, into the state folder."""

from __future__ import annotations

import http.client
import json
import time
from pathlib import Path

from redpp_serve.errors import RedppError

from .counters import Windows, as_json, scrape
from .files import COUNTS, GATEWAY, WINDOWS, Lines, write_json
from .gateway import switched
from .traffic import Traffic

# After this many windows of about a second they become longer, so that the file grows slowly in the second week.
_SHORT_WINDOWS, _LONG_WINDOW_S = 50_000, 10.0


class Counting:
    """Appends windows and keeps the counts.

    Args:
        state: the experiment's state folder.
        access_log: the gateway's.
        metrics_url: the server's.
        model: the served name.
    """

    def __init__(self, state: Path, access_log: Path, metrics_url: str, model: str) -> None:
        self._state, self._url, self._model = state, metrics_url, model
        self._traffic, self._log, self._old = Traffic(), Lines(access_log), None
        self._windows: Windows | None = None
        self._written, self._cut_at = 0, 0.0
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
        if windows := self._windows:
            counts = {"users": self._traffic.to_json(), "buckets": as_json(windows.since), "divided": as_json(windows.divided)}
            write_json(self._state / COUNTS, counts)
        return problems

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
            with (self._state / WINDOWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "batches": window}) + "\n")
            self._written += 1
