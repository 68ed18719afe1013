"""The state folder: one supervisor owns it, files are read while they grow, and a killed supervisor leaves nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from redpp_serve.ab.state import Lines, abandoned, clean, supervised, supervising
from redpp_serve.errors import RedppError

# Starts a child in a session of its own, which starts another and ends: as a launcher does with Java.
LAUNCHER = """
import subprocess, sys, time
process = subprocess.Popen(["sleep", "300"])
print(process.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""
SUPERVISOR = f"""
import subprocess, sys, time
from pathlib import Path
from redpp_serve.ab.state import supervising
from redpp_serve.processes import Guard
folder, state = map(Path, sys.argv[1:])
with supervising(folder, state):
    guard, pids = Guard(), []
    guard.watch_folder(state)
    for stay in ("300", "0"):
        command = [sys.executable, "-c", {LAUNCHER!r}, stay]
        child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
        guard.watch_session(child)
        pids += [child.pid, int(child.stdout.readline())]
    print(*pids, flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of lock files."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_processes_and_folder_of_a_killed_supervisor_are_removed(tmp_path: Path, run: Path) -> None:
    folder, state = tmp_path / "package", tmp_path / "state"
    state.mkdir()
    command = [sys.executable, "-c", SUPERVISOR, str(folder), str(state)]
    bystander = subprocess.Popen(["sleep", "300"])
    supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout
    pids = [int(pid) for pid in supervisor.stdout.readline().split()]
    try:
        assert supervised(folder) and not abandoned(folder) and not clean(folder)
        with pytest.raises(RedppError, match="an A/B test already runs"), supervising(folder, state):
            pytest.fail("there are two supervisors")
        assert all(map(alive, (pids[0], pids[1], pids[3])))
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()
        assert abandoned(folder)
        assert clean(folder) and not any(map(alive, pids)) and alive(bystander.pid)
        assert not state.exists() and not abandoned(folder) and not clean(folder)
        assert list(run.rglob("*.lock")) == []
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        bystander.kill()
        bystander.wait()


def test_the_next_supervisor_cleans_up_first(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the guard has been killed, too: then the folder goes after a while."""
    monkeypatch.setattr("redpp_serve.ab.state._GUARD_S", 0.1)
    (left := tmp_path / "left").mkdir()
    with supervising(tmp_path, left):
        path = next(run.rglob("ab-*.lock"))
        text = path.read_text()
    assert not supervised(tmp_path) and not path.exists()
    path.write_text(text)
    with supervising(tmp_path, tmp_path / "new"):
        assert not left.exists() and path.read_text() == str(tmp_path / "new")


def test_an_empty_lock_file_stops_nobody(tmp_path: Path, run: Path) -> None:
    with supervising(tmp_path, tmp_path / "state"):
        path = next(run.rglob("ab-*.lock"))
    path.write_text("")
    assert abandoned(tmp_path) and clean(tmp_path) is False and not path.exists()
    path.write_text("")
    with supervising(tmp_path, tmp_path / "state"):
        assert supervised(tmp_path)


def test_commands_that_look_at_the_lock_never_prevent_a_start(tmp_path: Path) -> None:
    """Others look, and clean up after nobody, at the very moment of a start."""
    ended, failures = threading.Event(), []

    def look() -> None:
        while not ended.is_set():
            try:
                supervised(tmp_path), clean(tmp_path), abandoned(tmp_path)
            except Exception as error:
                failures.append(error)
            time.sleep(0.0005)

    others = [threading.Thread(target=look) for _ in range(4)]
    for other in others:
        other.start()
    try:
        for _ in range(40):
            with supervising(tmp_path, tmp_path / "state"):
                assert supervised(tmp_path)
    finally:
        ended.set()
        for other in others:
            other.join()
    assert not failures


def test_a_growing_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = Lines(path)
    assert list(lines.new()) == []
    path.write_text('{"a":1}\n{"a":')
    assert list(lines.new()) == [{"a": 1}]
    with path.open("a") as file:
        file.write('2}\n{"cut sho\n{"a":3}\n')
    assert list(lines.new()) == [{"a": 2}, {"a": 3}] and list(lines.new()) == []
    path.replace(tmp_path / "old")
    path.write_text('{"a":4}\n' * 9)  # longer than the one before
    assert list(lines.new()) == [{"a": 4}] * 9
    path.write_text("")
    assert list(lines.new()) == []
    path.write_text('{"a":5}\n')
    assert list(lines.new()) == [{"a": 5}]
