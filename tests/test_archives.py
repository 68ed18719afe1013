"""Archives and arrays of strangers: what they claim is looked at before anything is read."""

import os
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from redpp_serve.archives import MAX_TABLE, check_arrays, check_claims, damaged_entry, open_zip, read_small
from redpp_serve.errors import RedppError
from redpp_serve.files import open_regular, read_bounded


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive of two entries."""
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", b"a" * 1000)
        file.writestr("b", b"b" * 1000)
    return path


@pytest.mark.parametrize("large", [False, True])
def test_a_large_table_is_refused_unread(archive: Path, large: bool) -> None:
    """It is a claim alone here; zipfile would read so many bytes. The record for large archives has 8 bytes for it."""
    size = MAX_TABLE + 1
    data = archive.read_bytes()
    place = data.rindex(b"PK\x05\x06")
    end = bytearray(data[place:])
    end[12:16] = struct.pack("<L", 0xFFFFFFFF if large else size)
    record = b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 2, 2, size, 0) if large else b""
    archive.write_bytes(data[:place] + record + bytes(end))
    with pytest.raises(RedppError, match=f"table of contents of {size} bytes"):
        open_zip(archive)


def test_the_first_damaged_entry_is_named(archive: Path) -> None:
    assert damaged_entry(archive) is None
    data = archive.read_bytes()
    archive.write_bytes(data.replace(b"b" * 10, b"b" * 9 + b"c", 1))
    assert damaged_entry(archive) == "b"
    archive.write_bytes(data[:-4])
    assert damaged_entry(archive) == "its table of contents"


def test_entries_that_are_read_whole_are_bounded(archive: Path) -> None:
    with open_zip(archive) as file:
        assert read_small(file, "a", 1000) == b"a" * 1000
        with pytest.raises(ValueError, match="more than 999 bytes"):
            read_small(file, "a", 999)
        with pytest.raises(KeyError):
            read_small(file, "c", 999)


def test_arrays_that_are_compressed(tmp_path: Path) -> None:
    """A package's own are stored as they are; a user's may be compressed, as far as the memory goes."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros(1 << 23, np.float32))
    with pytest.raises(RedppError, match="a zip bomb"):
        check_arrays(path)
    check_arrays(path, any_ratio=True)
    np.savez(path, x=np.zeros(1 << 20, np.float32))
    check_arrays(path)


def test_more_arrays_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros(1 << 23, np.float32))
    monkeypatch.setattr("redpp_serve.archives.os.sysconf", lambda name: 1 << 12)  # 16 MiB
    with pytest.raises(RedppError, match="of memory"):
        check_arrays(path, any_ratio=True)


def test_holes_are_not_weights(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * 4096)
    check_claims(path)
    os.truncate(path, 1 << 40)
    with pytest.raises(RedppError, match="of which the disk holds"):
        check_claims(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    path = Path("/dev/zero") if kind == "device" else path
    start = time.monotonic()
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(path)
    for check in (open_zip, check_arrays, read_bounded):
        with pytest.raises((OSError, RedppError)):
            check(path)
    assert time.monotonic() - start < 20


def test_bounded_reads(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        read_bounded(path, 4)
