"""One mirrored request to both versions: the pair's times, outputs and errors."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy

from redpp_serve.comparison.client import Connection, Endpoint, Exchange, Payload

from .inbox import Inbox, Mirrored
from .outputs import difference, read_outputs
from .split import ARMS

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
        self._connections = [Connection(Endpoint(arm, url, {}), TIMEOUT_S) for arm, url in zip(ARMS, urls)]
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
            "time": round(time.time(), 3), "request_id": request.request_id, "first": ARMS[order[0]], "quiet": quiet,
            "status": [_status(exchange, answer is not None) for exchange, answer in zip(pair, answers)],
            "seconds": [round(exchange.latency_s, 7) for exchange in pair],
            "handler": handler if all(handler) else None,
            "difference": apart and min(apart.relative, 1e9), "top1": apart and apart.top1,
        }  # fmt: skip

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
