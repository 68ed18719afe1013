"""Ports: chosen free and different, or refused with a reason before anything starts."""

import socket
from dataclasses import asdict, replace

import pytest

from redpp_serve.errors import RedppError
from redpp_serve.loopback import GatewayPorts, Ports, TritonPorts, check_ports, consecutive_ports, free_ports


def test_chosen_ports_are_different_and_free() -> None:
    for kind, count in ((Ports, 6), (TritonPorts, 3), (GatewayPorts, 3)):
        ports = free_ports(kind)
        assert isinstance(ports, kind) and len(set(asdict(ports).values())) == count
        check_ports(ports)


def test_a_port_in_use_is_refused_by_name() -> None:
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports.grpc_management)):
        with pytest.raises(RedppError, match=f"port {ports.grpc_management} for grpc management: .*in use"):
            check_ports(ports)
    check_ports(ports)


def test_equal_ports_are_refused() -> None:
    ports = free_ports()
    with pytest.raises(RedppError, match="also the port for management"):
        check_ports(replace(ports, exporter=ports.management))


@pytest.mark.parametrize("port", [0, -1, 70_000])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(RedppError, match="not a port number"):
        check_ports(Ports(inference=port))


def test_the_message_says_how_many_are_needed() -> None:
    with pytest.raises(RedppError, match="port 70000 for grpc: not a port number.*three different free ports"):
        check_ports(replace(free_ports(TritonPorts), grpc=70_000))


def test_consecutive_ports_follow_the_order_of_the_fields() -> None:
    assert consecutive_ports(TritonPorts, 9000) == TritonPorts(http=9000, grpc=9001, metrics=9002)
    assert consecutive_ports(Ports, 9000).exporter == 9005
