"""Which workers live: the memory of those that ended must not count for ever.

Each worker holds a lock on a file of its own in the folder of metrics, and the system takes the lock back however the
worker ends. Process ids would not do: they are used again, and mean nothing in another container.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

_held: dict[Path, IO[bytes]] = {}


def show_life(folder: str | Path) -> None:
    """Lock this process's file. Comes before the process writes metrics, so that none of them is without a lock."""
    path = _path(folder, str(os.getpid()))
    if path not in _held:  # a second lock would wait for the first
        _held[path] = path.open("wb")
        fcntl.flock(_held[path], fcntl.LOCK_EX)


def counted_files(folder: str | Path) -> list[str]:
    """The workers' files that count: all but the gauges, such as memory, of workers that live no more."""
    files = sorted(Path(folder).glob("*.db"))
    return [str(f) for f in files if not f.name.startswith("gauge_live") or _lives(folder, f.stem.rsplit("_", 1)[1])]


def _lives(folder: str | Path, worker: str) -> bool:
    try:
        with _path(folder, worker).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


def _path(folder: str | Path, worker: str) -> Path:
    return Path(folder) / f"{worker}.alive"
