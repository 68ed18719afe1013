"""The gateway: nginx in front of one model server, which chooses the arm of every request.

One template, ``nginx.conf.j2``, gives the configuration of a local A/B test and the split that ``deploy/`` starts.
Triton's gRPC has a port of its own, see `grpc_relay`; TorchServe's is not split.

``python -m redpp_serve.ab.gateway`` prints the deployed split.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from grp import getgrgid
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from redpp_serve.ab.spec import STEPS, TrafficSplit, parse_split
from redpp_serve.errors import RedppError
from redpp_serve.loopback import ADDRESS
from redpp_serve.packaging.server_config import MAX_REQUEST_BYTES
from redpp_serve.processes import Adopted, Leader, find_program, kill_session, session, start_session, started, tail
from redpp_serve.state_folders import open_to_others
from redpp_serve.variants import NAMES, ORIGINAL, PRUNED

ARM_HEADER = "X-Redpp-Arm"  # asks for an arm in a request, and names it in the reply
PROBE_HEADER, CHOSEN_HEADER = "X-Redpp-Probe", "X-Redpp-Chosen-By"  # of the commands' own requests, and of the answers
ACCESS_LOG, ERROR_LOG = "access.log", "error.log"
LOG_BYTES = 32 << 20  # size at which the access log is put aside; one old file is kept
# Files in the gateway's folder, see the template. Without the first two all users get the original.
_SPLIT, _PROMOTED, _SHADOW_OFF = "split", "promoted", "shadow_off"
_PARTS, _DIVISION = (
    "parts",
    "division.json",
)  # a link to a folder of files named after users' parts, and its description
STEP_LABELS = 4  # the access log tells the last few splits apart
DEAD = "dead"  # folder of files named after arms that cannot answer; it ends with the supervisor, who keeps it
_START_S, _STOP_S, _RETIRE_S, _POLL_S = 30.0, 10.0, 1.0, 0.02


@dataclass(frozen=True)
class Gateway:
    """What the configuration of a local gateway depends on.

    Attributes:
        folder: the gateway's private folder, absolute; its name needs no quoting in nginx.
        port: where users send requests, on the loopback address.
        server: port of the model server's HTTP inference.
        public: path that users post to, such as ``/predictions/NAME``.
        paths: path on the server for the original and for the pruned version.
        split: how users are divided at first.
        sticky: request header that names the user; None to decide for every request anew.
        salt: mixed into the division, so that another test divides the same users differently.
        probe: word by which the gateway knows the commands' own requests, see `moving`.
        token: request header, in nginx's spelling, and value that the server wants; None where it wants none.
        recorder: port of the shadow recorder; None without shadow mode.
        account: user and group of nginx's worker where root starts it; None elsewhere.
        connections: connections that the worker may hold; a request in flight takes two, with shadow mode three.
        shares: shares of the pruned version, in per cent, that it may be given later, besides `spec.STEPS`.
        front: port of the server's `front`, which answers for health and metadata; None where there is none.
        name: the model's name in the paths of the Open Inference Protocol.
        most_bytes: bytes that a request's body may have.
        logs: the folder of its logs; by default its own.
        grpc: port where users ask over gRPC, and the server's own address; None where they cannot.
    """

    folder: Path
    port: int
    server: int
    public: str
    paths: tuple[str, str]
    split: TrafficSplit
    sticky: str | None
    salt: str
    probe: str = "none"
    token: tuple[str, str] | None = None
    recorder: int | None = None
    account: tuple[str, str] | None = None
    connections: int = 1024
    shares: tuple[Decimal, ...] = ()
    front: int | None = None
    name: str = ""
    most_bytes: int = MAX_REQUEST_BYTES
    logs: Path | None = None
    grpc: tuple[int, str] | None = None

    def log(self, name: str) -> Path:
        """Return the path of a log."""
        return (self.logs or self.folder) / name


def gateway_config(gateway: Gateway) -> str:
    """Return the text of ``nginx.conf``."""
    return template("nginx.conf.j2").render(
        local=True,
        account=" ".join(gateway.account or ()),
        connections=gateway.connections,
        state=gateway.folder,
        error_log=gateway.log(ERROR_LOG),
        access_log=gateway.log(ACCESS_LOG),
        sticky=(gateway.sticky or "").lower().replace("-", "_"),
        salt=gateway.salt,
        probe=gateway.probe,
        token=gateway.token and (gateway.token[0], re.escape(gateway.token[1])),
        parts=_parts(gateway),
        labels=range(STEP_LABELS),
        paths=gateway.paths,
        upstream=f"{ADDRESS}:{gateway.server}",
        recorder=gateway.recorder and f"{ADDRESS}:{gateway.recorder}",
        relays={arm: relay_socket(gateway.folder, arm) for arm in NAMES},
        listen=f"{ADDRESS}:{gateway.port}",
        public=gateway.public,
        front=gateway.front and f"{ADDRESS}:{gateway.front}",
        protocol=f"/v2/models/{gateway.name}/infer",
        most_bytes=gateway.most_bytes,
        grpc=gateway.grpc
        and {
            "listen": f"{ADDRESS}:{gateway.grpc[0]}",
            "server": gateway.grpc[1],
            "sockets": {arm: grpc_socket(gateway.folder, arm) for arm in NAMES},
        },
    )


def deployed_config() -> str:
    """Return the text of ``deploy/nginx/split.conf.template``, where ``${REDPP_...}`` stand for what differs."""
    words = ("state", "access_log", "salt", "upstream", "listen", "public", "most_bytes")
    return template("nginx.conf.j2").render(
        {word: f"${{REDPP_{word.upper()}}}" for word in words},
        local=False,
        sticky="${REDPP_STICKY_VARIABLE}",
        shares="${REDPP_SPLIT}",
        paths=("${REDPP_PATH_ORIGINAL}", "${REDPP_PATH_PRUNED}"),
        recorder=None,
        relays={},
        front=None,
        token=None,
        grpc=None,
    )


@cache
def template(name: str) -> Template:
    """Return one of the templates of nginx's configurations that lie beside this module."""
    text = (files(__package__) / name).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(text)


def _parts(gateway: Gateway) -> str:
    """Return the body of nginx's ``split_clients``: users' parts, each named after the share at which it is pruned."""
    ends = _ends((gateway.split.pruned, *gateway.shares))
    widths = [f"{end - begin}% {_name(end)};" for begin, end in pairwise((Decimal(0), *ends[:-1]))]
    return " ".join([*widths, f"* {_name(ends[-1])};"])


def _name(end: Decimal) -> str:
    return f"{end.normalize():f}"  # 5.00 is 5


def _ends(shares: Collection[Decimal]) -> list[Decimal]:
    """Return the shares at which a part of users ends: those of every test and these; the last is 100."""
    return sorted({*STEPS, *shares} - {Decimal(0)})


def relay_socket(folder: Path, arm: str) -> Path:
    """Return the socket on which an arm's relay takes requests; ``folder`` is the gateway's."""
    return folder / f"relay-{arm}.sock"


def grpc_socket(folder: Path, arm: str) -> Path:
    """Return the socket on which `grpc_relay` takes an arm's requests; ``folder`` is the gateway's."""
    return folder / f"grpc-{arm}.sock"


def write_config(path: Path, text: str) -> None:
    """Write a configuration, where it is not there already: a full disk keeps no nginx from being started again.

    Raises:
        OSError: it cannot be written.
    """
    path.touch(mode=0o600)  # it may hold a token
    if path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


class ListeningProcess:
    """A program that takes connections, in a session of its own.

    Args:
        title: what messages call it.
        command: program and arguments.
        opens: the port of the loopback address, or the socket's path, that it opens.
        log: file that its output is appended to.
        watch: called with each process that is started, so that a guard can end it.
        folder: its working folder.
        inherited: descriptors that it holds while it runs.
    """

    _signals: tuple[tuple[int, float], ...] = ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S))

    def __init__(
        self,
        title: str,
        command: Sequence[str],
        opens: int | Path,
        log: Path,
        watch: Callable[[Leader], None] = lambda process: None,
        *,
        folder: Path | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        self._title, self._command, self._opens, self._log, self._watch = title, command, opens, log, watch
        self._folder, self._inherited = folder or log.parent, inherited
        self._process: Leader | None = None

    def start(self, wait: bool = True) -> None:
        """Start, and return when it takes connections, or at once without ``wait``.

        Raises:
            RedppError: it does not come up; the message holds the end of its log.
        """
        if self._process is not None:  # it was killed: what it started may still hold the port
            kill_session(self._process)
        self._process = start_session(self._command, self._log, folder=self._folder, inherited=self._inherited)
        self._watch(self._process)
        deadline = time.monotonic() + _START_S
        while wait and not self._listens():
            if not self.alive() or time.monotonic() > deadline:
                self.stop()
                raise self._refusal(f"{self._title} did not start: {self.log_tail()}")
            time.sleep(_POLL_S)

    def handover(self) -> list[float] | None:
        """Return what another process needs to `adopt` the program: its process id and start."""
        return None if self._process is None else [self._process.pid, started(self._process.pid) or 0.0]

    def adopt(self, given: Sequence[float] | None) -> bool:
        """Go on with a program whose supervisor was killed, and return True; False if it has ended."""
        ours = given is not None and started(int(given[0])) in (None, given[1])  # else its number is somebody else's
        self._process = Adopted(int(given[0]), given[1]) if given and ours else None
        return self.alive()

    def alive(self) -> bool:
        """Return True while the program runs."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = 5) -> str:
        """Return the last lines of the log."""
        return tail(self._log, lines)

    def stop(self) -> None:
        """End the program, gently at first, and then whatever it has left."""
        for number, patience_s in self._signals:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience_s)
        if self._process is not None:
            kill_session(self._process)
        self._process = None

    def _listens(self) -> bool:
        local = isinstance(self._opens, Path)
        with socket.socket(socket.AF_UNIX if local else socket.AF_INET) as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(str(self._opens) if local else (ADDRESS, self._opens)) == 0

    def _refusal(self, found: str) -> RedppError:
        return RedppError(found, f"{self._title} takes connections", "read its message above, which names the cause")


class NginxProcess(ListeningProcess):
    """One nginx with its configuration and scratch files in ``gateway.folder``, see `ListeningProcess`."""

    # SIGQUIT gives requests in flight a moment to end.
    _signals = ((signal.SIGQUIT, 1.0), *ListeningProcess._signals)

    def __init__(
        self, gateway: Gateway, watch: Callable[[Leader], None] = lambda process: None, inherited: Sequence[int] = ()
    ) -> None:
        folder, program = gateway.folder, find_program("nginx")
        log, config = gateway.log(ERROR_LOG), folder / "nginx.conf"
        command = [str(program), "-e", str(log), "-p", str(folder), "-c", str(config)]
        super().__init__("nginx", command, gateway.port, log, watch, folder=folder, inherited=inherited)
        self.gateway, self.access_log, self._config = gateway, gateway.log(ACCESS_LOG), config
        self._pid = folder / "nginx.pid"

    def start(self, wait: bool = True) -> None:
        """Write the configuration, check it, and start.

        Raises:
            RedppError: nginx refuses the configuration or does not come up; the message holds nginx's words.
        """
        self.make_folder()
        write_config(self._config, gateway_config(self.gateway))
        checked = subprocess.run(
            [*self._command, "-t", "-q"], capture_output=True, text=True, timeout=_START_S, check=False
        )
        if checked.returncode:
            raise self._refusal(f"nginx refuses its configuration: {checked.stderr.strip()[-1000:]}")
        former, self._process = self._process, None
        self._pid.unlink(missing_ok=True)
        try:
            super().start(wait)
        except BaseException:
            self._process = former
            raise
        if former is not None:
            self._retire(former)

    def _retire(self, former: Leader) -> None:
        """End the workers of an nginx whose master was killed; they have served users until the new one listens too."""
        workers = session(former.pid)
        for worker in workers:
            with suppress(OSError):
                os.kill(worker.pid, signal.SIGQUIT)
        deadline = time.monotonic() + _RETIRE_S
        while session(former.pid) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        kill_session(former)

    def _listens(self) -> bool:
        """Return True once this nginx takes connections: a former one's worker may do so on the same port."""
        try:
            ours = self._process is not None and self._pid.read_text().strip() == str(self._process.pid)
        except OSError:
            return False
        return ours and super()._listens()

    def make_folder(self) -> None:
        """Make the folder, if it is missing, and open it to nginx's worker."""
        folder, account = self.gateway.folder, self.gateway.account
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.parent.chmod(0o711 if account else 0o700)  # the worker looks for the switches
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711 if account else 0o700)
        if account:
            shutil.chown(folder / "tmp", *account)
        if division(folder) is None:
            set_split(folder, self.gateway.split, self.gateway.shares)

    def reaches_folder(self) -> bool:
        """Return True if the folder is open to nginx's worker."""
        return self.gateway.account is None or open_to_others(self.gateway.folder)

    def reopen(self) -> None:
        """Have nginx open its logs anew, where their files were taken away."""
        if self._process is not None:
            self._process.send_signal(signal.SIGUSR1)

    def rotate(self, most_bytes: int = LOG_BYTES) -> bool:
        """Put the access log aside when it has ``most_bytes`` or more; return True when it was."""
        if self._process is None or not self.access_log.exists() or self.access_log.stat().st_size < most_bytes:
            return False
        self.access_log.replace(self.access_log.with_suffix(".log.1"))
        self.reopen()
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


@dataclass(frozen=True)
class Division:
    """How users are divided, where they are.

    Attributes:
        step: counts the splits of this test, from 0 on.
        split: the split in force.
        ends: the shares, besides `spec.STEPS`, at which parts of users end.
    """

    step: int
    split: TrafficSplit
    ends: tuple[Decimal, ...] = ()

    @property
    def label(self) -> str:
        """What the access log calls the step."""
        return str(self.step % STEP_LABELS)


def set_split(folder: Path, split: TrafficSplit, shares: Collection[Decimal] = ()) -> Division:
    """Have users divided by another split from their next request on.

    Users whose part is pruned at a smaller share are so at a larger one. nginx looks for the parts' files at every
    request. They lie in a new folder whose link takes the old one's place, so that it sees all of them or none.

    Args:
        folder: the gateway's.
        split: the split.
        shares: of the gateway's; later splits know those of the first one.

    Raises:
        OSError: the folder is gone or cannot be written to; the former split is in force.
    """
    former = division(folder)
    ends = _ends([split.pruned, *shares, *(former.ends if former else ())])
    made = Division(former.step + 1 if former else 0, split, tuple(end for end in ends if end not in STEPS))
    new = Path(tempfile.mkdtemp(prefix=f"{_PARTS}-", dir=folder))
    try:
        new.chmod(0o711)  # nginx's worker may be another user
        for end in ends:
            if end <= split.pruned:
                _touch(new / _name(end))
        _touch(new / f"step{made.label}")
        document = {"step": made.step, "split": str(split), "ends": [*map(_name, made.ends)]}
        (new / _DIVISION).write_text(json.dumps(document), encoding="utf-8")
        link = new / _PARTS
        link.symlink_to(new.name)
        link.replace(folder / _PARTS)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for old in folder.glob(f"{_PARTS}-*"):
        if old != new:
            shutil.rmtree(old, ignore_errors=True)
    return made


def division(folder: Path) -> Division | None:
    """Return how users are divided where they are, or None where the folder does not say."""
    try:
        document = json.loads((folder / _PARTS / _DIVISION).read_text(encoding="utf-8"))
        return Division(document["step"], parse_split(document["split"]), tuple(map(Decimal, document.get("ends", ()))))
    except (OSError, ValueError, ArithmeticError):
        return None


def divide(folder: Path) -> None:
    """Divide users by the split in force from their next request on; ``folder`` is the gateway's.

    Raises:
        OSError: the folder is gone or cannot be written to.
    """
    _touch(folder / _SPLIT)
    (folder / _PROMOTED).unlink(missing_ok=True)


def switch(folder: Path, arm: str) -> None:
    """Send all users to one arm from their next request on; ``folder`` is the gateway's.

    A roll-back only removes files: it needs no room on the disk, and no folder.

    Raises:
        OSError: the folder is gone or cannot be written to.
    """
    if arm == PRUNED.name:
        _touch(folder / _PROMOTED)  # before the other one goes, so that users are never divided in between
    (folder / _SPLIT).unlink(missing_ok=True)
    if arm == ORIGINAL.name:
        (folder / _PROMOTED).unlink(missing_ok=True)


def switched(folder: Path) -> str | None:
    """Return the arm that all users are sent to; None while they are divided. A folder that is lost says the original.

    It tells what the files say; `moves.probe` asks nginx.
    """
    if os.path.isfile(folder / _PROMOTED):
        return PRUNED.name
    return None if os.path.isfile(folder / _SPLIT) else ORIGINAL.name


def divided_now(folder: Path) -> Division | None:
    """Return the division while each arm has its own users: they are divided, and no arm answers for the other."""
    apart = switched(folder) is None and not any(os.path.isfile(folder / DEAD / arm) for arm in NAMES)
    return division(folder) if apart else None


def mark_dead(folder: Path, arms: Collection[str]) -> None:
    """Have the users of these arms, and of no others, answered by the other one; ``folder`` is the gateway's.

    Raises:
        OSError: the folder is gone or cannot be written to.
    """
    for arm in NAMES:
        path = folder / DEAD / arm
        if arm not in arms:
            path.unlink(missing_ok=True)
        elif not path.exists():
            path.parent.mkdir(mode=0o711, exist_ok=True)
            path.parent.chmod(0o711)  # nginx's worker may be another user
            _touch(path)


def stop_mirroring(folder: Path) -> None:
    """Send no further request to the recorder; ``folder`` is the gateway's."""
    _touch(folder / _SHADOW_OFF)


def _touch(path: Path) -> None:
    path.touch()
    path.chmod(0o644)  # nginx's worker may be another user


if __name__ == "__main__":
    sys.stdout.write(deployed_config())
