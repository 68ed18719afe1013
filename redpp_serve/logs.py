"""The log folder of one run: what server, supervisor and gateway have written, kept when the run has ended.

Every program appends to a file of its own, so that none depends on another to be logged. The supervisor looks once a
second: a file that has grown too large is copied beside itself and cut, and where JSON is wanted its new lines are
added to a second file, ``NAME.jsonl``, for programs that collect logs. Neither the number of runs that are kept nor
what one of them takes grows without bound.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from redpp_serve.files import read_bounded, write_atomically
from redpp_serve.options import JSON_LINES
from redpp_serve.state_folders import Held, hold, kept_folder, state_folder

KEPT_RUNS = 10
MOST_BYTES = 8 << 20  # of one log; its older part takes as much once more
SERVER, SUPERVISOR = "server.log", "supervisor.log"
_FOLDER, _PLACES = "logs", ".places.json"
_LEVELS = {"E": "error", "W": "warn", "I": "info", "V": "debug"}
# How the lines of each program begin.
_STAMP = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (?P<message>.*)")  # the supervisor
_FORMS = (
    re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3}) \[(?P<level>\w+) *\] (?P<message>.*)"),  # TorchServe
    re.compile(r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (?P<level>[EWIV]) (?P<message>.*)"),  # Triton
    re.compile(r"(?P<time>\d{4}/\d\d/\d\d \d\d:\d\d:\d\d) \[(?P<level>\w+)\] (?P<message>.*)"),  # nginx
    _STAMP,
)
_REQUEST = re.compile(r"\brequest ([\w.:+/=-]{1,128}):")  # as the handlers name a request that failed


class Logs:
    """The log folder of a run that goes on.

    Args:
        held: the folder.
        form: ``text``, or ``json`` for a second file of JSON lines beside each log.
    """

    def __init__(self, held: Held, form: str) -> None:
        self._held, self._form = held, form
        self._mode = held.path.stat().st_mode & 0o777
        self._places: dict[str, int] = {}
        with suppress(OSError, ValueError, AttributeError):
            given = json.loads(read_bounded(held.path / _PLACES))
            self._places = {str(name): int(place) for name, place in given.items()}

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._held.path

    @property
    def handle(self) -> int:
        """What a program inherits that goes on writing when this process has been killed: the folder stays then."""
        return self._held.handle

    def file(self, name: str) -> Path:
        """Return a log's path; the file is there, and nobody else may read it, where the disk has room for it."""
        path = self.folder / name
        with suppress(OSError):
            self._make_folder()
            path.touch(mode=0o600)
        return path

    def say(self, line: str) -> None:
        """Add a line to the supervisor's log. A full disk loses it."""
        with suppress(OSError), self.file(SUPERVISOR).open("a", encoding="utf-8", errors="replace") as file:
            file.write(stamped(line) + "\n")

    def look(self, rotated: tuple[str, ...] = ()) -> bool:
        """Cut what is too large, and add JSON lines; return False where the folder was lost, and make it again.

        Args:
            rotated: logs that their own program puts aside.
        """
        kept = self._held.in_place()
        with suppress(OSError):
            self._make_folder()
            for path in sorted(self.folder.glob("*.log")):
                if path.name not in rotated:
                    self._take(path)
        return kept

    def close(self, rotated: tuple[str, ...] = ()) -> None:
        """Look once more, and leave the folder to those who start later runs."""
        self.look(rotated)
        self.release()

    def release(self) -> None:
        """Leave the folder to another process, which looks after it."""
        self._held.release()

    def _make_folder(self) -> None:
        if not self._held.in_place():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(self._mode)
            self._held.release()
            self._held, self._places = hold(self.folder), {}

    def _take(self, path: Path) -> None:
        size = path.stat().st_size
        if size >= MOST_BYTES:
            older = path.with_name(f"{path.name}.1")
            shutil.copy(path, older)
            self._follow(older, path)
            os.truncate(path, 0)  # its writers append
            self._places[path.name] = 0
        elif self._form == JSON_LINES and self._places.get(path.name, 0) != size:
            self._follow(path, path)
            write_atomically(self.folder / _PLACES, json.dumps(self._places), mode=0o600, durable=False)

    def _follow(self, read: Path, log: Path) -> None:
        """Add the lines of ``read`` that are new in ``log`` to its file of JSON lines."""
        if self._form != JSON_LINES:
            return
        place = self._places.get(log.name, 0)
        with read.open("rb") as file:
            file.seek(place if place <= os.fstat(file.fileno()).st_size else 0)
            data = file.read()
            end = data.rfind(b"\n") + 1
            self._places[log.name] = file.tell() - len(data) + end
        if not end:
            return
        into = log.with_suffix(".jsonl")
        if into.exists() and into.stat().st_size >= MOST_BYTES:
            into.replace(into.with_name(f"{into.name}.1"))
        lines = data[:end].decode(errors="replace").splitlines()
        with self.file(into.name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(as_json(line, log.stem)) + "\n" for line in lines)


def open_logs(what: str, form: str, *, parent: Path | None = None, for_others: bool = False) -> Logs:
    """Make the log folder of a new run; the newest `KEPT_RUNS` are kept.

    Args:
        what: part of its name: the model, and what runs.
        form: ``text`` or ``json``, see `Logs`.
        parent: the folder that holds those of all runs; by default in the `state_folder`.
        for_others: other users have to pass through it, as nginx's worker does.

    Raises:
        RedppError: it cannot be made.
    """
    name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}-{what}-"
    return Logs(kept_folder(parent or state_folder() / _FOLDER, name, KEPT_RUNS, for_others=for_others), form)


def logs_beside(folder: Path) -> Path:
    """Return the parent of log folders that other users reach as they reach a private folder."""
    return folder.parent / _FOLDER


def reopen_logs(folder: Path, form: str, *, for_others: bool = False) -> Logs:
    """Go on with the log folder of a run whose supervisor was killed, also where it was lost.

    Raises:
        OSError: it is lost and cannot be made.
    """
    folder.mkdir(mode=0o711 if for_others else 0o700, parents=True, exist_ok=True)
    return Logs(hold(folder), form)


def stamped(line: str) -> str:
    """Return a line with the time before it."""
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ} {line}"


def unstamped(line: str) -> str:
    """Return what `stamped` was given."""
    found = _STAMP.fullmatch(line)
    return found["message"] if found else line


def as_json(line: str, source: str) -> dict[str, Any]:
    """Return a line as an object: ``time`` in UTC, ``level``, ``source`` (the log), ``message``, ``request_id``.

    A line without a time, such as that of a traceback, gets the time at which it is read.
    """
    now = datetime.now(timezone.utc)
    found = next((match for form in _FORMS if (match := form.fullmatch(line))), None)
    parts = found.groupdict() if found else {"message": line}
    level = parts.get("level", "info")
    document = {
        "time": _time(parts.get("time"), now),
        "level": _LEVELS.get(level, level.lower()),
        "source": source,
        "message": parts["message"],
    }
    request = _REQUEST.search(line)
    return {**document, "request_id": request[1]} if request else document


def _time(text: str | None, now: datetime) -> str:
    """Return a time as ISO 8601 in UTC; TorchServe and nginx write local time."""
    read = now
    if text:
        with suppress(ValueError):
            read = datetime.fromisoformat(text.replace("/", "-").replace(",", ".").replace("Z", "+00:00"))
    return read.astimezone(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
