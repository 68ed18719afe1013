"""Atomic writes, locks, zips of equal bytes, and the user's folders."""

import errno
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from redpp_serve.files import cache_folder, deterministic_zip, locked, write_atomically

HOLD = """
import sys, time
from pathlib import Path
from redpp_serve.files import locked
with locked(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def within(seconds: float, body: Callable[[], None]) -> None:
    """Fail when the body takes longer, as it would with a lock that nobody gives back."""
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive()


def test_a_write_has_the_mode_asked_for_and_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    for content, mode, durable in (("first, é\r\n", 0o644, True), (b"2nd", 0o600, False)):
        write_atomically(path, content, mode=mode, durable=durable)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert path.stat().st_mode & 0o777 == mode
    assert os.listdir(path.parent) == ["file"]


def test_a_secret_is_private_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    monkeypatch.setattr(os, "fsync", lambda handle: modes.append(os.fstat(handle).st_mode & 0o777))
    write_atomically(tmp_path / "token", "secret", mode=0o644)
    assert modes == [0o600]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "chmod", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(OSError, match="No space left"):
                write_atomically(path, b"new, and longer")
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"], call


def test_a_lock_is_one_holders_until_it_ends_or_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "True\n"
        start = time.monotonic()
        for wait_s in (0.0, 0.2):
            with locked(path, wait_s) as held:
                assert held is False
        assert 0.2 <= time.monotonic() - start < 10
    finally:
        holder.kill()
        holder.wait()

    def take() -> None:
        with locked(path) as held:
            assert held is True
            with locked(path.with_name("other")) as other:
                assert other is True

    within(10, take)
    within(10, take)


def test_a_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock"):
        raise ZeroDivisionError
    with locked(tmp_path / "lock", 0.0) as held:
        assert held


def test_what_is_in_a_locks_place_neither_hangs_nor_fails(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    seen: dict[str, bool] = {}

    def take() -> None:
        for name in ("pipe", "folder", "folder/absent/lock"):
            with locked(tmp_path / name, 1.0) as held:
                seen[name] = held

    within(10, take)
    assert len(seen) == 3 and seen["folder"] is False


@pytest.mark.skipif(os.getuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_that_cannot_be_written_to_gives_no_lock(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with locked(tmp_path / "lock", 1.0) as held:
            assert held is False
    finally:
        tmp_path.chmod(0o700)


def test_a_zips_bytes_are_those_of_its_entries_in_their_order() -> None:
    data = deterministic_zip({"b": b"1", "a": b"2"})
    assert data == deterministic_zip({"b": b"1", "a": b"2"}) != deterministic_zip({"a": b"2", "b": b"1"})
    with zipfile.ZipFile(BytesIO(data)) as archive:
        assert [(i.filename, i.date_time, i.compress_type) for i in archive.infolist()] == [
            (name, (1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED) for name in ("b", "a")
        ]
        assert archive.read("a") == b"2"


def test_the_cache_folder_is_the_users_and_a_relative_setting_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "redpp-serve" and not (tmp_path / "redpp-serve").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    for setting in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", setting)
        assert cache_folder() == tmp_path / ".cache" / "redpp-serve"
