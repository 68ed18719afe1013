"""The state folder of an A/B test: which file holds what, how it is read while it grows, and who owns it.

A lock file for each packaged folder is held as long as the supervisor lives: the system itself releases the lock of a
process that was killed. What such a process leaves stays, and serves users, until it is taken over or ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from redpp_serve.ab.journal import Journal, key_path, read_journal
from redpp_serve.errors import RedppError
from redpp_serve.files import read_bounded, write_atomically

# All that `ab status` reads later is in these files of the state folder.
SPEC = "spec.json"  # written by ab start, and by the supervisor when users are served: the test, see `spec.Started`
GATEWAY = "gateway"  # nginx's folder
PACKAGE = "package"  # with a candidate: links to the original of one package and the pruned version of another
PAIRS = "pairs.jsonl"  # written by the recorder: a line for each request that both versions got
RECORDER = "recorder.json"  # written by the recorder: its counts
WINDOWS = "windows.jsonl"  # written by the supervisor: the server's counters, window by window
COUNTS = "counts.json"  # written by the supervisor: what users got, and the server's counters over the whole test
DECISIONS = "decisions.jsonl"  # written by the supervisor: what was decided, see `pilot.Decision`
HEARTBEAT = "supervisor.json"  # written by the supervisor, see `Heartbeat`
RECORDER_LOG, GRPC_LOG = "recorder.log", "grpc.log"  # in the folder of logs, see `logs`
_DYING_S = 2.0  # threads of a supervisor that was just killed may hold its lock for a moment


def write_json(path: Path, document: Any) -> None:
    """Write a document so that a reader sees the old one or the new one."""
    write_atomically(path, json.dumps(document), mode=0o600, durable=False)


def read_json(path: Path) -> Any:
    """Return the document, or None where there is none that can be read."""
    try:
        return json.loads(read_bounded(path))
    except (OSError, ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Heartbeat:
    """What the supervisor says of itself.

    Attributes:
        ready: True once users are served.
        problems: sentences about what it could not mend.
        looked: its last look, on the clock of ``time.monotonic``; None before the first.
        refusal: the parts of the `RedppError` that ended the start; None where it did not fail.
    """

    ready: bool = False
    problems: tuple[str, ...] = ()
    looked: float | None = None
    refusal: tuple[str, str, str] | None = None

    def write(self, state: Path) -> None:
        """Write it to the state folder."""
        write_json(state / HEARTBEAT, asdict(self))

    @classmethod
    def read(cls, state: Path) -> Heartbeat:
        """Read it from the state folder; not ready where there is none."""
        document = read_json(state / HEARTBEAT)
        if document is None:
            return cls()
        refusal = document["refusal"]
        return cls(document["ready"], tuple(document["problems"]), document["looked"], refusal and tuple(refusal))


class Lines:
    """The JSON objects of a growing file. A file that was replaced, or has shrunk, is read from its start."""

    def __init__(self, path: Path, place: Sequence[int] = (0, -1)) -> None:
        self.path = path
        self._offset, self._inode = place

    @property
    def place(self) -> tuple[int, int]:
        """How far it has been read: the constructor's argument with which another process goes on."""
        return self._offset, self._inode

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the objects added since the last call; an unfinished line comes next time."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            with suppress(ValueError):  # its writer was killed in the middle of the line
                yield json.loads(line)


@contextmanager
def supervising(folder: Path) -> Iterator[None]:
    """Be the one supervisor for a packaged folder while the body runs.

    Raises:
        RedppError: another supervisor lives.
    """
    path = key_path(folder, "lock")
    with _locked(path, patience_s=1.0) as file:
        if file is None:
            raise already_runs(folder)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def supervised(folder: Path) -> bool:
    """Return True if a supervisor lives for the folder, even one that is still starting."""
    path = key_path(folder, "lock")
    with _locked(path) as file:
        if file is None and path.exists():
            return True
    journal = read_journal(folder)  # the lock file itself may have been removed
    return journal is not None and journal.supervised()


def left_behind(folder: Path) -> Journal | None:
    """Return the journal of a test whose supervisor was killed; its users may well be served."""
    return None if supervised(folder) else read_journal(folder)


def clean(folder: Path) -> bool:
    """End what a killed supervisor has left, and return True if there was anything; not while one lives."""
    path = key_path(folder, "lock")
    with _locked(path, patience_s=_DYING_S) as file:
        if file is None:
            return False
        journal = read_journal(folder)
        if journal:
            journal.end()
        path.unlink(missing_ok=True)
        return journal is not None


def already_runs(folder: Path) -> RedppError:
    """Return the refusal of a second A/B test for a folder."""
    quoted = shlex.quote(str(folder))
    ways = f"see it with redpp-serve ab status {quoted}, end it with redpp-serve ab stop {quoted}"
    return RedppError(f"an A/B test already runs for {folder}", "one for each folder", ways)


@contextmanager
def _locked(path: Path, patience_s: float = 0.0) -> Iterator[TextIO | None]:
    """Yield the lock file, locked; None where a living supervisor holds it, or where there is none.

    With patience the file is made, and tried again: another command may hold it for the moment in which it looks
    whether a supervisor lives, or may remove it.
    """
    deadline = time.monotonic() + patience_s
    flags = os.O_RDWR | (os.O_CREAT if patience_s else 0)
    while True:
        try:
            file = os.fdopen(os.open(path, flags, 0o600), "r+", encoding="utf-8")
        except FileNotFoundError:
            yield None
            return
        with file:
            if _lock(file) and _is_at(file, path):
                yield file
                return
        if time.monotonic() >= deadline:
            yield None
            return
        time.sleep(0.02)


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: TextIO, path: Path) -> bool:
    """Return True if the path still leads to this file: it may have been removed before it was locked."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False
