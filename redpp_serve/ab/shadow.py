"""Shadow mode: a recorder takes requests that nginx mirrors, and replays each on both versions when they have time.

``python -m redpp_serve.ab.shadow --state DIR --port N --original URL --pruned URL`` runs until SIGTERM.
nginx gets its 204 before anything else happens, so neither a busy recorder nor a slow version reaches a user.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from redpp_serve.ab.state import PAIRS, RECORDER, read_json, write_json
from redpp_serve.comparison.client import Connection, Endpoint, Exchange, Payload
from redpp_serve.comparison.outputs import Heads, difference, read_outputs
from redpp_serve.handlers.tracing import ID_HEADER, TRACE_HEADERS
from redpp_serve.handlers.wire import TOP_HEADER
from redpp_serve.loopback import ADDRESS
from redpp_serve.variants import NAMES

MAX_PAIRS = 200_000  # a difference of 0.5 % is decided long before
TIMEOUT_S = 10.0
_MOST_BYTES = 64 << 20  # of the requests that wait to be repeated, and of one
_FIRST_GUARD_S, _LEAST_GUARD_S, _MOST_GUARD_S = 0.1, 0.005, 1.0
_PATIENCE_S, _LOOK_S, _COUNTS_EVERY_S = 0.5, 0.001, 0.5
_REPLY = b"HTTP/1.1 204 No Content\r\n\r\n"
_NOT_REPEATED = {
    "host",
    "connection",
    "content-length",
    "expect",
    "accept-encoding",
    "transfer-encoding",
    *TRACE_HEADERS,  # a replay is no part of the user's trace
    "accept",  # replies of numbers in JSON can be compared
    TOP_HEADER.lower(),
}


@dataclass(frozen=True)
class Mirrored:
    """A user's request as it went to the server.

    Attributes:
        request_id: the gateway's id.
        headers: headers by lower-case names, without those that a replay must not repeat.
        body: the body as it was sent.
    """

    request_id: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Pair:
    """One replayed request, a line of the recorder's file. Pairs of values are the original's and the pruned version's.

    Attributes:
        time: end of the replay, seconds since 1970.
        request_id: the gateway's id.
        first: the arm that was asked first.
        quiet: True where no user's request came in meanwhile, so that the times may be compared.
        status: HTTP statuses; 0 where no reply came, 502 where nobody can read the reply.
        seconds: times from sending to the last byte.
        handler: times in the handler, as the server says; None unless both are known.
        difference: relative difference of the outputs; None unless both versions answered.
        top1: True where both give the same class; None where outputs are not classes, or one is missing.
    """

    time: float
    request_id: str
    first: str
    quiet: bool
    status: Sequence[int]
    seconds: Sequence[float]
    handler: Sequence[float] | None
    difference: float | None
    top1: bool | None


@dataclass(frozen=True)
class RecorderCounts:
    """Mirrored requests that came in and that were dropped, and pairs recorded, over the whole A/B test."""

    received: int = 0
    dropped: int = 0
    pairs: int = 0


class Inbox:
    """A queue with bounds on count and bytes. Nothing waits for room: a request that does not fit is dropped."""

    def __init__(self, most: int = 64, most_bytes: int = _MOST_BYTES) -> None:
        self.received = self.dropped = 0
        self._most, self._most_bytes = most, most_bytes
        self._queue: deque[Mirrored] = deque()
        self._bytes = 0
        self._last_arrival = -np.inf
        self._changed = threading.Condition()

    def offer(self, request: Mirrored) -> bool:
        """Take a request in, and return False if it was dropped."""
        with self._changed:
            self.received += 1
            self._last_arrival = time.perf_counter()
            if len(self._queue) >= self._most or self._bytes + len(request.body) > self._most_bytes:
                self.dropped += 1
                return False
            self._queue.append(request)
            self._bytes += len(request.body)
            self._changed.notify()
            return True

    def take(self, timeout_s: float) -> Mirrored | None:
        """Return the oldest request, or None when none came within ``timeout_s``."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._queue), timeout_s):
                return None
            request = self._queue.popleft()
            self._bytes -= len(request.body)
            return request

    def quiet_since(self, moment: float) -> bool:
        """Return True if no request came in since ``moment`` on the clock of ``time.perf_counter``."""
        with self._changed:
            return self._last_arrival < moment


class Replayer:
    """Sends one request at a time to the original and to the pruned version, in random order.

    Users load one version more than the other, and a replay that waits behind a user's request in that version's
    queue would count against it. So a pair is sent when no user's request has come in for about as long as one takes.
    It is quiet if none came until it was over. Under dense traffic few pairs are quiet.
    """

    def __init__(
        self, urls: Sequence[str], inbox: Inbox, seed: int | None = None, scores: Sequence[int] = Heads.classes
    ) -> None:
        self._connections = [
            Connection(Endpoint(arm, url, {}), TIMEOUT_S) for arm, url in zip(NAMES, urls, strict=True)
        ]
        self._inbox, self._random, self._scores = inbox, random.Random(seed), scores
        self._seconds: deque[float] = deque(maxlen=64)

    @property
    def guard_s(self) -> float:
        """How long after it came in a user's request may still be under way, seconds."""
        if len(self._seconds) < 8:
            return _FIRST_GUARD_S
        return float(np.clip(1.5 * np.quantile(self._seconds, 0.9), _LEAST_GUARD_S, _MOST_GUARD_S))

    def replay(self, request: Mirrored) -> Pair:
        """Send the request to both versions, and compare their replies."""
        quiet_from = self._wait_for_quiet()
        order = self._random.sample(range(2), 2)
        sent = {arm: self._send(arm, request) for arm in order}
        quiet = quiet_from is not None and self._inbox.quiet_since(quiet_from)
        exchanges = [sent[0], sent[1]]
        a, b = answers = [_outputs(exchange) for exchange in exchanges]
        apart = difference(a, b, self._scores) if a and b else None
        self._seconds.extend(exchange.latency_s for exchange in exchanges)
        handler = [round(exchange.handler_s or 0.0, 7) for exchange in exchanges]
        return Pair(
            time=round(time.time(), 3),
            request_id=request.request_id,
            first=NAMES[order[0]],
            quiet=quiet,
            status=[_status(exchange, answer, answers) for exchange, answer in zip(exchanges, answers, strict=True)],
            seconds=[round(exchange.latency_s, 7) for exchange in exchanges],
            handler=handler if all(handler) else None,
            difference=apart and min(apart.relative, 1e9),
            top1=apart and apart.top1,
        )

    def close(self) -> None:
        """Close both connections."""
        for connection in self._connections:
            connection.close()

    def _wait_for_quiet(self) -> float | None:
        """Wait until no user's request has come in for a while; return since when, or None if that took too long."""
        guard = self.guard_s
        deadline = time.perf_counter() + _PATIENCE_S + guard
        while (now := time.perf_counter()) < deadline:
            if self._inbox.quiet_since(now - guard):
                return now - guard
            time.sleep(_LOOK_S)
        return None

    def _send(self, arm: int, request: Mirrored) -> Exchange:
        connection, headers = self._connections[arm], dict(request.headers)
        content_type = headers.pop("content-type", "application/octet-stream")
        connection.endpoint = replace(connection.endpoint, headers=headers)
        return connection.send(Payload(request.body, content_type))


def _status(exchange: Exchange, answer: list[np.ndarray] | None, answers: Sequence[list[np.ndarray] | None]) -> int:
    """Return a reply's status; 502 for one that cannot be read where the other version's can."""
    return 502 if exchange.ok and answer is None and any(other is not None for other in answers) else exchange.status


def _outputs(exchange: Exchange) -> list[np.ndarray] | None:
    """Return the version's outputs; None for an error, or a body that nobody can read."""
    if not exchange.ok:
        return None
    assert isinstance(exchange.body, bytes)  # the connection is one of HTTP
    try:
        return read_outputs(exchange.body)
    except ValueError:
        return None


class Recorder:
    """Listens for mirrored requests, replays them in a thread of its own, and appends pairs to the state folder.

    Args:
        state: the test's state folder.
        urls: URLs of the original and of the pruned version.
        scores: positions of the outputs that hold class scores.
    """

    def __init__(self, state: Path, urls: Sequence[str], scores: Sequence[int] = Heads.classes) -> None:
        self._state, self._inbox = state, Inbox()
        self._replayer = Replayer(urls, self._inbox, scores=scores)
        self._before = RecorderCounts(**(read_json(state / RECORDER) or {}))  # of a recorder that has died
        self._pairs = 0
        self._stop = threading.Event()

    async def run(self, port: int) -> None:
        """Serve until cancelled.

        Raises:
            OSError: the port is taken.
            RuntimeError: the replays have ended; the supervisor starts another recorder.
        """
        thread = threading.Thread(target=self._replay_all, daemon=True)
        server = await asyncio.start_server(self._listen, ADDRESS, port, limit=1 << 20)
        thread.start()
        try:
            async with server:
                while True:
                    await asyncio.sleep(_COUNTS_EVERY_S)
                    self._write_counts()
                    if not thread.is_alive():
                        raise RuntimeError("the replays have ended, see above")
        finally:
            self._stop.set()
            self._write_counts()

    def _write_counts(self) -> None:
        with suppress(OSError):  # a full disk: next time
            write_json(self._state / RECORDER, asdict(self._counts()))

    def _counts(self) -> RecorderCounts:
        before, inbox = self._before, self._inbox
        return RecorderCounts(
            before.received + inbox.received, before.dropped + inbox.dropped, before.pairs + self._pairs
        )

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of nginx; any other kind of request ends the connection."""
        with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, ConnectionError):
            while True:
                headers = _headers(await reader.readuntil(b"\r\n\r\n"))
                size = int(headers.get("content-length", 0))
                if not 0 <= size <= _MOST_BYTES:
                    break
                body = await reader.readexactly(size)
                writer.write(_REPLY)
                await writer.drain()
                kept = {name: value for name, value in headers.items() if name not in _NOT_REPEATED}
                self._inbox.offer(Mirrored(headers.get(ID_HEADER, ""), kept, body))
        writer.close()

    def _replay_all(self) -> None:
        with (self._state / PAIRS).open("a", encoding="utf-8") as file:
            while not self._stop.is_set():
                request = self._inbox.take(0.1)
                if request and self._counts().pairs < MAX_PAIRS:
                    line = json.dumps(asdict(self._replayer.replay(request)), separators=(",", ":"))
                    with suppress(OSError):  # a full disk: this pair is lost
                        file.write(line + "\n")
                        file.flush()
                        self._pairs += 1
        self._replayer.close()


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def command(state: Path, port: int, urls: tuple[str, str], scores: Sequence[int] = Heads.classes) -> list[str]:
    """Return the command that runs a recorder.

    Args:
        state: the test's state folder.
        port: where it listens.
        urls: of the original and of the pruned version.
        scores: positions of the outputs that hold class scores.
    """
    words = ["--state", str(state), "--port", str(port), "--original", urls[0], "--pruned", urls[1], "--scores"]
    words += map(str, scores)
    return [sys.executable, "-m", "redpp_serve.ab.shadow", *words]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; return the exit code."""
    parser = argparse.ArgumentParser(prog="redpp_serve.ab.shadow", description="Shadow recorder.")
    parser.add_argument("--state", type=Path, required=True, help="state folder of the A/B test")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--original", required=True, help="URL of the original version")
    parser.add_argument("--pruned", required=True, help="URL of the pruned version")
    parser.add_argument("--scores", type=int, nargs="*", default=[0], help="positions of outputs of class scores")
    options = parser.parse_args(arguments)

    async def run() -> None:
        recorder = Recorder(options.state, (options.original, options.pruned), options.scores)
        task = asyncio.ensure_future(recorder.run(options.port))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
