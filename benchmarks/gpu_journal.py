"""What a run of `benchmarks.gpu` has done, as lines of JSON on disk, so that a worker that dies loses nothing.

A worker says what it tries before it tries it. When it dies or hangs there, its successor reads the journal, takes
that one thing for crashed, and goes on with what is not measured yet.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
GRACE_S = 15.0  # that a try may take beyond its limit, in code that no signal interrupts, before it counts as hung


class TooSlow(BaseException):
    """A try took longer than its limit. No `Exception`: compilers catch those and go on."""


class DeviceLost(Exception):
    """The GPU answers no more in this process; only a new one can go on."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stops what runs inside after some seconds, at the next line of Python in the main thread. Does not nest.

    Raises:
        TooSlow: the time is over.
    """

    def stop(*_: object) -> None:
        raise TooSlow(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """Seconds until a deadline, shared out among what is still to do; who is quick leaves time to the others."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.end - self.clock())

    def part(self, share: float, remaining_shares: float) -> Budget:
        """The part that one of several gets of what is left; ``remaining_shares`` counts its own."""
        return Budget(self.left * share / remaining_shares, self.clock)

    def at_most(self, seconds: float) -> float:
        """The smaller of what is left and a limit."""
        return min(self.left, seconds)


class Journal:
    """Records in the order in which they were written; ``crashed`` has the tries that a worker did not survive."""

    def __init__(self, path: Path, device_works: Callable[[], None] = lambda: None) -> None:
        self.path, self.device_works = path, device_works
        self.records = read(path)
        self.crashed: dict[str, str] = {r["key"]: r["reason"] for r in self.records if r["kind"] == "crashed"}
        pending = unfinished(self.records)
        if pending:
            reason = pending.get("reason") or "its process died or hung"
            self.crashed[pending["key"]] = reason
            self.add("crashed", key=pending["key"], reason=reason)

    def add(self, kind: str, **record: Any) -> None:
        """Write one record, at once."""
        entry = {"kind": kind, **record}
        self.records.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    def attempt(self, key: str, seconds: float, action: Callable[[], T]) -> tuple[T | None, str]:
        """The action's result, or None and in words why there is none: it raised, was too slow, or crashed before.

        Raises:
            DeviceLost: after its error the device answers no more.
        """
        if key in self.crashed:
            return None, f"crashed: {self.crashed[key]}"
        if seconds <= 0:
            return None, "not reached"
        self.add("try", key=key, seconds=round(seconds, 1))
        value, reason = None, ""
        try:
            with limited(seconds):
                value = action()
        except TooSlow as error:
            reason = str(error)
        except Exception as error:  # whatever a kernel, a peer or a compiler raises
            reason = one_line(error)
        if reason:
            try:
                self.device_works()
            except Exception as error:
                self.add("lost", key=key, reason=reason)
                raise DeviceLost(reason) from error
        self.add("tried", key=key, reason=reason)
        return value, reason


def read(path: Path) -> list[dict[str, Any]]:
    """All whole records of a journal; the last line may be torn."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def unfinished(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The last try that nothing ended, with the reason if its worker could still say one."""
    for record in reversed(records):
        if record["kind"] in ("tried", "crashed"):
            return None
        if record["kind"] in ("try", "lost"):
            return record
    return None


def hung(records: list[dict[str, Any]], silent_s: float) -> bool:
    """Whether the journal has been silent for longer than what its worker tries may take."""
    pending = unfinished(records)
    return bool(pending) and silent_s > pending.get("seconds", 0.0) + GRACE_S


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
