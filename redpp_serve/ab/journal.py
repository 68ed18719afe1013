"""What a supervisor has started, written down beside its lock: the next one takes it over, and `ab stop` ends it.

The journal lies in the `state_folder` of all tests, so that a test is found though its own folder is lost.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from redpp_serve.ab.spec import Started
from redpp_serve.errors import RedppError
from redpp_serve.files import read_bounded, write_atomically
from redpp_serve.processes import Adopted, Leader, free_shared_memory, kill_session, started
from redpp_serve.serving.running import Running, package_key
from redpp_serve.state_folders import state_folder


def key_path(folder: Path, ending: str) -> Path:
    """Return the file of this ending that belongs to a packaged folder's test; it may not exist."""
    return state_folder() / f"ab-{package_key(folder)}.{ending}"


@dataclass
class Journal:
    """The processes of one test. Every change is written at once, or at the next `write` where a disk is full.

    Attributes:
        path: the journal's file.
        test: the test.
        state: its state folder.
        logs: its log folder.
        salt: what divides its users.
        probe: the word by which its gateway knows the commands' own requests.
        folders: the server's private folders.
        sessions: process id and start of every session's leader, see `started`.
        parts: what the next supervisor takes over: ``ports``, ``server``, ``nginx``, ``recorder``.
        running: the note for other commands; None before users are served.
        supervisor: process id and start of the last supervisor; empty before the first.
    """

    path: Path
    test: Started
    state: Path
    logs: Path
    salt: str
    probe: str
    folders: list[str] = field(default_factory=list)
    sessions: list[list[float]] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)
    running: Running | None = None
    supervisor: list[float] = field(default_factory=list)
    _written: str = ""
    # The server is mended in a thread of its own.
    _lock: Any = field(default_factory=threading.RLock, repr=False, compare=False)

    def watch_session(self, leader: Leader) -> None:
        """Write down the session of this leader."""
        with self._lock:
            self.sessions = [[pid, begun] for pid, begun in self.sessions if started(int(pid)) == begun]
            self.sessions.append([leader.pid, started(leader.pid) or 0.0])
            self.write()

    def watch_folder(self, folder: Path) -> None:
        """Write down a private folder."""
        self.folders = [*(name for name in self.folders if Path(name).exists()), str(folder)]
        self.write()

    def write(self) -> None:
        """Write what has changed, or has been removed by somebody. A full disk leaves the last version there."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        document = {
            "test": self.test.to_json(),
            "state": str(self.state),
            "logs": str(self.logs),
            "salt": self.salt,
            "boot": _boot(),
            "probe": self.probe,
            "folders": self.folders,
            "sessions": self.sessions,
            "parts": self.parts,
            "running": self.running and asdict(self.running),
            "supervisor": self.supervisor,
        }
        text = json.dumps(document)
        if text != self._written or not self.path.exists():
            with suppress(OSError):
                write_atomically(self.path, text, mode=0o600, durable=False)  # it holds tokens
                self._written = text

    def supervised(self) -> bool:
        """Return True while its last supervisor lives."""
        return bool(self.supervisor) and started(int(self.supervisor[0])) == self.supervisor[1]

    def living(self) -> list[Adopted]:
        """Return the leaders that still run."""
        leaders = [Adopted(int(pid), begun) for pid, begun in self.sessions]
        return [leader for leader in leaders if leader.poll() is None]

    def end_processes(self) -> None:
        """End every process of the test, also those whose leader has ended, and remove the server's folders."""
        for pid, begun in self.sessions:
            if started(int(pid)) in (None, begun):  # else the number has gone to somebody else's process
                kill_session(Adopted(int(pid), begun))
        for folder in map(Path, self.folders):
            free_shared_memory(folder)
            shutil.rmtree(folder, ignore_errors=True)
        self.sessions, self.folders, self.parts = [], [], {**self.parts, "server": None, "nginx": None}

    def end(self) -> None:
        """End every process of the test, and remove its folder and the journal."""
        self.end_processes()
        shutil.rmtree(self.state, ignore_errors=True)
        self.path.unlink(missing_ok=True)


def begin_journal(test: Started, state: Path, logs: Path | None = None) -> Journal:
    """Return the journal of a test that begins, written down.

    Args:
        test: the test.
        state: its state folder.
        logs: its log folder; by default the state folder.

    Raises:
        RedppError: the folder for state cannot be written to.
    """
    path = key_path(test.spec.folder, "json")
    journal = Journal(path, test, state, logs or state, secrets.token_hex(8), secrets.token_hex(16))
    journal.write()
    if not path.exists():
        raise RedppError(
            f"{path} cannot be written", "room on its disk", "free some, or point XDG_STATE_HOME elsewhere"
        )
    return journal


def read_journal(folder: Path) -> Journal | None:
    """Return the journal of a packaged folder's test; None where there is none that can be read."""
    return _read(key_path(folder, "json"))


def states() -> Collection[Path]:
    """Return the state folders of all of this user's tests, also of those whose supervisor was killed."""
    journals = map(_read, state_folder().glob("ab-*.json"))
    return [journal.state for journal in journals if journal]


def _read(path: Path) -> Journal | None:
    try:
        document = json.loads(read_bounded(path))
        running = document["running"] and Running.from_json(document["running"])
        changed = {"test": Started.from_json(document["test"]), "running": running}
        changed |= {key: Path(document[key]) for key in ("state", "logs")}
        if document.pop("boot") != _boot():  # process ids of another life of this machine
            document |= {"sessions": [], "supervisor": [], "parts": {"ports": document["parts"].get("ports")}}
        return Journal(path, **{**document, **changed})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, damaged, or written by another release
        return None


def _boot() -> str:
    """Return what tells this start of the machine from others; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
