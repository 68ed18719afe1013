"""The TCP ports of local servers: chosen free, or given and checked before anything starts."""

from __future__ import annotations

import http.client
import random
import socket
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

from redpp_serve.errors import RedppError

ADDRESS = "127.0.0.1"
# Below the range that systems hand out to outgoing connections, which could take a port between check and use.
_CANDIDATES = range(20000, 32000)


@dataclass(frozen=True)
class Ports:
    """TorchServe's listeners; ``exporter`` serves this project's metrics. Defaults are the server's own."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071
    exporter: int = 9400


@dataclass(frozen=True)
class TritonPorts:
    """Triton Inference Server's listeners. Defaults are the server's own."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


@dataclass(frozen=True)
class GatewayPorts:
    """The listeners of an experiment: where users ask, where their requests are recorded, and its own metrics."""

    gateway: int = 8088
    recorder: int = 8089
    metrics: int = 9401


AnyPorts = TypeVar("AnyPorts", Ports, TritonPorts, GatewayPorts)
_COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


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


def free_ports(kind: type[AnyPorts] = Ports) -> AnyPorts:  # type: ignore[assignment]
    """Ports that are free now.

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
                return kind(**dict(zip(wanted, found)))
    raise RedppError(
        f"fewer than {len(wanted)} free ports among 500 tried on {ADDRESS}", "free ports", "stop other servers"
    )


def consecutive_ports(kind: type[AnyPorts], first: int) -> AnyPorts:
    """The ports from ``first`` on, in the order of the kind's fields."""
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
    port: int, path: str, headers: dict[str, str], method: str = "GET", body: bytes | None = None, timeout_s: float = 5
) -> tuple[int, bytes]:
    """Status and body; without urllib, which would send loopback traffic through a configured proxy.

    Raises:
        OSError, http.client.HTTPException: nobody answers there, or not in HTTP.
    """
    connection = http.client.HTTPConnection(ADDRESS, port, timeout=timeout_s)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
