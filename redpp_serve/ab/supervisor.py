"""The process that an A/B test is: it starts server, gateway and recorder, keeps them running, and counts.

``python -m redpp_serve.ab.supervisor STATE`` runs the test that is described in the state folder until SIGTERM.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from redpp_serve.ab import shadow
from redpp_serve.ab.counts import Counting, scrape
from redpp_serve.ab.evidence import Evidence
from redpp_serve.ab.gateway import (
    Gateway,
    ListeningProcess,
    NginxProcess,
    connection_limit,
    stop_mirroring,
    worker_account,
)
from redpp_serve.ab.spec import Spec, Started
from redpp_serve.ab.state import (
    GATEWAY,
    PACKAGE,
    RECORDER,
    RECORDER_LOG,
    SPEC,
    Heartbeat,
    not_swept,
    read_json,
    supervising,
    write_json,
)
from redpp_serve.ab.status import Status, make_status
from redpp_serve.errors import RedppError
from redpp_serve.loopback import ADDRESS, GatewayPorts, check_ports, consecutive_ports, free_ports
from redpp_serve.options import ServerOptions
from redpp_serve.processes import Guard
from redpp_serve.serving.running import Running, register
from redpp_serve.serving.serve import open_server
from redpp_serve.serving.server import LocalServer
from redpp_serve.signals import stopped_by_signal

_POLL_S = 1.0


def supervise(test: Started, state: Path, note: Callable[[str], None], ready: Callable[[], None]) -> None:
    """Start everything, call ``ready``, and watch until an exception (of a signal) ends it; then end everything.

    Args:
        test: the test to run.
        state: its state folder.
        note: called with lines about the start, and later about a restart of the server.
        ready: called when users are served.

    Raises:
        RedppError: something does not start, or another A/B test runs for the folder.
    """
    spec = test.spec
    with ExitStack() as stack:
        stack.enter_context(supervising(spec.folder, state))
        stack.enter_context(not_swept(state))
        ports, server_port = choose_ports(spec)
        check_ports(ports)
        guard = Guard()
        stack.callback(guard.dismiss)
        guard.watch_folder(state)
        served = False

        def tell(line: str) -> None:
            with suppress(OSError):  # a full disk must not keep a server from being started again
                note(line)
                if served:
                    tell_others(state, [f"the server is being started again: {line}"])

        options = ServerOptions(spec.kind, spec.workers, server_port, not spec.auth)
        folder = state / PACKAGE if spec.candidate else spec.folder
        server = open_server(folder, options, name=test.name, note=tell)
        if spec.observe:
            server.environment |= spec.observe.environment()
        stack.callback(server.stop)
        server.start(guard)
        recorder = _recorder(state, ports.recorder, server, guard) if spec.shadow else None
        if recorder:
            stack.callback(recorder.stop)
            recorder.start()
        (state / GATEWAY).mkdir()
        nginx = NginxProcess(_gateway(spec, state / GATEWAY, ports, server), guard.watch_session)
        stack.callback(nginx.stop)
        nginx.start()
        test = replace(test, started=time.time())
        write_json(state / SPEC, test.to_json())
        urls = {
            "gateway": f"http://{ADDRESS}:{ports.gateway}{nginx.gateway.public}",
            "metrics": f"http://{ADDRESS}:{ports.metrics}/metrics",
        }
        counting = Counting(state, nginx.access_log, partial(scrape, server.metrics_url, server.name))
        watch = Watch(state, test, urls, counting, Parts(server, nginx, recorder))
        stack.callback(_serve_metrics(ports.metrics, lambda: watch.latest))
        stack.enter_context(register(_running(test, state, server, urls)))
        tell_others(state, [])
        served = True
        ready()
        while True:
            begun = time.monotonic()
            watch.look()
            time.sleep(max(0.05, _POLL_S - (time.monotonic() - begun)))


def _recorder(state: Path, port: int, server: LocalServer, guard: Guard) -> ListeningProcess:
    original, pruned = map(server.url, server.versions)
    command = shadow.command(state, port, (original, pruned))
    return ListeningProcess("the shadow recorder", command, port, state / RECORDER_LOG, guard.watch_session)


def _running(test: Started, state: Path, server: LocalServer, urls: Mapping[str, str]) -> Running:
    """Return the note for other commands, which look under the folder that the user named, not one of links."""
    extra = {
        "gateway": urls["gateway"],
        "ab_metrics": urls["metrics"],
        "state": str(state),
        "split": str(test.spec.split),
    }
    running = server.running(extra)
    return replace(running, folder=str(test.spec.folder), metrics_urls=[*running.metrics_urls, urls["metrics"]])


def tell_others(state: Path, problems: Sequence[str]) -> None:
    """Write down that the supervisor lives, and what it could not mend.

    Raises:
        OSError: it cannot be written.
    """
    Heartbeat(ready=True, problems=tuple(problems), looked=time.monotonic()).write(state)


@dataclass(frozen=True)
class Parts:
    """The processes of a test; there is no recorder without shadow mode."""

    server: LocalServer
    nginx: NginxProcess
    recorder: ListeningProcess | None = None


class Watch:
    """Looks after a running test: mends, counts, and writes down what other processes read.

    Attributes:
        latest: the status as of the last look; None before the first.
    """

    def __init__(self, state: Path, test: Started, urls: Mapping[str, str], counting: Counting, parts: Parts) -> None:
        self._state, self._test, self._urls, self._counting, self._parts = state, test, urls, counting, parts
        self._evidence = Evidence(state, test.spec, counting)
        self._problems: list[str] = []
        self._complaints: set[str] = set()
        self.latest: Status | None = None

    def look(self) -> None:
        """Mend, count and write down once. Whatever goes wrong is told, since users' requests must not end with it."""
        try:
            tell_others(self._state, self._problems)
            self._problems = self.mend()
            self._problems += self._counting.count()
            tell_others(self._state, self._problems)
            self.latest = make_status(self._state, self._test, self._evidence, self._urls, self._problems)
            if self._parts.nginx.rotate():
                self._counting.put_aside()
        except Exception as error:  # such as a full disk, or a folder that is gone
            self._problems = [f"the A/B test was not looked after: {type(error).__name__}: {error}"]
            self._complain()

    def mend(self) -> list[str]:
        """Start again what has ended, as far as possible; return sentences about the rest."""
        problems = []
        parts = self._parts
        try:
            parts.server.check_alive()
        except (RedppError, OSError) as error:
            found = error.found.strip() if isinstance(error, RedppError) else str(error)
            problems.append(f"{found}\nEnd the A/B test with redpp-serve ab stop, and start it again.")
        try:
            if not parts.nginx.alive():
                parts.nginx.start()
            if parts.recorder and not parts.recorder.alive():
                parts.recorder.start(wait=False)
        except RedppError as error:
            problems.append(error.found)
        except OSError as error:  # a full disk, or a folder that is gone
            problems.append(f"gateway or recorder cannot be started again: {error}")
        if (read_json(self._state / RECORDER) or {}).get("pairs", 0) >= shadow.MAX_PAIRS:
            stop_mirroring(parts.nginx.gateway.folder)
            problems.append(f"the recorder has its {shadow.MAX_PAIRS} pairs; start a new A/B test to record more")
        return problems

    def _complain(self) -> None:
        """Print the traceback to the log, once for each kind of failure."""
        text = traceback.format_exc()
        if text not in self._complaints:
            self._complaints.add(text)
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)


def choose_ports(spec: Spec) -> tuple[GatewayPorts, int | None]:
    """Return the gateway's ports and, after them, the server's first; where none was given, free ones and None."""
    if spec.port is None:
        return free_ports(GatewayPorts), None
    gateway = consecutive_ports(GatewayPorts, spec.port)
    return gateway, gateway.metrics + 1


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
    """Serve the test's own metrics; return a function that ends that."""
    from prometheus_client import start_http_server  # noqa: PLC0415

    from redpp_serve.ab.exporter import registry  # noqa: PLC0415

    server, thread = start_http_server(port, ADDRESS, registry(latest))

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return end


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal. A failed start is written to the state folder for the command that waits."""
    state = Path((sys.argv[1:] if arguments is None else arguments)[0])
    os.umask(0o077)  # counts and logs are nobody else's
    served = False

    def ready() -> None:
        nonlocal served
        served = True

    with stopped_by_signal():
        try:
            test = Started.from_json(read_json(state / SPEC))
            supervise(test, state, lambda line: print(line, flush=True), ready)
        except RedppError as error:
            Heartbeat(refusal=(error.found, error.expected, error.do)).write(state)
            return error.exit_code
        finally:
            if served:  # else the command that waits reads why not, and removes the folder
                shutil.rmtree(state, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
