"""Files that other processes read while they are written: atomic writes, locks, deterministic archives, user folders.

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

from filelock import FileLock, Timeout

from redpp_serve.errors import RedppError


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


def state_folder() -> Path:
    """Return the folder of this user's notes on running servers; make it when missing, readable to nobody else.

    Raises:
        RedppError: someone else made it, or others may read it or write to it.
    """
    path = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"redpp-serve-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()  # in a shared folder, anyone could have put a link or a folder of theirs here
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RedppError(
            f"{path} is not a folder of this user alone",
            "a folder with mode 0700 that this user owns",
            "remove it, or point XDG_RUNTIME_DIR at a private folder",
        )
    return path


def private_folder(prefix: str) -> Path:
    """Make a folder for this user alone, whose path is short enough for a socket and needs no quoting in nginx."""
    parent = tempfile.gettempdir()
    plain = all(character.isalnum() or character in "/._-" for character in parent) and parent.isascii()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent if plain and len(parent) < 60 else "/tmp"))
