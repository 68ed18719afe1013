"""A real tritonserver with both versions: tokens, roll-out under load, dead workers, an end that leaves nothing."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest

from redpp_serve.errors import RedppError
from redpp_serve.loopback import TritonPorts, free_ports
from redpp_serve.options import ServerOptions
from redpp_serve.processes import session, started
from redpp_serve.serving.health import probe, sample_request
from redpp_serve.serving.serve import open_server
from redpp_serve.serving.server import RESTARTS
from redpp_serve.serving.switching import switch
from redpp_serve.serving.triton_server import TritonServer
from tests.support.rollout import default_variant, expected_outputs, read, switch_under_load

pytestmark = pytest.mark.server

STOP_S = 30


def mine() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def post(
    server: TritonServer, path: str, body: bytes, headers: dict[str, str]
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=60)
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def infer(server: TritonServer, version: str | None, headers: dict[str, str] | None = None) -> Any:
    """(response, body) to the package's sample."""
    request = sample_request(server.running())
    url = server.url(version) if version else server.default_url()
    sent = server.headers() if headers is None else headers
    return post(server, urlsplit(url).path, request.body, {**sent, **request.headers})


def shared_memory(server: TritonServer) -> list[Path]:
    assert server.home
    return list(Path("/dev/shm").glob(f"{server.home.name}*"))


def tree(folder: Path) -> set[tuple[str, int]]:
    return {(str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def server(packaged: Path) -> Iterator[TritonServer]:
    lines: list[str] = []
    before, others = tree(packaged), set(mine())
    running = open_server(packaged, ServerOptions("triton"), name="small", note=lines.append)
    assert isinstance(running, TritonServer)
    with running:
        assert lines[-1] == "2 of 2 workers ready" and running.home
        home, memory = running.home, running.home.name
        yield running
        processes = set(mine()) - others
        assert len(processes) >= 4  # server, both versions and the stand-in
    assert not psutil.wait_procs(processes, timeout=10)[1]
    assert not home.exists() and not list(Path("/dev/shm").glob(f"{memory}*"))
    assert tree(packaged) == before  # no compiled code either


def test_both_versions_and_the_default_answer(server: TritonServer, packaged: Path) -> None:
    expected = expected_outputs(packaged)
    for version, variant in ((server.versions[0], "original"), (server.versions[1], "pruned"), (None, "original")):
        response, body = infer(server, version)
        assert read("triton", response, body)[0] == variant
        assert read("triton", response, body)[1] == pytest.approx(expected[variant], rel=1e-3, abs=1e-4)
    assert default_variant(server.running()) == "original"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritonclient_needs_the_token_in_one_and_the_same_header(
    server: TritonServer, packaged: Path, protocol: str
) -> None:
    import importlib

    client = importlib.import_module(f"tritonclient.{protocol}")
    x = np.load(packaged / "sample.npy")[None]
    tensor = client.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    address = f"127.0.0.1:{server.ports.grpc}" if protocol == "grpc" else urlsplit(server.default_url()).netloc
    expected = expected_outputs(packaged)["pruned"]
    with client.InferenceServerClient(address) as connection:
        result = connection.infer("small", [tensor], model_version="2", headers=server.headers())
        assert result.as_numpy("output_0")[0] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        for wrong in ({}, server.headers("management")):
            with pytest.raises(Exception, match="restricted"):
                connection.infer("small", [tensor], headers=wrong)
        for wrong in ({}, server.headers("inference")):
            with pytest.raises(Exception, match="restricted"):
                connection.get_model_repository_index(headers=wrong)
            with pytest.raises(Exception, match="restricted"):
                connection.unload_model("small", headers=wrong)
            with pytest.raises(Exception, match="restricted"):
                connection.get_system_shared_memory_status(headers=wrong)
        assert connection.is_model_ready("small", "1") and connection.get_inference_statistics("small")


def test_more_rows_than_triton_can_count_reach_no_network(server: TritonServer, packaged: Path) -> None:
    """2**40 are none in 32 bits: such a request has arrived as one row without its batch dimension."""
    import tritonclient.grpc
    from tritonclient.grpc import service_pb2

    x = np.load(packaged / "sample.npy")
    request = service_pb2.ModelInferRequest(model_name="small", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=[2**40, *x.shape])
    client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{server.ports.grpc}")
    with client as connection, pytest.raises(Exception, match="INVALID_ARGUMENT") as error:
        connection._client_stub.ModelInfer(request, metadata=list(server.headers().items()))
    assert "expected one or more rows" in str(error.value) and infer(server, "2")[0].status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/small/load",
        "/v2/logging",
        "/v2/trace/setting",
        "/v2/repository/models/small/unload",
        "/v2/systemsharedmemory/region/a/register",
    ],
)
def test_what_could_change_the_server_needs_the_other_token(server: TritonServer, path: str) -> None:
    for headers in ({}, server.headers("inference"), {next(iter(server.headers())): "wrong"}):
        response, body = post(server, path, b"{}", headers)
        assert response.status == 403 and b"restricted" in body


def test_an_unknown_version_is_named(server: TritonServer) -> None:
    response, body = infer(server, "9")
    assert response.status == 404 and "version 9 is not found" in json.loads(body)["error"]


def test_oversize_and_damaged_bodies_are_refused_and_harm_nobody(server: TritonServer) -> None:
    headers = server.headers()
    raw, path = {"Inference-Header-Content-Length": "0"}, urlsplit(server.default_url()).path
    for body, extra, status in (
        (b"\0" * 50_000_000, raw, 400),
        (b"", raw, 400),
        (b"\0" * 8, raw, 400),
        (b"{" * 1_000_000, {}, 500),
        (b"{}", {}, 500),
    ):  # Triton's own code for damaged JSON
        response, reply = post(server, path, body, {**headers, **extra})
        assert response.status == status and json.loads(reply)["error"]
    assert infer(server, None)[0].status == 200


def test_nothing_listens_beyond_loopback(server: TritonServer) -> None:
    listening = [c.laddr for p in mine() for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    found = {(address.ip.removeprefix("::ffff:"), address.port) for address in listening}
    assert found == {("127.0.0.1", port) for port in astuple(server.ports)}


def test_no_request_fails_while_versions_are_switched(server: TritonServer) -> None:
    kept = {v: pids(server, v) for v in server.versions}
    answered = switch_under_load(server, cycles=3, least=1000)
    assert answered.total() >= 1000 and min(answered["original"], answered["pruned"]) > 50
    assert {v: pids(server, v) for v in server.versions} == kept  # neither version was loaded anew
    switch(server.running(), "pruned")
    assert read("triton", *infer(server, None))[0] == "pruned"
    switch(server.running(), "original")
    switch(server.running(), "original")  # once more changes nothing
    assert read("triton", *infer(server, None))[0] == "original"
    server.check_alive()


def pids(server: TritonServer, version: str) -> list[int]:
    return [p.pid for p in mine() if f"{server.home}/models/small/{version}/model.py" in p.cmdline()]


def kill_worker(server: TritonServer, version: str) -> int:
    """The number of the process; the server does not collect it, so it stays as a zombie."""
    (pid,) = pids(server, version)
    psutil.Process(pid).kill()
    until = time.monotonic() + 10
    while (pids(server, version) or started(pid) is not None) and time.monotonic() < until:
        time.sleep(0.02)
    assert pids(server, version) == [] and started(pid) is None
    return pid


@pytest.mark.parametrize("victim", ["original", "pruned", "default"])
def test_a_dead_worker_is_noticed_and_replaced(server: TritonServer, victim: str) -> None:
    """Triton calls itself ready all the while."""
    running = server.running()
    version = {"original": "1", "pruned": "2"}.get(victim) or next(v for v in ("3", "4") if pids(server, v))
    assert server.dead(0) == set()
    pid = kill_worker(server, version)
    assert server.dead(0) == ({version} if victim != "default" else set())
    health = probe(running, victim)
    assert "answers 500" in health.problem and health.variant == victim
    others = {"original", "pruned", "default"} - {victim}
    assert [probe(running, variant).problem for variant in sorted(others)] == ["", ""]
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.http)
    connection.request("GET", "/v2/health/ready")
    assert connection.getresponse().status == 200
    connection.close()
    server.restarts.clear()  # those of the tests before are no crash loop
    server.check_alive()
    assert probe(running, victim).problem == "" and default_variant(server.running()) == "original"
    assert pid not in pids(server, version) and server.dead(0) == set()


def test_workers_that_die_again_and_again_end_it(server: TritonServer) -> None:
    server.restarts.clear()
    for _ in range(RESTARTS):
        server.restarts.append(time.monotonic())
    kill_worker(server, "2")
    with pytest.raises(RedppError, match="version 2 dies again and again"):
        server.check_alive()
    server.restarts.clear()
    server.check_alive()


def test_a_server_that_has_died_comes_back_as_it_was(server: TritonServer) -> None:
    """With its ports, its tokens and what has been promoted; its workers' memory is freed."""
    switch(server.running(), "pruned")
    server.check_alive()
    before = session(server._leaders[server.title].pid)
    server._leaders[server.title].kill()
    server._leaders[server.title].wait(STOP_S)
    assert "does not answer" in probe(server.running(), "pruned").problem
    server.restarts.clear()
    server.check_alive()
    assert [probe(server.running(), variant).problem for variant in ("original", "pruned", "default")] == [""] * 3
    assert default_variant(server.running()) == "pruned" and not psutil.wait_procs(before, timeout=STOP_S)[1]
    switch(server.running(), "original")
    server.restarts.clear()


def test_it_is_ready_once_all_its_ports_answer(server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC comes first, so that what it says of the versions is not enough."""
    assert server._answers()
    for closed in ("http", "metrics"):
        with monkeypatch.context() as patched:
            patched.setattr(server, "ports", replace(server.ports, **{closed: free_ports(TritonPorts).http}))
            assert not server._answers()


def test_a_server_that_aborts_while_it_is_started_again_gets_another_try(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.restarts.clear()
    launch = server._launch

    def aborts(home: Path) -> None:
        launch(home)
        server._leaders[server.title].kill()

    with monkeypatch.context() as patched:
        patched.setattr(server, "_launch", aborts)
        server._leaders[server.title].kill()
        server._leaders[server.title].wait(STOP_S)
        server.check_alive()
        assert server._leaders[server.title].poll() is not None
    server.check_alive()
    assert [probe(server.running(), variant).problem for variant in ("original", "pruned", "default")] == [""] * 3
    server.restarts.clear()


def test_a_server_that_is_down_is_unhealthy(server: TritonServer) -> None:
    away = replace(server.running(), management_url="http://127.0.0.1:9", urls={"default": "http://127.0.0.1:9/x"})
    assert "does not answer" in probe(away).problem


def test_sigterm_ends_serve_and_leaves_nothing(
    packaged: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With what else the command line offers for a running server."""
    state, before = tmp_path_factory.mktemp("state"), tree(packaged)
    environment = {**os.environ, "TMPDIR": str(tmp_path), "XDG_STATE_HOME": str(state)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "redpp_serve.cli", *words, str(packaged)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    command = [sys.executable, "-m", "redpp_serve.cli", "serve", "--server", "triton", str(packaged)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout and process.stderr
    try:
        printed: dict[str, str] = {}
        for line in process.stdout:
            if line.startswith("Ctrl-C"):
                break
            key, _, value = line.strip().partition(" ")
            printed[key] = value.strip()
        assert set(printed) == {
            "original",
            "pruned",
            "default",
            "metrics",
            "token",
            "try",
            "promote",
            "v2",
            "grpc",
            "logs",
        }
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 4  # the server, both versions and the stand-in
        asked = subprocess.run(["bash", "-c", printed["try"]], capture_output=True, timeout=60)
        assert json.loads(asked.stdout)["model_version"] == "2", asked.stderr
        assert run("promote").stdout == f"requests to {printed['default']} now go to pruned\n"
        health = run("health")
        assert health.returncode == 0 and re.fullmatch(r"(\w+ +ok, [\d.]+ ms\n){3}", health.stdout)
        assert run("rollback").stdout.endswith("now go to original\n")
        memory = {path.name for path in Path("/dev/shm").glob("redpp-*")}
        assert memory
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0 and process.stderr.read().endswith("2 of 2 workers ready\nstopped\n")
    finally:
        process.terminate()
        process.wait(STOP_S)
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert list(tmp_path.iterdir()) == [] and tree(packaged) == before
    left = {path.name for path in state.rglob("*") if path.is_file()}
    assert left == {"server.log", "supervisor.log"}, "something but logs is left"
    gone = run("health")
    assert gone.returncode == 1 and "no server is running" in gone.stderr


def test_a_model_that_does_not_load_ends_the_start_with_its_log(packaged: Path, tmp_path: Path) -> None:
    folder, before = tmp_path / "dist", set(mine())
    shutil.copytree(packaged, folder)
    (folder / "triton" / "small" / "2" / "model.py").write_text("raise ValueError('a damaged network')\n")
    with pytest.raises(RedppError, match="(?s)tritonserver ended while starting.*a damaged network"):
        TritonServer(folder, name="small").start()
    assert set(mine()) <= before


def test_a_port_in_use_is_found_beforehand(packaged: Path) -> None:
    ports, before = free_ports(TritonPorts), set(mine())
    refusal = pytest.raises(RedppError, match=f"port {ports.grpc} for grpc: .*in use.*four different")
    with socket.create_server(("127.0.0.1", ports.grpc)), refusal:
        TritonServer(packaged, name="small", ports=ports).start()
    assert set(mine()) <= before


def test_an_interrupt_while_starting_leaves_nothing(packaged: Path) -> None:
    before, homes = set(mine()), []

    def interrupt(line: str) -> None:
        homes.append(starting.home)
        raise KeyboardInterrupt

    starting = TritonServer(packaged, name="small", note=interrupt)
    with pytest.raises(KeyboardInterrupt):
        starting.start()
    assert set(mine()) <= before and homes[0] and not homes[0].exists()
