"""Which processes and folders belong to an experiment, so that nothing of it stays when its supervisor is killed.

One file for each packaged folder, locked as long as the supervisor lives: the system itself gives the lock free.

The state folder of an experiment: who writes what, and how another process reads it while it grows.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from redpp_serve.errors import RedppError
from redpp_serve.files import state_folder
from redpp_serve.processes import started

# In the state folder. Whatever is read later, by `ab status` too, is in these files and nowhere else.
SPEC = "experiment.json"  # the supervisor writes it: what was asked for
GATEWAY = "gateway"  # nginx's folder
PAIRS = "pairs.jsonl"  # the recorder: one line for every request that both versions got
RECORDER = "recorder.json"  # the recorder: its counts
WINDOWS = "windows.jsonl"  # the supervisor: the server's counters, window by window
COUNTS = "counts.json"  # the supervisor: what users got, and the server's counters over the whole experiment
STATUS = "supervisor.json"  # the supervisor: whether it is ready, or what it could not mend
SUPERVISOR_LOG, RECORDER_LOG = "supervisor.log", "recorder.log"


def write_json(path: Path, document: Any) -> None:
    """At once: a reader sees the old document or the new one."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(json.dumps(document), encoding="utf-8")
    os.replace(scratch, path)


def read_json(path: Path) -> Any:
    """The document, or None where there is none yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


@contextmanager
def not_swept(folder: Path) -> Iterator[None]:
    """While the body runs, what cleans a system's folder for temporary files leaves the folder alone.

    systemd-tmpfiles removes files that nobody touched for days, such as the switch of a promotion, but passes by a
    folder that is locked.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


class Lines:
    """The JSON objects of a growing file; `new` gives those that were added since the last call.

    A file that became another one (put aside, or written anew) is read from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._inode = 0, -1

    def new(self) -> Iterator[dict[str, Any]]:
        """Whole lines only; the rest of an unfinished one comes next time."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            with suppress(ValueError):  # of a process that was killed in the middle of a line
                yield json.loads(line)


if TYPE_CHECKING:
    from psutil import Process

_WAIT_S = 5.0


class Journal:
    """The open file of a living supervisor."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, folders: Sequence[Path]) -> None:
        """This process's descendants as they are now, and folders to remove with them."""
        from psutil import Process

        begun = {process.pid: started(process.pid) for process in Process().children(recursive=True)}
        processes = [each for each in begun.items() if each[1] is not None]
        text = json.dumps({"processes": processes, "folders": [str(folder) for folder in folders]})
        self._file.seek(0)
        self._file.write(text)
        self._file.truncate()
        self._file.flush()


@contextmanager
def supervising(folder: Path) -> Iterator[Journal]:
    """Be the one supervisor for a packaged folder. What a killed one has left is ended first.

    Raises:
        RedppError: another one lives.
    """
    path = _path(folder)
    with _locked(path, patience_s=1.0) as file:
        if file is None:
            raise already_runs(folder)
        _end_left_over(file)
        try:
            yield Journal(file)
        finally:
            path.unlink(missing_ok=True)


def supervised(folder: Path) -> bool:
    """Whether a supervisor lives for the folder, also one that is still starting."""
    path = _path(folder)
    if not path.exists():
        return False
    with _locked(path) as file:
        return file is None


def abandoned(folder: Path) -> bool:
    """Whether a killed supervisor has left processes or folders that `clean` would end."""
    return _path(folder).exists() and not supervised(folder)


def clean(folder: Path) -> bool:
    """End what a killed supervisor has left; whether there was anything. Does nothing while one lives."""
    path = _path(folder)
    if not path.exists():
        return False
    with _locked(path) as file:
        if file is None:
            return False
        left = _end_left_over(file)
        path.unlink(missing_ok=True)
        return left


def already_runs(folder: Path) -> RedppError:
    """For a second experiment."""
    quoted = shlex.quote(str(folder))
    ways = f"see it with redpp-serve ab status {quoted}, end it with redpp-serve ab stop {quoted}"
    return RedppError(f"an experiment already runs for {folder}", "one for each folder", ways)


def _path(folder: Path) -> Path:
    return state_folder() / f"ab-{sha256(os.fsencode(folder.resolve())).hexdigest()[:24]}.lock"


@contextmanager
def _locked(path: Path, patience_s: float = 0.0) -> Iterator[TextIO | None]:
    """The journal, locked; None where a living supervisor holds it, or it has just been removed.

    ``patience_s``: another command may hold it for the moment in which it looks whether a supervisor lives, or remove
    it; with any patience it is made anew.
    """
    deadline = time.monotonic() + patience_s
    flags = os.O_RDWR | (os.O_CREAT if patience_s else 0)
    while True:
        try:
            file = os.fdopen(os.open(path, flags, 0o600), "r+", encoding="utf-8")
        except FileNotFoundError:
            yield None
            return
        with file:
            if _lock(file) and _is_at(file, path):
                yield file
                return
        if time.monotonic() >= deadline:
            yield None
            return
        time.sleep(0.02)


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the path still leads to this file: it may have been removed before it was locked."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _end_left_over(file: TextIO) -> bool:
    text = file.read()
    if not text.strip():
        return False
    try:
        document = json.loads(text)
    except ValueError:  # killed in the middle of a line: nothing can be said of what is left
        return False
    _kill([(int(pid), float(created)) for pid, created in document["processes"]])
    for folder in map(Path, document["folders"]):
        shutil.rmtree(folder, ignore_errors=True)
        for shared in Path("/dev/shm").glob(f"{folder.name}-*"):  # of Triton's workers
            shared.unlink(missing_ok=True)
    return True


def _kill(recorded: Sequence[tuple[int, float]]) -> None:
    """Processes that are still those recorded, and all in the sessions that they opened."""
    from psutil import wait_procs

    for _ in range(5):  # a launcher may start another one between a look and a kill
        left = [process for process in _living() if _belongs(process, recorded)]
        if not left:
            return
        for process in left:
            _try_kill(process)
        wait_procs(left, timeout=_WAIT_S)


def _living() -> list[Process]:
    from psutil import STATUS_ZOMBIE, Error, process_iter

    found = []
    for process in process_iter():
        try:
            if process.uids().real == os.getuid() and process.status() != STATUS_ZOMBIE:
                found.append(process)
        except Error:  # ended meanwhile
            continue
    return found


def _belongs(process: Process, recorded: Sequence[tuple[int, float]]) -> bool:
    """A number is given again only when no process has it, and no session either."""
    try:
        created, session = started(process.pid), os.getsid(process.pid)
    except OSError:
        return False
    if created is None:
        return False
    same = any(process.pid == pid and abs(created - begun) < 1 for pid, begun in recorded)
    return same or any(session == pid != process.pid and created >= begun - 1 for pid, begun in recorded)


def _try_kill(process: Process) -> None:
    from psutil import Error

    try:
        process.kill()
    except Error:
        return
