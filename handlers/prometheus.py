"""Bind the table of metrics to ``prometheus_client`` in multiprocess mode: files for each worker, summed by `exporter`.

Writing one batch's metrics takes 30 microseconds, a tenth of a small network's time. So a batch only notes its numbers,
and a thread writes down, ten times a second, what came together. A worker that is killed loses the last tenth of a
second.

The memory of workers that have ended must not count for ever. Therefore each worker holds a lock on a file of its own
in the folder of metrics, and the system takes the lock back however the worker ends. Process ids would not do: they are
used again, and mean nothing in another container.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import threading
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from redpp_serve.handlers.metrics import DIRECTORY, Family, Metrics, ModelLabels

log = logging.getLogger(__name__)

WRITE_EVERY_S = 0.1
_held: dict[Path, IO[bytes]] = {}


def open_metrics(labels: ModelLabels, device: str = "cpu") -> Metrics | None:
    """Return metrics for this worker, or None (after one line in the log) where they cannot be collected."""
    folder = os.environ.get(DIRECTORY)
    if not folder:
        log.warning("metrics are off: set %s to an empty directory to turn them on", DIRECTORY)
        return None
    os.makedirs(folder, exist_ok=True)
    try:
        binding = PrometheusBinding()
    except ImportError:
        log.warning("metrics are off: the package prometheus-client is not installed")
        return None
    _show_life(Path(folder))  # before the first file of metrics, so that none of them is without a lock
    return Metrics(labels, binding, device)


def counted_files(folder: Path) -> list[str]:
    """Return the workers' files that count: all but the gauges, such as memory, of workers that have ended."""
    files = sorted(folder.glob("*.db"))
    return [str(f) for f in files if not f.name.startswith("gauge_live") or _lives(folder, f.stem.rsplit("_", 1)[1])]


def _show_life(folder: Path) -> None:
    path = folder / f"{os.getpid()}.alive"
    if path not in _held:  # a second lock would wait for the first
        _held[path] = path.open("wb")
        fcntl.flock(_held[path], fcntl.LOCK_EX)


def _lives(folder: Path, worker: str) -> bool:
    try:
        with (folder / f"{worker}.alive").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


class PrometheusBinding:
    """Makes instruments that write to ``PROMETHEUS_MULTIPROC_DIR``, which is set before the first one is made.

    Attributes:
        registry: this worker's metrics alone.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram  # noqa: PLC0415

        self._kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self.registry = CollectorRegistry()
        self._families: dict[str, Any] = {}
        self._noted: deque[tuple[Noted, float]] = deque()
        self._writing = threading.Lock()
        threading.Thread(target=self._write_on, name="metrics", daemon=True).start()
        atexit.register(self.write)

    def instrument(self, family: Family, labels: Mapping[str, str]) -> Any:
        """See `metrics.Binding`."""
        made = self._families.get(family.name)
        if made is None:
            options: dict[str, Any] = {"buckets": family.buckets} if family.kind == "histogram" else {}
            if family.kind == "gauge":
                options["multiprocess_mode"] = "livesum" if family.per_worker else "mostrecent"
            made = self._kinds[family.kind](family.name, family.help, tuple(labels), registry=self.registry, **options)
            self._families[family.name] = made
        child = made.labels(**labels)
        if family.kind == "gauge":  # set seldom
            return child
        return (NotedHistogram if family.kind == "histogram" else Noted)(self._noted, child)

    def write(self) -> None:
        """Write down what was noted."""
        with self._writing:
            values: dict[Noted, list[float]] = {}
            while self._noted:
                instrument, value = self._noted.popleft()
                values.setdefault(instrument, []).append(value)
            for instrument, several in values.items():
                instrument.write(several)

    def _write_on(self) -> None:
        while True:
            time.sleep(WRITE_EVERY_S)
            try:
                self.write()
            except Exception:  # the thread goes on: else what is noted would pile up
                log.exception("metrics could not be written")


class Noted:
    """A counter whose increments are written together."""

    def __init__(self, noted: deque[tuple[Noted, float]], child: Any) -> None:
        self._note, self._child = noted.append, child

    def inc(self, amount: float = 1) -> None:
        """Note an increment."""
        self._note((self, amount))

    def write(self, values: Sequence[float]) -> None:
        """Write noted values, which may come in any order."""
        self._child.inc(sum(values))


class NotedHistogram(Noted):
    """A histogram whose observations are written together: one write for each bucket, not for each observation."""

    observe = Noted.inc

    def write(self, values: Sequence[float]) -> None:
        """Do for all values what prometheus_client's ``observe`` does for one.

        It has no public way for several, and one by one they would cost four times as much. pyproject.toml bounds its
        version, and a test compares the two ways.
        """
        child = self._child
        child._sum.inc(sum(values))
        for bucket, count in Tally(bisect_left(child._upper_bounds, value) for value in values).items():
            child._buckets[bucket].inc(count)
