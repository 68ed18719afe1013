"""The state folder of an experiment: who writes what, and how another process reads it while it grows."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# In the state folder. Whatever is read later, by `ab status` too, is in these files and nowhere else.
SPEC = "experiment.json"  # the supervisor writes it: what was asked for
GATEWAY = "gateway"  # nginx's folder
PAIRS = "pairs.jsonl"  # the recorder: one line for every request that both versions got
RECORDER = "recorder.json"  # the recorder: its counts
WINDOWS = "windows.jsonl"  # the supervisor: the server's counters, window by window
COUNTS = "counts.json"  # the supervisor: what users got, and the server's counters over the whole experiment
STATUS = "supervisor.json"  # the supervisor: whether it is ready, or what it could not mend
SUPERVISOR_LOG, RECORDER_LOG = "supervisor.log", "recorder.log"


def write_json(path: Path, document: Any) -> None:
    """At once: a reader sees the old document or the new one."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(json.dumps(document), encoding="utf-8")
    os.replace(scratch, path)


def read_json(path: Path) -> Any:
    """The document, or None where there is none yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


@contextmanager
def not_swept(folder: Path) -> Iterator[None]:
    """While the body runs, what cleans a system's folder for temporary files leaves the folder alone.

    systemd-tmpfiles removes files that nobody touched for days, such as the switch of a promotion, but passes by a
    folder that is locked.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


class Lines:
    """The JSON objects of a growing file; `new` gives those that were added since the last call.

    A file that became another one (put aside, or written anew) is read from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._inode = 0, -1

    def new(self) -> Iterator[dict[str, Any]]:
        """Whole lines only; the rest of an unfinished one comes next time."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            with suppress(ValueError):  # of a process that was killed in the middle of a line
                yield json.loads(line)
