"""A worker's metrics: recorded by the handlers' real objects, exported, scraped over HTTP, read by `metrics_reader`.

Every number arrives under the name and labels that the handlers' table gives it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from redpp_serve.handlers.exporter import Workers
from redpp_serve.handlers.metrics import DIRECTORY, FAMILIES, OUTCOMES, SECONDS_BUCKETS
from redpp_serve.metrics_reader import Key, Reading, read
from redpp_serve.variants import ORIGINAL, VARIANTS

# What each version records: two batches of 1 and one of 3, with the handler's and the network's seconds.
BATCHES = ((1, 0.004, 0.003), (1, 0.006, 0.004), (3, 0.25, 0.125))
COST = {"parameters": 2000.0, "macs": 6000.0, "bytes": 8000.0}
LAYERS = {1: {"dense": 2}, 8: {"dense": 1, "split": 1}}
WORKER = f"""
import sys
from redpp_serve.handlers.metrics import ModelLabels
from redpp_serve.handlers.prometheus import open_metrics
for version, variant in (line.split(":") for line in sys.argv[1:]):
    metrics = open_metrics(ModelLabels("digits", version, variant))
    metrics.describe(**{COST!r})
    metrics.plan("redpp", "fp32", "0123456789ab", {LAYERS!r})
    metrics.ready(1.25)
    for size, handler_s, network_s in {BATCHES!r}:
        metrics.batch(size, handler_s)
        metrics.inference(network_s)
        for _ in range(size):
            metrics.request("ok")
    metrics.request("bad_request")
    metrics.request("error")
    metrics.request("error")
print("recorded", flush=True)
sys.stdin.read()  # live on: memory counts for living workers alone
"""


def record(folder: Path, *versions: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *versions],
        env={**os.environ, DIRECTORY: str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "recorded\n"
    return process


def scrape(folder: Path) -> Reading:
    registry = CollectorRegistry()
    registry.register(Workers(folder))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        return read(f"http://127.0.0.1:{server.server_port}/metrics", "digits")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("metrics")
    process = record(path, *(f"{variant.version}:{variant.name}" for variant in VARIANTS))
    yield path
    process.communicate(timeout=30)


def test_every_number_arrives_under_its_name(folder: Path) -> None:
    for _ in range(100):  # the writer's thread writes ten times a second
        values = scrape(folder).values
        if values.get(Key("redpp_requests_total", "pruned", "error")) == 2:
            break
        time.sleep(0.05)
    for variant in ("original", "pruned"):
        found = {key[::2]: value for key, value in values.items() if key.variant == variant}
        assert {name: found["redpp_requests_total", name] for name in OUTCOMES} == {
            "ok": 5,
            "bad_request": 1,
            "error": 2,
        }
        assert {size: found["redpp_batches_total", size] for size in ("1", "3")} == {"1": 2, "3": 1}
        assert found["redpp_batch_seconds_total", "1"] == pytest.approx(0.010)
        assert found["redpp_batch_seconds_total", "3"] == 0.25
        assert {name: found[f"redpp_model_{name}", ""] for name in COST} == COST
        assert found["redpp_ready_seconds", ""] == 1.25
        assert found["redpp_plan_info", "cpu redpp fp32 0123456789ab"] == 1
        assert found["redpp_plan_layers", "dense 1"] == 2 and found["redpp_plan_layers", "split 8"] == 1
        assert found["redpp_worker_cpu_seconds_total", ""] > 0
        assert found["redpp_worker_resident_bytes", ""] == found["redpp_device_memory_bytes", "cpu"] > 1e6
        for name, seconds, fast in (("redpp_handler_seconds", 0.26, 1), ("redpp_inference_seconds", 0.132, 2)):
            assert (found[f"{name}_count", ""], found[f"{name}_sum", ""]) == (3, pytest.approx(seconds))
            edges = {float(detail): value for (each, detail), value in found.items() if each == f"{name}_bucket"}
            assert sorted(edges)[:-1] == list(SECONDS_BUCKETS) and edges[float("inf")] == 3
            assert edges[0.004] == fast
        assert found["redpp_batch_size_sum", ""] == 5 and found["redpp_batch_size_bucket", "2.0"] == 2
    told = {key.name for key in values}
    assert {f.name for f in FAMILIES.values() if f.kind != "histogram"} <= told, "every family of the table was checked"
    assert {f"{f.name}_bucket" for f in FAMILIES.values() if f.kind == "histogram"} <= told
    assert scrape(folder).others == frozenset()


def test_the_pruned_version_of_an_older_package_is_read_as_pruned(tmp_path: Path) -> None:
    record(tmp_path, "2.0:redpp").communicate(timeout=30)
    values = scrape(tmp_path).values
    assert values[Key("redpp_requests_total", "pruned", "ok")] == 5
    assert {key.variant for key in values} == {"pruned"} and ORIGINAL.name not in str(values)


def test_what_comes_between_two_scrapes_is_the_difference(tmp_path: Path) -> None:
    record(tmp_path, "1.0:original").communicate(timeout=30)
    before = scrape(tmp_path)
    record(tmp_path, "1.0:original").communicate(timeout=30)
    gained, restarted = scrape(tmp_path).since(before)
    assert not restarted
    assert gained[Key("redpp_batches_total", "original", "1")] == 2
    assert gained[Key("redpp_handler_seconds_bucket", "original", "+Inf")] == 3
    again = before.since(scrape(tmp_path))
    assert again.restarted and again.gained[Key("redpp_batches_total", "original", "1")] == 2
