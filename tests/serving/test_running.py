"""The notes on running servers: found by folder, private, and gone or ignored when their process is."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from redpp_serve.errors import RedppError
from redpp_serve.processes import started
from redpp_serve.serving.running import Running, find, find_all, register
from redpp_serve.state_folders import state_folder


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "run"))
    return tmp_path / "run" / "redpp-serve"


def note(folder: Path, pid: int | None = None, kind: str = "triton") -> Running:
    pid = pid or os.getpid()
    return Running(
        str(folder.resolve()),
        "small",
        kind,
        pid,
        started(pid) or 0.0,
        ("1", "2"),
        {"original": "http://a"},
        "http://m",
        ["http://b"],
        {"inference": {"k": "v"}, "management": {}},
        {"name": "small"},
        {"gateway": "g"},
    )


def test_what_is_registered_is_found_by_any_way_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dist" / "a b ü"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    with register(note(folder)):
        for way in (folder, tmp_path / "link", Path("."), folder / ".." / folder.name):
            assert find(way) == note(folder)
    with pytest.raises(RedppError, match=r"no server is running for \..*start one with redpp-serve serve"):
        find(Path("."))


def test_notes_are_this_users_alone(tmp_path: Path, state: Path) -> None:
    with register(note(tmp_path)):
        (file,) = state.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert not stat.S_IMODE(state.stat().st_mode) & 0o066, "root lets nginx pass through"
    assert list(state.iterdir()) == []


def test_an_exception_removes_the_note(tmp_path: Path, state: Path) -> None:
    with pytest.raises(ZeroDivisionError), register(note(tmp_path)):
        raise ZeroDivisionError
    assert list(state.iterdir()) == []


def test_a_note_that_a_killed_process_left_is_ignored_and_removed(tmp_path: Path, state: Path) -> None:
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
        "from tests.serving.test_running import note; from redpp_serve.serving.running import register; "
        "kept = register(note(Path(sys.argv[2]))); kept.__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parents[2]), str(tmp_path)], timeout=60)
    assert len(list(state.iterdir())) == 1
    with pytest.raises(RedppError, match="no server is running"):
        find(tmp_path)
    assert list(state.iterdir()) == []


def test_another_process_with_the_same_number_is_another_one(tmp_path: Path) -> None:
    with register(replace(note(tmp_path), created=1.0)), pytest.raises(RedppError, match="no server is running"):
        find(tmp_path)


@pytest.mark.skipif(not psutil.LINUX, reason="psutil counts from the machine's start on Linux alone")
def test_setting_the_clock_loses_no_server(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = psutil.Process().create_time()
    boot = psutil.boot_time()
    with register(note(tmp_path)):
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + 3600)  # where Linux says that it was started
        assert psutil.Process().create_time() == epoch + 3600
        assert find(tmp_path).pid == os.getpid() and len(list(state.iterdir())) == 1


def test_two_servers_of_a_folder_are_told_apart_by_kind_or_refused(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with register(note(tmp_path)), register(note(tmp_path, other.pid, "torchserve")):
            with pytest.raises(RedppError, match=f"2 servers are running.*torchserve of process {other.pid}.*--server"):
                find(tmp_path)
            assert {running.kind for running in find_all(tmp_path)} == {"triton", "torchserve"}
            assert find(tmp_path, "torchserve").pid == other.pid and find(tmp_path, "triton").pid == os.getpid()
        with register(note(tmp_path)), pytest.raises(RedppError, match="no torchserve is running.*--server torchserve"):
            find(tmp_path, "torchserve")
    finally:
        other.communicate(b"\n", timeout=10)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"folder": "x", "versions": [1, 2]})])
def test_damaged_notes_are_ignored(tmp_path: Path, state: Path, content: str) -> None:
    with register(note(tmp_path)):
        (file,) = state.iterdir()
        file.write_text(content)
        with pytest.raises(RedppError, match="no server is running"):
            find(tmp_path)


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, state: Path) -> None:
    state_folder().chmod(0o777)
    with pytest.raises(RedppError, match="not a folder of this user alone.*XDG_STATE_HOME"):
        find(tmp_path)


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path, state: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    state.parent.mkdir()
    state.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RedppError, match="not a folder of this user alone"), register(note(tmp_path)):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []
