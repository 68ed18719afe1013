"""The programs of an A/B test: server, gateway and recorder, started, or taken over from a killed supervisor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from urllib.parse import urlsplit

from redpp_serve.ab import grpc_relay, shadow
from redpp_serve.ab.attached import AttachedServer, find_served
from redpp_serve.ab.gateway import (
    DEAD,
    Gateway,
    ListeningProcess,
    NginxProcess,
    connection_limit,
    divide,
    division,
    grpc_socket,
    mark_dead,
    worker_account,
)
from redpp_serve.ab.journal import Journal
from redpp_serve.ab.relay import Relay
from redpp_serve.ab.spec import Spec
from redpp_serve.ab.state import GATEWAY, GRPC_LOG, PACKAGE, RECORDER_LOG
from redpp_serve.comparison.outputs import heads_of
from redpp_serve.logs import Logs
from redpp_serve.loopback import GatewayPorts, Ports, TritonPorts, check_ports, consecutive_ports, free_ports
from redpp_serve.options import ServerOptions
from redpp_serve.packaging.server_config import read_limits
from redpp_serve.report.folder import read_report
from redpp_serve.serving.serve import open_server
from redpp_serve.serving.server import LocalServer
from redpp_serve.serving.triton_server import TritonServer
from redpp_serve.variants import NAMES

_LOOK_S = 0.1  # between two looks at the workers; one that dies is seen at once


@dataclass(frozen=True)
class Parts:
    """The programs of a test.

    Attributes:
        server: the model server.
        nginx: the gateway.
        recorder: takes the mirrored requests; None without shadow mode.
        relays: arm -> what can take back its requests.
        grpc: names the version of requests over gRPC; None where they are not split.
        lost: whether the test went on and its folder was not there.
    """

    server: LocalServer | AttachedServer
    nginx: NginxProcess
    recorder: ListeningProcess | None = None
    relays: Mapping[str, Relay] = field(default_factory=dict)
    grpc: ListeningProcess | None = None
    lost: bool = False

    def handover(self) -> dict[str, object]:
        """Return what the next supervisor needs to take them over."""
        return {
            "server": self.server.handover(),
            "nginx": self.nginx.handover(),
            "recorder": self.recorder and self.recorder.handover(),
            "relays": {arm: relay.handover() for arm, relay in self.relays.items()},
            "grpc": self.grpc and self.grpc.handover(),
        }


def start_parts(
    journal: Journal, logs: Logs, stack: ExitStack, tell: Callable[[str], None]
) -> tuple[GatewayPorts, Parts]:
    """Start every program, or go on with it where it runs; write each down, and end all of them with the stack.

    Args:
        journal: names the test, and what there is of it.
        logs: where they log.
        stack: ends the programs.
        tell: takes lines about progress.

    Raises:
        RedppError: something does not start.
    """
    spec, left = journal.test.spec, dict(journal.parts)
    ports, server_port = choose_ports(spec)
    if left.get("ports"):
        ports = GatewayPorts(**left["ports"])
    server = find_served(spec) if spec.attach else _server(journal, logs, server_port, tell)
    stack.callback(server.stop)
    taken_over = bool(left.get("server")) and server.adopt(left["server"], journal)
    if taken_over:
        tell("the server goes on")
    else:
        journal.end_processes()
        check_ports(ports)
        server.start(journal)
    grpc_port = left.get("grpc_port") or choose_grpc_port(spec)
    journal.parts |= {"ports": asdict(ports), "server": server.handover(), "grpc_port": grpc_port}
    journal.write()
    recorder = _recorder(journal, logs, ports.recorder, server) if spec.shadow else None
    if recorder:
        stack.callback(recorder.stop)
        if not (taken_over and recorder.adopt(left.get("recorder"))):
            recorder.start()
    nginx = NginxProcess(_gateway(journal, ports, server), journal.watch_session, [logs.handle])
    stack.callback(nginx.stop)
    lost = journal.running is not None and division(nginx.gateway.folder) is None
    nginx.make_folder()
    if journal.running is None:  # the test begins; one that goes on leaves users where they are
        divide(nginx.gateway.folder)
    relays = {arm: Relay(nginx.gateway, arm, journal.watch_session, [logs.handle]) for arm in NAMES}
    for arm, relay in relays.items():
        stack.callback(relay.stop)
        if not (taken_over and relay.adopt(left.get("relays", {}).get(arm)) and relay.reachable()):
            relay.start()
    grpc = _grpc_relay(nginx.gateway, server, journal, logs) if nginx.gateway.grpc else None
    if grpc:
        stack.callback(grpc.stop)
        if not (taken_over and grpc.adopt(left.get("grpc"))):
            grpc.start()
    if not (taken_over and nginx.adopt(left.get("nginx"))):
        nginx.start()
    parts = Parts(server, nginx, recorder, relays, grpc, lost)
    journal.parts |= parts.handover()
    journal.write()
    return ports, parts


def _server(journal: Journal, logs: Logs, port: int | None, tell: Callable[[str], None]) -> LocalServer:
    spec = journal.test.spec
    options = ServerOptions(spec.kind, spec.workers, port, not spec.auth)
    folder = journal.state / PACKAGE if spec.candidate else spec.folder
    server = open_server(folder, options, name=journal.test.name, note=tell)
    server.logs = logs
    if spec.observe:
        server.environment |= spec.observe.environment()
    return server


def choose_ports(spec: Spec) -> tuple[GatewayPorts, int | None]:
    """Return the gateway's ports and, after them, the server's first; where none was given, free ones and None.

    Triton's come after those that TorchServe would take, so that neither is scraped as the other.
    """
    if spec.port is None:
        return free_ports(GatewayPorts), None
    gateway = consecutive_ports(GatewayPorts, spec.port)
    return gateway, gateway.metrics + 1 + (len(fields(Ports)) if spec.kind == TritonServer.kind else 0)


def choose_grpc_port(spec: Spec) -> int | None:
    """Return where users ask over gRPC: after all other ports, or a free one; None where the server is not Triton."""
    if spec.kind != TritonServer.kind:
        return None
    if spec.port is None:
        return free_ports(GatewayPorts).gateway
    return spec.port + sum(len(fields(kind)) for kind in (GatewayPorts, Ports, TritonPorts))


@contextmanager
def failing_over(parts: Parts) -> Iterator[None]:
    """Have the users of an arm that died answered by the other one, at once, while the body runs."""
    ended, folder, arms = (
        threading.Event(),
        parts.nginx.gateway.folder,
        dict(zip(parts.server.versions, NAMES, strict=True)),
    )

    def look() -> None:
        known: set[str] = set()
        while not ended.is_set():
            dead = {arms[version] for version in parts.server.dead(_LOOK_S)}
            with suppress(OSError):  # a full disk, or a folder that is gone
                mark_dead(folder, dead)
            for arm in parts.relays.keys() & dead - known:
                parts.relays[arm].cut()
            known = dead

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            mark_dead(folder, ())


def _grpc_relay(
    gateway: Gateway, server: LocalServer | AttachedServer, journal: Journal, logs: Logs
) -> ListeningProcess:
    original, pruned = (grpc_socket(gateway.folder, arm) for arm in NAMES)
    title, folder, log = "the relay for gRPC", gateway.folder, logs.file(GRPC_LOG)
    command = grpc_relay.command(
        server.grpc_address, original, pruned, server.versions, folder / DEAD, gateway.most_bytes
    )
    return ListeningProcess(title, command, pruned, log, journal.watch_session, folder=folder, inherited=[logs.handle])


def _recorder(journal: Journal, logs: Logs, port: int, server: LocalServer | AttachedServer) -> ListeningProcess:
    original, pruned = map(server.url, server.versions)
    scores = heads_of(read_report(server.folder)).classes
    command = shadow.command(journal.state, port, (original, pruned), scores)
    log = logs.file(RECORDER_LOG)
    return ListeningProcess("the shadow recorder", command, port, log, journal.watch_session, folder=journal.state)


def _gateway(journal: Journal, ports: GatewayPorts, server: LocalServer | AttachedServer) -> Gateway:
    spec, default = journal.test.spec, urlsplit(server.default_url())
    original, pruned = (urlsplit(server.url(version)).path for version in server.versions)
    assert default.port is not None
    return Gateway(
        folder=journal.state / GATEWAY,
        port=ports.gateway,
        server=default.port,
        public=default.path,
        paths=(original, pruned),
        split=spec.split,
        sticky=spec.sticky,
        salt=journal.salt,
        probe=journal.probe,
        token=next(((name.lower().replace("-", "_"), value) for name, value in server.headers().items()), None),
        recorder=ports.recorder if spec.shadow else None,
        account=worker_account(),
        connections=connection_limit(),
        shares=spec.ramp,
        front=urlsplit(server.front_url).port,
        name=server.name,
        most_bytes=read_limits(server.folder).request,
        logs=journal.logs,
        grpc=(journal.parts["grpc_port"], server.grpc_address) if journal.parts["grpc_port"] else None,
    )
