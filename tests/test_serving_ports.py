"""Ports: chosen free and different, or refused with a reason before anything starts."""

import socket
from dataclasses import asdict, replace

import pytest

from redpp_serve.errors import RedppError
from redpp_serve.serving.ports import Ports, free_ports


def test_chosen_ports_are_different_and_free() -> None:
    ports = free_ports()
    assert len(set(asdict(ports).values())) == 6
    ports.check()


def test_a_port_in_use_is_refused_by_name() -> None:
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports.grpc_management)):
        with pytest.raises(RedppError, match=f"port {ports.grpc_management} for grpc management: .*in use"):
            ports.check()
    ports.check()


def test_equal_ports_are_refused() -> None:
    ports = free_ports()
    with pytest.raises(RedppError, match="also the port for management"):
        replace(ports, exporter=ports.management).check()


@pytest.mark.parametrize("port", [0, -1, 70_000])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(RedppError, match="not a port number"):
        Ports(inference=port).check()
