"""Shadow mode: pairs with a known truth, bounded queues, and users who never notice."""

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest

from redpp_serve.ab.gateway import NginxProcess
from redpp_serve.ab.shadow import Inbox, Mirrored, Replayer, command
from redpp_serve.ab.state import PAIRS, RECORDER, Lines, read_json, write_json
from redpp_serve.comparison.outputs import difference, read_outputs
from redpp_serve.handlers.wire import HANDLER_HEADER
from redpp_serve.loopback import GatewayPorts, free_ports
from redpp_serve.statistics.sequences import RatioSequence
from redpp_serve.statistics.verdicts import Verdict, verdict
from tests.ab.test_gateway import PATHS, PUBLIC, folder, gateway  # noqa: F401 (a fixture)
from tests.support.stubs import arms, ask, stub

SAME = {"1.0": [1.0, 2.0, 3.0], "2.0": [1.0, 2.0, 3.0]}
EQUAL = {"1.0": 0.002, "2.0": 0.002}


@contextmanager
def recorder(state: Path, port: int, server: int) -> Iterator[subprocess.Popen[bytes]]:
    """A recorder process for a stub server."""
    urls = [f"http://127.0.0.1:{server}{path}" for path in PATHS]
    process = subprocess.Popen(command(state, port, (urls[0], urls[1])))
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        assert process.wait(5) == 0


@contextmanager
def shadowed(folder: Path, server: int, recorder_port: int) -> Iterator[NginxProcess]:  # noqa: F811
    nginx = NginxProcess(gateway(folder, server, "100:0", recorder=recorder_port))
    nginx.start()
    try:
        yield nginx
    finally:
        nginx.stop()


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return result


def pairs(state: Path) -> list[dict[str, Any]]:
    return list(Lines(state / PAIRS).new())


def decide(state: Path) -> Verdict:
    sequence = RatioSequence()
    sequence.update([numpy.log(a / b) for a, b in (pair["seconds"] for pair in pairs(state) if pair["quiet"])])
    return verdict(sequence, 0.02, measure="end to end")


@pytest.mark.server
def test_a_version_that_is_a_fifth_slower_and_answers_differently(folder: Path) -> None:  # noqa: F811
    state, port = folder.parent, free_ports(GatewayPorts).recorder
    outputs = {"1.0": [1.0, 2.0, 3.0], "2.0": [1.0, 2.5, 2.0]}
    with (
        stub(arms({"1.0": 0.010, "2.0": 0.012}, outputs)) as server,
        recorder(state, port, server.port),
        shadowed(folder, server.port, port) as nginx,
    ):
        connection = http.client.HTTPConnection("127.0.0.1", nginx.gateway.port)
        decision, k = decide(state), 0
        while decision.kind == "undecided" and k < 400:
            sent = {"X-User-Id": f"{k}", "X-Mine": "yes", "traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
            status, headers, body = ask(0, PUBLIC, headers=sent, connection=connection)
            assert (status, headers["x-redpp-arm"]) == (200, "original"), "a user got something else than the original"
            assert json.loads(body)["outputs"] == [outputs["1.0"]]
            k += 1
            until(lambda: len(pairs(state)) >= k)  # noqa: B023 (called at once)
            decision = decide(state) if k % 20 == 0 else decision
        counts = until(lambda: (c := read_json(state / RECORDER) or {}).get("pairs") == k and c)
        forwarded, seen = server.headers[-1], pairs(state)
    assert server.seen == {PATHS[0]: 2 * k, PATHS[1]: k} and counts == {"received": k, "dropped": 0, "pairs": k}
    assert "traceparent" not in forwarded, "a replay is in the user's trace"
    assert forwarded["x-mine"] == "yes" and {pair["first"] for pair in seen} == {"original", "pruned"}
    assert sum(pair["quiet"] for pair in seen) > 0.8 * k, "nobody but the recorder asked"
    assert decision.kind == "slower" and decision.low < 10 / 12 * 1.05 and decision.high > 10 / 12 * 0.95, decision
    distance = float(numpy.linalg.norm([0, 0.5, -1]) / numpy.linalg.norm([1, 2, 3]))
    assert all(pair["difference"] == pytest.approx(distance) and pair["top1"] is False for pair in seen)
    assert all(pair["status"] == [200, 200] for pair in seen)


@pytest.mark.server
def test_errors_of_one_version_are_told_apart(folder: Path) -> None:  # noqa: F811
    state, port = folder.parent, free_ports(GatewayPorts).recorder
    write_json(state / RECORDER, {"received": 5, "dropped": 2, "pairs": 1})  # of a recorder that was started anew
    with (
        stub(arms(EQUAL, SAME, {"2.0": 500})) as server,
        recorder(state, port, server.port),
        shadowed(folder, server.port, port) as nginx,
    ):
        for status in (500, 400):
            server.answer = arms(EQUAL, SAME, {"2.0": status})
            assert ask(nginx.gateway.port, PUBLIC)[0] == 200, "a user met an error of the pruned version"
            until(lambda status=status: [p for p in pairs(state) if p["status"] == [200, status]])
        server.answer = lambda path, body, headers: (
            200,
            {"nothing": 1} if path.endswith("2.0") else {"outputs": [[1.0]]},
        )
        ask(nginx.gateway.port, PUBLIC)
        unreadable = until(lambda: pairs(state)[2:])[0]
    assert unreadable["status"] == [200, 502] and unreadable["difference"] is None
    assert read_json(state / RECORDER) == {"received": 8, "dropped": 2, "pairs": 4}


def timed(nginx: NginxProcess, requests: int) -> float:
    """Seconds of the slowest of so many requests over one connection; all are answered."""
    connection = http.client.HTTPConnection("127.0.0.1", nginx.gateway.port)
    slowest = 0.0
    for _ in range(requests):
        start = time.perf_counter()
        assert ask(0, PUBLIC, connection=connection)[0] == 200
        slowest = max(slowest, time.perf_counter() - start)
    return slowest


@pytest.mark.server
def test_users_do_not_notice_a_dead_or_hung_recorder(folder: Path) -> None:  # noqa: F811
    state, port = folder.parent, free_ports(GatewayPorts).recorder
    with stub(arms(EQUAL, SAME)) as server:
        with shadowed(folder, server.port, port) as nginx:
            dead = timed(nginx, 100)  # nobody listens
        with recorder(state, port, server.port) as process, shadowed(folder, server.port, port) as nginx:
            os.kill(process.pid, signal.SIGSTOP)  # takes connections, answers never
            begun = time.perf_counter()
            hung = timed(nginx, 200)
            took = time.perf_counter() - begun
    # One request may wait for the one that finds out, 0.2 s; without the sink it would be all 200, 40 s.
    assert dead < 2.0 and hung < 3.0 and took < 15.0, (dead, hung, took)


@pytest.mark.server
def test_a_full_disk_loses_pairs_and_nothing_else(folder: Path) -> None:  # noqa: F811
    state = folder.parent
    with stub(arms(EQUAL, SAME)) as server:
        port = free_ports(GatewayPorts).recorder
        (state / PAIRS).symlink_to("/dev/full")
        with recorder(state, port, server.port) as process, shadowed(folder, server.port, port) as nginx:
            for _ in range(5):
                assert ask(nginx.gateway.port, PUBLIC)[0] == 200
            until(lambda: server.seen[PATHS[1]] == 5)  # each was replayed
            until(lambda: (read_json(state / RECORDER) or {}).get("received") == 5)
            assert read_json(state / RECORDER)["pairs"] == 0 and process.poll() is None


@pytest.mark.server
def test_users_do_not_notice_a_pruned_version_that_hangs(folder: Path) -> None:  # noqa: F811
    state, port = folder.parent, free_ports(GatewayPorts).recorder
    release = threading.Event()

    def answer(path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        if path.endswith("2.0"):
            release.wait(20)
        return 200, {"outputs": [[1.0]]}

    with stub(answer) as server, recorder(state, port, server.port), shadowed(folder, server.port, port) as nginx:
        slowest = timed(nginx, 300)
        counts = until(lambda: (c := read_json(state / RECORDER)) and c["received"] == 300 and c)
        release.set()
    assert slowest < 5.0, "users wait for the pruned version, 20 s"
    assert counts["pairs"] == 0 and counts["dropped"] >= 300 - 64 - 1, "the queue has no bound"


def test_the_inbox_is_bounded_by_count_and_bytes() -> None:
    inbox = Inbox(most=3, most_bytes=100)
    request = Mirrored("", {}, bytes(40))
    assert [inbox.offer(request) for _ in range(3)] == [True, True, False]  # 120 bytes are too many
    assert inbox.take(0) and inbox.offer(request)
    small = Mirrored("", {}, b"")
    assert [inbox.offer(small) for _ in range(2)] == [True, False]  # four are too many
    assert (inbox.received, inbox.dropped) == (6, 2)
    assert [inbox.take(0) is None for _ in range(4)] == [False, False, False, True]
    assert inbox.quiet_since(time.perf_counter()) and not inbox.quiet_since(time.perf_counter() - 10)


def test_replays_go_in_random_order_as_the_user_sent_them() -> None:
    """The guard follows the replays' own times; times in the handler count only where both versions tell them."""
    told = {"1.0": {HANDLER_HEADER: "2.5"}, "2.0": {}}

    def answer(path: str, body: bytes, headers: dict[str, str]) -> Any:
        version = path.rsplit("/", 1)[-1]
        return 200, {"outputs": [[1.0, 2.0]]}, told[version]

    with stub(answer) as server:
        replayer = Replayer([f"http://127.0.0.1:{server.port}{path}" for path in PATHS], Inbox(), seed=1)
        assert replayer.guard_s == 0.1
        request = Mirrored("id", {"content-type": "x/y", "x-mine": "yes"}, b"1")
        seen = [replayer.replay(request) for _ in range(12)]
        told["2.0"] = {HANDLER_HEADER: "1.5"}
        both = replayer.replay(request)
        times = [seconds for pair in (*seen, both) for seconds in pair.seconds]
        assert replayer.guard_s == pytest.approx(max(0.005, 1.5 * numpy.quantile(times, 0.9)), rel=1e-3)
        replayer.close()
    assert {pair.first for pair in seen} == {"original", "pruned"}
    assert {headers["content-type"] for headers in server.headers} == {"x/y"}
    assert {headers["x-mine"] for headers in server.headers} == {"yes"}
    assert {pair.handler for pair in seen} == {None} and both.handler == [0.0025, 0.0015]


def test_a_pair_among_other_users_requests_is_not_quiet() -> None:
    inbox = Inbox()
    with stub(arms({"1.0": 0.05, "2.0": 0.05}, SAME)) as server:
        replayer = Replayer([f"http://127.0.0.1:{server.port}{path}" for path in PATHS], inbox, seed=1)
        request = Mirrored("id", {"content-type": "x/y"}, b"1")
        assert replayer.replay(request).quiet is True
        timer = threading.Timer(0.05, inbox.offer, [request])  # in the middle of the pair
        timer.start()
        disturbed = replayer.replay(request)
        timer.join()
        stop = threading.Event()

        def busy() -> None:
            while not stop.wait(0.005):
                inbox.offer(request)

        thread = threading.Thread(target=busy)
        thread.start()
        dense = replayer.replay(request)
        stop.set()
        thread.join()
        replayer.close()
    assert disturbed.quiet is False and dense.quiet is False
    assert dense.difference == 0 and dense.status == [200, 200]


def test_replies_that_neither_version_writes_as_numbers_are_no_errors() -> None:
    named = {"outputs": [{"name": "a", "datatype": "BYTES", "shape": [1], "data": ["0.9:3"]}]}
    with stub(lambda path, body, headers: (200, named)) as server:
        replayer = Replayer([f"http://127.0.0.1:{server.port}{path}" for path in PATHS], Inbox())
        pair = replayer.replay(Mirrored("id", {"content-type": "x/y"}, b"1"))
        replayer.close()
    assert (pair.status, pair.difference, pair.top1) == ([200, 200], None, None)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"outputs":[[1,2],[3.5]]}', [[1, 2], [3.5]]),
        (b'{"outputs":[{"name":"a","datatype":"FP32","shape":[1,2],"data":[1,2]}]}', [[[1, 2]]]),
        (
            b'{"outputs":[{"datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}},'
            b'{"datatype":"INT64","shape":[1],"parameters":{"binary_data_size":8}}]}'
            + numpy.array([1, 2], "<f4").tobytes()
            + numpy.array([7], "<i8").tobytes(),
            [[[1, 2]], [7]],
        ),
        (b'{"predictions":[[[1,2],[5]],[[3,4],[6]]]}', [[[1, 2], [3, 4]], [[5], [6]]]),
        (b'{"predictions":[{"a":[1,2],"b":5},{"a":[3,4],"b":6}]}', [[[1, 2], [3, 4]], [5, 6]]),
    ],
)
def test_replies_of_both_servers_are_read(body: bytes, expected: list[Any]) -> None:
    assert [array.tolist() for array in read_outputs(body)] == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1]",
        b'{"outputs":[]}',
        b'{"predictions":[]}',
        b'{"predictions":[[[1],[2]],[[1]]]}',
        b'{"outputs":[[NaN]]}',
        b'{"outputs":[["a"]]}',
        b'{"outputs":[[1],[[2],3]]}',
        b"3",
        b'{"outputs":[{"datatype":"FP32","shape":[2],"parameters":{"binary_data_size":8}}]}1234',
        b'{"outputs":[{"datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":1}}]}1',
        b'{"outputs":[{"datatype":"FP32","shape":[3],"data":[1,2]}]}',
    ],
)
def test_what_cannot_be_read(body: bytes) -> None:
    with pytest.raises(ValueError):
        read_outputs(body)


def test_differences_of_outputs() -> None:
    a = numpy.array([3.0, 4.0])
    assert difference([a], [a]) == (0.0, True)
    assert difference([a, a * 0], [a * 1.1, a * 0]) == (pytest.approx(0.1), True)
    assert difference([a], [a[::-1]])[1] is False
    assert difference([a * 0], [a])[0] == numpy.inf
    assert difference([a], [a, a]) == (numpy.inf, False)
    assert difference([a.reshape(1, 2, 1)], [a.reshape(1, 2, 1)]) == (0.0, None)
