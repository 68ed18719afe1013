"""Bind the table of metrics to Triton's own: instruments that the instances of a version share and add up in.

One call into Triton takes 20 to 40 microseconds, and the half dozen calls for a batch take as long as a small network.
So a thread makes the calls after the answers have left, and sums up what came together.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
from collections.abc import Mapping
from typing import Any

from redpp_serve.handlers.metrics import Family

log = logging.getLogger(__name__)

_CLOSE_S = 5.0
Entry = tuple[Any, str, float]  # a metric of Triton's, the call on it, and its argument


class TritonBinding:
    """Makes instruments out of Triton's ``MetricFamily``.

    Args:
        backend: the module ``triton_python_backend_utils``.
    """

    def __init__(self, backend: Any) -> None:
        self._kinds = backend.MetricFamily
        self._families: dict[str, Any] = {}
        self._metrics: list[Any] = []
        self._shares: list[TritonInstrument] = []
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._post, name="metrics", daemon=True)
        self._thread.start()

    def instrument(self, family: Family, labels: Mapping[str, str]) -> TritonInstrument:
        """See `metrics.Binding`.

        Raises:
            Exception: what Triton raises where metrics are turned off.
        """
        made = self._families.get(family.name)
        if made is None:
            kind = getattr(self._kinds, family.kind.upper())
            made = self._families[family.name] = self._kinds(name=family.name, description=family.help, kind=kind)
        buckets = {"buckets": [float(bound) for bound in family.buckets]} if family.buckets else {}
        self._metrics.append(made.Metric(labels=dict(labels), **buckets))
        instrument = TritonInstrument(self._queue, self._metrics[-1], family.per_worker)
        if family.per_worker:
            self._shares.append(instrument)
        return instrument

    def close(self) -> None:
        """Take this worker's share out of what workers add up to, and wait until everything is posted.

        Nothing is deleted, not even when Python ends: workers with equal labels share a metric in Triton, and the one
        that deletes its own takes it from the others, which crashes the server (2.51, on every reload of a version).
        """
        for instrument in self._shares:
            instrument.set(0)
        self._queue.put(None)
        self._thread.join(_CLOSE_S)
        for kept in (*self._families.values(), *self._metrics):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))

    def _post(self) -> None:
        while True:
            entries = [self._queue.get()]
            while not self._queue.empty():
                entries.append(self._queue.get())
            for metric, call, value in summed(entries):
                try:
                    getattr(metric, call)(value)
                except Exception:
                    log.exception("a metric could not be recorded")
            if None in entries:
                return


class TritonInstrument:
    """See `metrics.Binding`; of a worker's share of a gauge it records the change."""

    def __init__(self, entries: queue.SimpleQueue[Entry | None], metric: Any, share: bool) -> None:
        self._entries, self._metric, self._share, self._last = entries, metric, share, 0.0

    def inc(self, amount: float = 1) -> None:
        """Increment a counter."""
        self._entries.put((self._metric, "increment", float(amount)))

    def set(self, value: float) -> None:
        """Set a gauge."""
        if self._share:
            self.inc(value - self._last)
            self._last = value
        else:
            self._entries.put((self._metric, "set", float(value)))

    def observe(self, value: float) -> None:
        """Observe a value in a histogram."""
        self._entries.put((self._metric, "observe", float(value)))


def summed(entries: list[Entry | None]) -> list[Entry]:
    """Return the entries in their order, with all increments of a metric as one."""
    kept: list[Entry] = []
    sums: dict[int, float] = {}
    for metric, call, value in filter(None, entries):
        if call != "increment":
            kept.append((metric, call, value))
            continue
        if id(metric) not in sums:
            kept.append((metric, call, 0.0))
        sums[id(metric)] = sums.get(id(metric), 0.0) + value
    return [(metric, call, sums[id(metric)] if call == "increment" else value) for metric, call, value in kept]
