"""The shadow recorder: takes mirrored requests from nginx, and sends each to both versions when they have time.

``python -m redpp_serve.ab.shadow --state DIR --port N --original URL --pruned URL`` runs until SIGTERM.
nginx gets its 204 before anything else happens, so neither a busy recorder nor a slow version reaches a user.

Mirrored requests that wait for their replay, and when users' requests came in.

One mirrored request to both versions: the pair's times, outputs and errors.
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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy

from redpp_serve.ab.state import PAIRS, RECORDER, read_json, write_json
from redpp_serve.comparison.client import Connection, Endpoint, Exchange, Payload
from redpp_serve.comparison.outputs import difference, read_outputs
from redpp_serve.loopback import ADDRESS
from redpp_serve.packaging.server_config import MAX_REQUEST_BYTES
from redpp_serve.variants import NAMES

_ARRIVALS = 4096


@dataclass(frozen=True)
class Mirrored:
    """A user's request as it went to the server.

    Attributes:
        request_id: the gateway's.
        headers: lower-case names; those that a replay must not repeat are left out.
        body: as sent.
    """

    request_id: str
    headers: dict[str, str]
    body: bytes


class Inbox:
    """A queue bounded by count and bytes. Nothing ever waits for room: what does not fit is dropped and counted."""

    def __init__(self, most: int = 64, most_bytes: int = 64 << 20) -> None:
        self.received = self.dropped = 0
        self._most, self._most_bytes = most, most_bytes
        self._queue: deque[Mirrored] = deque()
        self._bytes = 0
        self._arrivals: deque[float] = deque(maxlen=_ARRIVALS)
        self._changed = threading.Condition()

    def offer(self, request: Mirrored) -> bool:
        """Take a request in; False where it was dropped."""
        with self._changed:
            self.received += 1
            self._arrivals.append(time.perf_counter())
            if len(self._queue) >= self._most or self._bytes + len(request.body) > self._most_bytes:
                self.dropped += 1
                return False
            self._queue.append(request)
            self._bytes += len(request.body)
            self._changed.notify()
            return True

    def take(self, timeout_s: float) -> Mirrored | None:
        """The oldest request, or None when none came within ``timeout_s``."""
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._queue), timeout_s):
                return None
            request = self._queue.popleft()
            self._bytes -= len(request.body)
            return request

    def quiet_since(self, moment: float) -> bool:
        """Whether no user's request has come in since then, on the clock of ``time.perf_counter``."""
        with self._changed:
            return not self._arrivals or self._arrivals[-1] < moment


TIMEOUT_S = 10.0
_FIRST_GUARD_S, _LEAST_GUARD_S, _MOST_GUARD_S = 0.1, 0.005, 1.0
_PATIENCE_S, _LOOK_S = 0.5, 0.001


class Replayer:
    """Sends one request at a time to the original and to the pruned version, in random order.

    Users load one version more than the other, and a replay that waits behind a user's request in that version's
    queue would count against it. So a pair is sent when no user's request has come in for about as long as one takes,
    and it is quiet, fit for comparing times, if none came until it was over. Under dense traffic few pairs are.
    """

    def __init__(self, urls: Sequence[str], inbox: Inbox, seed: int | None = None) -> None:
        self._connections = [Connection(Endpoint(arm, url, {}), TIMEOUT_S) for arm, url in zip(NAMES, urls)]
        self._inbox, self._random = inbox, random.Random(seed)
        self._seconds: deque[float] = deque(maxlen=64)

    @property
    def guard_s(self) -> float:
        """How long after a user's request has come in it may still be under way, seconds."""
        if len(self._seconds) < 8:
            return _FIRST_GUARD_S
        return float(numpy.clip(1.5 * numpy.quantile(self._seconds, 0.9), _LEAST_GUARD_S, _MOST_GUARD_S))

    def replay(self, request: Mirrored) -> dict[str, Any]:
        """The pair as a line of the recorder's file; lists hold the original's and the pruned version's value.

        ``seconds`` are from sending to the last byte, ``handler`` what the server says of its own time. ``difference``
        and ``top1`` (see `outputs.Difference`) are None unless both versions answered.
        """
        quiet_from = self._wait_for_quiet()
        order = self._random.sample(range(2), 2)
        exchanges: dict[int, Exchange] = {arm: self._send(arm, request) for arm in order}
        quiet = quiet_from is not None and self._inbox.quiet_since(quiet_from)
        pair = [exchanges[0], exchanges[1]]
        answers = a, b = [_outputs(exchange) for exchange in pair]
        apart = difference(a, b) if a and b else None
        self._seconds.extend(exchange.latency_s for exchange in pair)
        handler = [exchange.handler_s and round(exchange.handler_s, 7) for exchange in pair]
        return {
            "time": round(time.time(), 3),
            "request_id": request.request_id,
            "first": NAMES[order[0]],
            "quiet": quiet,
            "status": [_status(exchange, answer is not None) for exchange, answer in zip(pair, answers)],
            "seconds": [round(exchange.latency_s, 7) for exchange in pair],
            "handler": handler if all(handler) else None,
            "difference": apart and min(apart.relative, 1e9),
            "top1": apart and apart.top1,
        }

    def close(self) -> None:
        """Close both connections."""
        for connection in self._connections:
            connection.close()

    def _wait_for_quiet(self) -> float | None:
        """Since when no user's request has come in; None where that did not last in time."""
        deadline, guard = time.perf_counter() + _PATIENCE_S + self.guard_s, self.guard_s
        while (now := time.perf_counter()) < deadline:
            if self._inbox.quiet_since(now - guard):
                return now - guard
            time.sleep(_LOOK_S)
        return None

    def _send(self, arm: int, request: Mirrored) -> Exchange:
        connection = self._connections[arm]
        headers = {name: value for name, value in request.headers.items() if name != "content-type"}
        connection.endpoint = replace(connection.endpoint, headers=headers)
        return connection.send(Payload(request.body, request.headers.get("content-type", "application/octet-stream")))


def _status(exchange: Exchange, readable: bool) -> int:
    """Of the reply; an answer that nobody can read is a bad gateway's."""
    return 502 if exchange.ok and not readable else exchange.status


def _outputs(exchange: Exchange) -> list[numpy.ndarray] | None:
    """What the version answered; None for an error, or a body that nobody can read."""
    if not exchange.ok:
        return None
    assert isinstance(exchange.body, bytes)  # of an HTTP connection
    try:
        return read_outputs(exchange.body)
    except ValueError:
        return None


# More tell nothing that these did not: a difference of 0.5 % is decided long before.
MAX_PAIRS = 200_000
_NOT_REPEATED = {
    "host",
    "connection",
    "content-length",
    "expect",
    "accept-encoding",
    "transfer-encoding",
    "x-request-id",
}
_REPLY = b"HTTP/1.1 204 No Content\r\n\r\n"
_COUNTS_EVERY_S = 0.5


class Recorder:
    """Listens, replays in a thread of its own, and appends pairs to the state folder.

    Args:
        state: the experiment's state folder.
        urls: where the original and the pruned version answer.
        inbox: the queue in between.
    """

    def __init__(self, state: Path, urls: Sequence[str], inbox: Inbox | None = None) -> None:
        self.inbox = inbox or Inbox()
        self._state, self._replayer = state, Replayer(urls, self.inbox)
        before: dict[str, int] = read_json(state / RECORDER) or {}  # of a recorder that was started anew
        self._before = {key: before.get(key, 0) for key in ("received", "dropped", "pairs")}
        self._pairs = 0
        self._stop = threading.Event()

    async def run(self, port: int) -> None:
        """Until cancelled.

        Raises:
            OSError: the port is taken.
        """
        thread = threading.Thread(target=self._replay_all, daemon=True)
        server = await asyncio.start_server(self._listen, ADDRESS, port, limit=1 << 20)
        thread.start()
        try:
            async with server:
                while True:
                    await asyncio.sleep(_COUNTS_EVERY_S)
                    self._write_counts()
                    if not thread.is_alive():  # the supervisor starts another recorder
                        raise RuntimeError("the replays have ended, see above")
        finally:
            self._stop.set()
            self._write_counts()

    def _write_counts(self) -> None:
        with suppress(OSError):  # a full disk: next time
            write_json(self._state / RECORDER, self.counts())

    def counts(self) -> dict[str, int]:
        """Mirrored requests received and dropped, and pairs recorded, over the whole experiment."""
        now = {"received": self.inbox.received, "dropped": self.inbox.dropped, "pairs": self._pairs}
        return {key: self._before[key] + value for key, value in now.items()}

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of nginx. Whatever is not a request of its kind ends the connection."""
        with suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, ConnectionError):
            while True:
                headers = _headers(await reader.readuntil(b"\r\n\r\n"))
                size = int(headers.get("content-length", 0))
                if not 0 <= size <= MAX_REQUEST_BYTES:
                    break
                body = await reader.readexactly(size)
                writer.write(_REPLY)
                await writer.drain()
                kept = {name: value for name, value in headers.items() if name not in _NOT_REPEATED}
                self.inbox.offer(Mirrored(headers.get("x-request-id", ""), kept, body))
        writer.close()

    def _replay_all(self) -> None:
        with (self._state / PAIRS).open("a", encoding="utf-8") as file:
            while not self._stop.is_set():
                request = self.inbox.take(0.1)
                if request and self.counts()["pairs"] < MAX_PAIRS:
                    pair = self._replayer.replay(request)
                    with suppress(OSError):  # a full disk: this pair is lost
                        _append(file, pair)
                        self._pairs += 1
        self._replayer.close()


def _append(file: TextIO, pair: dict[str, Any]) -> None:
    file.write(json.dumps(pair, separators=(",", ":")) + "\n")
    file.flush()


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    parser = argparse.ArgumentParser(prog="redpp_serve.ab.shadow", description="Shadow recorder.")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--original", required=True, help="URL of the original version")
    parser.add_argument("--pruned", required=True, help="URL of the pruned version")
    options = parser.parse_args(arguments)

    async def run() -> None:
        task = asyncio.ensure_future(Recorder(options.state, (options.original, options.pruned)).run(options.port))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
