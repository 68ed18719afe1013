"""Where this program keeps state: notes on running servers, the private folders of its processes, and their logs.

State lies where nothing cleans up, and where every shell of the same user looks. A folder is held while its process
lives; `sweep` removes those of processes that were killed, except the `kept_folder` of logs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from redpp_serve.errors import RedppError

_NAME = "redpp-serve"
_YOUNG_S = 60.0  # a scratch folder may not be held yet at this age
_SPECIAL = set("\"'\\$\n\r{};")  # nginx gives them a meaning, even between quotes


def state_folder() -> Path:
    """Return the folder of what outlives this user's processes: notes on running servers, and their private folders.

    It lies in XDG_STATE_HOME, else in ``/var/lib`` for root and in ``~/.local/state`` for others, so that every shell
    finds the same one and nothing that cleans up temporary files comes there. Made when missing, readable to nobody
    else; others may pass through root's, since nginx's worker is another user there.

    Raises:
        RedppError: it cannot be made, someone else made it, or others may read it or write to it.
    """
    return _private(_state_homes()[0] / _NAME)


class Held(NamedTuple):
    """A folder that `sweep` and what cleans up temporary files leave alone.

    Attributes:
        path: the folder.
        handle: a descriptor of it. The folder is held until this process, and all that were given it, have ended.
    """

    path: Path
    handle: int

    def in_place(self) -> bool:
        """Return True while the path leads to this folder: it was neither removed nor replaced."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.handle))
        except OSError:
            return False

    def release(self) -> None:
        """Leave it to `sweep`."""
        os.close(self.handle)


def private_folder(prefix: str, *, most_length: int = 64, for_others: bool = False) -> Held:
    """Make a folder that is swept once the processes which hold it have ended, see `sweep`.

    It lies in the `state_folder`, or in the default one where that one's path is too long or closed to others.

    Args:
        prefix: begins its name.
        most_length: longest path of its parent, in bytes: a socket's path may have 107.
        for_others: other users have to pass through its parents, as nginx's worker does.

    Raises:
        RedppError: there is no such place.
    """
    for home in _state_homes():
        parent = home / _NAME
        if len(os.fsencode(parent)) > most_length or set(str(parent)) & _SPECIAL:
            continue
        if not for_others or open_to_others(_private(parent)):
            with alone(_private(parent)):  # nobody sweeps it before it is held
                try:
                    return hold(Path(tempfile.mkdtemp(prefix=prefix, dir=parent)))
                except OSError as error:
                    raise _unwritable(parent, error) from error
    raise RedppError(
        f"{_state_homes()[0]} is no place for sockets and nginx's files",
        f"a path of at most {most_length - len(_NAME) - 1} bytes without quotes, backslash and $"
        + (" that others may pass through" if for_others else ""),
        "point XDG_STATE_HOME at one",
    )


def kept_folder(parent: Path, prefix: str, keep: int, *, for_others: bool = False) -> Held:
    """Make a folder that stays when the processes that hold it have ended, and remove the oldest of those in its place.

    Args:
        parent: the folder that holds all of them; made when missing. Its parent is a `state_folder`.
        prefix: begins its name; names sort by age.
        keep: how many are left, this one among them. Those that are held stay in any case.
        for_others: other users have to pass through it.

    Raises:
        RedppError: it cannot be made.
    """
    with alone(_private(parent)):
        try:
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            folder.chmod(0o711 if for_others else 0o700)
            held = hold(folder)
        except OSError as error:
            raise _unwritable(parent, error) from error
        for path in sorted(parent.iterdir())[:-keep]:
            if not _held(path):
                shutil.rmtree(path, ignore_errors=True)
    return held


def hold(folder: Path) -> Held:
    """Keep a folder from `sweep` and from what cleans up temporary files."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return Held(folder, handle)


def sweep(prefix: str, kept: Collection[Path] = ()) -> list[Path]:
    """Remove private folders whose processes were killed; return them.

    Args:
        prefix: begins the folders' names.
        kept: folders that stay although nobody holds them.
    """
    swept = []
    for parent in {home / _NAME for home in _state_homes() if (home / _NAME).is_dir()}:
        with alone(_private(parent)):
            left = [path for path in parent.glob(f"{prefix}*") if path not in kept and not _held(path)]
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            swept += left
    return swept


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield an empty folder in ``parent`` that is removed afterwards; first remove those that killed processes left.

    Args:
        parent: the folder to make it in, which may be everybody's.
        prefix: begins its name. Nothing else there may be called so.

    Raises:
        OSError: it cannot be made.
    """
    for folder in left_scratch(parent, prefix):
        shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
        held = hold(Path(name))
        try:
            yield held.path
        finally:
            held.release()


def left_scratch(parent: Path, prefix: str) -> list[Path]:
    """Return this user's scratch folders of that prefix whose processes have ended without removing them."""
    found = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        with contextlib.suppress(OSError):  # it has just been removed
            status = path.lstat() if path.name.startswith(prefix) else None
            ours = status and stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
            if status and ours and time.time() - status.st_mtime > _YOUNG_S and not _held(path):
                found.append(path)
    return found


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Change what ``folder`` holds while no other process does: wait for the one that does, for ever."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _held(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # somebody else's, or no folder
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _state_homes() -> list[Path]:
    """Return the parents of this user's state folder, the one that counts first, then the default."""
    given = os.environ.get("XDG_STATE_HOME", "")
    try:
        default = Path("/var/lib") if os.geteuid() == 0 else Path.home() / ".local" / "state"
    except RuntimeError as error:
        if not os.path.isabs(given):
            raise RedppError("a user without a home", "a folder for state", "point XDG_STATE_HOME at one") from error
        return [Path(given)]
    return [Path(given), default] if os.path.isabs(given) else [default]


def _private(path: Path) -> Path:
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        path.parent.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
            path.chmod(mode)
        status = path.lstat()  # in a shared folder, anyone could have put a link or a folder of theirs here
    except OSError as error:
        raise _unwritable(path, error) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o777 & ~mode:
        raise RedppError(
            f"{path} is not a folder of this user alone",
            f"a folder with mode {mode:04o} that this user owns",
            "remove it, or point XDG_STATE_HOME at a private folder",
        )
    return path


def _unwritable(path: Path, error: OSError) -> RedppError:
    return RedppError(
        f"{path} cannot be written to: {error.strerror}",
        "a folder for state, with room on its disk",
        "free some, or point XDG_STATE_HOME at another one",
    )


def open_to_others(folder: Path) -> bool:
    """Return True if other users of this machine may pass through a folder."""
    try:
        return all(path.stat().st_mode & 0o001 for path in (folder, *folder.parents))
    except OSError:
        return False
