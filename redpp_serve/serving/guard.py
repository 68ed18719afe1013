"""Ends a server whose supervisor was killed and could not: a process beside it that waits for the supervisor's end.

It learns of that end from a pipe, which the system closes with whatever process held it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .processes import free_shared_memory, kill_members
from .registry import started


class Guard:
    """Removes a server's private folder and ends its sessions, unless it is dismissed before this process ends.

    Args:
        home: the private folder; shared memory whose names begin with its name and a hyphen goes with it.
    """

    def __init__(self, home: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(home)], cwd=home, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True, text=True,
        )  # fmt: skip

    def watch(self, leader: subprocess.Popen[bytes]) -> None:
        """This session too."""
        self._tell(f"{leader.pid} {started(leader.pid)}")

    def dismiss(self) -> None:
        """Everything has been ended; returns when the guard has too."""
        self._tell(_DISMISSED)
        with suppress(OSError):
            self._process.communicate()

    def _tell(self, line: str) -> None:
        assert self._process.stdin
        with suppress(OSError):  # someone has ended the guard: the server runs on without
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()


_DISMISSED = "dismissed"


def wait_and_end(home: Path, lines: Iterable[str]) -> None:
    """Read to the end of the lines that `Guard` writes, then end what they name; nothing where it was dismissed."""
    leaders = []
    for line in lines:
        if line.strip() == _DISMISSED:
            return
        leaders.append(line.split())
    for number, begun in leaders:
        now = started(int(number))
        if now is None or str(now) == begun:  # else its number has gone to somebody else's process
            kill_members(int(number))
    shutil.rmtree(home, ignore_errors=True)
    free_shared_memory(f"{home.name}-")


if __name__ == "__main__":
    wait_and_end(Path(sys.argv[1]), sys.stdin)
