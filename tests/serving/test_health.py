"""Probing and switching a running TorchServe by its note; Triton Inference Server's part is with its launcher."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redpp_serve import cli
from redpp_serve.errors import RedppError
from redpp_serve.handlers.wire import VARIANT_HEADER
from redpp_serve.processes import started
from redpp_serve.serving.health import Health, Unhealthy, check, probe, require_healthy, sample_request, triton_request
from redpp_serve.serving.running import Running, register
from redpp_serve.serving.serve import open_server, roll_out
from redpp_serve.serving.server import LocalServer
from tests.support.rollout import default_variant, switch_under_load
from tests.support.stubs import stub


@pytest.fixture(scope="module")
def server(packaged: Path) -> Iterator[LocalServer]:
    with open_server(packaged, name="small") as running:
        yield running


@pytest.fixture
def running(server: LocalServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """Registered for this test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
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
        require_healthy(check(packaged))
    assert caught.value.exit_code == 1


def test_what_cannot_be_switched_or_probed_is_refused(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
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
            require_healthy(check(packaged))
    with pytest.raises(RedppError, match="no sample.npy or sample.npz.*package the model again"):
        sample_request(replace(note, folder=str(tmp_path)))


@pytest.mark.parametrize(
    ("says", "found"), [("pruned", "now go to pruned"), ("original", "still answered by original")]
)
def test_a_move_is_seen_by_requests_before_it_is_told(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, found: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("redpp_serve.serving.serve._PATIENCE_S", 0.2)
    with stub(lambda path, body, headers: (200, {}, {VARIANT_HEADER: says})) as server:
        url = f"http://127.0.0.1:{server.port}"
        created = started(os.getpid()) or 0.0
        note = Running(
            str(packaged), "small", "torchserve", os.getpid(), created, ("1.0", "2.0"), {"default": url}, url, []
        )
        with register(replace(note, headers={"inference": {}, "management": {}})):
            try:
                told = roll_out(packaged, "pruned")
            except RedppError as error:
                told = error.found
            assert found in told
            server.answer = lambda path, body, headers: (503 if "set-default" not in path else 200, {})
            assert "now go to pruned, which answers 503" in roll_out(packaged, "pruned")


def test_health_as_json_tells_every_server_and_judges_their_times(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def health(*words: str) -> tuple[int, list[dict[str, Any]], str]:
        code = cli.main(["health", str(packaged), "--json", *words])
        printed = capsys.readouterr()
        return code, json.loads(printed.out), printed.err

    code, servers, err = health()
    assert (code, servers) == (1, []) and "no server is running" in err
    with stub(lambda path, body, headers: (500 if "bad" in path else 200, {"outputs": [1]})) as server:
        url, created = f"http://127.0.0.1:{server.port}/", started(os.getpid()) or 0.0
        urls = {"original": url, "pruned": url, "default": url}
        note = Running(str(packaged), "small", "torchserve", os.getpid(), created, ("1.0", "2.0"), urls, url, [])
        other = replace(note, pid=os.getppid(), created=started(os.getppid()) or 0.0)
        with register(note):
            code, (one,), err = health("--require", "pruned_ms<=30000", "--require", "default_ms<=30000")
            assert (code, err, one["server"], one["ok"], one["problem"]) == (0, "", "torchserve", True, None)
            assert set(one["arms"]) == {"original", "pruned", "default"} and one["pid"] == os.getpid()
            assert one["arms"]["pruned"]["ok"] and 0 < one["arms"]["pruned"]["ms"] < 30_000
            assert [each["met"] for each in one["requirements"]] == [True, True]
            code, (one,), err = health("--require", "original_ms<=0")
            assert code == 3 and one["ok"] and "original_ms is " in err and "Expected: original_ms<=0" in err
            with register(replace(other, urls={**urls, "pruned": f"{url}bad"})):  # what fails goes before what is slow
                code, servers, err = health("--require", "original_ms<=0")
        assert code == 1 and sorted(each["ok"] for each in servers) == [False, True]
        (bad,) = [each for each in servers if not each["ok"]]
        assert bad["problem"].startswith("pruned answers 500") and not bad["arms"]["pruned"]["ok"]
    with pytest.raises(SystemExit, match="2"):
        health("--require", "p99_ms<=1")
    assert "'p99_ms' is no figure; there are original_ms, pruned_ms, default_ms" in capsys.readouterr().err


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


def test_a_size_that_varies_is_that_of_the_sample() -> None:
    metadata = {"inputs": [{"name": "a", "datatype": "INT64", "shape": [-1, -1]}], "outputs": [{"name": "y"}]}
    request = triton_request(metadata, [np.array([1, 2, 3])])
    assert b'"shape":[1,3]' in request.body.replace(b" ", b"")


def test_health_is_one_line() -> None:
    assert Health("pruned", 0.0123).to_text() == "pruned    ok, 12.3 ms"
    assert Health("pruned", 0.01, "answers 500: x").to_text() == "pruned    answers 500: x"


def test_a_probe_starts_without_torch() -> None:
    """It runs every few seconds where an orchestrator asks."""
    code = "import sys, redpp_serve.serving.health; sys.exit(bool({'torch', 'tritonclient'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
