"""`serve`: what it prints, and that every way of stopping it leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch

import redpp_serve.serving.serve as module
from redpp_serve.comparison.payloads import folder_payloads
from redpp_serve.errors import RedppError
from redpp_serve.loopback import Ports
from redpp_serve.options import ServerOptions
from redpp_serve.serving.running import find
from redpp_serve.serving.serve import model_name, serve
from redpp_serve.serving.server import LocalServer
from redpp_serve.state_folders import state_folder
from tests.support.small import SHAPE, outputs

STOP_S = 30  # a few seconds on an idle machine
READY = "Ctrl-C stops the server."


class Standin(LocalServer):
    """TorchServe's interface without a server; ``act`` is called at the named moment."""

    kind = "torchserve"
    title = "TorchServe"
    metrics_url = "http://127.0.0.1:9400/metrics"
    management_url = "http://127.0.0.1:8081"
    front_url = "http://127.0.0.1:8085"
    grpc_address = "127.0.0.1:7070"
    log: ClassVar[list[str]] = []
    act: ClassVar[dict[str, Callable[[], None]]] = {}

    ports_type = Ports

    def __init__(self, folder: Path, options: ServerOptions, **given: Any) -> None:
        super().__init__(folder, workers=options.workers, auth=not options.demo_auth_off, **given)
        self.log.append("made")

    def _open(self) -> tuple[str, str]:
        return "1.0", "2.0"

    def _reach(self, moment: str) -> None:
        self.log.append(moment)
        Standin.act.get(moment, lambda: None)()

    def start(self) -> None:
        self._reach("start")

    def check_alive(self) -> None:
        self._reach("alive")

    def stop(self) -> None:
        self._reach("stop")
        self.log.append("stopped")

    def _front_options(self) -> list[str]:
        return []

    def dead(self, patience_s: float) -> set[str]:
        raise AssertionError

    def url(self, version: str) -> str:
        return f"{self.default_url()}/{version}"

    def default_url(self) -> str:
        return f"http://127.0.0.1:8080/predictions/{self.name}"

    def headers(self, api: str = "inference") -> dict[str, str]:
        return {"Authorization": f"Bearer secret-of-{api}"} if self.auth else {}

    def _prepare(self) -> None:
        raise AssertionError

    def _launch(self, home: Path) -> None:
        raise AssertionError

    def _ready(self) -> tuple[int, int]:
        raise AssertionError

    def _terminate(self) -> None:
        raise AssertionError


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Standin]]:
    monkeypatch.setattr(module, "open_server", Standin)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    Standin.log, Standin.act = [], {}
    yield Standin
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def log_folder() -> Path:
    """The only run's."""
    (folder,) = (state_folder() / "logs").iterdir()
    return folder


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def test_urls_and_token_are_printed(packaged: Path, standin: type[Standin]) -> None:
    lines: list[str] = []
    standin.act["alive"] = send(signal.SIGINT)
    serve(packaged, ServerOptions(workers=3), note=lines.append)
    assert lines[:5] == [
        "original  http://127.0.0.1:8080/predictions/small/1.0",
        "pruned    http://127.0.0.1:8080/predictions/small/2.0",
        "default   http://127.0.0.1:8080/predictions/small",
        "metrics   http://127.0.0.1:9400/metrics",
        "token     secret-of-inference",
    ]
    assert "curl -H 'Authorization: Bearer secret-of-inference' " in lines[5]
    assert f"--data-binary @{packaged / 'sample.npy'} http" in lines[5]
    assert lines[6].startswith(f"promote   redpp-serve promote {packaged}: ")
    assert lines[7].startswith("v2        http://127.0.0.1:8085 ") and lines[8] == "grpc      127.0.0.1:7070"
    assert lines[9] == f"logs      {log_folder()}" and lines[10:] == [READY]


def test_other_commands_find_it_while_it_runs(packaged: Path, standin: type[Standin]) -> None:
    found: list[Any] = []

    def look() -> None:
        found.append(find(packaged))
        send(signal.SIGINT)()

    standin.act["alive"] = look
    serve(packaged, note=lambda line: None)
    assert (found[0].kind, found[0].pid, found[0].name) == ("torchserve", os.getpid(), "small")
    assert found[0].headers["management"] == {"Authorization": "Bearer secret-of-management"}
    assert [path.name for path in state_folder().iterdir()] == ["logs"]
    with pytest.raises(RedppError, match="no server is running for .*redpp-serve serve"):
        find(packaged)


def test_without_auth_no_token_is_mentioned(packaged: Path, standin: type[Standin]) -> None:
    lines: list[str] = []
    standin.act["alive"] = send(signal.SIGINT)
    serve(packaged, ServerOptions(demo_auth_off=True), note=lines.append)
    assert not any("oken" in line or "Bearer" in line for line in lines[:-2]) and len(lines) == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["start", "alive"])
def test_a_signal_stops_at_once_also_while_starting(
    packaged: Path, standin: type[Standin], number: int, moment: str
) -> None:
    standin.act[moment] = send(number)
    start = time.monotonic()
    serve(packaged, note=lambda line: None)
    assert standin.log[-3:] == [moment, "stop", "stopped"] and time.monotonic() - start < 5


def test_a_signal_from_elsewhere_ends_the_wait(packaged: Path, standin: type[Standin]) -> None:
    threading.Timer(0.3, send(signal.SIGTERM)).start()
    serve(packaged, note=lambda line: None)
    assert standin.log[-2:] == ["stop", "stopped"]


def test_further_signals_do_not_disturb_stopping(packaged: Path, standin: type[Standin]) -> None:
    def impatient() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)

    standin.act = {"alive": send(signal.SIGINT), "stop": impatient}
    serve(packaged, note=lambda line: None)
    assert standin.log[-1] == "stopped"


def test_a_server_that_ends_by_itself_is_an_error(packaged: Path, standin: type[Standin]) -> None:
    def ended() -> None:
        raise RedppError("TorchServe has ended", "a running server", "read the log")

    standin.act["alive"] = ended
    with pytest.raises(RedppError, match="has ended"):
        serve(packaged, note=lambda line: None)
    assert standin.log[-1] == "stopped"


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"tool": 1}', "\x00"])
def test_other_folders_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(RedppError, match="is not a packaged model.*redpp-serve package"):
        model_name(tmp_path)
    with pytest.raises(RedppError, match="is not a packaged model"):
        serve(tmp_path / "absent")


def ask(url: str, body: bytes, token: str | None) -> list[float]:
    headers = {"Content-Type": "application/octet-stream", **({"Authorization": f"Bearer {token}"} if token else {})}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body, headers), timeout=60) as reply:
        return json.load(reply)["outputs"][0]


@pytest.mark.server
def test_live_servers_print_urls_answer_and_end_by_either_signal(
    packaged: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two at once, side by side: one is ended by SIGINT, the other by SIGTERM."""
    payload, state = folder_payloads(packaged)[0], tmp_path_factory.mktemp("state")
    x = torch.from_numpy(np.load(packaged / "inputs.npz")["x"][0])
    before = {p.name for p in packaged.iterdir()}
    flags: dict[int, list[str]] = {signal.SIGINT: [], signal.SIGTERM: ["--demo-auth-off", "--log-format", "json"]}
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "XDG_STATE_HOME": str(state),
    }  # where its private folders must not be left behind
    servers = {}
    try:
        for number, extra in flags.items():
            command = [sys.executable, "-m", "redpp_serve.cli", "serve", str(packaged), *extra]
            with (tmp_path / f"{number}.err").open("w") as errors:
                servers[number] = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
                )
        for number, server in servers.items():
            assert server.stdout
            printed = {}
            for line in server.stdout:
                if line.strip() == READY:
                    break
                key, _, value = line.strip().partition(" ")
                printed[key] = value.strip()
            assert {"original", "pruned", "metrics", "try"} <= set(printed), (tmp_path / f"{number}.err").read_text()
            token = printed.get("token")
            assert (token is None) == (number == signal.SIGTERM) and tuple(x.shape) == SHAPE
            for variant in ("original", "pruned"):
                expected = outputs(packaged / f"{variant}.mar", x)[0]
                assert ask(printed[variant], payload.body, token) == pytest.approx(expected, rel=1e-3, abs=1e-4)
            if token:
                with pytest.raises(urllib.error.HTTPError):
                    ask(printed["pruned"], payload.body, None)
            processes = psutil.Process(server.pid).children(recursive=True)
            assert len(processes) >= 5  # launcher, Java, two workers, exporter
            server.send_signal(number)
            assert server.wait(STOP_S) == 0
            assert not psutil.wait_procs(processes, timeout=10)[1]
            errors = (tmp_path / f"{number}.err").read_text()
            assert "2 of 2 workers ready" in errors and errors.endswith("stopped\n") and "Traceback" not in errors
            said, written = (Path(printed["logs"]) / name for name in ("supervisor.log", "server.log"))
            assert "2 of 2 workers ready" in said.read_text() and said.read_text().endswith("Z stopped\n")
            assert written.stat().st_size > 0
            assert written.with_suffix(".jsonl").exists() == ("--log-format" in flags[number])
    finally:
        for server in servers.values():
            server.terminate()
            server.wait(STOP_S)
    assert {p.name for p in packaged.iterdir()} == before
    assert all(path.suffix == ".err" for path in tmp_path.iterdir())
    assert all(path.parent.parent.name == "logs" for path in state.rglob("*") if path.is_file())
