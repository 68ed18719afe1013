"""The first signal unwinds a program, later ones do not disturb its clean-up, and the handlers are put back."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from redpp_serve.signals import STOP_SIGNALS, Stopped, exit_of_a_command, stopped_by_signal


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _handlers_come_back() -> Iterator[None]:
    before = handlers()
    yield
    assert handlers() == before


def test_each_signal_ends_the_body_in_silence_and_its_clean_up_is_not_disturbed() -> None:
    for number in STOP_SIGNALS:
        cleaned = False
        with suppress(Stopped), stopped_by_signal():
            try:
                send(number)
                time.sleep(10)
            except Exception:  # nobody else's
                pytest.fail("the signal was caught as an error")
            finally:
                for again in STOP_SIGNALS:
                    send(again)
                cleaned = True
            pytest.fail("the body went on")
        assert cleaned


def test_a_command_ends_with_the_signals_exit_code() -> None:
    with pytest.raises(KeyboardInterrupt), stopped_by_signal(exit_of_a_command):
        send(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(SystemExit) as caught, stopped_by_signal(exit_of_a_command):
            send(number)
        assert caught.value.code == 128 + number


def test_signals_are_ignored_from_a_clean_up_on_that_begins_by_itself() -> None:
    with pytest.raises(ZeroDivisionError), stopped_by_signal() as ignore:
        try:
            raise ZeroDivisionError
        finally:
            ignore()
            send(signal.SIGTERM)


def test_one_within_another_ends_the_inner_body_alone() -> None:
    with stopped_by_signal(exit_of_a_command):
        with suppress(Stopped), stopped_by_signal():
            send(signal.SIGTERM)
        with pytest.raises(SystemExit):
            send(signal.SIGTERM)
            time.sleep(10)


def test_other_threads_set_no_handlers() -> None:
    seen: list[object] = []

    def body() -> None:
        with stopped_by_signal() as ignore:
            ignore()
            seen.extend(handlers())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == handlers()
