"""Starting, watching and switching the nginx of an experiment."""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from grp import getgrgid
from pathlib import Path

from redpp_serve.ab.nginx import (
    ACCESS_LOG,
    ADDRESS,
    CONFIG,
    ERROR_LOG,
    PROMOTED,
    ROLLED_BACK,
    SHADOW_OFF,
    Gateway,
    gateway_config,
)
from redpp_serve.errors import RedppError
from redpp_serve.processes import kill_session
from redpp_serve.serving.tools import find_tool

LOG_BYTES = 32 << 20  # of the access log before it is put aside; one old file is kept
_START_S, _STOP_S, _POLL_S = 10.0, 10.0, 0.02
_SWITCHES = {"pruned": PROMOTED, "original": ROLLED_BACK}


def worker_account() -> tuple[str, str] | None:
    """User and group that nginx's worker drops to where root starts it; None elsewhere, it stays who it is."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam("nobody")
    return entry.pw_name, getgrgid(entry.pw_gid).gr_name


def connection_limit(wanted: int = 4096) -> int:
    """Connections that nginx may hold within this process's limit of open files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return wanted if hard == resource.RLIM_INFINITY else max(64, min(wanted, hard - 128))


class NginxProcess:
    """One nginx with its configuration, logs and scratch files in ``gateway.folder``."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self._program = gateway, find_tool("nginx")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def access_log(self) -> Path:
        """One JSON object a line for every request."""
        return self.gateway.folder / ACCESS_LOG

    def start(self) -> None:
        """Write the configuration, and return when the port takes connections.

        Raises:
            RedppError: nginx refuses the configuration or does not come up, with what it says.
        """
        folder = self.gateway.folder
        scratch = folder / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        if self.gateway.account:  # the worker writes bodies there, and looks for the switches and the sink
            shutil.chown(scratch, *self.gateway.account)
            for path in (folder, folder.parent):
                path.chmod(0o711)
        (folder / CONFIG).write_text(gateway_config(self.gateway), encoding="utf-8")
        if self._process is not None:  # it was killed: its worker still holds the port
            kill_session(self._process)
        (folder / "sink.sock").unlink(missing_ok=True)
        self._check()
        with (folder / ERROR_LOG).open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_S
        while not _takes_connections(self.gateway.port):
            if not self.alive() or time.monotonic() > deadline:
                self.stop()
                raise _refusal(f"nginx did not start: {self.log_tail()}")
            time.sleep(_POLL_S)

    def alive(self) -> bool:
        """Whether nginx runs."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 5) -> str:
        """The last lines of nginx's error log."""
        path = self.gateway.folder / ERROR_LOG
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def rotate(self) -> bool:
        """Put a large access log aside; whether it did."""
        try:
            if self.access_log.stat().st_size < LOG_BYTES or self._process is None:
                return False
        except FileNotFoundError:
            return False
        self.access_log.replace(self.access_log.with_suffix(".log.1"))
        self._process.send_signal(signal.SIGUSR1)  # nginx opens a new one
        return True

    def stop(self) -> None:
        """End nginx with its worker; requests in flight get a moment to end."""
        if self._process is None:
            return
        for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
                try:
                    self._process.wait(1.0 if number == signal.SIGQUIT else _STOP_S)
                except subprocess.TimeoutExpired:
                    continue
        self._process = None

    def _command(self) -> list[str]:
        folder = self.gateway.folder
        return [str(self._program), "-e", str(folder / ERROR_LOG), "-p", str(folder), "-c", str(folder / CONFIG)]

    def _check(self) -> None:
        tried = subprocess.run([*self._command(), "-t", "-q"], capture_output=True, text=True, timeout=_START_S)
        if tried.returncode:
            raise _refusal(f"nginx refuses its configuration: {tried.stderr.strip()[-1000:]}")


def switch(folder: Path, arm: str) -> None:
    """Send all users to one arm; ``folder`` is the gateway's.

    nginx looks at the files at its next request. The new one is there before the old one goes.
    """
    _touch(folder / _SWITCHES[arm])
    for other, name in _SWITCHES.items():
        if other != arm:
            (folder / name).unlink(missing_ok=True)


def switched(folder: Path) -> str | None:
    """The arm that all users are sent to; None while they are divided."""
    return next((arm for arm, name in _SWITCHES.items() if (folder / name).exists()), None)


def stop_mirroring(folder: Path) -> None:
    """No user's request goes to the recorder any more."""
    _touch(folder / SHADOW_OFF)


def private_folder(prefix: str) -> Path:
    """A new folder for this user alone whose path is short enough for a socket and needs no quoting in nginx."""
    parent = tempfile.gettempdir()
    plain = all(character.isalnum() or character in "/._-" for character in parent) and parent.isascii()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent if plain and len(parent) < 60 else "/tmp"))


def _touch(path: Path) -> None:
    path.touch(mode=0o644)


def _takes_connections(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((ADDRESS, port)) == 0


def _refusal(found: str) -> RedppError:
    return RedppError(found, "a gateway that takes requests", "read what nginx says above; it names the cause")
