"""Ending every process of a started program, also those whose parent has ended before them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psutil import Process


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
