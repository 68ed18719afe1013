"""Prometheus metrics of one served model, right across several worker processes.

Workers write to memory-mapped files in ``PROMETHEUS_MULTIPROC_DIR``; `exporter` sums and serves them. The
server's own metrics have no versions, no percentiles, or buckets that start at 5 ms.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass

log = logging.getLogger(__name__)

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
SECONDS_BUCKETS = tuple(float(f"{0.00025 * 2 ** (k / 2):.3g}") for k in range(29))  # 0.25 ms to 4.1 s
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
OUTCOMES = ("ok", "bad_request", "error")


@dataclass(frozen=True)
class ModelLabels:
    """The labels on every sample: served name, version as in the URL, and ``original`` or ``redpp``."""

    model: str
    version: str
    variant: str


class Metrics:
    """The metrics of one model in one worker. Import of ``prometheus_client`` happens here: see `open_metrics`."""

    def __init__(self, labels: ModelLabels) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        values = asdict(labels)
        names, registry = tuple(values), CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, names, buckets=buckets, registry=registry).labels(**values)

        def gauge(name: str, text: str) -> Gauge:
            gauge = Gauge(name, text, names, registry=registry, multiprocess_mode="mostrecent")
            return gauge.labels(**values)

        self._handler = histogram(
            "redpp_handler_seconds", "Time the handler spent on one batch, parsing to reply.", SECONDS_BUCKETS
        )
        self._inference = histogram(
            "redpp_inference_seconds", "Time the network alone took for one batch.", SECONDS_BUCKETS
        )
        self._batch = histogram("redpp_batch_size", "Requests in one batch, as the server formed it.", BATCH_BUCKETS)
        requests = Counter("redpp_requests", "Requests by outcome.", (*names, "outcome"), registry=registry)
        self._requests = {outcome: requests.labels(**values, outcome=outcome) for outcome in OUTCOMES}
        self._info = {
            "parameters": gauge("redpp_model_parameters", "Parameters of the network."),
            "macs": gauge("redpp_model_macs", "Multiply-accumulates of one forward pass at batch size 1."),
            "bytes": gauge("redpp_model_bytes", "Stored weights, bytes."),
        }

    def describe(self, **info: float) -> None:
        """Set what is fixed for a model: ``parameters``, ``macs``, ``bytes``."""
        for name, value in info.items():
            self._info[name].set(value)

    def batch(self, size: int, handler_s: float) -> None:
        """Record one batch: its size and the handler's time in seconds."""
        self._batch.observe(size)
        self._handler.observe(handler_s)

    def inference(self, seconds: float) -> None:
        """Record one run of the network."""
        self._inference.observe(seconds)

    def request(self, outcome: str) -> None:
        """Count one request; ``outcome`` is one of `OUTCOMES`."""
        self._requests[outcome].inc()


def open_metrics(labels: ModelLabels) -> Metrics | None:
    """Metrics for this worker, or None (after one line in the log) where they cannot be collected."""
    directory = os.environ.get(DIRECTORY)
    if not directory:
        log.warning("metrics are off: set %s to an empty directory to turn them on", DIRECTORY)
        return None
    os.makedirs(directory, exist_ok=True)
    try:
        return Metrics(labels)
    except ImportError:
        log.warning("metrics are off: the package prometheus-client is not installed")
        return None
