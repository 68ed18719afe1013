"""The state folder: one supervisor owns it, files are read while they grow, and a killed supervisor leaves nothing."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from redpp_serve.ab.journal import Journal, begin_journal, read_journal, states
from redpp_serve.ab.spec import Spec, Started, parse_split
from redpp_serve.ab.state import Lines, clean, left_behind, supervised, supervising
from redpp_serve.errors import RedppError
from redpp_serve.processes import Adopted, started
from redpp_serve.serving.running import Running

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
from redpp_serve.ab.journal import begin_journal
from redpp_serve.ab.spec import Spec, Started, parse_split
from redpp_serve.ab.state import supervising
folder, state = map(Path, sys.argv[1:])
with supervising(folder):
    spec = Spec(folder, None, "torchserve", parse_split("50:50"), None, False)
    journal = begin_journal(Started(spec, "m", 1.0), state)
    pids = []
    for stay in ("300", "0"):
        command = [sys.executable, "-c", {LAUNCHER!r}, stay]
        child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
        journal.watch_session(child)
        pids += [child.pid, int(child.stdout.readline())]
    (home := state.with_name("home")).mkdir()
    journal.watch_folder(home)
    print(*pids, flush=True)
    time.sleep(300)
"""


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of lock files."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "run"))
    return tmp_path / "run"


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_a_killed_supervisor_leaves_runs_on_and_can_be_ended(tmp_path: Path, run: Path) -> None:
    folder, state = tmp_path / "package", tmp_path / "state"
    state.mkdir()
    command = [sys.executable, "-c", SUPERVISOR, str(folder), str(state)]
    bystander = subprocess.Popen(["sleep", "300"])
    supervisor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout
    pids = [int(pid) for pid in supervisor.stdout.readline().split()]
    try:
        assert supervised(folder) and left_behind(folder) is None and not clean(folder)
        with pytest.raises(RedppError, match="an A/B test already runs"), supervising(folder):
            pytest.fail("there are two supervisors")
        assert all(map(alive, (pids[0], pids[1], pids[3])))
        supervisor.send_signal(signal.SIGKILL)
        supervisor.wait()
        left = left_behind(folder)
        assert left and left.state == state and states() == [state]
        assert [leader.pid for leader in left.living()] == [pids[0]] and all(map(alive, (pids[0], pids[1], pids[3])))
        shutil.rmtree(state)  # the journal lies elsewhere
        assert clean(folder) and not any(map(alive, pids)) and alive(bystander.pid)
        assert not (tmp_path / "home").exists() and left_behind(folder) is None and not clean(folder)
        assert not any((run / "redpp-serve").iterdir())
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        bystander.kill()
        bystander.wait()


def journal_for(folder: Path) -> Journal:
    test = Started(Spec(folder, None, "torchserve", parse_split("90:10"), "X-User", True), "m", 2.5)
    return begin_journal(test, folder / "state")


def test_a_journal_is_read_as_it_was_written_and_written_again_where_it_is_gone(tmp_path: Path) -> None:
    journal = journal_for(tmp_path)
    journal.parts["server"] = {"home": "/x", "leaders": {"TorchServe": [1, 2.5]}}
    journal.running = Running("/dist", "m", "torchserve", 1, 0.0, ("1.0", "2.0"), {"original": "u"}, "m", ["n"])
    for _ in range(2):
        journal.write()
        read = read_journal(tmp_path)
        assert read and replace(read, _written=journal._written) == journal
        assert journal.path.stat().st_mode & 0o077 == 0, "it holds tokens"
        journal.path.unlink()
    assert read_journal(tmp_path) is None


def test_a_full_disk_leaves_the_last_journal_and_the_next_look_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = journal_for(tmp_path)
    with monkeypatch.context() as full:
        full.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        journal.watch_session(Adopted(os.getpid(), 0.0))
        assert (read_journal(tmp_path) or journal).sessions == []
    journal.write()
    assert (read_journal(tmp_path) or journal_for(tmp_path)).sessions[0][0] == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"test": 1}', "\x00"])
def test_a_damaged_journal_stops_nobody(tmp_path: Path, text: str) -> None:
    journal_for(tmp_path).path.write_text(text)
    assert read_journal(tmp_path) is None and left_behind(tmp_path) is None and list(states()) == []
    with supervising(tmp_path):
        assert supervised(tmp_path)


def test_an_empty_lock_file_stops_nobody(tmp_path: Path, run: Path) -> None:
    with supervising(tmp_path):
        path = next(run.rglob("ab-*.lock"))
    path.write_text("")
    assert not supervised(tmp_path) and clean(tmp_path) is False and not path.exists()
    path.write_text("")
    with supervising(tmp_path):
        assert supervised(tmp_path)


def test_a_supervisor_is_known_though_its_lock_file_was_removed(tmp_path: Path) -> None:
    journal = journal_for(tmp_path)
    begun = started(os.getpid()) or 0.0
    journal.supervisor = [os.getpid(), begun]
    journal.write()
    assert supervised(tmp_path) and left_behind(tmp_path) is None
    journal.supervisor = [os.getpid(), begun - 5]  # an earlier process of its number
    journal.write()
    assert not supervised(tmp_path) and left_behind(tmp_path) is not None


def test_commands_that_look_at_the_lock_never_prevent_a_start(tmp_path: Path) -> None:
    """Others look, and clean up after nobody, at the very moment of a start."""
    ended, failures = threading.Event(), []

    def look() -> None:
        while not ended.is_set():
            try:
                supervised(tmp_path), clean(tmp_path), left_behind(tmp_path)
            except Exception as error:
                failures.append(error)
            time.sleep(0.0005)

    others = [threading.Thread(target=look) for _ in range(4)]
    for other in others:
        other.start()
    try:
        for _ in range(40):
            with supervising(tmp_path):
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
