"""Programs that this project starts: found, ended, and cleaned up after when their supervisor is killed.

Every program is started as the leader of a session of its own, so that all its descendants can be found by the
session's number, also those whose parent has ended. A `Guard` is a small process beside the supervisor that ends the
sessions and removes the folders when the supervisor dies without doing so: the system then closes the pipe
between them.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from redpp_serve.errors import RedppError

if TYPE_CHECKING:
    from psutil import Process

# Programs of the system that this project starts but does not install, and Debian's packages that hold them.
PACKAGES = {
    "nginx": "nginx-light",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "chromium": "chromium",
    "kubectl": "kubernetes-client",
}
ADMINISTRATION = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not in every user's PATH, and nginx lies there
_POLL_S = 0.02


def find_program(name: str, administration: Sequence[str] | None = None) -> Path:
    """Return the program of that name in PATH, or else in folders of programs for administration.

    Raises:
        RedppError: it is not installed; names Debian's package.
    """
    folders = ADMINISTRATION if administration is None else administration
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    found = shutil.which(name, path=path)
    if found is None:
        raise RedppError(
            f"the program {name} is not installed",
            f"{name} in PATH",
            f"install it, on Debian and Ubuntu: apt-get install {PACKAGES.get(name, name)}",
        )
    return Path(found)


def start_session(
    command: Sequence[str],
    log: Path,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    inherited: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a program as the leader of a session of its own, whose output is appended to a log.

    Args:
        command: the program and its arguments.
        log: the file for what it prints.
        folder: its working folder; by default this process's.
        environment: its variables; by default this process's.
        inherited: descriptors that it gets too.

    Raises:
        OSError: it cannot be started.
    """
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # a lost log keeps nothing from being started again
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            pass_fds=inherited,
        )


def tail(log: Path, lines: int) -> str:
    """Return the last lines of a log; empty where there is none."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def started(pid: int) -> float | None:
    """Return when a process started, seconds on a clock that all processes share; None when it does not run.

    On Linux the clock starts with the machine. psutil counts from the epoch there, which moves every process when
    someone sets the clock.
    """
    import psutil  # noqa: PLC0415

    try:
        process, since = psutil.Process(pid), psutil.boot_time() if psutil.LINUX else 0.0
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time() - since, 2)
    except psutil.Error:
        return None


class Adopted:
    """A leader of a session that another process has started, to be handled like one's own ``Popen``.

    Args:
        pid: its process id.
        begun: when it started, see `started`; a later process with its number is another one.
    """

    def __init__(self, pid: int, begun: float) -> None:
        self.pid, self._begun = pid, begun

    def poll(self) -> int | None:
        """Return None while it runs, else 0: how it ended is not known."""
        return None if started(self.pid) == self._begun else 0

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(_POLL_S)
        return 0

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


Leader = subprocess.Popen[bytes] | Adopted


def session(number: int) -> list[Process]:
    """Return the living processes in a session; its number is the process id of the leader, which may have ended."""
    import psutil  # noqa: PLC0415

    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):  # it has ended meanwhile, or is not ours to ask
            if os.getsid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def command_line(process: Process) -> list[str]:
    """Return the words of a process's command line; none when it has ended."""
    import psutil  # noqa: PLC0415

    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_for_an_end(pids: Iterable[int], timeout_s: float) -> None:
    """Return as soon as one of these processes ends, or after ``timeout_s`` seconds."""
    with ExitStack() as opened:
        handles = []
        for pid in pids:
            try:
                handles.append(os.pidfd_open(pid))
            except OSError:  # it has ended
                return
            opened.callback(os.close, handles[-1])
        select.select(handles, [], [], timeout_s)


def terminate(processes: Sequence[Process], told: Callable[[Process], bool], timeout_s: float) -> None:
    """Send SIGTERM to the processes that ``told`` accepts, and wait up to ``timeout_s`` seconds for all of them."""
    import psutil  # noqa: PLC0415

    for process in filter(told, processes):
        with suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(processes, timeout=timeout_s)


def kill_session(leader: Leader) -> None:
    """Kill what is left of a session. The leader goes first: a launcher could start Java at this very moment."""
    if leader.poll() is None:
        leader.kill()
    _kill_members(leader.pid)
    leader.wait()


def _kill_members(number: int) -> None:
    import psutil  # noqa: PLC0415

    for _ in range(10):  # Java may start workers between a look and a kill
        left = session(number)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        if not left:
            break
        psutil.wait_procs(left, timeout=1)


def shared_memory(folder: Path) -> str:
    """Return what the names of the shared memory begin with that belongs to a private folder."""
    return f"redpp-{sha256(os.fsencode(folder)).hexdigest()[:12]}-"


def free_shared_memory(folder: Path) -> None:
    """Remove the shared memory that belongs to a private folder; that of killed processes is left behind."""
    for left in Path("/dev/shm").glob(f"{shared_memory(folder)}*"):
        left.unlink(missing_ok=True)


class Guard:
    """A process that ends sessions and removes folders when this process dies before it calls `dismiss`.

    One guard serves a whole supervisor: watch each session once it is started, and each folder once it is made. A
    session that was started again is watched again.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def watch_session(self, leader: Leader) -> None:
        """Also kill the session of this leader."""
        self._tell("session", [leader.pid, started(leader.pid)])

    def watch_folder(self, folder: Path) -> None:
        """Also remove this folder, and the shared memory that belongs to it."""
        self._tell("folder", str(folder))

    def dismiss(self) -> None:
        """Tell the guard that everything has been ended, and return when the guard has ended too."""
        self._tell("dismiss", None)
        with suppress(OSError):
            self._process.communicate()

    def _tell(self, what: str, value: object) -> None:
        assert self._process.stdin
        with suppress(OSError):  # someone has killed the guard: the supervisor goes on without
            self._process.stdin.write(json.dumps([what, value]) + "\n")
            self._process.stdin.flush()


def wait_and_end(lines: Iterable[str]) -> None:
    """Read the lines that a `Guard` writes to their end, then end what they name, unless the last one dismisses."""
    told = [json.loads(line) for line in lines]
    if told and told[-1][0] == "dismiss":
        return
    for number, begun in [value for what, value in told if what == "session"]:
        if started(number) in (None, begun):  # else the number has gone to somebody else's process
            _kill_members(number)
    for folder in [Path(value) for what, value in told if what == "folder"]:
        shutil.rmtree(folder, ignore_errors=True)
        free_shared_memory(folder)


if __name__ == "__main__":
    wait_and_end(sys.stdin)
