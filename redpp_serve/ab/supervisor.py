"""The process that an experiment is: it starts server, gateway and recorder, watches them, and counts.

``python -m redpp_serve.ab.supervisor STATE`` runs what is asked for in the state folder until SIGTERM.

A helper process of the supervisor that is started again when it dies.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from redpp_serve.ab.commands import mixed_folder
from redpp_serve.ab.counts import Counting
from redpp_serve.ab.evidence import Evidence
from redpp_serve.ab.gateway import (
    Gateway,
    ListeningProcess,
    NginxProcess,
    connection_limit,
    stop_mirroring,
    worker_account,
)
from redpp_serve.ab.shadow import MAX_PAIRS
from redpp_serve.ab.spec import Spec
from redpp_serve.ab.state import (
    GATEWAY,
    RECORDER,
    RECORDER_LOG,
    SPEC,
    STATUS,
    Journal,
    not_swept,
    read_json,
    supervising,
    write_json,
)
from redpp_serve.ab.status import Status, read_status
from redpp_serve.errors import RedppError
from redpp_serve.loopback import ADDRESS, GatewayPorts, Ports, TritonPorts, check_ports, consecutive_ports, free_ports
from redpp_serve.serving.running import Running, register
from redpp_serve.serving.serve import model_name, open_server
from redpp_serve.serving.server import LocalServer

_POLL_S = 1.0


class Supervisor:
    """Runs one experiment. ``say`` is called with lines about the start.

    Attributes:
        latest: the status as of the last look; None before the first.
    """

    def __init__(self, spec: Spec, state: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self._spec, self._state, self._say = spec, state, say
        self._urls: dict[str, str] = {}
        self._journal: Journal | None = None
        self._server: LocalServer | None = None
        self._complaints: set[str] = set()
        self.latest: Status | None = None

    def run(self, ready: Callable[[], None]) -> None:
        """Start everything, call ``ready``, and watch until an exception (of a signal) ends it; then end everything.

        Raises:
            RedppError: something does not start, or another experiment runs for the folder.
        """
        with ExitStack() as stack:
            self._journal = stack.enter_context(supervising(self._spec.folder))
            stack.enter_context(not_swept(self._state))
            ports, server_ports = _ports(self._spec)
            check_ports(ports)
            server = self._start_server(stack, server_ports)
            recorder = self._start_recorder(stack, ports, server) if self._spec.shadow else None
            nginx = self._start_nginx(stack, ports, server)
            self._urls = {
                "gateway": f"http://{ADDRESS}:{ports.gateway}{nginx.gateway.public}",
                "metrics": f"http://{ADDRESS}:{ports.metrics}/metrics",
            }
            stack.callback(_serve_metrics(ports.metrics, lambda: self.latest))
            started = {"spec": self._spec.to_json(), "started": time.time(), "name": server.name}
            write_json(self._state / SPEC, started)
            self._note()
            stack.enter_context(register(self._running(server)))
            counting = Counting(self._state, nginx.access_log, server.metrics_url, server.name)
            ready()
            self._watch(counting, Watch(self._state, server, nginx, recorder))

    def _start_server(self, stack: ExitStack, ports: Ports | TritonPorts | None) -> LocalServer:
        spec, folder = self._spec, self._spec.folder
        if spec.candidate:
            folder = mixed_folder(folder, spec.candidate, self._state / "package")

        def note(line: str) -> None:
            with suppress(OSError):  # a full disk must not keep a server from being started again
                self._note()
                self._say(line)
                if self._urls:  # long after the start
                    self._write_status([f"the server is being started again: {line}"])

        self._server = open_server(
            spec.kind,
            folder,
            name=model_name(spec.folder),
            workers=spec.workers,
            ports=ports,
            auth=spec.auth,
            note=note,
        )
        stack.callback(self._server.stop)
        self._note()
        self._server.start()
        return self._server

    def _start_recorder(self, stack: ExitStack, ports: GatewayPorts, server: LocalServer) -> ListeningProcess:
        original, pruned = map(server.url, server.versions)
        words = ["--state", str(self._state), "--port", str(ports.recorder), "--original", original, "--pruned", pruned]
        command = [sys.executable, "-m", "redpp_serve.ab.shadow", *words]
        recorder = ListeningProcess("the shadow recorder", command, ports.recorder, self._state / RECORDER_LOG)
        stack.callback(recorder.stop)
        recorder.start()
        return recorder

    def _start_nginx(self, stack: ExitStack, ports: GatewayPorts, server: LocalServer) -> NginxProcess:
        folder = self._state / GATEWAY
        folder.mkdir()
        nginx = NginxProcess(_gateway(self._spec, folder, ports, server))
        stack.callback(nginx.stop)
        nginx.start()
        return nginx

    def _running(self, server: LocalServer) -> Running:
        """For other commands: under the folder that the user named, also where the server got one of links."""
        extra = {
            "gateway": self._urls["gateway"],
            "ab_metrics": self._urls["metrics"],
            "state": str(self._state),
            "split": str(self._spec.split),
        }
        running = server.running(extra)
        metrics = [*running.metrics_urls, self._urls["metrics"]]
        return replace(running, folder=str(self._spec.folder), metrics_urls=metrics)

    def _note(self) -> None:
        """Write down which processes and folders there are now, for the case that this process is killed."""
        assert self._journal is not None
        self._journal.write([self._state, *filter(None, [self._server.home if self._server else None])])

    def _watch(self, counting: Counting, watch: Watch) -> None:
        evidence = Evidence(self._state, self._spec)
        problems: list[str] = []
        while True:
            begun = time.monotonic()
            try:
                problems = self._look(counting, watch, evidence, problems)
            except Exception as error:  # a full disk, a folder that is gone: users' requests must not end with it
                problems = [f"the experiment was not looked after: {type(error).__name__}: {error}"]
                self._complain()
            time.sleep(max(0.05, _POLL_S - (time.monotonic() - begun)))

    def _look(self, counting: Counting, watch: Watch, evidence: Evidence, problems: list[str]) -> list[str]:
        """Mend, count and write down once; returns what is wrong. ``problems`` are of the look before."""
        self._write_status(problems)
        problems = watch.mend()
        problems += counting.count()
        self._write_status(problems)
        self.latest = read_status(self._state, self._urls, evidence)
        if watch.nginx.rotate():
            counting.put_aside()
        self._note()
        return problems

    def _write_status(self, problems: Sequence[str]) -> None:
        write_json(self._state / STATUS, {"ready": True, "problems": problems, "looked": time.monotonic()})

    def _complain(self) -> None:
        """Into the log, once for each kind of failure."""
        text = traceback.format_exc()
        if text not in self._complaints:
            self._complaints.add(text)
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)


class Watch:
    """Looks after the processes; ``recorder`` is None without shadow mode."""

    def __init__(
        self, state: Path, server: LocalServer, nginx: NginxProcess, recorder: ListeningProcess | None
    ) -> None:
        self._state, self._server, self.nginx, self._recorder = state, server, nginx, recorder

    def mend(self) -> list[str]:
        """Start again what has ended, as far as it can be; sentences about the rest."""
        problems = []
        try:
            self._server.check_alive()
        except (RedppError, OSError) as error:
            found = error.found.strip() if isinstance(error, RedppError) else str(error)
            problems.append(f"{found}\nEnd the experiment with redpp-serve ab stop, and start it again.")
        try:
            if not self.nginx.alive():
                self.nginx.start()
            if self._recorder and not self._recorder.alive():
                self._recorder.start(wait=False)
        except RedppError as error:
            problems.append(error.found)
        except OSError as error:  # a full disk, a folder that is gone
            problems.append(f"gateway or recorder cannot be started again: {error}")
        recorded = read_json(self._state / RECORDER) or {}
        if recorded.get("pairs", 0) >= MAX_PAIRS:
            stop_mirroring(self.nginx.gateway.folder)
            problems.append(f"the recorder has its {MAX_PAIRS} pairs; start a new experiment to record more")
        return problems


def _ports(spec: Spec) -> tuple[GatewayPorts, Ports | TritonPorts | None]:
    """The gateway's, and the server's behind them; free ones where none was given."""
    if spec.port is None:
        return free_ports(GatewayPorts), None
    gateway = consecutive_ports(GatewayPorts, spec.port)
    kind: Any = TritonPorts if spec.kind == "triton" else Ports
    return gateway, consecutive_ports(kind, gateway.metrics + 1)


def _gateway(spec: Spec, folder: Path, ports: GatewayPorts, server: LocalServer) -> Gateway:
    default = urlsplit(server.default_url())
    original, pruned = (urlsplit(server.url(version)).path for version in server.versions)
    assert default.port is not None
    return Gateway(
        folder=folder,
        port=ports.gateway,
        server=default.port,
        public=default.path,
        paths=(original, pruned),
        split=spec.split,
        sticky=spec.sticky,
        salt=secrets.token_hex(8),
        recorder=ports.recorder if spec.shadow else None,
        account=worker_account(),
        connections=connection_limit(),
    )


def _serve_metrics(port: int, latest: Callable[[], Status | None]) -> Callable[[], None]:
    """Serve the experiment's own metrics; returns what ends it."""
    from prometheus_client import start_http_server

    from redpp_serve.ab.exporter import registry

    server, thread = start_http_server(port, ADDRESS, registry(latest))

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM, SIGINT or SIGHUP. A failed start is written to the state folder for the command that waits."""
    state = Path((sys.argv[1:] if arguments is None else arguments)[0])
    ours = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    os.umask(0o077)  # counts and logs are nobody else's

    def leave(*_: object) -> None:
        for number in ours:  # ending must not be interrupted half-way
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(0)

    for number in ours:
        signal.signal(number, leave)
    spec = Spec.from_json(read_json(state / SPEC)["spec"])
    started = False

    def ready() -> None:
        nonlocal started
        started = True
        write_json(state / STATUS, {"ready": True, "problems": []})

    try:
        Supervisor(spec, state, say=lambda line: print(line, flush=True)).run(ready)
    except RedppError as error:
        write_json(state / STATUS, {"ready": False, "refusal": [error.found, error.expected, error.do]})
        return error.exit_code
    finally:
        if started:  # else the command that waits reads why not, and removes the folder
            shutil.rmtree(state, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
