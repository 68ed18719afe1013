"""Requests without a version that never pause while the default version of a running server is moved to and fro."""

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from redpp_serve.loopback import ask
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.packaging.samples import request_body
from redpp_serve.serving.health import Request, sample_request, triton_request
from redpp_serve.serving.running import Running
from redpp_serve.serving.server import LocalServer
from redpp_serve.serving.switching import STAND_INS, loaded_triton_versions, switch
from redpp_serve.variants import NAMES
from tests.support.small import outputs

CLIENTS = 4


def switch_under_load(server: LocalServer, cycles: int, least: int) -> Counter[str]:
    """Promote and roll back that often, and on until there were ``least`` requests, which must all be answered in full.

    Returns how many each variant answered.
    """
    running = server.running()
    request, url = sample_request(running), urlsplit(server.default_url())
    headers = {**server.headers(), **request.headers}
    expected = expected_outputs(server.folder)
    answered: Counter[str] = Counter()
    failures: list[object] = []
    done, lock = threading.Event(), threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", url.port, timeout=60)
        while not done.is_set() and len(failures) < 10:
            try:
                connection.request("POST", url.path, request.body, headers)
                response = connection.getresponse()
                body = response.read()
                variant, values = read(server.kind, response, body)
                assert values == pytest.approx(expected[variant], rel=1e-3, abs=1e-4)
                with lock:
                    answered[variant] += 1
            except Exception as error:
                failures.append(repr(error))
                connection.close()
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        switches = 0
        while switches < cycles or (answered.total() < least and not failures):
            switch(running, "pruned")
            assert default_variant(running) == "pruned"
            time.sleep(0.2)
            switch(running, "original")
            assert default_variant(running) == "original"
            time.sleep(0.2)
            switches += 1
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []
    return answered


def default_variant(running: Running) -> str:
    """Where requests that name no version go now: ``original`` or ``pruned``."""
    if running.kind == "torchserve":
        status, reply = ask(f"{running.management_url}/models/{running.name}", running.headers["management"])
        assert status == 200, reply
        return NAMES[running.versions.index(json.loads(reply)[0]["modelVersion"])]
    return "original" if loaded_triton_versions(running) & set(STAND_INS) else "pruned"


def expected_outputs(folder: Path) -> dict[str, list[float]]:
    """Each variant's outputs for the package's sample."""
    x = torch.from_numpy(np.load(folder / "sample.npy"))
    return {variant: outputs(folder / f"{variant}.mar", x)[0] for variant in ("original", "pruned")}


def predict(server: LocalServer, version: str, arrays: Sequence[Any]) -> tuple[http.client.HTTPResponse, bytes]:
    """Send one request of arrays without a batch to a version."""
    running = server.running()
    if server.kind == "triton":
        metadata = json.loads(ask(f"{running.management_url}/v2/models/{running.name}")[1])
        request = triton_request(metadata, arrays)
    else:
        names = [spec.name for spec in read_artifact(server.folder / "original.mar").graph.inputs]
        request = Request(request_body(dict(zip(names, arrays, strict=True))), {})
    url = urlsplit(server.url(version))
    connection = http.client.HTTPConnection("127.0.0.1", url.port, timeout=60)
    connection.request("POST", url.path, request.body, {**server.headers(), **request.headers})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def read(kind: str, response: http.client.HTTPResponse, body: bytes) -> tuple[str, list[float]]:
    """Which variant answered, and its first output."""
    assert response.status == 200, (response.status, body)
    document = json.loads(body)
    if kind == "torchserve":
        outputs = document["outputs"]  # by name where the network names them
        first = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]
        return str(response.headers["X-Redpp-Variant"]), first
    variants = {"1": "original", "2": "pruned", "3": "original", "4": "original"}
    return variants[document["model_version"]], document["outputs"][0]["data"]
