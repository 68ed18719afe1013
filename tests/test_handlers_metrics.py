"""Metrics of several worker processes, summed as the exporter sums them. Each worker is a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from redpp_serve.handlers.metrics import SECONDS_BUCKETS, ModelLabels, open_metrics

WORKER = """
import sys
from redpp_serve.handlers.metrics import ModelLabels, open_metrics
metrics = open_metrics(ModelLabels("digits", sys.argv[1], sys.argv[2]))
metrics.describe(parameters=100, macs=2000, bytes=400)
for seconds in (0.001, 0.02):
    metrics.inference(seconds / 2)
    metrics.batch(3, seconds)
for outcome in ("ok", "ok", "bad_request"):
    metrics.request(outcome)
"""


def work(folder: Path, version: str, variant: str) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    subprocess.run([sys.executable, "-c", WORKER, version, variant], env=environment, check=True, timeout=60)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> CollectorRegistry:
    """Two workers of version 1.0 and one of 2.0; the folder does not exist before the first."""
    folder = tmp_path_factory.mktemp("metrics") / "new"
    for version, variant in (("1.0", "original"), ("1.0", "original"), ("2.0", "redpp")):
        work(folder, version, variant)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    return registry


ORIGINAL = {"model": "digits", "version": "1.0", "variant": "original"}
PRUNED = {"model": "digits", "version": "2.0", "variant": "redpp"}


@pytest.mark.parametrize(("labels", "workers"), [(ORIGINAL, 2), (PRUNED, 1)])
def test_counts_and_times_add_up_over_workers(registry: CollectorRegistry, labels: dict, workers: int) -> None:
    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(name, {**labels, **more})

    assert value("redpp_requests_total", outcome="ok") == 2 * workers
    assert value("redpp_requests_total", outcome="bad_request") == workers
    assert value("redpp_requests_total", outcome="error") == 0
    assert value("redpp_handler_seconds_count") == value("redpp_inference_seconds_count") == 2 * workers
    assert value("redpp_handler_seconds_sum") == pytest.approx(0.021 * workers)
    assert value("redpp_inference_seconds_sum") == pytest.approx(0.0105 * workers)
    assert value("redpp_handler_seconds_bucket", le="0.001") == workers
    assert value("redpp_handler_seconds_bucket", le="+Inf") == 2 * workers
    assert value("redpp_batch_size_sum") == 6 * workers
    assert value("redpp_batch_size_bucket", le="2.0") == 0 and value("redpp_batch_size_bucket", le="4.0") == 2 * workers


@pytest.mark.parametrize("labels", [ORIGINAL, PRUNED])
def test_what_describes_a_model_is_not_multiplied_by_its_workers(registry: CollectorRegistry, labels: dict) -> None:
    found = {n: registry.get_sample_value(f"redpp_model_{n}", labels) for n in ("parameters", "macs", "bytes")}
    assert found == {"parameters": 100, "macs": 2000, "bytes": 400}


def test_buckets_are_geometric_from_a_quarter_millisecond_to_four_seconds() -> None:
    assert SECONDS_BUCKETS[0] == 0.00025 and 4 <= SECONDS_BUCKETS[-1] < 4.2
    ratios = [b / a for a, b in zip(SECONDS_BUCKETS, SECONDS_BUCKETS[1:])]
    assert all(1.40 < ratio < 1.43 for ratio in ratios)


def test_without_the_package_serving_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert open_metrics(ModelLabels("digits", "1.0", "original")) is None
    assert [r.message for r in caplog.records] == ["metrics are off: the package prometheus-client is not installed"]
