"""The gateway's nginx: who gets which arm, what users see when something is wrong, and what is written down."""

import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from redpp_serve.ab.counts import Traffic
from redpp_serve.ab.gateway import (
    STEP_LABELS,
    Gateway,
    NginxProcess,
    connection_limit,
    divide,
    divided_now,
    division,
    gateway_config,
    mark_dead,
    set_split,
    stop_mirroring,
    switch,
    switched,
    worker_account,
)
from redpp_serve.ab.spec import parse_split, split_at
from redpp_serve.ab.state import Lines
from redpp_serve.loopback import GatewayPorts, free_ports
from redpp_serve.packaging.server_config import MAX_REQUEST_BYTES
from redpp_serve.processes import session, started
from redpp_serve.state_folders import private_folder
from redpp_serve.variants import NAMES
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
    """Of a gateway that divides users; removed with all that nginx wrote."""
    tool("nginx")
    held = private_folder("redpp-test-", for_others=True)
    (held.path / "gateway").mkdir()
    divide(held.path / "gateway")
    yield held.path / "gateway"
    shutil.rmtree(held.path)
    held.release()


@pytest.fixture
def upstream() -> Iterator[StubServer]:
    with stub() as server:
        yield server


@pytest.fixture
def live(folder: Path, upstream: StubServer) -> Iterator[NginxProcess]:
    nginx = NginxProcess(gateway(folder, upstream.port, shares=(Decimal("33.37"),)))
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
def test_compressed_bodies_are_refused(live: NginxProcess, upstream: StubServer) -> None:
    """The servers unpack them without a bound."""
    for packed in ("gzip", "deflate", "identity, gzip", "GZIP"):
        status, _, body = ask(live.gateway.port, PUBLIC, headers={"Content-Encoding": packed})
        assert status == 415 and "a compressed body" in json.loads(body)["error"]
    assert not upstream.seen
    assert arm(ask(live.gateway.port, PUBLIC, headers={"Content-Encoding": "identity"}))
    live.stop()
    traffic = Traffic()
    traffic.take(Lines(live.access_log).new())
    assert traffic.requests.total() == 1, "what was refused went to no arm"


@pytest.mark.server
def test_a_body_without_a_type_is_no_web_form(live: NginxProcess, upstream: StubServer) -> None:
    for given, sent in (({}, "application/octet-stream"), ({"Content-Type": "image/png"}, "image/png")):
        ask(live.gateway.port, PUBLIC, headers=given)
        assert upstream.headers[-1]["content-type"] == sent


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
def test_a_trace_goes_to_the_server_and_what_is_none_goes_nowhere(live: NginxProcess, upstream: StubServer) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    good = f"00-{trace}-00f067aa0ba902b7-01"
    later = f"0a-{trace}-00f067aa0ba902b7-01-more"
    texts = [
        good,
        later,
        f"{good}-more",
        good.upper(),
        good.replace("4", "g"),
        f"00-{'0' * 32}{good[35:]}",
        f"ff{good[2:]}",
    ]
    texts += [f"\x1b{good}", f"{later}\x1b[2J", later + "x" * 500]
    for text in texts:
        _, headers, _ = ask(live.gateway.port, PUBLIC, headers={"traceparent": text, "tracestate": "a=1,b=2"})
        seen = upstream.headers[-1]
        wanted = {"traceparent": text, "tracestate": "a=1,b=2"} if text in (good, later) else {}
        assert {key: value for key, value in seen.items() if key.startswith("trace")} == wanted
        assert not any("trace" in key or trace in value for key, value in headers.items()), "replies have none"
    for state in ("x" * 513, "a=\x7f"):
        ask(live.gateway.port, PUBLIC, headers={"traceparent": good, "tracestate": state})
        assert upstream.headers[-1]["traceparent"] == good and "tracestate" not in upstream.headers[-1]
    live.stop()
    ids = [json.loads(line)["trace_id"] for line in live.access_log.read_text().splitlines()]
    assert ids == [trace, trace, *[""] * (len(texts) - 2), trace, trace]


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
    """Without any, whatever became of them, all users get the original."""
    text = gateway_config(gateway(tmp_path, 4711, recorder=4712))
    rules = [line.split("{")[0].strip() for line in text.splitlines() if "(-f " in line]
    steps = (f"parts/step{label}" for label in range(STEP_LABELS))
    dead = ("dead/pruned", "dead/original", "dead/$answered_by", "dead/$other_arm")
    names = ("parts/$split_part", *steps, "split", "promoted", *dead, "shadow_off")
    assert rules == [f'if (-f "{tmp_path}/{name}")' for name in names]
    assert switched(tmp_path) == "original"
    divide(tmp_path)
    assert switched(tmp_path) is None and divided_now(tmp_path) is None, "the folder does not say how"
    switch(tmp_path, "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["promoted"] and switched(tmp_path) == "pruned"
    divide(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["split"] and switched(tmp_path) is None
    switch(tmp_path, "pruned")
    switch(tmp_path, "original")
    assert not any(tmp_path.iterdir()) and switched(tmp_path) == "original" and not divided_now(tmp_path)
    switch(tmp_path / "gone", "original")  # a roll-back needs no folder
    assert switched(tmp_path / "gone") == "original" and not divided_now(tmp_path / "gone")
    with pytest.raises(OSError):
        switch(tmp_path / "gone", "pruned")
    stop_mirroring(tmp_path)
    assert (tmp_path / "shadow_off").exists()


def test_dead_arms_are_the_files_that_nginx_looks_for(tmp_path: Path) -> None:
    divide(tmp_path)
    made = set_split(tmp_path, parse_split("90:10"))
    for arms in (["pruned"], ["pruned", "original"], ["original"], []):
        mark_dead(tmp_path, arms)
        assert sorted(path.name for path in (tmp_path / "dead").iterdir()) == sorted(arms)
        assert divided_now(tmp_path) == (None if arms else made) and switched(tmp_path) is None
    mark_dead(tmp_path / "gone", [])
    with pytest.raises(OSError):
        mark_dead(tmp_path / "gone", ["pruned"])


@pytest.mark.server
def test_users_get_the_original_where_the_switches_are_lost_or_closed(folder: Path, live: NginxProcess) -> None:
    """Also after a promotion, and what is left of another test's folder says nothing."""
    users = [{"X-User-Id": f"user-{k}"} for k in range(40)]

    def seen() -> set[str]:
        return {arm(ask(live.gateway.port, PUBLIC, headers=user)) for user in users}

    for state in (divide, lambda folder: switch(folder, "pruned")):
        state(folder)
        assert "pruned" in seen()
        folder.rename(aside := folder.with_name("aside"))
        assert seen() == {"original"}, "lost"
        folder.mkdir()
        assert seen() == {"original"}, "emptied"
        folder.rmdir()
        aside.rename(folder)
        assert "pruned" in seen()
    if live.gateway.account:
        folder.parent.chmod(0o700)
        assert seen() == {"original"}, "closed to nginx's worker"
        assert not live.reaches_folder()
        live.make_folder()
        assert live.reaches_folder() and seen() == {"pruned"}


@pytest.mark.parametrize("status", [500, 502, 503, 507])
@pytest.mark.server
def test_users_of_an_arm_that_fails_are_answered_by_the_other(
    live: NginxProcess, upstream: StubServer, status: int
) -> None:
    """Those who chose it are not, and after a roll-back nobody gets the pruned version."""
    users = [{"X-User-Id": f"user-{k}"} for k in range(40)]
    own = {user["X-User-Id"]: arm(ask(live.gateway.port, PUBLIC, headers=user)) for user in users}
    for bad, good in zip(PATHS, reversed(PATHS), strict=True):
        upstream.answer = lambda path, body, headers, bad=bad: (
            status if path.split("?")[0] == bad else 200,
            {"bytes": len(body)},
        )
        upstream.seen.clear()
        for user in users:
            answer = ask(live.gateway.port, f"{PUBLIC}?a=b", body=b"body", headers=user)
            assert arm(answer) == NAMES[PATHS.index(good)] and json.loads(answer[2]) == {"bytes": 4}
        assert set(upstream.seen) == {f"{path}?a=b" for path in PATHS}, "a query is passed on"
        chosen = {"X-Redpp-Arm": NAMES[PATHS.index(bad)]}
        assert ask(live.gateway.port, PUBLIC, headers=chosen)[0] == status
    switch(live.gateway.folder, "original")
    upstream.answer = lambda path, body, headers: (status if path == PATHS[0] else 200, {})
    assert ask(live.gateway.port, PUBLIC)[0] == status
    switch(live.gateway.folder, "pruned")
    upstream.answer = lambda path, body, headers: (status, {"error": "both"})
    code, _, body = ask(live.gateway.port, PUBLIC)
    assert code == status and json.loads(body) == {"error": "both"}
    live.stop()
    logged = [json.loads(line) for line in live.access_log.read_text().splitlines()]
    traffic = Traffic()
    traffic.take(logged)
    assert traffic.failed_over == {name: list(own.values()).count(name) for name in NAMES}
    assert traffic.by_header == {"original": 1, "pruned": 1} and traffic.errors == {"original": 2, "pruned": 2}
    assert traffic.faults == {
        "original": traffic.failed_over["original"] + 1,
        "pruned": traffic.failed_over["pruned"],  # what both fail speaks against neither
    }


@pytest.mark.server
def test_users_of_an_arm_known_to_be_dead_do_not_wait_for_it(live: NginxProcess, upstream: StubServer) -> None:
    users = [{"X-User-Id": f"user-{k}"} for k in range(20)]
    for dead, other in zip(NAMES, reversed(NAMES), strict=True):
        mark_dead(live.gateway.folder, [dead])
        upstream.seen.clear()
        assert {arm(ask(live.gateway.port, PUBLIC, headers=user)) for user in users} == {other}
        assert list(upstream.seen) == [PATHS[NAMES.index(other)]]
        assert arm(ask(live.gateway.port, PUBLIC, headers={"X-Redpp-Arm": dead})) == dead
    mark_dead(live.gateway.folder, NAMES)
    assert {arm(ask(live.gateway.port, PUBLIC, headers=user)) for user in users} == set(NAMES)  # as if none were
    mark_dead(live.gateway.folder, ["original"])
    switch(live.gateway.folder, "original")
    assert arm(ask(live.gateway.port, PUBLIC)) == "original"
    mark_dead(live.gateway.folder, ["pruned"])
    switch(live.gateway.folder, "pruned")
    assert arm(ask(live.gateway.port, PUBLIC)) == "original"


@pytest.mark.server
def test_a_full_disk_and_a_lost_folder_keep_no_large_request_from_its_answer(
    folder: Path, live: NginxProcess, upstream: StubServer
) -> None:
    """Neither bodies nor replies go to the disk."""
    shutil.rmtree(folder)
    large = bytes(MAX_REQUEST_BYTES)
    upstream.answer = lambda path, body, headers: (200, {"reply": "x" * (4 << 20), "bytes": len(body)})
    status, _, body = ask(live.gateway.port, PUBLIC, body=large)
    assert status == 200 and json.loads(body)["bytes"] == len(large) and len(body) > 4 << 20


@pytest.mark.server
def test_only_requests_with_the_servers_token_are_admitted_and_probes_are_not_counted(
    folder: Path, upstream: StubServer
) -> None:
    nginx = NginxProcess(gateway(folder, upstream.port, token=("authorization", "Bearer t.1+"), probe="p" * 32))
    nginx.start()
    try:
        assert (folder / "nginx.conf").stat().st_mode & 0o077 == 0, "it holds the token"
        for given in ("Bearer t.1+", "Bearer wrong", "bearer T.1+", "", "Bearer t.1+x", "xBearer t.1+", "Bearer tx11"):
            ask(nginx.gateway.port, PUBLIC, headers={"Authorization": given})
        _, headers, _ = ask(nginx.gateway.port, PUBLIC, headers={"X-Redpp-Probe": "p" * 32})
        assert headers["x-redpp-chosen-by"] == "split" and "x-redpp-probe" not in upstream.headers[-1]
        _, headers, _ = ask(nginx.gateway.port, PUBLIC, headers={"X-Redpp-Probe": "guess"})
        assert "x-redpp-chosen-by" not in headers
    finally:
        nginx.stop()
    logged = [json.loads(line) for line in nginx.access_log.read_text().splitlines()]
    assert [line["admitted"] for line in logged] == [True, *[False] * 7]


@pytest.mark.server
def test_a_folder_may_have_spaces_and_letters_of_any_language(upstream: StubServer, folder: Path) -> None:
    odd = folder.parent / "zwei Wörter 'x'"
    odd.mkdir(mode=0o711)
    divide(odd)
    nginx = NginxProcess(gateway(odd, upstream.port, recorder=9))
    nginx.start()
    try:
        assert {arm(ask(nginx.gateway.port, PUBLIC)) for _ in range(60)} == set(NAMES)
    finally:
        nginx.stop()
    assert len(nginx.access_log.read_text().splitlines()) == 60


@pytest.mark.server
def test_an_nginx_that_was_killed_is_replaced_without_a_refused_connection(
    live: NginxProcess, upstream: StubServer
) -> None:
    """Its worker serves users on until the next one listens, and is gone then."""
    former = live.handover()
    assert former
    workers = [process.pid for process in session(int(former[0])) if process.pid != int(former[0])]
    answers: list[int] = []
    ended = threading.Event()

    def users() -> None:
        while not ended.is_set():
            answers.append(ask(live.gateway.port, PUBLIC)[0])

    thread = threading.Thread(target=users)
    thread.start()
    os.kill(int(former[0]), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while live.alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    live.start()
    time.sleep(0.1)
    ended.set()
    thread.join()
    assert set(answers) == {200} and len(answers) > 20
    assert workers and all(started(pid) is None for pid in workers) and live.handover() != former


@pytest.mark.server
def test_nothing_of_a_killed_nginx_keeps_its_port(folder: Path, upstream: StubServer) -> None:
    """Its worker is another user's process, whose parent is gone. Another process may end it, or go on with it."""
    nginx = NginxProcess(gateway(folder, upstream.port))
    nginx.start()
    later = NginxProcess(nginx.gateway)
    assert later.adopt(nginx.handover()) and ask(nginx.gateway.port, PUBLIC)[0] == 200
    pid, _ = nginx.handover() or (0, 0)
    os.kill(int(pid), signal.SIGKILL)
    nginx._process.wait()  # type: ignore[union-attr]
    assert not later.alive() and not later.adopt(nginx.handover())
    later.stop()
    with socket.create_server(("127.0.0.1", nginx.gateway.port)):
        pass


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


_TOKEN = "Authorization: Bearer t\r\n"
_WHOLE = "Content-Length: 4\r\n\r\nbody"
ATTACKS = {
    "chooses its arm and leaves at once": "X-Redpp-Arm: pruned\r\n" + _WHOLE,
    "chooses its arm with a token": _TOKEN + "X-Redpp-Arm: pruned\r\n" + _WHOLE,
    "has no token": _WHOLE,
    "has a wrong token": "Authorization: Bearer x\r\n" + _WHOLE,
    "leaves before any arm could answer": _TOKEN + _WHOLE,
    "announces a huge body": _TOKEN + "Content-Length: 16000000\r\n\r\nbody",
    "announces chunks that never come": _TOKEN + "Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n",
    "has no type": _TOKEN + "Content-Type: \r\n" + _WHOLE,
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.server
def test_no_stranger_forces_a_verdict(folder: Path, upstream: StubServer, attack: str) -> None:
    """Sixty requests of the kind to the pruned arm, whose senders leave at once, beside good ones."""
    upstream.answer = lambda path, body, headers: (time.sleep(0.1), (200, {}))[1]
    nginx = NginxProcess(gateway(folder, upstream.port, "50:50", sticky=None, token=("authorization", "Bearer t")))
    nginx.start()
    try:
        with ThreadPoolExecutor(16) as users:
            good = [
                users.submit(ask, nginx.gateway.port, PUBLIC, b"x", {"Authorization": "Bearer t"}) for _ in range(80)
            ]
            assert {future.result()[0] for future in good} == {200}
        switch(folder, "pruned")
        for _ in range(60):
            with socket.create_connection(("127.0.0.1", nginx.gateway.port)) as wire:
                wire.sendall(f"POST {PUBLIC} HTTP/1.1\r\nHost: x\r\n{ATTACKS[attack]}".encode())
    finally:
        nginx.stop()
    traffic = Traffic()
    traffic.take(Lines(nginx.access_log).new())
    assert traffic.requests.total() > 80 and +traffic.faults == {}


@pytest.mark.server
def test_requests_that_break_both_versions_force_no_verdict(folder: Path, upstream: StubServer) -> None:
    """Such as JSON that Triton cannot read, or numbers that overflow in the network."""
    breaking = {"x-break": "1"}
    upstream.answer = lambda path, body, headers: (500 if "x-break" in headers else 200, {})
    nginx = NginxProcess(gateway(folder, upstream.port, "0:100"))
    nginx.start()
    try:
        good = [ask(nginx.gateway.port, PUBLIC, b"x", {"X-User-Id": f"{k}"})[0] for k in range(60)]
        bad = [ask(nginx.gateway.port, PUBLIC, b"x", {"X-User-Id": f"{k}", **breaking})[0] for k in range(60)]
    finally:
        nginx.stop()
    assert set(good) == {200} and set(bad) == {500}
    traffic = Traffic()
    traffic.take(Lines(nginx.access_log).new())
    assert traffic.errors == {"pruned": 60}, "they are shown"
    assert (traffic.judged["pruned"], traffic.faults["pruned"]) == (60, 0)


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
def test_the_log_tells_users_apart_by_a_number_of_this_test(live: NginxProcess) -> None:
    """Its salt draws it from a million, so that nobody is known by it in another test."""
    for user in ("a", "b", "a", None):
        ask(live.gateway.port, PUBLIC, headers={"X-User-Id": user} if user else {})
    live.stop()
    first, other, again, nobody = (json.loads(line)["user"] for line in live.access_log.read_text().splitlines())
    assert first == again != other and nobody == "" and len(first) == len(other) == 6 and first.isdigit()


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
        set_split(folder, nginx.gateway.split, nginx.gateway.shares)
        nginx.start()
        try:
            assert {arm(ask(nginx.gateway.port, PUBLIC)) for _ in range(20)} == {expected}
        finally:
            nginx.stop()


@pytest.mark.server
def test_the_split_changes_while_requests_come(live: NginxProcess, folder: Path) -> None:
    """Nobody's connection is cut, who got the pruned version at a smaller share keeps it, and the log tells splits."""
    connection = http.client.HTTPConnection("127.0.0.1", live.gateway.port)
    users = [f"user-{k}" for k in range(1000)]
    pruned: list[set[str]] = []
    for share in ("0.5", "7", "33.37", "100", "50", "0"):
        made = set_split(folder, split_at(Decimal(share)))
        assert division(folder) == made and made.step == len(pruned) + 1
        seen = {user: arm(ask(0, PUBLIC, headers={"X-User-Id": user}, connection=connection)) for user in users}
        pruned.append({user for user in users if seen[user] == "pruned"})
        assert abs(len(pruned[-1]) / 1000 - float(share) / 100) < 0.05, share
    assert pruned[0] < pruned[1] < pruned[2] < pruned[3] == set(users) and pruned[2] < pruned[4] and not pruned[5]
    labels = [json.loads(line)["step"] for line in live.access_log.read_text().splitlines()]
    assert labels == [str(step % STEP_LABELS) for step in range(1, 7) for _ in users]
    assert [path.name.split("-")[0] for path in sorted(folder.glob("parts*"))] == ["parts", "parts"]


def test_the_parts_that_get_the_pruned_version_make_up_its_share_exactly(tmp_path: Path) -> None:
    shares = tuple(map(Decimal, ("0", "0.5", "7", "33.37", "99.99", "100", "50", "33.37")))
    config = gateway_config(gateway(tmp_path, 4711, str(split_at(shares[-1])), shares=shares))
    set_split(tmp_path, split_at(shares[-1]), shares)
    for share in shares:
        parts = re.search(r"[$]split_part [{] (.*); [}]", config)[1].split("; ")
        widths = {end: Decimal(width.strip("%*") or 0) for width, end in (part.split() for part in parts)}
        widths[parts[-1].split()[1]] = 100 - sum(widths.values())
        set_split(tmp_path, split_at(share))
        assert sum(width for end, width in widths.items() if (tmp_path / "parts" / end).exists()) == share


def test_a_split_that_cannot_be_written_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_split(tmp_path, parse_split("90:10"))
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def full_disk(self: Path, *_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "symlink_to", full_disk)
        set_split(tmp_path, parse_split("50:50"))
    assert str(division(tmp_path).split) == "90:10" and sorted(path.name for path in tmp_path.rglob("*")) == before
    switch(tmp_path, "original")
    assert switched(tmp_path) == "original" and division(tmp_path), "a roll-back leaves the split to come back to"


@pytest.mark.server
def test_a_refused_configuration_says_why(folder: Path) -> None:
    nginx = NginxProcess(gateway(folder, 1, public="/a { }"))
    with pytest.raises(Exception, match="nginx refuses its configuration"):
        nginx.start()


def test_the_configuration_follows_the_gateways_fields(tmp_path: Path) -> None:
    text = gateway_config(gateway(tmp_path, 4711, "99.5:0.5", recorder=4712, account=("who", "group")))
    assert '"salt-1$split_key" $split_part { 0.1% 0.1; 0.1% 0.2; 0.1% 0.3; 0.1% 0.4; 0.1% 0.5; ' in text
    assert " 1% 99; * 100; }" in text
    assert "user who group;" in text and f"client_max_body_size {MAX_REQUEST_BYTES};" in text
    assert "127.0.0.1:4711" in text and "mirror /.shadow" in text and "127.0.0.1:4712" in text
    plain = gateway_config(gateway(tmp_path, 4711, sticky=None, account=None))
    assert (
        "mirror /" not in plain and "/.shadow" not in plain and "user " not in plain and '"salt-1$request_id"' in plain
    )
    assert all("127.0.0.1:" in line or "unix:" in line for line in text.splitlines() if "listen " in line)
    assert "map $http_x_user_id $split_key" in text
    wanted = gateway_config(gateway(tmp_path, 4711, token=("authorization", "Bearer t.1+")))
    assert r'map $http_authorization $admitted { "~^Bearer\ t\.1\+$" true; default false; }' in wanted


@pytest.mark.server
def test_the_open_inference_protocol_is_divided_and_its_front_asked(folder: Path, upstream: StubServer) -> None:
    with stub(lambda path, body, headers: (200, {"front": path})) as front:
        nginx = NginxProcess(gateway(folder, upstream.port, front=front.port, name="m", most_bytes=1000))
        nginx.start()
        try:
            port = nginx.gateway.port
            for name, path in zip(NAMES, PATHS, strict=True):
                status, headers, body = ask(port, "/v2/models/m/infer", b"1", {"X-Redpp-Arm": name})
                assert (status, headers["x-redpp-arm"]) == (200, name)
                assert json.loads(body) == {"path": path, "bytes": 1}
            for path in ("/healthz", "/v2", "/v2/health/ready", "/v2/models/m", "/v2/models/m/versions/1/ready"):
                status, headers, body = ask(port, path, b"", method="GET")
                assert (status, json.loads(body)) == (200, {"front": path}) and "x-redpp-arm" not in headers
            # Only the split chooses a version.
            assert ask(port, "/v2/models/m/versions/2/infer")[0] == 405
            assert ask(port, "/v2/models/m/infer", b"1" * 1001)[0] == 413
        finally:
            nginx.stop()
    assert sum(front.seen.values()) == 5 and sum(upstream.seen.values()) == 2
