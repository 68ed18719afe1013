"""Probing and switching a running TorchServe by its note; Triton Inference Server's part is with its launcher."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from redpp_serve import cli
from redpp_serve.errors import RedppError
from redpp_serve.processes import started
from redpp_serve.serving.health import Health, Unhealthy, check, probe, sample_request, triton_request
from redpp_serve.serving.running import Running, register
from redpp_serve.serving.serve import open_server, roll_out
from redpp_serve.serving.server import LocalServer
from tests.support.rollout import default_variant, switch_under_load


@pytest.fixture(scope="module")
def server(packaged: Path) -> Iterator[LocalServer]:
    with open_server(packaged, name="small") as running:
        yield running


@pytest.fixture
def running(server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Registered for this test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with register(server.running()):
        yield server.running()


@pytest.mark.server
def test_no_request_fails_while_versions_are_switched(server: LocalServer) -> None:
    answered = switch_under_load(server, cycles=5, least=1000)
    assert answered.total() >= 1000 and min(answered["original"], answered["pruned"]) > 50


@pytest.mark.server
def test_the_commands_act_on_the_running_server(
    server: LocalServer, running: Running, packaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, variant in (("promote", "pruned"), ("promote", "pruned"), ("rollback", "original")):
        assert cli.main([command, str(packaged)]) == 0
        assert capsys.readouterr().out == f"requests to {server.default_url()} now go to {variant}\n"
        assert default_variant(running) == variant
    assert cli.main(["health", str(packaged), "--server", "torchserve"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["original", "ok,"],
        ["pruned", "ok,"],
        ["default", "ok,"],
    ]
    for command, code in (("promote", 2), ("rollback", 2), ("health", 1)):
        assert cli.main([command, str(packaged), "--server", "triton"]) == code
        assert "no triton is running" in capsys.readouterr().err


@pytest.mark.server
def test_what_does_not_answer_is_named(server: LocalServer, running: Running, packaged: Path) -> None:
    assert probe(running, "pruned").problem == ""
    unknown = replace(running, urls={**running.urls, "pruned": server.url("9.9")})
    assert "answers 404" in probe(unknown, "pruned").problem
    assert "answers 400" in probe(replace(running, headers={"inference": {}}), "original").problem
    down = replace(running, pid=os.getpid(), urls={"original": "http://127.0.0.1:9/predictions/small/1.0"})
    with register(down), pytest.raises(Unhealthy, match="original does not answer: .*refused") as caught:
        check(packaged)
    assert caught.value.exit_code == 1


def test_what_cannot_be_switched_or_probed_is_refused(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    urls = {"default": "http://127.0.0.1:9"}
    created = started(os.getpid()) or 0.0
    note = Running(
        str(packaged), "small", "torchserve", os.getpid(), created, ("1.0", "2.0"), urls, urls["default"], []
    )
    divided = replace(note, extra={"gateway": "http://127.0.0.1:9"})
    with register(divided), pytest.raises(RedppError, match="an experiment divides.*redpp-serve ab rollback"):
        roll_out(packaged, "original")
    with register(note):
        with pytest.raises(RedppError, match="does not answer.*start it again"):
            roll_out(packaged, "pruned")
        with pytest.raises(Unhealthy, match="default does not answer: .*refused"):
            check(packaged)
    with pytest.raises(RedppError, match="no sample.npy or sample.npz.*package the model again"):
        sample_request(replace(note, folder=str(tmp_path)))


def test_several_inputs_are_put_one_behind_the_other() -> None:
    inputs = [{"name": "a", "datatype": "FP32", "shape": [-1, 2]}, {"name": "b", "datatype": "INT64", "shape": [-1, 1]}]
    metadata = {"inputs": inputs, "outputs": [{"name": "y"}]}
    request = triton_request(metadata, [np.array([1, 2], np.float32), np.array(3)])
    length = int(request.headers["Inference-Header-Content-Length"])
    assert request.body[length:] == np.array([1, 2], np.float32).tobytes() + np.array([3]).tobytes()
    document = json.loads(request.body[:length])
    assert [spec["shape"] for spec in document["inputs"]] == [[1, 2], [1, 1]]
    assert [spec["parameters"]["binary_data_size"] for spec in document["inputs"]] == [8, 8]
    assert document["outputs"] == [{"name": "y", "parameters": {"binary_data": False}}]  # curl's user reads it


def test_health_is_one_line() -> None:
    assert Health("pruned", 0.0123).to_text() == "pruned    ok, 12.3 ms"
    assert Health("pruned", 0.01, "answers 500: x").to_text() == "pruned    answers 500: x"


def test_a_probe_starts_without_torch() -> None:
    """It runs every few seconds where an orchestrator asks."""
    code = "import sys, redpp_serve.serving.health; sys.exit(bool({'torch', 'tritonclient'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
