"""Ends a server whose supervisor was killed and could not: a process beside it that waits for the supervisor's end.

It learns of that end from a pipe, which the system closes with whatever process held it.

Ending every process of a started program, also those whose parent has ended before them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psutil import Process


def started(pid: int) -> float | None:
    """When the process started, seconds since a moment that is the same for all processes; None when it does not run.

    On Linux since the machine's start: psutil counts from the epoch there, and moves every process when the clock is
    set.
    """
    from psutil import LINUX, STATUS_ZOMBIE, Error, Process, boot_time

    try:
        process, since = Process(pid), boot_time() if LINUX else 0.0
        return None if process.status() == STATUS_ZOMBIE else round(process.create_time() - since, 2)
    except Error:
        return None


def session(leader: subprocess.Popen[bytes]) -> list[Process]:
    """The living processes in the session that ``leader`` opened, also those whose parent has ended."""
    return members(leader.pid)


def members(number: int) -> list[Process]:
    """The living processes in the session of that number, which is its leader's process id."""
    from psutil import STATUS_ZOMBIE, Error, process_iter

    found = []
    for process in process_iter():
        try:
            if os.getsid(process.pid) == number and process.status() != STATUS_ZOMBIE:
                found.append(process)
        except (OSError, Error):  # ended meanwhile, or not ours to ask
            continue
    return found


def kill_session(leader: subprocess.Popen[bytes]) -> None:
    """End what is left of a session. The leader goes first: a launcher could start Java at this very moment."""
    if leader.poll() is None:
        leader.kill()
    kill_members(leader.pid)
    leader.wait()


def kill_members(number: int) -> None:
    """End every process in the session of that number."""
    from psutil import Error, wait_procs

    for _ in range(10):  # Java may start workers between a look and a kill
        left = members(number)
        for process in left:
            try:
                process.kill()
            except Error:
                continue
        if not left:
            break
        wait_procs(left, timeout=1)


def free_shared_memory(prefix: str) -> None:
    """Remove the shared memory whose names begin with that, which is not empty."""
    for left in Path("/dev/shm").glob(f"{prefix}*") if prefix else ():
        left.unlink(missing_ok=True)


def runs(process: Process, argument: str) -> bool:
    """Whether the process's command line holds this argument."""
    from psutil import Error

    try:
        return argument in process.cmdline()
    except Error:
        return False


class Guard:
    """Removes a server's private folder and ends its sessions, unless it is dismissed before this process ends.

    Args:
        home: the private folder; shared memory whose names begin with its name and a hyphen goes with it.
    """

    def __init__(self, home: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(home)],
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

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
