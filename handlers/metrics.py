"""Metrics of one served model, the same on every server: one table of families, one class that records.

A binding turns a family into instruments of a server: `prometheus` for TorchServe, whose workers' files `exporter` sums
and serves, and `triton_metrics` for Triton Inference Server. The servers' own metrics lack versions or percentiles, or
their buckets start at 5 ms.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
SECONDS_BUCKETS = tuple(float(f"{0.00025 * 2 ** (k / 2):.3g}") for k in range(29))  # 0.25 ms to 4.1 s
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
OUTCOMES = ("ok", "bad_request", "error")
_USAGE_EVERY_S = 0.5


@dataclass(frozen=True)
class ModelLabels:
    """The labels on every sample.

    Attributes:
        model: the served name.
        version: the version of the artifact.
        variant: ``original`` or ``pruned``.
    """

    model: str
    version: str
    variant: str


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        kind: ``counter``, ``gauge`` or ``histogram``.
        name: its name as exported.
        help: what it says.
        labels: names of labels beside those of `ModelLabels`.
        buckets: upper bounds of a histogram, without infinity.
        per_worker: for a gauge, True if each living worker has a value of its own and the exported one is their sum;
            otherwise all workers of a version hold the same value.
    """

    kind: str
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    per_worker: bool = False


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "histogram",
            "redpp_handler_seconds",
            "Time the handler spent on one batch, parsing to reply.",
            buckets=SECONDS_BUCKETS,
        ),
        Family(
            "histogram",
            "redpp_inference_seconds",
            "Time the network alone took for one batch.",
            buckets=SECONDS_BUCKETS,
        ),
        Family(
            "histogram", "redpp_batch_size", "Requests in one batch, as the server formed it.", buckets=BATCH_BUCKETS
        ),
        Family("counter", "redpp_requests_total", "Requests by outcome.", ("outcome",)),
        Family("counter", "redpp_batches_total", "Batches by the exact number of requests they held.", ("batch",)),
        Family(
            "counter",
            "redpp_batch_seconds_total",
            "Handler seconds by the exact number of requests in the batch.",
            ("batch",),
        ),
        Family("gauge", "redpp_model_parameters", "Parameters of the network."),
        Family("gauge", "redpp_model_macs", "Multiply-accumulates of one forward pass at batch size 1."),
        Family("gauge", "redpp_model_bytes", "Stored weights, bytes."),
        Family(
            "gauge",
            "redpp_plan_info",
            "1 for the plan in use: its engine, its precision and a digest of its choices.",
            ("device", "engine", "precision", "digest"),
        ),
        Family(
            "gauge",
            "redpp_ready_seconds",
            "Time from the start of a worker's initialization until it was ready to answer.",
        ),
        Family(
            "gauge",
            "redpp_plan_layers",
            "Layers that a kernel runs in a batch bucket; an engine runs the network as one.",
            ("kernel", "batch"),
        ),
        Family("counter", "redpp_worker_cpu_seconds_total", "CPU time of the worker processes since they started."),
        Family("gauge", "redpp_worker_resident_bytes", "Resident memory of the worker processes.", per_worker=True),
        Family(
            "gauge",
            "redpp_device_memory_bytes",
            "Memory held on the device: tensors on a GPU, resident memory on a CPU.",
            ("device",),
            per_worker=True,
        ),
    )
}


class Binding(Protocol):
    """What a server offers: instruments of its own kind."""

    def instrument(self, family: Family, labels: Mapping[str, str]) -> Any:
        """Return the instrument for a family and all its labels' values; called once for each set of labels.

        A counter has ``inc(amount)``, a gauge ``set(value)``, a histogram ``observe(value)``.
        """


class Metrics:
    """The metrics of one model in one worker.

    Args:
        labels: the labels of every sample.
        binding: makes the server's instruments.
        device: where the network runs, ``cpu`` or e.g. ``cuda:0``.
    """

    def __init__(self, labels: ModelLabels, binding: Binding, device: str = "cpu") -> None:
        self._labels, self._binding, self._device = asdict(labels), binding, device
        self._batch, self._handler = self._open("redpp_batch_size"), self._open("redpp_handler_seconds")
        self._inference = self._open("redpp_inference_seconds")
        self._requests = {outcome: self._open("redpp_requests_total", outcome=outcome) for outcome in OUTCOMES}
        self._batches: dict[int, tuple[Any, Any]] = {}
        self._cpu, self._cpu_s = self._open("redpp_worker_cpu_seconds_total"), 0.0
        self._resident = self._open("redpp_worker_resident_bytes")
        self._held = self._open("redpp_device_memory_bytes", device=device)
        self._usage_at = float("-inf")
        self._usage()

    def describe(self, **info: float) -> None:
        """Set what is fixed for a model: ``parameters``, ``macs``, ``bytes``."""
        for name, value in info.items():
            self._open(f"redpp_model_{name}").set(value)

    def plan(self, engine: str, precision: str, digest: str, layers: Mapping[int, Mapping[str, int]]) -> None:
        """Set which plan is in use, and how many ``layers`` each kernel runs, by batch bucket and kernel."""
        self._open("redpp_plan_info", device=self._device, engine=engine, precision=precision, digest=digest).set(1)
        for batch, counts in layers.items():
            for kernel, count in counts.items():
                self._open("redpp_plan_layers", kernel=kernel, batch=str(batch)).set(count)

    def ready(self, seconds: float) -> None:
        """Set how long the worker's initialization took."""
        self._open("redpp_ready_seconds").set(seconds)

    def batch(self, size: int, handler_s: float) -> None:
        """Record one batch, its size and the handler's time in seconds, and what the worker has used by now."""
        self._batch.observe(size)
        self._handler.observe(handler_s)
        pair = self._batches.get(size)
        if pair is None:
            label = str(size)
            pair = self._batches[size] = (
                self._open("redpp_batches_total", batch=label),
                self._open("redpp_batch_seconds_total", batch=label),
            )
        pair[0].inc()
        pair[1].inc(handler_s)
        self._usage()

    def inference(self, seconds: float) -> None:
        """Record one run of the network."""
        self._inference.observe(seconds)

    def request(self, outcome: str) -> None:
        """Count one request; ``outcome`` is one of `OUTCOMES`."""
        self._requests[outcome].inc()

    def _open(self, name: str, **labels: str) -> Any:
        return self._binding.instrument(FAMILIES[name], {**self._labels, **labels})

    def _usage(self) -> None:
        """Record CPU time and memory so far. Reading them costs more than all the rest: twice a second is enough."""
        now = time.monotonic()
        if now - self._usage_at < _USAGE_EVERY_S:
            return
        self._usage_at = now
        spent = time.process_time()
        self._cpu.inc(spent - self._cpu_s)
        self._cpu_s = spent
        resident = resident_bytes()
        if resident is not None:
            self._resident.set(resident)
        held = resident if self._device == "cpu" else _cuda_bytes(self._device)
        if held is not None:
            self._held.set(held)


def resident_bytes() -> int | None:
    """Return the resident memory of this process, bytes; None on systems without ``/proc``."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return None


def _cuda_bytes(device: str) -> int:
    import torch  # noqa: PLC0415  the exporter and other readers of the table do without

    return torch.cuda.memory_allocated(device)
