"""Signals that end a command: as exceptions, so that servers are stopped and scratch files removed on the way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def unwinding() -> Iterator[None]:
    """Turn the first of the ending signals into an exception, and ignore those that follow while the body cleans up.

    SIGINT raises KeyboardInterrupt; the others raise SystemExit with 128 and their number. Only the main thread may
    set handlers: elsewhere the body runs as it is.
    """

    def leave(number: int, _: object) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, leave) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
