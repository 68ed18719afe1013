"""Files that other processes read while they are written, and files that somebody else wrote: bounded reads.

The serving archives carry a copy of this module, so it needs the standard library and filelock (which torch requires).
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

MOST_DOCUMENT = 8 << 20  # bytes of a report, a registry's entry and the like


def write_atomically(
    path: Path, data: bytes | str | Iterable[bytes], *, mode: int = 0o644, durable: bool = True
) -> None:
    """Write a file so that readers see the old contents or the new ones, never a part; make the folder when missing.

    Args:
        path: the file to write or to replace.
        data: the new contents, whole or in parts; text is written as UTF-8 with ``\\n`` line ends.
        mode: permission bits of the new file; it is private to this user until it is complete.
        durable: flush to disk before the file takes its place, so that it survives a power failure.

    Raises:
        OSError: the folder cannot be made or written to; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            whole = data.encode() if isinstance(data, str) else data
            file.writelines([whole] if isinstance(whole, bytes) else whole)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading if it is one: a pipe would keep its reader waiting, and a device may have no end.

    Raises:
        OSError: it is something else, or cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path} is not a regular file")
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(f"{path} is not a regular file any more")


def read_bounded(path: Path, most: int = MOST_DOCUMENT) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: no such file, or not a regular one.
        ValueError: it has more than ``most`` bytes.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return data


@contextlib.contextmanager
def locked(path: Path, wait_s: float = -1.0) -> Iterator[bool]:
    """Hold the lock file ``path`` while the body runs.

    Args:
        path: the lock file; it is made when missing and stays.
        wait_s: how long to wait for another holder, seconds; negative waits for ever.

    Yields:
        Whether the lock is held: False after ``wait_s`` seconds, or on a file system without locks.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait_s)
    except (Timeout, OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def deterministic_zip(entries: Mapping[str, bytes]) -> bytes:
    """Build a zip whose bytes depend on the entries alone: stored, fixed time stamps and permissions, given order."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def cache_folder() -> Path | None:
    """Return this project's folder in the user's cache, which may not exist yet; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "redpp-serve"
    except RuntimeError:
        return None
