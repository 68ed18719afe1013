"""Local servers on the loopback address: their ports, chosen free or checked before anything starts, and requests."""

from __future__ import annotations

import http.client
import random
import socket
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import TypeVar
from urllib.parse import urlsplit

from redpp_serve.errors import RedppError

ADDRESS = "127.0.0.1"
NO_ANSWER = (OSError, http.client.HTTPException)  # what `ask` raises
# Below the range that systems hand out to outgoing connections, which could take a port between check and use.
_CANDIDATES = range(20000, 32000)


@dataclass(frozen=True)
class Ports:
    """TorchServe's ports, and those of this project's metrics exporter and front. Defaults are the server's own."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071
    exporter: int = 9400
    front: int = 8085


@dataclass(frozen=True)
class TritonPorts:
    """Triton Inference Server's ports, and that of this project's front. Defaults are the server's own."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    front: int = 8005


@dataclass(frozen=True)
class GatewayPorts:
    """An experiment's ports: for users, for the recorder of their requests, and for its own metrics."""

    gateway: int = 8088
    recorder: int = 8089
    metrics: int = 9401


AnyPorts = TypeVar("AnyPorts", Ports, TritonPorts, GatewayPorts)
_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}


def check_ports(ports: Ports | TritonPorts | GatewayPorts) -> None:
    """Refuse ports that are in use, equal or out of range.

    Raises:
        RedppError: names the first offender and its purpose.
    """
    seen: dict[int, str] = {}
    given = asdict(ports)
    for purpose, port in given.items():
        problem = f"also the port for {seen[port]}" if port in seen else _problem(port)
        if problem:
            raise RedppError(
                f"port {port} for {purpose.replace('_', ' ')}: {problem}",
                f"{_COUNTS[len(given)]} different free ports on {ADDRESS}",
                "choose another port, or stop the program that holds it",
            )
        seen[port] = purpose.replace("_", " ")


def free_ports(kind: type[AnyPorts]) -> AnyPorts:
    """Choose ports that are free now.

    Raises:
        RedppError: hardly any port of this machine is free.
    """
    wanted = [field.name for field in fields(kind)]
    found: list[int] = []
    with ExitStack() as held:  # all are held until the last is found, so that they differ
        for port in random.SystemRandom().sample(_CANDIDATES, 500):
            try:
                found.append(_bound(held, port))
            except OSError:
                continue
            if len(found) == len(wanted):
                return kind(*found)
    raise RedppError(
        f"fewer than {len(wanted)} free ports among 500 tried on {ADDRESS}", "free ports", "stop other servers"
    )


def consecutive_ports(kind: type[AnyPorts], first: int) -> AnyPorts:
    """Return the ports from ``first`` on, in the order of the kind's fields."""
    return kind(*range(first, first + len(fields(kind))))


def _problem(port: int) -> str:
    if not 0 < port < 65536:
        return "not a port number"
    try:
        with ExitStack() as held:
            _bound(held, port)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _bound(held: ExitStack, port: int) -> int:
    listener = held.enter_context(socket.socket())
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: a closed one is not "in use"
    listener.bind((ADDRESS, port))
    return port


def ask(
    url: str,
    headers: dict[str, str] | None = None,
    *,
    method: str = "GET",
    body: bytes | None = None,
    timeout_s: float = 5.0,
) -> tuple[int, bytes]:
    """Send one request over HTTP, and return the reply's status and body, whatever the status.

    It does not use urllib, which would send loopback traffic through a configured proxy.

    Raises:
        OSError, http.client.HTTPException: nobody answers there, or not in HTTP; see `NO_ANSWER`.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or ADDRESS, parts.port, timeout=timeout_s)
    try:
        connection.request(method, parts._replace(scheme="", netloc="").geturl() or "/", body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
