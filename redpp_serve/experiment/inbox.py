"""Mirrored requests that wait for their replay, and when users' requests came in."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

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
