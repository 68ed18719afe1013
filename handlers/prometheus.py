"""Binds the table of metrics to ``prometheus_client`` in multiprocess mode: one set of files for each worker process.

Writing one batch's metrics takes 30 microseconds between two batches, a tenth of a small network's time. So a batch
only notes its numbers, and a thread writes down, ten times a second, what came together. A worker that is killed loses
the last tenth of a second.

Which workers live: the memory of those that ended must not count for ever.

Each worker holds a lock on a file of its own in the folder of metrics, and the system takes the lock back however the
worker ends. Process ids would not do: they are used again, and mean nothing in another container.
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

from redpp_serve.handlers.metrics import Family, Instrument

_held: dict[Path, IO[bytes]] = {}


def show_life(folder: str | Path) -> None:
    """Lock this process's file. Comes before the process writes metrics, so that none of them is without a lock."""
    path = _path(folder, str(os.getpid()))
    if path not in _held:  # a second lock would wait for the first
        _held[path] = path.open("wb")
        fcntl.flock(_held[path], fcntl.LOCK_EX)


def counted_files(folder: str | Path) -> list[str]:
    """The workers' files that count: all but the gauges, such as memory, of workers that live no more."""
    files = sorted(Path(folder).glob("*.db"))
    return [str(f) for f in files if not f.name.startswith("gauge_live") or _lives(folder, f.stem.rsplit("_", 1)[1])]


def _lives(folder: str | Path, worker: str) -> bool:
    try:
        with _path(folder, worker).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


def _path(folder: str | Path, worker: str) -> Path:
    return Path(folder) / f"{worker}.alive"


log = logging.getLogger(__name__)

WRITE_EVERY_S = 0.1


class PrometheusBinding:
    """Instruments that write to ``PROMETHEUS_MULTIPROC_DIR``, which is set before ``prometheus_client`` is imported.

    Attributes:
        registry: of this worker's metrics alone.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self.registry, self._families = CollectorRegistry(), {}
        self._noted: deque[tuple[Noted, float]] = deque()
        self._writing = threading.Lock()
        threading.Thread(target=self._write_on, name="metrics", daemon=True).start()
        atexit.register(self.write)

    def instrument(self, family: Family, labels: Mapping[str, str]) -> Instrument:
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
        self._note((self, amount))

    def write(self, values: Sequence[float]) -> None:
        """The values, in any order."""
        self._child.inc(sum(values))


class NotedHistogram(Noted):
    """A histogram whose observations are written together: one write for each bucket, not for each observation."""

    observe = Noted.inc

    def write(self, values: Sequence[float]) -> None:
        # What `observe` of prometheus_client does for one value; it has no public way for several.
        child = self._child
        child._sum.inc(sum(values))
        for bucket, count in Tally(bisect_left(child._upper_bounds, value) for value in values).items():
            child._buckets[bucket].inc(count)
