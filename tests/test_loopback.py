"""Ports: chosen free and different, or refused with a reason before anything starts."""

import json
import socket
from dataclasses import asdict, replace

import pytest

from redpp_serve.errors import RedppError
from redpp_serve.loopback import (
    NO_ANSWER,
    GatewayPorts,
    Ports,
    TritonPorts,
    ask,
    check_ports,
    consecutive_ports,
    free_ports,
)
from tests.support.stubs import stub


def test_chosen_ports_are_different_and_free() -> None:
    for kind, count in ((Ports, 7), (TritonPorts, 4), (GatewayPorts, 3)):
        ports = free_ports(kind)
        assert isinstance(ports, kind) and len(set(asdict(ports).values())) == count
        check_ports(ports)


def test_a_port_in_use_is_refused_by_name() -> None:
    ports = free_ports(Ports)
    refusal = pytest.raises(RedppError, match=f"port {ports.grpc_management} for grpc management: .*in use")
    with socket.create_server(("127.0.0.1", ports.grpc_management)), refusal:
        check_ports(ports)
    check_ports(ports)


def test_equal_ports_are_refused() -> None:
    ports = free_ports(Ports)
    with pytest.raises(RedppError, match="also the port for management"):
        check_ports(replace(ports, exporter=ports.management))


def test_what_is_no_port_is_refused() -> None:
    for port in (0, -1, 65_536):
        with pytest.raises(RedppError, match="not a port number"):
            check_ports(Ports(inference=port))


def test_the_message_says_how_many_are_needed() -> None:
    with pytest.raises(RedppError, match="port 70000 for grpc: not a port number.*four different free ports"):
        check_ports(replace(free_ports(TritonPorts), grpc=70_000))


def test_consecutive_ports_follow_the_order_of_the_fields() -> None:
    assert consecutive_ports(TritonPorts, 9000) == TritonPorts(http=9000, grpc=9001, metrics=9002, front=9003)
    assert consecutive_ports(Ports, 9000).exporter == 9005


def test_a_request_goes_past_any_proxy_and_any_status_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with stub(lambda path, body, headers: (404, [path, body.decode(), headers.get("token")])) as server:
        url = f"http://127.0.0.1:{server.port}"
        status, reply = ask(f"{url}/a?b=c%20d", {"token": "t"}, method="POST", body=b"x")
        assert (status, json.loads(reply)) == (404, ["/a?b=c%20d", "x", "t"])
        assert json.loads(ask(url)[1]) == ["/", "", None]


def test_nobody_there_and_no_http_are_both_no_answer() -> None:
    with pytest.raises(NO_ANSWER):
        ask("http://127.0.0.1:9/")
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(NO_ANSWER):
        ask(f"http://127.0.0.1:{mute.getsockname()[1]}/", timeout_s=0.1)
