"""What a killed supervisor leaves behind is found and ended, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from redpp_serve.ab.state import abandoned, clean, supervised, supervising
from redpp_serve.errors import RedppError
from redpp_serve.processes import started

# Starts a child in a session of its own, which starts another and ends: as a launcher does with Java.
SUPERVISOR = """
import subprocess, sys, time
from pathlib import Path
from redpp_serve.ab.state import supervising
launcher = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); time.sleep(%s)"
with supervising(Path(sys.argv[1])) as journal:
    pids = []
    for stay in ("300", "0"):
        child = subprocess.Popen([sys.executable, "-c", launcher % stay], start_new_session=True, stdout=subprocess.PIPE)
        pids += [child.pid, int(child.stdout.readline())]
        journal.write([Path(sys.argv[2])])
    print(*pids, flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def own_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_killed_supervisors_processes_and_folders_go(tmp_path: Path) -> None:
    folder, home = tmp_path / "package", tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-c", SUPERVISOR, str(folder), str(home)]
    bystander = subprocess.Popen(["sleep", "300"])
    supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout
    pids = [int(pid) for pid in supervisor.stdout.readline().split()]
    try:
        assert supervised(folder) and not abandoned(folder) and not clean(folder)
        with pytest.raises(RedppError, match="an experiment already runs"), supervising(folder):
            pytest.fail("there are two supervisors")
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()
        assert abandoned(folder) and all(map(alive, (pids[0], pids[1], pids[3])))
        assert clean(folder)
        deadline = time.monotonic() + 5
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(alive, pids)) and alive(bystander.pid)
        assert not home.exists() and not abandoned(folder) and not clean(folder)
        assert list((tmp_path / "run").rglob("*.lock")) == []
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        bystander.kill()
        bystander.wait()


def test_the_next_supervisor_ends_what_is_left_first(tmp_path: Path) -> None:
    left = subprocess.Popen(["sleep", "300"], start_new_session=True)
    other = subprocess.Popen(["sleep", "300"], start_new_session=True)
    (tmp_path / "home").mkdir()
    with supervising(tmp_path):
        path = next((tmp_path / "run").rglob("ab-*.lock"))
    assert not supervised(tmp_path) and not path.exists()
    created = started(left.pid)
    assert created is not None
    # `other` stands for a process that was given the number of one that had ended long before
    path.write_text(
        json.dumps(
            {"processes": [[left.pid, created], [other.pid, created - 100]], "folders": [str(tmp_path / "home")]}
        )
    )
    with supervising(tmp_path):
        assert not alive(left.pid) and alive(other.pid)
        assert not (tmp_path / "home").exists()
    other.kill()
    other.wait()


def test_a_journal_that_was_cut_short_stops_nobody(tmp_path: Path) -> None:
    with supervising(tmp_path):
        path = next((tmp_path / "run").rglob("ab-*.lock"))
    path.write_text('{"processes": [[1')
    assert clean(tmp_path) is False
    with supervising(tmp_path) as journal:
        journal.write([])


def test_commands_that_look_meanwhile_keep_nobody_from_starting(tmp_path: Path) -> None:
    """Others look, and clean up after nobody, at the very moment of a start."""
    ended, failures = threading.Event(), []

    def look() -> None:
        while not ended.is_set():
            try:
                supervised(tmp_path), clean(tmp_path), abandoned(tmp_path)
            except Exception as error:
                failures.append(error)

    others = [threading.Thread(target=look) for _ in range(4)]
    for other in others:
        other.start()
    try:
        for _ in range(40):
            with supervising(tmp_path) as journal:
                journal.write([])
                assert supervised(tmp_path)
    finally:
        ended.set()
        for other in others:
            other.join()
    assert not failures
