"""Requests that wait for a dead arm are taken back and answered by the other; those for a slow one are not."""

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from redpp_serve.ab.counts import Traffic
from redpp_serve.ab.gateway import NginxProcess, divide, mark_dead, relay_socket, switch
from redpp_serve.ab.relay import Relay
from redpp_serve.processes import session
from redpp_serve.variants import NAMES
from tests.ab.test_gateway import PATHS, PUBLIC, arm, folder, gateway, upstream  # noqa: F401
from tests.support.stubs import StubServer, ask

pytestmark = pytest.mark.server
USERS = [{"X-User-Id": f"user-{k}"} for k in range(24)]


class Way:
    """A gateway with a relay for each arm, in front of a server whose versions can be held."""

    def __init__(self, folder: Path, upstream: StubServer) -> None:  # noqa: F811
        self.held: dict[str, threading.Event] = {name: threading.Event() for name in NAMES}
        for event in self.held.values():
            event.set()
        upstream.answer = self._answer
        self.nginx = NginxProcess(gateway(folder, upstream.port, "50:50"))
        self.nginx.make_folder()
        self.relays = {name: Relay(self.nginx.gateway, name) for name in NAMES}
        for process in (*self.relays.values(), self.nginx):
            process.start()

    def _answer(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, int]]:
        self.held[NAMES[PATHS.index(path)]].wait(20)
        return 200, {"bytes": len(body)}

    def ask(self, headers: dict[str, str], body: bytes = b"body") -> tuple[str, float]:
        begun = time.monotonic()
        reply = ask(self.nginx.gateway.port, PUBLIC, body=body, headers=headers)
        assert json.loads(reply[2]) == {"bytes": len(body)}
        return arm(reply), time.monotonic() - begun

    def ask_all(self, meanwhile: Callable[[], object] = lambda: None) -> list[tuple[str, float]]:
        """Ask for every user at once; ``meanwhile`` is done when all have been passed on."""
        with ThreadPoolExecutor(len(USERS)) as pool:
            answers = [pool.submit(self.ask, user) for user in USERS]
            time.sleep(0.3)
            meanwhile()
            return [answer.result() for answer in answers]

    def die(self, name: str) -> None:
        """What the supervisor does when the arm's last worker dies."""
        mark_dead(self.nginx.gateway.folder, [name])
        self.relays[name].cut()

    def counted(self) -> Traffic:
        self.nginx.stop()
        traffic = Traffic()
        traffic.take(json.loads(line) for line in self.nginx.access_log.read_text().splitlines())
        return traffic


@pytest.fixture
def way(folder: Path, upstream: StubServer) -> Iterator[Way]:  # noqa: F811
    made = Way(folder, upstream)
    yield made
    for event in made.held.values():
        event.set()
    for process in (made.nginx, *made.relays.values()):
        process.stop()


@pytest.mark.parametrize(("dead", "other"), [NAMES, tuple(reversed(NAMES))])
def test_requests_that_wait_for_a_dead_arm_are_answered_by_the_other_at_once(way: Way, dead: str, other: str) -> None:
    own = Counter(name for name, _ in way.ask_all())
    way.held[dead].clear()
    answers = way.ask_all(lambda: way.die(dead))
    assert {name for name, _ in answers} == {other} and max(seconds for _, seconds in answers) < 1.3
    chosen = threading.Thread(target=way.ask, args=({"X-Redpp-Arm": dead},))
    chosen.start()
    assert {name for name, _ in way.ask_all()} == {other}
    assert chosen.is_alive(), "who asks for an arm waits for it"
    way.held[dead].set()
    chosen.join()
    mark_dead(way.nginx.gateway.folder, ())
    assert Counter(name for name, _ in way.ask_all()) == own
    traffic = way.counted()
    assert traffic.failed_over == {dead: 2 * own[dead], other: 0}
    assert traffic.faults == {dead: own[dead], other: 0}, "what a user sends soon after a failure says nothing"
    assert not traffic.errors.total()


def test_a_slow_arm_is_no_dead_one(way: Way, upstream: StubServer) -> None:  # noqa: F811
    """An honest answer may take its time: it comes from the user's arm, and the server is asked once."""
    own = Counter(name for name, _ in way.ask_all())
    upstream.seen.clear()
    way.held["pruned"].clear()
    answers = way.ask_all(lambda: time.sleep(3) or way.held["pruned"].set())
    assert Counter(name for name, _ in answers) == own and max(seconds for _, seconds in answers) > 3
    assert upstream.seen == {path: own[name] for name, path in zip(NAMES, PATHS, strict=True)}
    assert not way.counted().faults.total()


def test_the_other_arms_requests_are_not_cut(way: Way, upstream: StubServer) -> None:  # noqa: F811
    own = Counter(name for name, _ in way.ask_all())
    upstream.seen.clear()
    for event in way.held.values():
        event.clear()

    def die() -> None:
        way.die("pruned")
        time.sleep(0.3)
        way.held["original"].set()

    assert {name for name, _ in way.ask_all(die)} == {"original"}
    assert upstream.seen == {PATHS[0]: len(USERS), PATHS[1]: own["pruned"]}, "a request was asked for twice"


def test_where_both_arms_are_dead_users_wait_for_their_own(way: Way) -> None:
    own = Counter(name for name, _ in way.ask_all())
    for event in way.held.values():
        event.clear()

    def die() -> None:
        mark_dead(way.nginx.gateway.folder, NAMES)
        for name in NAMES:
            way.relays[name].cut()
        time.sleep(0.5)
        for event in way.held.values():
            event.set()

    assert Counter(name for name, _ in way.ask_all(die)) == own


def test_a_body_that_takes_its_time_does_not_reach_an_arm_that_died_meanwhile(way: Way) -> None:
    switch(way.nginx.gateway.folder, "pruned")
    way.held["pruned"].clear()
    begun = time.monotonic()
    reply = slowly(way.nginx.gateway.port, lambda: way.die("pruned"))
    assert b" 200 " in reply and b"X-Redpp-Arm: original" in reply and time.monotonic() - begun < 1.5


def slowly(port: int, meanwhile: Callable[[], object]) -> bytes:
    import socket

    with socket.create_connection(("127.0.0.1", port)) as sender:
        sender.sendall(f"POST {PUBLIC} HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbo".encode())
        time.sleep(0.3)
        meanwhile()
        time.sleep(0.3)
        sender.sendall(b"dy")
        return sender.recv(4096)


def test_users_lose_nothing_where_a_relay_is_gone(way: Way, upstream: StubServer) -> None:  # noqa: F811
    """Killed whole, or lost with the folder: the gateway asks the server itself, and nothing counts against the arm."""
    own = Counter(name for name, _ in way.ask_all())
    for relay in way.relays.values():
        relay.stop()
    assert Counter(name for name, _ in way.ask_all()) == own
    way.relays["pruned"].start()
    relay_socket(way.nginx.gateway.folder, "pruned").unlink()
    assert not way.relays["pruned"].reachable(), "it has to be started again"
    assert Counter(name for name, _ in way.ask_all()) == own
    way.relays["pruned"].start()
    assert way.relays["pruned"].reachable()
    given = way.relays["pruned"].handover()
    assert given
    os.kill(int(given[0]), signal.SIGKILL)
    assert Counter(name for name, _ in way.ask_all()) == own
    way.relays["pruned"].start()
    assert {process.pid for process in session(int(given[0]))} == set(), "its worker is left"
    assert Counter(name for name, _ in way.ask_all()) == own
    assert not way.counted().faults.total()


def test_large_requests_queries_and_headers_pass_through(way: Way, upstream: StubServer) -> None:  # noqa: F811
    upstream.answer = lambda path, body, headers: (200, {"path": path, "bytes": len(body), "reply": "x" * (2 << 20)})
    long = "x" * 7000
    reply = ask(way.nginx.gateway.port, f"{PUBLIC}?a=b%20c", body=bytes(8 << 20), headers={**USERS[0], "X-Long": long})
    document = json.loads(reply[2])
    assert document["bytes"] == 8 << 20 and document["path"].endswith("?a=b%20c") and len(document["reply"]) == 2 << 20
    assert upstream.headers[-1]["x-long"] == long and upstream.headers[-1]["x-user-id"] == USERS[0]["X-User-Id"]
    assert upstream.headers[-1]["x-request-id"] == reply[1]["x-request-id"]


def test_a_relay_lives_in_a_folder_of_any_name(folder: Path, upstream: StubServer) -> None:  # noqa: F811
    odd = folder.parent / "zwei Wörter 'x'"
    divide_into(odd)
    way = Way(odd, upstream)
    try:
        assert {name for name, _ in way.ask_all()} == set(NAMES)
        assert not way.relays["pruned"].log_tail(), "nginx has something to warn of"
    finally:
        for process in (way.nginx, *way.relays.values()):
            process.stop()
        shutil.rmtree(odd)


def divide_into(folder: Path) -> None:  # noqa: F811
    folder.mkdir(mode=0o711)
    divide(folder)
