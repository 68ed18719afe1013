"""Load against small HTTP servers in this process, with known delays and failures."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from redpp_serve.comparison.client import Connection, Decoder, Endpoint, Payload
from redpp_serve.comparison.load import (
    WARMUP_REQUESTS,
    Load,
    Schedule,
    plan_blocks,
    preflight,
    run_blocks,
    run_open_loop,
    run_paired,
)
from redpp_serve.errors import RedppError

PAYLOADS = [Payload(str(i).encode(), "text/plain") for i in range(5)]


class Server(ThreadingHTTPServer):
    """Answers input i with ``answer(i)`` after a delay; ``reject`` inputs get a 400."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        delay_s: float,
        one_at_a_time: bool = False,
        reject: tuple[str, ...] = (),
        answer: Callable[[int], list[float]] = lambda i: [i, -i],
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.delay_s, self.reject, self.answer = delay_s, reject, answer
        self.lock = threading.Lock() if one_at_a_time else None
        self.opened, self.drop_next, self.requests, self.headers = 0, False, 0, []
        self.body: bytes | None = None

    def endpoint(self, label: str) -> Endpoint:
        return Endpoint(label, f"http://127.0.0.1:{self.server_port}/predictions/m/1.0", {"X-User": label})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.opened += 1

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.requests += 1
        self.server.headers.append((self.headers["X-User"], self.headers["Content-Type"]))
        if self.server.lock:
            with self.server.lock:
                time.sleep(self.server.delay_s)
        else:
            time.sleep(self.server.delay_s)
        bad = text in self.server.reject
        body = b'{"message": "bad input"}' if bad else json.dumps({"outputs": [self.server.answer(int(text))]}).encode()
        body = self.server.body or body
        self.send_response(400 if bad else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Redpp-Handler-Ms", f"{1000 * self.server.delay_s:.3f}")
        self.end_headers()
        self.wfile.write(body)
        # Drop the idle connection without having announced it.
        self.close_connection, self.server.drop_next = self.server.drop_next, False

    def log_message(self, *args: object) -> None:
        pass


Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[Server] = []

    def launch(*args: object, **options: object) -> Server:
        servers.append(Server(*args, **options))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return servers[-1]

    yield launch
    for server in servers:
        server.shutdown()
        server.server_close()


def test_reply_is_read(start: Start) -> None:
    server = start(0.004)
    connection = Connection(server.endpoint("a"))
    reply = Decoder(time.perf_counter()).reply("a", 3, connection.send(PAYLOADS[3]))
    connection.close()
    assert reply.ok and reply.outputs is not None and reply.outputs[0].tolist() == [3.0, -3.0]
    assert reply.handler_s == pytest.approx(0.004) and 0.004 <= reply.latency_s < 1
    assert server.headers == [("a", "text/plain")]


def test_connection_is_kept_and_reopened_once_when_dropped(start: Start) -> None:
    server = start(0.0)
    connection = Connection(server.endpoint("a"))
    for _ in range(3):
        assert connection.send(PAYLOADS[1]).ok
    assert server.opened == 1
    server.drop_next = True
    assert connection.send(PAYLOADS[1]).ok
    time.sleep(0.05)
    assert connection.send(PAYLOADS[1]).ok
    connection.close()
    assert (server.opened, server.requests) == (2, 5)


def test_timeout_is_a_reply_without_a_second_try(start: Start) -> None:
    server = start(0.5)
    connection = Connection(server.endpoint("a"), timeout_s=0.1)
    exchange = connection.send(PAYLOADS[0])
    connection.close()
    assert exchange.status == 0 and "timed out" in exchange.error and server.requests == 1


def test_unreadable_reply_is_a_failure(start: Start) -> None:
    server = start(0.0)
    connection = Connection(server.endpoint("a"))
    for body in (b"no json", b'{"other": 1}', b'{"outputs": []}', b'{"outputs": [[NaN]]}', b"[1]"):
        server.body = body
        reply = Decoder(0.0).reply("a", 0, connection.send(PAYLOADS[0]))
        assert reply.status == 200 and not reply.ok and reply.outputs is None and "outputs" in reply.error, body
    connection.close()


def test_nobody_listens_is_an_error_in_words(start: Start) -> None:
    server = start(0.0)
    endpoint = server.endpoint("original")
    server.shutdown()
    server.server_close()
    with pytest.raises(RedppError, match=r"original .* answered none .*refused"):
        preflight(endpoint, PAYLOADS)


def test_url_without_scheme_is_refused() -> None:
    with pytest.raises(RedppError, match="absolute http"):
        Connection(Endpoint("a", "localhost:8080/predictions/m", {}))


def test_paired_ratio_and_count(start: Start) -> None:
    slow, fast = start(0.012), start(0.004)
    shares: list[float] = []
    pairs = run_paired(Load(slow.endpoint("a"), fast.endpoint("b"), PAYLOADS, 2), 31, 60.0, shares.append)
    assert len(pairs) == 31 and shares[-1] == 1.0 and shares == sorted(shares)
    assert all(a.ok and b.ok and a.payload == b.payload and (a.arm, b.arm) == ("a", "b") for a, b in pairs)
    assert {a.payload for a, _ in pairs} == set(range(5))
    firsts = sum(a.start_s < b.start_s for a, b in pairs)
    assert 3 < firsts < 28, "the order of the arms is random"
    ratios = sorted(a.latency_s / b.latency_s for a, b in pairs)
    assert 1.3 < ratios[15] < 4
    assert slow.requests == fast.requests == 31 + 2 * WARMUP_REQUESTS
    assert slow.opened == fast.opened == 2


def test_paired_ends_by_time(start: Start) -> None:
    a, b = start(0.004), start(0.004)
    begin = time.perf_counter()
    pairs = run_paired(Load(a.endpoint("a"), b.endpoint("b"), PAYLOADS, 2), None, 0.3)
    assert 0.3 <= time.perf_counter() - begin < 3 and pairs
    assert max(reply.start_s for pair in pairs for reply in pair) < 0.3 + 0.5


@pytest.mark.exhaustive
def test_queue_of_the_slower_arm_does_not_inflate_the_ratio(start: Start) -> None:
    """One worker per arm: free-running clients would gather at the slower one and measure about 5 instead of 2."""
    slow, fast = start(0.016, one_at_a_time=True), start(0.008, one_at_a_time=True)
    pairs = run_paired(Load(slow.endpoint("a"), fast.endpoint("b"), PAYLOADS, 4), 48, None)
    total = [sum(pair[arm].latency_s for pair in pairs) for arm in (0, 1)]
    assert 1.4 < total[0] / total[1] < 2.8


def test_failures_keep_their_text(start: Start) -> None:
    a, b = start(0.0), start(0.0, reject=("2",))
    pairs = run_paired(Load(a.endpoint("a"), b.endpoint("b"), PAYLOADS, 1), 20, None)
    failed = [(x, y) for x, y in pairs if not y.ok]
    assert len(failed) == 4 and all(x.ok for x, _ in pairs)
    assert all(y.payload == 2 and y.status == 400 and y.error == '{"message": "bad input"}' for _, y in failed)
    count = run_blocks(Load(a.endpoint("a"), b.endpoint("b"), PAYLOADS, 2), 0.1, 4).pruned
    assert count.failed > 0 and count.completed > count.failed and "bad input" in count.error


def test_blocks_alternate_and_bound_the_ratio(start: Start) -> None:
    slow, fast = start(0.012), start(0.004)
    result = run_blocks(Load(slow.endpoint("a"), fast.endpoint("b"), PAYLOADS, 2), 0.15, 8)
    assert result.ratio is not None
    assert 1.3 < result.ratio.value < 4 and result.ratio.low <= result.ratio.value <= result.ratio.high
    assert result.pruned.rps > result.original.rps and 0.6 <= result.original.seconds < 3
    count = result.original
    assert count.failed == 0 and count.rps == pytest.approx(count.completed / count.seconds)
    assert 25 < count.rps <= 2 / 0.012, "two workers that wait 12 ms for each answer"


def test_blocks_fit_the_time_and_hold_many_requests() -> None:
    assert plan_blocks(8.0, 0.005) == (0.5, 16)
    assert plan_blocks(8.0, 0.05) == (1.0, 8)
    assert plan_blocks(8.0, 5.0) == (2.0, 4)


def test_no_ratio_where_an_arm_answers_nothing(start: Start) -> None:
    good, bad = start(0.002), start(0.002, reject=tuple("01234"))
    result = run_blocks(Load(good.endpoint("a"), bad.endpoint("b"), PAYLOADS, 1), 0.05, 4)
    assert result.ratio is None and result.pruned.completed == 0 and result.pruned.failed > 0
    assert result.original.completed > 0


@pytest.mark.exhaustive
def test_open_loop_charges_the_wait(start: Start) -> None:
    """40 requests a second of 50 ms each over one connection: the queue grows, and latency shows it."""
    server = start(0.05)
    replies = run_open_loop(server.endpoint("a"), PAYLOADS, Schedule(40.0, 0.75, 1, 1))
    assert all(0 <= reply.start_s < 0.75 for reply in replies)
    assert [x.start_s for x in replies] == sorted(x.start_s for x in replies)
    answered = [reply for reply in replies if reply.ok]
    assert answered[-1].latency_s > 0.25 > answered[0].latency_s


def test_open_loop_ends_though_overloaded(start: Start) -> None:
    server = start(0.1)
    begin = time.perf_counter()
    replies = run_open_loop(server.endpoint("a"), PAYLOADS, Schedule(100.0, 0.3, 1, 0))
    assert time.perf_counter() - begin < 3
    unsent = [reply for reply in replies if reply.status == 0]
    assert unsent and all("not sent" in reply.error for reply in unsent) and replies[0].ok


def test_open_loop_keeps_its_rate(start: Start) -> None:
    replies = run_open_loop(start(0.002).endpoint("a"), PAYLOADS, Schedule(100.0, 0.5, 8, 0))
    assert 25 < len(replies) < 80 and all(reply.ok for reply in replies)


def test_wrong_arguments_are_refused() -> None:
    endpoint = Endpoint("a", "http://127.0.0.1:9/", {})
    with pytest.raises(RedppError, match="no inputs"):
        Load(endpoint, endpoint, [])
    with pytest.raises(RedppError, match="concurrency of 0"):
        Load(endpoint, endpoint, PAYLOADS, 0)
    load = Load(endpoint, endpoint, PAYLOADS, 1)
    for pairs, seconds in ((None, None), (0, None), (None, -1.0), (-1, 2.0)):
        with pytest.raises(RedppError, match="pairs or seconds"):
            run_paired(load, pairs, seconds)
    for blocks in (2, 5):
        with pytest.raises(RedppError, match="at least 4"):
            run_blocks(load, 1.0, blocks)
    for rate, length in ((0.0, 1.0), (1.0, 0.0)):
        with pytest.raises(RedppError, match="positive"):
            Schedule(rate, length, 1, 0)
    with pytest.raises(RedppError, match="concurrency of 0"):
        run_open_loop(endpoint, PAYLOADS, Schedule(1.0, 1.0, 0, 0))
