"""Panels and recording rules all have an answer where a live Prometheus scrapes each server under load."""

import http.client
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
import torch
import yaml

from redpp_serve.ab import commands
from redpp_serve.ab.spec import Spec, parse_split
from redpp_serve.loopback import Ports, ask, free_ports
from redpp_serve.serving.health import sample_request
from redpp_serve.serving.running import Running, find
from redpp_serve.serving.serve import KINDS
from tests.support.boards import GPU_ONLY, Target, filled, targets
from tests.support.tools import tool

pytestmark = pytest.mark.server
RULES = Path(__file__).parents[2] / "deploy" / "prometheus"
WAIT_S = 30.0
THREADS = 3  # for each version: its batches hold one to three requests


@contextmanager
def prometheus(folder: Path, addresses: dict[str, str]) -> Iterator[int]:
    """A server with the deployed configuration, but the addresses of its jobs, and everything each second; its port."""
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / name) for name in config["rule_files"]]
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in addresses]
    assert len(config["scrape_configs"]) == len(addresses)
    for job in config["scrape_configs"]:
        job["static_configs"][0]["targets"] = [addresses[job["job_name"]]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_ports(Ports).metrics
    command = [
        tool("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait(lambda: process.poll() is not None or answers(port), "Prometheus to answer")
        assert process.poll() is None, (folder / "log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait(timeout=15)


@contextmanager
def load(running: Running) -> Iterator[list[int]]:
    """Load both versions and, sparsely, so that replays find quiet, the gateway; yield the statuses of the replies."""
    stop, statuses, sample = threading.Event(), [], sample_request(running)
    headers = {**running.headers["inference"], **sample.headers}

    def send(url: str, pause_s: float) -> None:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=30)
        while not stop.wait(pause_s):
            connection.request("POST", parts.path, sample.body, headers)
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
        connection.close()

    targets = [(running.urls[variant], 0.01) for variant in ("original", "pruned") for _ in range(THREADS)]
    targets.append((running.extra["gateway"], 0.2))
    threads = [threading.Thread(target=send, args=target) for target in targets]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait(done: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.25)


def answers(port: int) -> bool:
    try:
        return ask(f"http://127.0.0.1:{port}/-/ready")[0] == 200
    except OSError:
        return False


def api(port: int, path: str, **parameters: str) -> Any:
    status, body = ask(f"http://127.0.0.1:{port}/api/v1/{path}?{urlencode(parameters)}")
    document = json.loads(body)
    assert status == 200, document
    return document["data"]


def answered(port: int, expr: str) -> bool:
    """Whether a query has values that are numbers, of both versions where it tells them apart."""
    result = api(port, "query", query=expr)["result"]
    variants = {sample["metric"].get("variant") for sample in result if sample["value"][1] != "NaN"}
    return variants in ({None}, {"original", "pruned"})


@pytest.fixture(scope="module", params=KINDS)
def live(request: pytest.FixtureRequest, packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Prometheus that scrapes this kind of server, and an experiment on it, under load."""
    for name in ("prometheus", "nginx"):
        tool(name)
    spec = Spec(packaged, None, request.param, parse_split("80:20"), None, shadow=True)
    commands.start(spec, foreground=False, say=lambda line: None, note=lambda line: None)
    try:
        running = find(packaged, request.param)
        server, experiment = (urlsplit(url).netloc for url in running.metrics_urls)
        addresses = {f"redpp-{request.param}": server, "redpp-ab": experiment}
        with load(running) as statuses, prometheus(tmp_path_factory.mktemp("p"), addresses) as port:
            yield port
        assert len(statuses) > 100 and set(statuses) == {200}
    finally:
        commands.stop(packaged)


def test_no_panel_is_empty(live: int) -> None:
    assert not answered(live, "redpp_nothing") and not answered(live, "vector(0) / 0")
    left: list[Target] = list(targets())
    if not torch.cuda.is_available():
        left = [target for target in left if (target.board, target.panel) not in GPU_ONLY]

    def done() -> bool:
        left[:] = [target for target in left if not answered(live, filled(target.expr, "15s"))]
        return not left

    try:
        wait(done, "all panels")
    except AssertionError:
        pytest.fail("no answer: " + "; ".join(f"{t.board}, {t.panel}, {t.legend}: {t.expr}" for t in left))


def test_every_recording_rule_has_a_value_and_no_alert_fires(live: int) -> None:
    rules = [rule for group in api(live, "rules")["groups"] for rule in group["rules"]]
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    assert len(recorded) > 20 and {rule["health"] for rule in rules} == {"ok"}
    wait(lambda: all(answered(live, name) for name in recorded), "every recording rule")
    assert [alert for alert in api(live, "alerts")["alerts"] if alert["state"] == "firing"] == []
