"""The gateway: nginx in front of one model server, which chooses the arm of every request.

One template, ``nginx.conf.j2``, gives the configuration of a local A/B test and the split that ``deploy/`` starts.
HTTP only: gRPC requests go to the server directly and are not split.

``python -m redpp_serve.ab.gateway`` prints the deployed split.
"""

from __future__ import annotations

import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from grp import getgrgid
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from redpp_serve.ab.spec import TrafficSplit
from redpp_serve.errors import RedppError
from redpp_serve.loopback import ADDRESS
from redpp_serve.packaging.server_config import MAX_REQUEST_BYTES
from redpp_serve.processes import find_program, kill_session, start_session, tail
from redpp_serve.variants import NAMES, ORIGINAL, PRUNED

ARM_HEADER = "X-Redpp-Arm"  # asks for an arm in a request, and names it in the reply
ACCESS_LOG, ERROR_LOG = "access.log", "error.log"
LOG_BYTES = 32 << 20  # size at which the access log is put aside; one old file is kept
_SWITCHES = {PRUNED.name: "promoted", ORIGINAL.name: "rolled_back"}  # files in the gateway's folder, see the template
_SHADOW_OFF = "shadow_off"
_START_S, _STOP_S, _POLL_S = 30.0, 10.0, 0.02


@dataclass(frozen=True)
class Gateway:
    """What the configuration of a local gateway depends on.

    Attributes:
        folder: the gateway's private folder, absolute; its name needs no quoting in nginx.
        port: where users send requests, on the loopback address.
        server: port of the model server's HTTP inference.
        public: path that users post to, such as ``/predictions/NAME``.
        paths: path on the server for the original and for the pruned version.
        split: how users are divided.
        sticky: request header that names the user; None to decide for every request anew.
        salt: mixed into the division, so that another test divides the same users differently.
        recorder: port of the shadow recorder; None without shadow mode.
        account: user and group of nginx's worker where root starts it; None elsewhere.
        connections: connections that the worker may hold; a request in flight takes two, with shadow mode three.
    """

    folder: Path
    port: int
    server: int
    public: str
    paths: tuple[str, str]
    split: TrafficSplit
    sticky: str | None
    salt: str
    recorder: int | None = None
    account: tuple[str, str] | None = None
    connections: int = 1024


def gateway_config(gateway: Gateway) -> str:
    """Return the text of ``nginx.conf``."""
    return _template().render(
        local=True,
        account=" ".join(gateway.account or ()),
        connections=gateway.connections,
        state=gateway.folder,
        error_log=gateway.folder / ERROR_LOG,
        access_log=gateway.folder / ACCESS_LOG,
        sticky=(gateway.sticky or "").lower().replace("-", "_"),
        salt=gateway.salt,
        shares=_shares(gateway.split),
        paths=gateway.paths,
        upstream=f"{ADDRESS}:{gateway.server}",
        recorder=gateway.recorder and f"{ADDRESS}:{gateway.recorder}",
        listen=f"{ADDRESS}:{gateway.port}",
        public=gateway.public,
        most_bytes=MAX_REQUEST_BYTES,
    )


def deployed_config() -> str:
    """Return the text of ``deploy/nginx/split.conf.template``, where ``${REDPP_...}`` stand for what differs."""
    words = ("state", "access_log", "salt", "upstream", "listen", "public")
    return _template().render(
        {word: f"${{REDPP_{word.upper()}}}" for word in words},
        local=False,
        sticky="${REDPP_STICKY_VARIABLE}",
        shares="${REDPP_SPLIT}",
        paths=("${REDPP_PATH_ORIGINAL}", "${REDPP_PATH_PRUNED}"),
        recorder=None,
        most_bytes=MAX_REQUEST_BYTES,
    )


@cache
def _template() -> Template:
    text = (files(__package__) / "nginx.conf.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(text)


def _shares(split: TrafficSplit) -> str:
    """Return the body of nginx's ``split_clients``, which takes no share of 0 or 100 per cent."""
    whole = next((arm for arm in NAMES if getattr(split, arm) == 100), None)
    return f"* {whole};" if whole else f"{split.pruned}% pruned; * original;"


class ListeningProcess:
    """A program that listens on a port of the loopback address, in a session of its own.

    Args:
        title: what messages call it.
        command: program and arguments.
        port: the port that it opens.
        log: file that its output is appended to.
        watch: called with each process that is started, so that a guard can end it.
    """

    _signals: tuple[tuple[int, float], ...] = ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S))

    def __init__(
        self,
        title: str,
        command: Sequence[str],
        port: int,
        log: Path,
        watch: Callable[[subprocess.Popen[bytes]], None] = lambda process: None,
    ) -> None:
        self._title, self._command, self._port, self._log, self._watch = title, command, port, log, watch
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        """Start, and return when the port takes connections, or at once without ``wait``.

        Raises:
            RedppError: it does not come up; the message holds the end of its log.
        """
        if self._process is not None:  # it was killed: what it started may still hold the port
            kill_session(self._process)
        self._process = start_session(self._command, self._log, folder=self._log.parent)
        self._watch(self._process)
        deadline = time.monotonic() + _START_S
        while wait and not self._listens():
            if not self.alive() or time.monotonic() > deadline:
                self.stop()
                raise self._refusal(f"{self._title} did not start: {self.log_tail()}")
            time.sleep(_POLL_S)

    def alive(self) -> bool:
        """Return True while the program runs."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 5) -> str:
        """Return the last lines of the log."""
        return tail(self._log, lines)

    def stop(self) -> None:
        """End the program, gently at first."""
        for number, patience_s in self._signals:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience_s)
        self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((ADDRESS, self._port)) == 0

    def _refusal(self, found: str) -> RedppError:
        return RedppError(found, f"{self._title} takes connections", "read its message above, which names the cause")


class NginxProcess(ListeningProcess):
    """One nginx with its configuration, logs and scratch files in ``gateway.folder``."""

    # SIGQUIT gives requests in flight a moment to end.
    _signals = ((signal.SIGQUIT, 1.0), *ListeningProcess._signals)

    def __init__(
        self, gateway: Gateway, watch: Callable[[subprocess.Popen[bytes]], None] = lambda process: None
    ) -> None:
        folder, program = gateway.folder, find_program("nginx")
        log, config = folder / ERROR_LOG, folder / "nginx.conf"
        command = [str(program), "-e", str(log), "-p", str(folder), "-c", str(config)]
        super().__init__("nginx", command, gateway.port, log, watch)
        self.gateway, self.access_log, self._config = gateway, folder / ACCESS_LOG, config

    def start(self, wait: bool = True) -> None:
        """Write the configuration, check it, and start.

        Raises:
            RedppError: nginx refuses the configuration or does not come up; the message holds nginx's words.
        """
        folder = self.gateway.folder
        scratch = folder / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        if self.gateway.account:  # the worker writes bodies there, and looks for the switches and the sink
            shutil.chown(scratch, *self.gateway.account)
            for path in (folder, folder.parent):
                path.chmod(0o711)
        self._config.write_text(gateway_config(self.gateway), encoding="utf-8")
        checked = subprocess.run(
            [*self._command, "-t", "-q"], capture_output=True, text=True, timeout=_START_S, check=False
        )
        if checked.returncode:
            raise self._refusal(f"nginx refuses its configuration: {checked.stderr.strip()[-1000:]}")
        (folder / "sink.sock").unlink(missing_ok=True)
        super().start(wait)

    def rotate(self, most_bytes: int = LOG_BYTES) -> bool:
        """Put the access log aside when it has ``most_bytes`` or more; return True when it was."""
        if self._process is None or not self.access_log.exists() or self.access_log.stat().st_size < most_bytes:
            return False
        self.access_log.replace(self.access_log.with_suffix(".log.1"))
        self._process.send_signal(signal.SIGUSR1)  # nginx opens a new one
        return True


def worker_account() -> tuple[str, str] | None:
    """Return the user and group that nginx's worker drops to where root starts it; None for other users."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam("nobody")
    return entry.pw_name, getgrgid(entry.pw_gid).gr_name


def connection_limit(wanted: int = 4096) -> int:
    """Return how many connections nginx may hold within this process's limit of open files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return wanted if hard == resource.RLIM_INFINITY else max(64, min(wanted, hard - 128))


def switch(folder: Path, arm: str) -> None:
    """Send all users to one arm from their next request on; ``folder`` is the gateway's.

    Raises:
        OSError: the folder is gone or cannot be written to.
    """
    _touch(folder / _SWITCHES[arm])  # before the other one goes, so that users are never divided in between
    for other, name in _SWITCHES.items():
        if other != arm:
            (folder / name).unlink(missing_ok=True)


def switched(folder: Path) -> str | None:
    """Return the arm that all users are sent to; None while they are divided."""
    # nginx, too, lets a roll-back win over a promotion.
    return next((arm for arm in NAMES if (folder / _SWITCHES[arm]).exists()), None)


def stop_mirroring(folder: Path) -> None:
    """Send no further request to the recorder; ``folder`` is the gateway's."""
    _touch(folder / _SHADOW_OFF)


def _touch(path: Path) -> None:
    path.touch(mode=0o644)  # nginx's worker may be another user


if __name__ == "__main__":
    sys.stdout.write(deployed_config())
