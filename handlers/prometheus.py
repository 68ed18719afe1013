"""Binds the table of metrics to ``prometheus_client`` in multiprocess mode: one set of files for each worker process.

Writing one batch's metrics takes 30 microseconds between two batches, a tenth of a small network's time. So a batch
only notes its numbers, and a thread writes down, ten times a second, what came together. A worker that is killed loses
the last tenth of a second.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from .metrics import Family, Instrument

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
