"""A whole A/B test with a real server: start, load, verdict, promotion without a lost request, faults, an end that
leaves nothing behind."""

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput

from redpp_serve.ab.decisions import STAND_BACK, decisions
from redpp_serve.ab.gateway import divide, switch
from redpp_serve.ab.journal import read_journal
from redpp_serve.ab.state import GATEWAY
from redpp_serve.ab.status import Status
from redpp_serve.cli import main
from redpp_serve.graph.artifact import load
from redpp_serve.loopback import ask
from redpp_serve.processes import shared_memory
from redpp_serve.runtime.moments_file import LEAST, load_moments
from redpp_serve.serving.health import sample_request
from redpp_serve.serving.running import ATTACHED, Running, find
from redpp_serve.serving.workers import triton_workers
from redpp_serve.variants import NAMES
from tests.support.rollout import read
from tests.support.tools import tool

pytestmark = pytest.mark.server
CLIENTS, USERS = 4, 12


class Client:
    """Users of a gateway; every reply is counted by status and arm, and its outputs are looked at."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.running: Running = find(folder, kind)
        self.url = urlsplit(self.running.extra["gateway"])
        request = sample_request(self.running)
        self.body, self.headers = request.body, {**self.running.headers["inference"], **request.headers}
        self.seen: Counter[Any] = Counter()
        self._lock = threading.Lock()

    def send(
        self, connection: http.client.HTTPConnection, body: bytes | None = None, **headers: str
    ) -> tuple[int, str | None]:
        given = {
            **self.headers,
            "X-User-Id": str(random.random()),
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        connection.request("POST", self.url.path, self.body if body is None else body, given)
        response = connection.getresponse()
        content, arm = response.read(), response.getheader("X-Redpp-Arm")
        if response.status == 200:  # also where the other arm has answered
            assert read(self.running.kind, response, content)[0] == arm, "the arm is another one than it says"
        return response.status, arm

    def one(self, **arguments: Any) -> tuple[int, str | None]:
        connection = http.client.HTTPConnection("127.0.0.1", self.url.port, timeout=60)
        try:
            return self.send(connection, **arguments)
        finally:
            connection.close()

    def load(self, requests: int, pause_s: float = 0.0, until: Callable[[], bool] = lambda: True) -> None:
        """So many requests from each of `CLIENTS` kept connections, and on until ``until``; nothing may be lost."""

        def client() -> None:
            connection, sent = http.client.HTTPConnection("127.0.0.1", self.url.port, timeout=60), 0
            while sent < requests or not until():
                try:
                    key: Any = self.send(connection)
                except Exception as error:  # counted as lost
                    key = repr(error)
                    connection.close()
                with self._lock:
                    self.seen[key] += 1
                sent += 1
                time.sleep(pause_s)
            connection.close()

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def words_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has just ended
        return []


def until(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return result


def status(folder: Path) -> Status:
    from redpp_serve.ab.commands import status as now

    return now(folder)


def family(client: Client) -> list[psutil.Process]:
    supervisor = psutil.Process(client.running.pid)
    return living([supervisor, *supervisor.children(recursive=True)])


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run. The supervisor is a child of this process, which nobody has waited for."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def leader(folder: Path, part: str) -> int:
    """The process that leads a part of the test, as the journal has it."""
    journal = read_journal(folder)
    assert journal is not None
    return int(journal.parts[part][0])


def start(folder: Path, *arguments: str) -> None:
    assert main(["ab", "start", str(folder), "--margin", "3", "--max-p99-ratio", "50", *arguments]) == 0


def moments(folder: Path) -> Path:
    return folder.parent / "observed.safetensors"


def switch_under_load(folder: Path, client: Client) -> Counter[Any]:
    """Promote and roll back twice while users ask; the replies by status and arm."""
    client.seen.clear()
    switched = threading.Event()
    loaded = threading.Thread(target=client.load, args=(300, 0.0, switched.is_set))
    loaded.start()
    try:
        for command, arm in (("promote", "pruned"), ("rollback", "original")) * 2:
            time.sleep(0.3)
            assert main(["ab", command, str(folder)]) == 0
            assert {client.one() for _ in range(5)} == {(200, arm)}, f"{command} acts later than at the next request"
    finally:
        switched.set()
        loaded.join()
    return client.seen


def workers_of(running: Running, arm: str) -> list[int]:
    number = running.versions[NAMES.index(arm)]
    if running.kind == "triton":
        owner = psutil.Process(int(running.extra.get(ATTACHED, running.pid)))
        return triton_workers(owner.children(recursive=True), running.name, [number])[number]
    models = json.loads(ask(f"{running.management_url}/models/{running.name}/all", running.headers["management"])[1])
    return [int(worker["pid"]) for model in models if model["modelVersion"] == number for worker in model["workers"]]


def kill_workers_under_load(
    folder: Path, client: Client, arm: str = "pruned", ask_once: Callable[[], int] | None = None
) -> None:
    """Kill an arm's workers. The servers take seconds to start new ones or to give up the requests in flight."""
    before = status(folder).arms[arm].failed_over
    workers, once = workers_of(client.running, arm), ask_once or (lambda: client.one()[0])

    def timed(number: int) -> tuple[int, float]:
        if number == USERS:  # requests wait in the server's queue now
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        return once(), time.monotonic() - begun

    with ThreadPoolExecutor(USERS) as users:
        answers = list(users.map(timed, range(20 * USERS)))
    assert {code for code, _ in answers} == {200} and max(seconds for _, seconds in answers) < 1
    until(lambda: status(folder).arms[arm].failed_over > before)
    until(lambda: client.one(X_Redpp_Arm=arm) == (200, arm), 30)


@pytest.fixture(scope="module")
def folder(packaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tool("nginx")
    return Path(shutil.copytree(packaged, tmp_path_factory.mktemp("live") / "small"))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    """Users of an A/B test on TorchServe that runs for the whole module."""
    candidate = shutil.copytree(folder, folder.parent / "candidate")
    observe = ("--observe", "1", "--observe-to", str(moments(folder)))
    candidate_and_more = ("--candidate", str(candidate), *observe)
    start(folder, "--split", "50:50", "--shadow", "--sticky-header", "X-User-Id", *candidate_and_more)
    yield Client(folder, "torchserve")
    main(["ab", "stop", str(folder)])


def test_users_are_served_and_a_verdict_comes(folder: Path, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    decided = until(
        lambda: (
            client.load(15, 0.03)
            or next(
                (f for f in status(folder).findings if f.source == "shadow" and f.verdict.kind != "undecided"), None
            )
        ),
        40,
    )
    assert decided.verdict.kind == "equivalent"  # both are within a factor of 4: it is the same network
    assert set(client.seen) == {(200, "original"), (200, "pruned")}, "a user's request was lost"
    total = sum(client.seen.values())
    now = until(lambda: (s := status(folder)).arms["original"].requests + s.arms["pruned"].requests == total and s)
    assert {arm: now.arms[arm].requests for arm in now.arms} == {arm: client.seen[200, arm] for arm in now.arms}
    assert now.shadow and now.shadow.agreement == 1.0 and now.shadow.top1 == 1.0
    assert now.problems == [] and now.arms["pruned"].handler_ms["p50"] and now.arms["pruned"].gateway_ms["p50"]
    capsys.readouterr()
    assert main(["ab", "status", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["verdicts"][0]["kind"] == "equivalent" and document["advice"]["kind"] in ("promote", "wait")
    assert main(["ab", "status", str(folder)]) == 0
    assert "pruned is as fast as original" in capsys.readouterr().out


def test_the_original_was_observed(folder: Path, client: Client) -> None:
    path = moments(folder)
    until(path.exists)
    with zipfile.ZipFile(folder / "original.mar") as archive:
        graph = load(archive.read("model.redpp")).graph
    found = load_moments(path, graph)
    (sample,) = found.outputs.values()
    assert found.images >= LEAST and float(sample.variance().max()) < 1e-6, "all users send the same sample"


def test_the_metrics_of_the_test_are_served(client: Client) -> None:
    url = urlsplit(client.running.extra["ab_metrics"])
    connection = http.client.HTTPConnection("127.0.0.1", url.port)
    connection.request("GET", url.path)
    text = connection.getresponse().read().decode()
    connection.close()
    names = {line.split("{")[0] for line in text.splitlines() if line.startswith("redpp_ab_")}
    assert names == {
        f"redpp_ab_{name}"
        for name in (
            "traffic_ratio",
            "settled",
            "requests_total",
            "failed_over_total",
            "pairs_total",
            "agreement_ratio",
            "speedup_ratio",
            "verdict",
            "advice",
            "advice_reason",
            "dropped_total",
            "problems",
        )
    }


def test_bad_requests_count_as_refused_not_as_errors(folder: Path, client: Client) -> None:
    before = status(folder)
    answers = {
        client.one(body=b"no input")[0],
        client.one(body=b"", X_Redpp_Arm="pruned")[0],
        client.one(Authorization="Bearer wrong")[0],
    }
    assert all(400 <= code < 500 for code in answers)
    refused = until(
        lambda: (s := status(folder)) and sum(a.refused - before.arms[k].refused for k, a in s.arms.items()) == 3 and s
    )
    assert refused.arms["pruned"].errors == refused.arms["original"].errors == 0
    assert refused.shadow and refused.shadow.agreement == 1.0, "a request that both refuse counts as a disagreement"


def test_no_request_is_lost_while_all_users_are_moved(folder: Path, client: Client) -> None:
    seen = switch_under_load(folder, client)
    assert set(seen) == {(200, "original"), (200, "pruned")} and sum(seen.values()) >= 1000
    assert status(folder).all_to == "original"


def test_a_second_ab_test_is_refused(folder: Path, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ab", "start", str(folder)]) == 2
    assert "an A/B test already runs" in capsys.readouterr().err
    port = str(client.url.port)
    other = shutil.copytree(folder, folder.parent / "other")
    assert main(["ab", "start", str(other), "--port", port]) == 2
    assert f"port {port} for gateway: Address already in use" in capsys.readouterr().err
    assert main(["ab", "stop", str(other)]) == 2
    assert "no A/B test runs" in capsys.readouterr().err


def test_users_of_a_dead_arm_are_answered_by_the_other_within_a_second(folder: Path, client: Client) -> None:
    switch(Path(client.running.extra["state"]) / GATEWAY, "original")
    divide(Path(client.running.extra["state"]) / GATEWAY)
    kill_workers_under_load(folder, client)
    until(lambda: (200, "pruned") in {client.one() for _ in range(10)})
    assert status(folder).arms["original"].failed_over == 0
    switch(Path(client.running.extra["state"]) / GATEWAY, "original")


def test_nginx_relays_recorder_and_exporter_are_restarted(folder: Path, client: Client) -> None:
    def named(word: str) -> set[int]:
        return {p.pid for p in family(client) if word in " ".join(words_of(p))}

    parts = ("/nginx.conf", "relay-original.conf", "relay-pruned.conf", "redpp_serve.ab.shadow", "handlers.exporter")
    before = {part: named(part) for part in parts}
    assert all(len(pids) == 1 for pids in before.values())
    for pid in set().union(*before.values()):
        os.kill(pid, signal.SIGKILL)
    # the worker that the master has left is ended too: it holds the port
    until(lambda: all(len(named(part) - before[part]) == 1 for part in parts[:-1]))
    until(lambda: client.one()[0] == 200)
    until(lambda: len(named(parts[-1]) - before[parts[-1]]) == 1 and status(folder).problems == [])


def test_a_dead_server_is_reported_and_users_get_json(folder: Path, client: Client) -> None:
    java = next(p for p in family(client) if "org.pytorch.serve.ModelServer" in words_of(p))
    java.kill()
    java.wait(10)
    assert until(client.one)[0] == 502
    problems = until(lambda: status(folder).problems)
    assert "TorchServe has ended" in problems[0] and "PROBLEM" in status(folder).to_text()


def test_the_end_leaves_nothing_behind(
    folder: Path, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processes, state, journal = family(client), Path(client.running.extra["state"]), read_journal(folder)
    assert len(processes) > 4 and state.is_dir()
    assert main(["ab", "stop", str(folder), "--keep", str(tmp_path / "kept")]) == 0
    assert not living(processes), "processes are left"
    assert not state.exists()
    logs = {"access.log", "error.log", "recorder.log", "server.log", "supervisor.log"}
    assert journal and logs <= set(os.listdir(journal.logs))
    assert {"pairs.jsonl", "windows.jsonl", "counts.json", "access.log", "spec.json"} <= set(
        os.listdir(tmp_path / "kept")
    )
    capsys.readouterr()
    for command in ("status", "promote", "rollback", "stop"):
        assert main(["ab", command, str(folder)]) == 2
        assert f"no A/B test runs for {folder}" in capsys.readouterr().err


def over_grpc(client: Client, arm: str = "") -> str:
    """The version that answers through the gateway, asked for by its arm or chosen by the split."""
    x = np.zeros((1, 1, 12, 12), np.float32)
    given = InferInput("x", x.shape, "FP32").set_data_from_numpy(x)
    headers = {**client.running.headers["inference"], "x-redpp-arm": arm}
    with InferenceServerClient(client.running.extra["gateway_grpc"]) as asking:
        answer = asking.infer(client.running.name, [given], headers=headers, client_timeout=20)
    assert answer.as_numpy("output_0").shape == (1, 5)
    return str(answer.get_response().model_version)


def test_an_ab_test_on_triton_inference_server(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its supervisor is killed twice: users are served on, the next one takes over, and `ab stop` ends all."""
    options = ("--split", "80:20", "--server", "triton", "--sticky-header", "X-User-Id", "--log-format", "json")
    start(folder, *options)
    client = Client(folder, "triton")
    processes = family(client)
    state = Path(client.running.extra["state"])

    def kill_supervisor() -> None:
        supervisor = psutil.Process(find(folder, "triton").pid)
        supervisor.kill()
        until(lambda: not living([supervisor]))

    try:
        kill_workers_under_load(folder, client, "original")
        kill_workers_under_load(folder, client, "pruned", lambda: 200 if over_grpc(client) in "12" else 0)
        seen = switch_under_load(folder, client)
        assert set(seen) == {(200, "original"), (200, "pruned")} and sum(seen.values()) >= 1000
        assert [over_grpc(client, arm) for arm in ("original", "pruned")] == ["1", "2"]
        assert client.one(body=b"no input")[0] == 400
        now = until(lambda: (s := status(folder)).arms["pruned"].handler_ms["p50"] and s)
        assert now.kind == "triton" and now.problems == [] and now.findings[0].source == "split"
        until(lambda: status(folder).arms["original"].refused == 1)
        total = sum(arm.requests for arm in status(folder).arms.values())
        kill_supervisor()
        client.seen.clear()
        client.load(25)
        assert client.seen == {(200, "original"): 100}, "users are served as they were"
        assert "the supervisor was killed" in status(folder).problems[0] and status(folder).all_to == "original"
        assert main(["ab", "promote", str(folder)]) == 0 and client.one() == (200, "pruned")
        assert main(["ab", "start", str(folder), "--shadow"]) == 2
        start(folder, *options)
        assert client.one() == (200, "pruned")
        until(lambda: sum(arm.requests for arm in status(folder).arms.values()) == total + 102)
        assert status(folder).problems == []
        assert len(living(processes)) > 4, "the server and nginx are the same"
        nginx = leader(folder, "nginx")
        os.kill(nginx, signal.SIGKILL)  # its worker holds both ports until the next one serves
        until(lambda: leader(folder, "nginx") != nginx and status(folder).problems == [])
        assert client.one() == (200, "pruned")
        assert [over_grpc(client, arm) for arm in ("original", "pruned")] == ["1", "2"]
        logs = (read_journal(folder) or pytest.fail("no journal")).logs
        said, told = ((logs / f"supervisor.{ending}").read_text().splitlines() for ending in ("log", "jsonl"))
        assert len(said) == len(told) > 2, "each line of both supervisors is there once"
    finally:
        kill_supervisor()
        capsys.readouterr()
        assert main(["ab", "stop", str(folder), "--keep", str(tmp_path / "kept")]) == 0
    assert "cleaned up after an A/B test" in capsys.readouterr().out
    assert {"windows.jsonl", "counts.json", "access.log", "spec.json"} <= set(os.listdir(tmp_path / "kept"))
    until(lambda: not living(processes))
    assert not state.exists() and not list(Path("/dev/shm").glob(f"{shared_memory(state)}*"))
    with socket.create_server(("127.0.0.1", client.url.port or 0)):
        pass


def test_a_ramp_on_a_server_that_serve_runs_climbs_by_itself_until_a_person_moves_users(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of the test leaves the server to `serve`."""
    own = shutil.copytree(folder, tmp_path / "small")
    with subprocess.Popen(
        [sys.executable, "-m", "redpp_serve.cli", "serve", str(own)], stdout=subprocess.PIPE
    ) as serve:
        try:
            assert serve.stdout and any(line.startswith(b"Ctrl-C") for line in serve.stdout)
            ramp = ("--attach", "--auto", "--ramp", "20,60,100", "--hold", "1", "--sticky-header", "X-User-Id")
            start(own, *ramp)
            client = Client(own, "torchserve")
            until(lambda: client.load(100) or status(own).split.pruned == 60, 60)
            assert main(["ab", "split", str(own), "30"]) == 0
            until(lambda: client.load(100) or decisions(Path(client.running.extra["state"]))[-1].action == STAND_BACK)
            kill_workers_under_load(own, client)
            assert status(own).split.pruned == 30 and set(client.seen) == {(200, "original"), (200, "pruned")}
            assert main(["ab", "stop", str(own), "--keep", str(tmp_path / "kept")]) == 0
            text = (tmp_path / "kept" / "verdict.txt").read_text()
            assert "at 20 % of users" in text and "somebody" in text.lower(), text
            capsys.readouterr()
            assert main(["health", str(own)]) == 0 and capsys.readouterr().out.count("ok") == 3
        finally:
            serve.send_signal(signal.SIGTERM)
    assert serve.returncode == 0
