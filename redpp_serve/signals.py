"""Signals that ask a program to stop: the first one unwinds the program, further ones do not disturb its clean-up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(SystemExit):
    """A signal asked to stop: caught where that is no failure, and otherwise the program's end with exit code 0."""


def exit_of_a_command(number: int) -> BaseException:
    """Return what ends a command by this signal: KeyboardInterrupt for Ctrl-C, else exit code 128 + ``number``."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def stopped_by_signal(
    exception: Callable[[int], BaseException] = lambda number: Stopped(),
) -> Iterator[Callable[[], None]]:
    """Raise an exception in the body at the first SIGINT, SIGTERM or SIGHUP, and ignore those that come after it.

    So ``finally`` clauses and context managers run, and are not interrupted half-way. Outside the main thread, which
    alone may set handlers, this does nothing.

    Args:
        exception: makes what is raised from the signal's number; by default `Stopped`.

    Yields:
        A function that ignores the signals from now on: call it before a clean-up that no signal has begun.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def ignore() -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def leave(number: int, _: object) -> None:
        ignore()
        raise exception(number)

    previous = {number: signal.signal(number, leave) for number in STOP_SIGNALS}
    try:
        yield ignore
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
