"""The gateway's nginx: who gets which arm, what users see when something is wrong, and what is written down."""

import http.client
import json
import math
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from redpp_serve.ab.counts import Traffic
from redpp_serve.ab.gateway import (
    Gateway,
    NginxProcess,
    connection_limit,
    gateway_config,
    stop_mirroring,
    switch,
    switched,
    worker_account,
)
from redpp_serve.ab.spec import parse_split
from redpp_serve.ab.state import Lines
from redpp_serve.files import private_folder
from redpp_serve.loopback import GatewayPorts, free_ports
from redpp_serve.packaging.server_config import MAX_REQUEST_BYTES
from tests.support.stubs import StubServer, ask, stub
from tests.support.tools import tool

PUBLIC, PATHS = "/predictions/m", ("/predictions/m/1.0", "/predictions/m/2.0")
USERS = 3000


def gateway(folder: Path, server: int, split: str = "80:20", **changes: object) -> Gateway:
    return replace(
        Gateway(
            folder,
            free_ports(GatewayPorts).gateway,
            server,
            PUBLIC,
            PATHS,
            parse_split(split),
            "X-User-Id",
            "salt-1",
            account=worker_account(),
            connections=connection_limit(512),
        ),
        **changes,
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of a gateway; removed with all that nginx wrote."""
    import shutil

    tool("nginx")
    path = private_folder("redpp-test-")
    (path / "gateway").mkdir()
    yield path / "gateway"
    shutil.rmtree(path)


@pytest.fixture
def upstream() -> Iterator[StubServer]:
    with stub() as server:
        yield server


@pytest.fixture
def live(folder: Path, upstream: StubServer) -> Iterator[NginxProcess]:
    nginx = NginxProcess(gateway(folder, upstream.port))
    nginx.start()
    yield nginx
    nginx.stop()


def arm(reply: tuple[int, dict[str, str], bytes]) -> str:
    assert reply[0] == 200, reply
    return reply[1]["x-redpp-arm"]


@pytest.mark.server
def test_users_are_divided_as_asked_and_keep_their_arm(live: NginxProcess, upstream: StubServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", live.gateway.port)
    first, again = (
        [arm(ask(0, PUBLIC, headers={"X-User-Id": f"user-{k}"}, connection=connection)) for k in range(USERS)]
        for _ in range(2)
    )
    share, width = first.count("pruned") / USERS, 4 * math.sqrt(0.2 * 0.8 / USERS)
    assert first == again
    assert abs(share - 0.2) < width
    assert upstream.seen == {PATHS[0]: 2 * first.count("original"), PATHS[1]: 2 * first.count("pruned")}
    without = {
        arm(ask(0, PUBLIC, connection=connection)) for _ in range(60)
    }  # a user without a name: each request anew
    assert without == {"original", "pruned"}


@pytest.mark.server
def test_another_salt_divides_the_same_users_differently(
    folder: Path, live: NginxProcess, upstream: StubServer
) -> None:
    users = [{"X-User-Id": f"user-{k}"} for k in range(200)]
    before = [arm(ask(live.gateway.port, PUBLIC, headers=user)) for user in users]
    live.stop()
    live.gateway = replace(live.gateway, salt="salt-2")
    live.start()
    after = [arm(ask(live.gateway.port, PUBLIC, headers=user)) for user in users]
    assert before != after and {"original", "pruned"} == set(after)


@pytest.mark.server
def test_a_header_asks_for_an_arm_and_is_not_passed_on(live: NginxProcess, upstream: StubServer) -> None:
    user = {"X-User-Id": "user-1", "Authorization": "Bearer t", "Inference-Header-Content-Length": "3"}
    for wanted in ("original", "pruned"):
        assert arm(ask(live.gateway.port, PUBLIC, headers={**user, "X-Redpp-Arm": wanted})) == wanted
    assert "x-redpp-arm" not in upstream.headers[-1]
    assert upstream.headers[-1]["authorization"] == "Bearer t"
    assert upstream.headers[-1]["inference-header-content-length"] == "3"
    status, _, body = ask(live.gateway.port, PUBLIC, headers={"X-Redpp-Arm": "candidate"})
    assert status == 400 and "names no arm" in json.loads(body)["error"]


@pytest.mark.server
def test_gateway_user_and_server_see_the_same_request_id(live: NginxProcess, upstream: StubServer) -> None:
    _, headers, _ = ask(live.gateway.port, PUBLIC, headers={"X-Request-Id": "mine"})
    assert headers["x-request-id"] == upstream.headers[-1]["x-request-id"] != "mine"
    connection = http.client.HTTPConnection("127.0.0.1", live.gateway.port)
    connection.request("POST", PUBLIC, b"x")
    ids = connection.getresponse().headers.get_all("X-Request-Id")
    connection.close()
    assert ids == [upstream.headers[-1]["x-request-id"]]  # not the server's own beside it


@pytest.mark.server
def test_promote_and_rollback_take_effect_at_the_next_request_of_a_connection(folder: Path, live: NginxProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", live.gateway.port)
    users = [{"X-User-Id": f"user-{k}"} for k in range(40)]

    def seen() -> set[str]:
        return {arm(ask(0, PUBLIC, headers=user, connection=connection)) for user in users}

    assert seen() == {"original", "pruned"}
    local = connection.sock.getsockname()
    assert switched(folder) is None
    for to in ("pruned", "original", "pruned"):
        switch(folder, to)
        assert switched(folder) == to and seen() == {to}
    assert connection.sock.getsockname() == local, "the connection was cut"
    assert (
        arm(ask(live.gateway.port, PUBLIC, headers={"X-Redpp-Arm": "original"})) == "original"
    )  # asked for: that stands


def test_the_switches_are_the_files_that_nginx_looks_for(tmp_path: Path) -> None:
    """Where both stand, for a moment or because somebody put them there, the roll-back wins."""
    text = gateway_config(gateway(tmp_path, 4711, recorder=4712))
    rules = [line.split("{")[0].strip() for line in text.splitlines() if f"-f {tmp_path}" in line]
    assert rules == [f"if (-f {tmp_path}/{name})" for name in ("promoted", "rolled_back", "shadow_off")]
    assert switched(tmp_path) is None
    switch(tmp_path, "pruned")
    assert (tmp_path / "promoted").exists() and switched(tmp_path) == "pruned"
    switch(tmp_path, "original")
    assert [path.name for path in tmp_path.iterdir()] == ["rolled_back"] and switched(tmp_path) == "original"
    (tmp_path / "promoted").touch()
    assert switched(tmp_path) == "original"
    stop_mirroring(tmp_path)
    assert (tmp_path / "shadow_off").exists()


@pytest.mark.server
def test_what_is_not_served_is_refused_in_json(live: NginxProcess) -> None:
    port = live.gateway.port
    cases = [
        (ask(port, "/models", method="GET"), 404, f"expected POST {PUBLIC}"),
        (ask(port, f"{PUBLIC}/2.0"), 404, f"expected POST {PUBLIC}"),
        (ask(port, "/.shadow"), 404, f"expected POST {PUBLIC}"),
        (ask(port, PUBLIC, method="GET"), 405, "only POST and PUT"),
        (ask(port, PUBLIC, body=bytes(MAX_REQUEST_BYTES + 1)), 413, f"more than {MAX_REQUEST_BYTES} bytes"),
    ]
    for (status, headers, body), code, text in cases:
        assert status == code and text in json.loads(body)["error"], (code, body)
        assert headers["content-type"] == "application/json" and headers["x-request-id"]
    status, _, body = ask(port, PUBLIC, body=bytes(MAX_REQUEST_BYTES))
    assert status == 200 and json.loads(body)["bytes"] == MAX_REQUEST_BYTES


@pytest.mark.server
def test_a_user_who_leaves_counts_neither_as_an_error_nor_as_a_refusal(
    live: NginxProcess, upstream: StubServer
) -> None:
    upstream.answer = lambda path, body, headers: (time.sleep(1), (200, {}))[1]
    with pytest.raises(TimeoutError):
        impatient = http.client.HTTPConnection("127.0.0.1", live.gateway.port, timeout=0.3)
        ask(0, PUBLIC, headers={"X-Redpp-Arm": "pruned"}, connection=impatient)
    impatient.close()
    deadline, traffic = time.monotonic() + 5, Traffic()
    lines = Lines(live.access_log)
    while not traffic.requests.total() and time.monotonic() < deadline:
        traffic.take(lines.new())
        time.sleep(0.02)
    assert traffic.abandoned == {"pruned": 1} and not traffic.errors.total() and not traffic.refused.total()


MALFORMED = [
    (b"\x16\x03\x01 a TLS greeting\r\n\r\n", 400),
    (b"CONNECT a:80 HTTP/1.1\r\n\r\n", 405),
    (b"GET / HTTP/9.9\r\n\r\n", 505),
    (b"POST / HTTP/1.1\r\n\r\n", 400),
    (b"POST /?" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    (b"POST / HTTP/1.1\r\nHost: x\r\nX-User-Id: " + b"a" * 40_000 + b"\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -3\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nX-Redpp-Arm: red\rpp\r\n\r\n", 400),
]


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.server
def test_malformed_requests_are_refused_in_json_and_count_for_no_arm(folder: Path, shadow: bool) -> None:
    nginx = NginxProcess(gateway(folder, 9, recorder=9 if shadow else None))
    nginx.start()
    try:
        for sent, code in MALFORMED:
            with socket.create_connection(("127.0.0.1", nginx.gateway.port), timeout=5) as wire:
                wire.sendall(sent)
                reply = b"".join(iter(lambda: wire.recv(1 << 16), b""))
            head, _, body = reply.partition(b"\r\n\r\n")
            assert int(head.split()[1]) in (code, 400 if code == 405 else code), (sent[:40], head)
            assert json.loads(body)["error"] and b"application/json" in head, (sent[:40], body)
    finally:
        nginx.stop()
    logged = [json.loads(line) for line in nginx.access_log.read_text().splitlines()]
    assert len(logged) == len(MALFORMED) and {line["arm"] for line in logged} == {""}


@pytest.mark.server
def test_the_servers_own_errors_pass_through(live: NginxProcess, upstream: StubServer) -> None:
    for code in (400, 404, 500, 503):
        upstream.answer = lambda path, body, headers, code=code: (code, {"error": f"my {code}"})
        status, headers, body = ask(live.gateway.port, PUBLIC)
        assert (status, json.loads(body)) == (code, {"error": f"my {code}"})
        assert headers["x-redpp-arm"] in ("original", "pruned")


@pytest.mark.server
def test_a_server_that_is_down_is_a_502_in_json(folder: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nginx = NginxProcess(gateway(folder, closed.getsockname()[1]))
        nginx.start()
        try:
            status, headers, body = ask(nginx.gateway.port, PUBLIC)
        finally:
            nginx.stop()
    assert status == 502 and "does not answer" in json.loads(body)["error"]
    assert headers["x-redpp-arm"] in ("original", "pruned")


@pytest.mark.server
def test_the_log_is_json_without_bodies_and_users(live: NginxProcess, upstream: StubServer) -> None:
    secret = 'some"one\\'
    upstream.answer = lambda path, body, headers: time.sleep(0.05) or (200, {})
    _, headers, _ = ask(
        live.gateway.port, PUBLIC, body=b"the body", headers={"X-User-Id": secret, "X-Redpp-Arm": "pruned"}
    )
    ask(live.gateway.port, '/no"where')
    live.stop()
    text = live.access_log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines] == [200, 404]
    assert lines[0]["request_id"] == headers["x-request-id"]
    assert (lines[0]["arm"], lines[0]["chosen_by"], lines[1]["arm"]) == ("pruned", "header", "")
    assert lines[0]["request_time"] >= 0.04 and lines[0]["upstream_time"] >= 0.04  # by clocks of 1 ms
    assert lines[1]["upstream_time"] is None
    assert "some" not in text and "the body" not in text
    assert live.log_tail() == "", "nginx has something to warn of"


@pytest.mark.server
def test_a_large_log_is_put_aside_while_requests_go_on(live: NginxProcess) -> None:
    ask(live.gateway.port, PUBLIC)
    deadline = time.monotonic() + 5
    assert not live.rotate()
    while not live.rotate(1) and time.monotonic() < deadline:
        time.sleep(0.01)
    while not live.access_log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    ask(live.gateway.port, PUBLIC)
    live.stop()
    assert len(live.access_log.read_text().splitlines()) == 1
    assert len(live.access_log.with_suffix(".log.1").read_text().splitlines()) == 1


@pytest.mark.server
def test_a_share_of_zero_or_of_a_hundred_per_cent(folder: Path, upstream: StubServer) -> None:
    for split, expected in (("100:0", "original"), ("0:100", "pruned")):
        nginx = NginxProcess(gateway(folder, upstream.port, split, sticky=None))
        nginx.start()
        try:
            assert {arm(ask(nginx.gateway.port, PUBLIC)) for _ in range(20)} == {expected}
        finally:
            nginx.stop()


@pytest.mark.server
def test_a_refused_configuration_says_why(folder: Path) -> None:
    nginx = NginxProcess(gateway(folder, 1, public="/a { }"))
    with pytest.raises(Exception, match="nginx refuses its configuration"):
        nginx.start()


def test_the_configuration_follows_the_gateways_fields(tmp_path: Path) -> None:
    text = gateway_config(gateway(tmp_path, 4711, "99.5:0.5", recorder=4712, account=("who", "group")))
    assert '"salt-1$split_key" $split_arm { 0.5% pruned; * original; }' in text
    assert "user who group;" in text and f"client_max_body_size {MAX_REQUEST_BYTES};" in text
    assert "127.0.0.1:4711" in text and "mirror /.shadow" in text and "127.0.0.1:4712" in text
    plain = gateway_config(gateway(tmp_path, 4711, sticky=None, account=None))
    assert (
        "mirror /" not in plain and "/.shadow" not in plain and "user " not in plain and '"salt-1$request_id"' in plain
    )
    assert all("127.0.0.1:" in line or "unix:" in line for line in text.splitlines() if "listen " in line)
    assert "map $http_x_user_id $split_key" in text
