"""Processes in sessions are found and ended, and a guard cleans up after a supervisor that is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from redpp_serve.errors import RedppError
from redpp_serve.processes import (
    Adopted,
    command_line,
    find_program,
    free_shared_memory,
    kill_session,
    session,
    shared_memory,
    started,
    terminate,
    wait_and_end,
    wait_for_an_end,
)
from tests.support.tools import REQUIRED, tool

# Its leader ends at once, and leaves a process in the session, as a server does that was killed.
_SUPERVISOR = """
import os, subprocess, sys
from pathlib import Path
from redpp_serve.processes import Guard
guard = Guard()
guard.watch_folder(Path(sys.argv[1]))
leader = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!"], stdout=subprocess.PIPE, start_new_session=True)
guard.watch_session(leader)
print(leader.stdout.readline().decode().strip(), guard._process.pid, flush=True)
leader.wait()
if sys.argv[2] == "dismiss":
    guard.dismiss()
else:
    os.kill(os.getpid(), 9)
"""


def home(tmp_path: Path) -> Path:
    """Its name is no other test's: shared memory has no folders."""
    return tmp_path / f"home{os.getpid()}"


@pytest.fixture
def end(tmp_path: Path) -> Callable[[str], tuple[psutil.Process, int]]:
    """Lets a supervisor end in that way; its server's process, and the guard's number."""
    home(tmp_path).mkdir()

    def run(how: str) -> tuple[psutil.Process, int]:
        command = [sys.executable, "-c", _SUPERVISOR, str(home(tmp_path)), how]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
        server, guard = map(int, done.stdout.split())
        return psutil.Process(server), guard

    return run


def test_what_a_killed_supervisor_leaves_is_ended(
    tmp_path: Path, end: Callable[[str], tuple[psutil.Process, int]]
) -> None:
    memory = Path("/dev/shm") / f"{shared_memory(home(tmp_path))}memory"
    memory.touch()
    try:
        server, guard = end("kill")
        deadline = time.monotonic() + 30
        while started(guard) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not started(guard) and not started(server.pid)
        assert not home(tmp_path).exists() and not memory.exists()
    finally:
        memory.unlink(missing_ok=True)


def test_a_dismissed_guard_ends_and_touches_nothing(
    tmp_path: Path, end: Callable[[str], tuple[psutil.Process, int]]
) -> None:
    server, guard = end("dismiss")
    try:
        assert not started(guard) and server.is_running() and home(tmp_path).exists()
    finally:
        server.kill()


def test_a_number_that_is_somebody_elses_by_now_is_left_alone() -> None:
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        wait_and_end([json.dumps(["session", [other.pid, 12.5]])])
        assert other.poll() is None
        wait_and_end([json.dumps(["session", [other.pid, started(other.pid)]])])
        assert not started(other.pid)
    finally:
        other.kill()
        other.wait()


def test_what_a_leader_that_has_ended_leaves_in_its_session_is_ended() -> None:
    leader = subprocess.Popen(["sh", "-c", "sleep 60 & read line"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        begun = started(leader.pid)
        assert begun is not None
        deadline = time.monotonic() + 10
        while len(session(leader.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        leader.communicate(b"\n", timeout=10)
        assert len(session(leader.pid)) == 1 and started(leader.pid) is None
        wait_and_end([json.dumps(["session", [leader.pid, begun]])])
        assert session(leader.pid) == []
    finally:
        kill_session(leader)


def test_one_guard_ends_several_sessions_and_folders(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b\n")]
    sessions = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2)]
    try:
        for folder in folders:
            (folder / "within").mkdir(parents=True)
        told = [["session", [leader.pid, started(leader.pid)]] for leader in sessions]
        wait_and_end(json.dumps(each) for each in (*told, *(["folder", str(folder)] for folder in folders)))
        assert [started(leader.pid) for leader in sessions] == [None, None]
        assert list(tmp_path.iterdir()) == []
    finally:
        for leader in sessions:
            leader.kill()
            leader.wait()


def test_only_the_shared_memory_of_a_folder_is_freed(tmp_path: Path) -> None:
    ours, other = (Path("/dev/shm") / f"{shared_memory(tmp_path / name)}x" for name in ("ours", "other"))
    for memory in (ours, other):
        memory.touch()
    try:
        free_shared_memory(tmp_path / "ours")
        assert not ours.exists() and other.exists()
    finally:
        other.unlink()


def test_a_process_of_another_supervisor_is_waited_for_and_killed() -> None:
    """Through its number and its start, which tell it from a later one."""
    process = subprocess.Popen(["sleep", "60"])
    adopted = Adopted(process.pid, started(process.pid) or 0.0)
    assert adopted.poll() is None and Adopted(process.pid, 1.0).poll() == 0
    Adopted(process.pid, 1.0).kill()
    with pytest.raises(subprocess.TimeoutExpired):
        adopted.wait(0.05)
    begun = time.monotonic()
    wait_for_an_end([process.pid], 0.05)
    assert time.monotonic() - begun > 0.04
    threading.Timer(0.1, adopted.kill).start()
    wait_for_an_end([process.pid, os.getpid()], 30.0)
    assert time.monotonic() - begun < 10
    assert process.wait() == -signal.SIGKILL and adopted.wait(1) == 0 and adopted.poll() == 0
    adopted.kill()
    wait_for_an_end([process.pid], 30.0)
    assert time.monotonic() - begun < 10, "one that has ended is not waited for"


def test_terminating_tells_some_and_waits_for_all() -> None:
    leader = subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True)
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # until the shell has started its child, and the child its program
            members = session(leader.pid)
            sleeper = next((process for process in members if command_line(process)[:1] == ["sleep"]), None)
            if sleeper:
                break
            time.sleep(0.01)
        terminate(members, lambda process: process == sleeper, timeout_s=10)
        assert leader.wait(10) == 0 and session(leader.pid) == [] and command_line(sleeper) == []
    finally:
        kill_session(leader)


def test_a_program_is_found_in_path_or_among_those_for_administration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for folder in ("sbin", "bin"):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "nginx"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert find_program("nginx", [str(tmp_path / "sbin")]) == program  # once it is in both, PATH wins


def test_a_missing_program_is_named_with_its_package_and_skips_or_fails_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, package in (("nginx", "nginx-light"), ("redpp-absent", "redpp-absent")):
        with pytest.raises(RedppError, match=f"{name} is not installed.*apt-get install {package}"):
            find_program(name, [])
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="redpp-absent"):
        tool("redpp-absent")
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="redpp-absent"):
        tool("redpp-absent")
