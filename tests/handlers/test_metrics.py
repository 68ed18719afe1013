"""Metrics of several worker processes, summed as the exporter sums them. Each worker is a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from prometheus_client import CollectorRegistry, Histogram

from redpp_serve.handlers import metrics
from redpp_serve.handlers.exporter import Workers
from redpp_serve.handlers.metrics import FAMILIES, SECONDS_BUCKETS, Metrics, ModelLabels
from redpp_serve.handlers.prometheus import Noted, PrometheusBinding, open_metrics

WORKER = """
import sys
from redpp_serve.handlers.metrics import ModelLabels
from redpp_serve.handlers.prometheus import open_metrics
metrics = open_metrics(ModelLabels("digits", sys.argv[1], sys.argv[2]))
metrics.describe(parameters=100, macs=2000, bytes=400)
for seconds in (0.001, 0.02):
    metrics.inference(seconds / 2)
    metrics.batch(3, seconds)
metrics.batch(1, 0.5)
for outcome in ("ok", "ok", "bad_request"):
    metrics.request(outcome)
if sys.argv[3:]:
    print("ready", flush=True)
    sys.stdin.read()
"""


def work(folder: Path, version: str, variant: str) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    subprocess.run([sys.executable, "-c", WORKER, version, variant], env=environment, check=True, timeout=60)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> CollectorRegistry:
    """Two workers of version 1.0 and one of 2.0; the folder does not exist before the first."""
    folder = tmp_path_factory.mktemp("metrics") / "new"
    for version, variant in (("1.0", "original"), ("1.0", "original"), ("2.0", "pruned")):
        work(folder, version, variant)
    return collected(folder)


def collected(folder: Path) -> CollectorRegistry:
    """As the exporter collects."""
    registry = CollectorRegistry()
    registry.register(Workers(folder))
    return registry


ORIGINAL = {"model": "digits", "version": "1.0", "variant": "original"}
PRUNED = {"model": "digits", "version": "2.0", "variant": "pruned"}


@pytest.mark.parametrize(("labels", "workers"), [(ORIGINAL, 2), (PRUNED, 1)])
def test_counts_and_times_add_up_over_workers(registry: CollectorRegistry, labels: dict, workers: int) -> None:
    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(name, {**labels, **more})

    assert value("redpp_requests_total", outcome="ok") == 2 * workers
    assert value("redpp_requests_total", outcome="bad_request") == workers
    assert value("redpp_requests_total", outcome="error") == 0
    assert value("redpp_handler_seconds_count") == 3 * workers and value("redpp_inference_seconds_count") == 2 * workers
    assert value("redpp_handler_seconds_sum") == pytest.approx(0.521 * workers)
    assert value("redpp_inference_seconds_sum") == pytest.approx(0.0105 * workers)
    assert value("redpp_handler_seconds_bucket", le="0.001") == workers
    assert value("redpp_handler_seconds_bucket", le="+Inf") == 3 * workers
    assert value("redpp_batch_size_sum") == 7 * workers
    assert value("redpp_batch_size_bucket", le="2.0") == workers
    assert value("redpp_batch_size_bucket", le="4.0") == 3 * workers
    assert value("redpp_batches_total", batch="3") == 2 * workers and value("redpp_batches_total", batch="1") == workers
    assert value("redpp_batch_seconds_total", batch="3") == pytest.approx(0.021 * workers)
    assert value("redpp_batch_seconds_total", batch="1") == pytest.approx(0.5 * workers)
    assert 0.01 * workers < value("redpp_worker_cpu_seconds_total") < 60 * workers


def test_what_describes_a_model_is_not_multiplied_by_its_workers(registry: CollectorRegistry) -> None:
    for labels in (ORIGINAL, PRUNED):
        found = {n: registry.get_sample_value(f"redpp_model_{n}", labels) for n in ("parameters", "macs", "bytes")}
        assert found == {"parameters": 100, "macs": 2000, "bytes": 400}, labels


@pytest.fixture
def living(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two workers of the original that have recorded, and wait."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WORKER, "1.0", "original", "wait"]
    workers = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        assert all(worker.stdout.readline() == "ready\n" for worker in workers)
        last = {"version": "1.0", "model": "digits", "variant": "original", "outcome": "bad_request"}
        deadline = time.monotonic() + 60
        while collected(tmp_path).get_sample_value("redpp_requests_total", last) != len(workers):
            assert time.monotonic() < deadline, "what a worker records last was never written"
            time.sleep(0.02)
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_memory_of_a_dead_worker_counts_no_more_and_its_work_still_does(
    tmp_path: Path, living: list[subprocess.Popen[str]]
) -> None:
    def values() -> dict[str, float | None]:
        registry, labels = collected(tmp_path), {"version": "1.0", "model": "digits", "variant": "original"}
        found = {name: registry.get_sample_value(name, labels) for name in FAMILIES}
        found["device"] = registry.get_sample_value("redpp_device_memory_bytes", {**labels, "device": "cpu"})
        return found

    both, sizes = values(), [psutil.Process(worker.pid).memory_info().rss for worker in living]
    assert both["redpp_worker_resident_bytes"] == pytest.approx(sum(sizes), rel=0.1)
    assert both["device"] == both["redpp_worker_resident_bytes"]
    living[0].send_signal(signal.SIGKILL)
    living[0].wait()
    one = values()
    assert one["redpp_worker_resident_bytes"] == pytest.approx(sizes[1], rel=0.1)
    assert one["redpp_worker_cpu_seconds_total"] == both["redpp_worker_cpu_seconds_total"] > 0
    assert one["redpp_model_macs"] == 2000
    living[1].communicate()
    none = values()
    assert none["redpp_worker_resident_bytes"] is None and none["device"] is None
    assert none["redpp_worker_cpu_seconds_total"] == both["redpp_worker_cpu_seconds_total"]


class Note:
    """An instrument that keeps the last value, or the sum."""

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = value

    observe = inc


class Notes(dict):
    """A binding without a server."""

    def instrument(self, family: metrics.Family, labels: dict[str, str]) -> Note:
        assert set(labels) == {"model", "version", "variant", *family.labels}
        extra = tuple(labels[name] for name in family.labels)
        assert (family.name, *extra) not in self, "opened twice: its cost would be paid at each batch"
        return self.setdefault((family.name, *extra), Note())


def test_every_family_of_the_table_is_recorded_by_any_binding() -> None:
    notes = Notes()
    recorder = Metrics(ModelLabels("digits", "1.0", "original"), notes)
    recorder.describe(parameters=1, macs=2, bytes=3)
    recorder.plan("openvino", "bf16", "0a1b", {1: {"dense": 3, "library": 2}, 4: {"dense": 5}})
    recorder.ready(2.5)
    for size in (2, 2, 5):
        recorder.batch(size, 0.25)
        recorder.inference(0.125)
        recorder.request("error")
    assert {name for name, *_ in notes} == set(FAMILIES)
    assert notes["redpp_batches_total", "2"].value == 2 and notes["redpp_batch_seconds_total", "5"].value == 0.25
    assert notes["redpp_ready_seconds",].value == 2.5
    assert notes["redpp_requests_total", "error"].value == 3 and notes["redpp_inference_seconds",].value == 0.375


def test_cpu_time_and_memory_follow_the_process_but_are_not_read_at_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0, "cpu": 4.0}
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(metrics.time, "process_time", lambda: clock["cpu"])
    notes = Notes()
    recorder = Metrics(ModelLabels("digits", "1.0", "original"), notes)
    spent = notes["redpp_worker_cpu_seconds_total",]
    assert spent.value == 4.0 and notes["redpp_worker_resident_bytes",].value > 1e6
    clock.update(now=0.1, cpu=4.05)
    recorder.batch(1, 0.1)
    assert spent.value == 4.0
    clock.update(now=1.0, cpu=4.75)
    recorder.batch(1, 0.1)
    assert spent.value == 4.75


def test_on_a_gpu_the_device_memory_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: {"cuda:1": 4096}[device])
    notes = Notes()
    Metrics(ModelLabels("digits", "1.0", "original"), notes, device="cuda:1")
    assert notes["redpp_device_memory_bytes", "cuda:1"].value == 4096 < notes["redpp_worker_resident_bytes",].value


def test_what_is_written_together_counts_as_what_is_observed_one_by_one() -> None:
    """Also values on a bound, and beyond the last one."""
    binding = PrometheusBinding()
    labels = {"model": "digits", "version": "1.0", "variant": "original"}
    name, counter = "redpp_handler_seconds", "redpp_requests_total"
    noted, count = binding.instrument(FAMILIES[name], labels), binding.instrument(FAMILIES[counter], {"outcome": "ok"})
    registry = CollectorRegistry()
    plain = Histogram(name, "", tuple(labels), buckets=SECONDS_BUCKETS, registry=registry).labels(**labels)
    for value in (0.0, 0.0001, *SECONDS_BUCKETS, 0.0301, 5.0, 100.0, 0.0301):
        noted.observe(value)
        plain.observe(value)
        count.inc()
    binding.write()
    found = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in binding.registry.collect()
        for s in family.samples
        if not s.name.endswith("_created")
    }
    expected = {
        (s.name, *sorted(s.labels.items())): s.value
        for family in registry.collect()
        for s in family.samples
        if not s.name.endswith("_created")
    }
    assert found.pop((counter, ("outcome", "ok"))) == len(SECONDS_BUCKETS) + 6
    assert found == pytest.approx(expected) and len(expected) == len(SECONDS_BUCKETS) + 3


def test_what_cannot_be_written_does_not_end_the_writing(caplog: pytest.LogCaptureFixture) -> None:
    binding = PrometheusBinding()
    count = binding.instrument(FAMILIES["redpp_requests_total"], {"outcome": "ok"})
    count.inc(-1)  # a counter refuses
    deadline = time.monotonic() + 10
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [record.message for record in caplog.records] == ["metrics could not be written"]
    count.inc(2)
    while binding.registry.get_sample_value("redpp_requests_total", {"outcome": "ok"}) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_write_at_exit_waits_for_the_one_that_is_under_way() -> None:
    """The thread that writes ends with the process: what it took and has not written yet would be lost."""
    binding, begun, go_on, written = PrometheusBinding(), threading.Event(), threading.Event(), []

    class Slow:
        def inc(self, amount: float) -> None:
            begun.set()
            assert go_on.wait(10)
            written.append(amount)

    Noted(binding._noted, Slow()).inc(3)
    assert begun.wait(10)
    at_exit = threading.Thread(target=binding.write)
    at_exit.start()
    at_exit.join(0.1)
    assert at_exit.is_alive()
    go_on.set()
    at_exit.join(10)
    assert written == [3] and not at_exit.is_alive()


def test_a_batch_costs_the_handler_a_few_microseconds() -> None:
    recorder = Metrics(ModelLabels("digits", "1.0", "original"), PrometheusBinding())

    def record() -> float:
        start = time.thread_time()
        for _ in range(100):
            recorder.inference(0.001)
            recorder.request("ok")
            recorder.batch(1, 0.002)
        return (time.thread_time() - start) / 100

    assert min(record() for _ in range(20)) < 10e-6


def test_buckets_are_geometric_from_a_quarter_millisecond_to_four_seconds() -> None:
    assert SECONDS_BUCKETS[0] == 0.00025 and 4 <= SECONDS_BUCKETS[-1] < 4.2
    ratios = [b / a for a, b in pairwise(SECONDS_BUCKETS)]
    assert all(1.40 < ratio < 1.43 for ratio in ratios)


def test_without_the_package_serving_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert open_metrics(ModelLabels("digits", "1.0", "original")) is None
    assert [r.message for r in caplog.records] == ["metrics are off: the package prometheus-client is not installed"]
