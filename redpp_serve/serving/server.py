"""What local model servers have in common: a private folder, processes in sessions of their own, a log, and an end.

Everything that a server writes (process id, sockets, unpacked archives, tokens) goes to its private folder, so that
several servers run side by side and nothing is left behind. Its log does so too, unless it has a folder of `logs`.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol

from redpp_serve.errors import RedppError
from redpp_serve.handlers.wire import OBSERVE_FILE_VARIABLE, OBSERVE_VARIABLE
from redpp_serve.logs import SERVER, Logs
from redpp_serve.loopback import ADDRESS, NO_ANSWER, ask, check_ports, free_ports
from redpp_serve.packaging.server_config import read_limits
from redpp_serve.processes import Adopted, Guard, Leader, kill_session, start_session, started, tail
from redpp_serve.runtime.memory import with_huge_pages
from redpp_serve.serving.running import Running
from redpp_serve.state_folders import Held, hold, private_folder, sweep
from redpp_serve.variants import NAMES

INSTALL = "pip install 'redpp-serve[serve]'"
GRACE_S = 15.0  # for the processes to end when they are asked to
START_TIMEOUT_S = 300.0
_POLL_S = 0.1
RESTARTS, _WITHIN_S = 3, 60.0  # what dies more often than that in this time is not started again


_PREFIX, _FRONT = "redpp-server-", "the front"


class Keeper(Protocol):
    """Is told what must not be forgotten of a server when its supervisor is killed, such as a `Guard`."""

    def watch_session(self, leader: Leader) -> None:
        """Remember the session of this leader."""

    def watch_folder(self, folder: Path) -> None:
        """Remember this folder."""


class LocalServer(ABC):
    """Both versions of a packaged model, served on the loopback address while the context is open.

    Requests that name no version go to the original after the start; `switching.switch` moves them. `stop` runs on
    leaving the context, also after an exception or Ctrl-C.

    Args:
        folder: the packaged folder; only read.
        name: the model's name in URLs.
        workers: processes for each version.
        ports: where to listen, of the type ``ports_type``; free ones by default.
        auth: require a token for requests, see `headers`.
        note: takes a line of text for the user when the number of ready workers changes or something restarts.

    Attributes:
        versions: the numbers of the original and of the pruned version in URLs.
        home: its private folder with log and tokens; None when not running.
        environment: variables for its processes, besides those of this one.
        logs: where it logs; None for its private folder, whose log ends with it.
        restarts: when the last few parts that had died were started again, on the clock of ``time.monotonic``.
    """

    kind: ClassVar[str]
    title: ClassVar[str]  # what messages call it
    ports_type: ClassVar[Any]  # `Ports` or `TritonPorts`

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        workers: int = 1,
        ports: Any = None,
        auth: bool = True,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        from redpp_serve.packaging.mar import check_name  # noqa: PLC0415  with torch, which other commands do without

        check_name(name)
        self.folder, self.name = Path(folder).resolve(), name
        self.versions = self._open()
        self.workers, self.auth = workers, auth
        self.ports: Any = ports or free_ports(self.ports_type)
        self.home: Path | None = None
        self.environment: dict[str, str] = {}
        self.logs: Logs | None = None
        self._note = note
        self._leaders: dict[str, Leader] = {}  # what each is -> the leader of its session
        self._held: Held | None = None  # the private folder
        self._guard: Keeper | None = None
        self._own_guard: Guard | None = None
        self.restarts: deque[float] = deque(maxlen=RESTARTS)

    @property
    @abstractmethod
    def management_url(self) -> str:
        """Base of the management API."""

    @property
    @abstractmethod
    def metrics_url(self) -> str:
        """What Prometheus scrapes for this project's metrics."""

    @abstractmethod
    def default_url(self) -> str:
        """Return where to POST inputs without naming a version."""

    @abstractmethod
    def url(self, version: str) -> str:
        """Return where to POST inputs for one of ``versions``."""

    @abstractmethod
    def headers(self, api: str = "inference") -> dict[str, str]:
        """Return the headers with the running server's token for ``inference`` or ``management``; none without one."""

    @property
    def model_config(self) -> dict[str, Any]:
        """What the server was told about the model, where `switching` has to repeat it."""
        return {}

    @property
    def front_url(self) -> str:
        """Base of the Open Inference Protocol, and of ``/healthz`` without a token; see `front`."""
        return f"http://{ADDRESS}:{self.ports.front}"

    @property
    @abstractmethod
    def grpc_address(self) -> str:
        """Host and port of the server's own gRPC."""

    @abstractmethod
    def _front_options(self) -> list[str]:
        """Return what `front` has to know of this server."""

    @abstractmethod
    def _open(self) -> tuple[str, str]:
        """Return the versions in the folder; raise a RedppError where there is nothing that could be served."""

    @abstractmethod
    def _prepare(self) -> None:
        """Find what has to be installed; raise a RedppError before anything starts."""

    @abstractmethod
    def _launch(self, home: Path) -> None:
        """Write what the server reads, and spawn its processes."""

    @abstractmethod
    def _ready(self) -> tuple[int, int]:
        """Return how many workers are ready, and how many have to be."""

    @abstractmethod
    def _terminate(self) -> None:
        """Ask every process to end, and wait up to `GRACE_S`."""

    def _surroundings(self) -> dict[str, str]:
        """Return the environment of its processes. Only who starts a server can have it observe requests."""
        own = {key: value for key, value in os.environ.items() if key not in (OBSERVE_VARIABLE, OBSERVE_FILE_VARIABLE)}
        return with_huge_pages(own | self.environment)

    def _answers(self) -> bool:
        """Return True once all that is not a worker responds too."""
        return self._gives(self.metrics_url)

    @staticmethod
    def _gives(url: str) -> bool:
        """Return whether somebody answers there that all is well."""
        try:
            return ask(url)[0] == 200
        except NO_ANSWER:
            return False

    def _given_up(self) -> str:
        """Return why waiting on is useless; empty while it is not."""
        return ""

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self.stop()

    def start(self, keeper: Keeper | None = None) -> None:
        """Start, and return when every worker of both versions answers.

        Args:
            keeper: is told of what has to end with the server if this process is killed; by default a `Guard` that
                ends it at once.

        Raises:
            RedppError: something is not installed, a port in use, or a server that does not come up (with its log).
        """
        self._prepare()
        check_ports(self.ports)
        try:
            sweep(_PREFIX)
            self._held = private_folder(_PREFIX)
            self.home = self._held.path
            if keeper is None:
                keeper = self._own_guard = Guard()
            self._guard = keeper
            keeper.watch_folder(self.home)
            self._launch(self.home)
            self._start_front()
            self._wait()
        except BaseException:
            self.stop()
            raise

    def handover(self) -> dict[str, Any]:
        """Return what another process needs to `adopt` this running server: plain values, tokens among them."""
        return {
            "home": str(self.home),
            "ports": asdict(self.ports),
            "leaders": {what: [leader.pid, started(leader.pid)] for what, leader in self._leaders.items()},
        }

    def adopt(self, document: Mapping[str, Any], keeper: Keeper) -> bool:
        """Go on with a server whose supervisor was killed, and return True; False, and nothing changed, if it ended.

        Args:
            document: what `handover` returned there.
            keeper: as for `start`.
        """
        leaders = {what: Adopted(*given) for what, given in document["leaders"].items()}
        lives = self.title in leaders and leaders[self.title].poll() is None
        if not lives or not Path(document["home"]).is_dir():
            return False
        self._prepare()
        self._held, self.ports = hold(Path(document["home"])), self.ports_type(**document["ports"])
        self.home = self._held.path
        self._leaders, self._guard = dict(leaders), keeper
        return True

    def stop(self) -> None:
        """End every process, and remove the private folder. Do nothing when not running."""
        try:
            self._terminate()
        finally:
            for leader in self._leaders.values():
                kill_session(leader)
            if self._held:
                shutil.rmtree(self._held.path, ignore_errors=True)
                self._held.release()
            if self._own_guard:
                self._own_guard.dismiss()
            self.home, self._held, self._leaders, self._guard, self._own_guard = None, None, {}, None, None

    @abstractmethod
    def dead(self, patience_s: float) -> set[str]:
        """Return the versions all of whose workers have died and are not ready again.

        Args:
            patience_s: how long to wait, seconds, for a worker to die; when one does, return at once.
        """

    def check_alive(self) -> None:
        """Raise a RedppError with the end of the log when a process has ended by itself."""
        self._keep_front()
        self._check_leaders("has ended")

    def log_tail(self, lines: int = 30) -> str:
        """Return the last lines that the server and its workers wrote; empty when it does not run."""
        return tail(self._log, lines) if self.home else ""

    @property
    def _log(self) -> Path:
        assert self.home is not None
        return self.logs.file(SERVER) if self.logs else self.home / SERVER

    def running(self, extra: dict[str, str] | None = None) -> Running:
        """Describe this server for `running.register`, as one that this process supervises."""
        urls = {name: self.url(version) for name, version in zip(NAMES, self.versions, strict=True)}
        return Running(
            folder=str(self.folder),
            name=self.name,
            kind=self.kind,
            pid=os.getpid(),
            created=started(os.getpid()) or 0.0,
            versions=self.versions,
            urls={**urls, "default": self.default_url()},
            management_url=self.management_url,
            metrics_urls=[self.metrics_url],
            headers={api: self.headers(api) for api in ("inference", "management")},
            model_config=self.model_config,
            extra=extra or {},
            front_url=self.front_url,
            grpc=self.grpc_address,
        )

    def _start_front(self) -> None:
        command = [sys.executable, "-m", "redpp_serve.serving.front", self.kind]
        command += [
            "--port",
            str(self.ports.front),
            "--name",
            self.name,
            "--most",
            str(read_limits(self.folder).request),
        ]
        self._spawn(_FRONT, [*command, *self._front_options()], self._surroundings())

    def _keep_front(self) -> None:
        """Start the front again where it has ended: it keeps nothing, and its clients connect anew."""
        front = self._leaders.get(_FRONT)
        if front is not None and front.poll() is not None and self._may_restart(_FRONT):
            self._start_front()

    def _spawn(self, what: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start a session, so that Ctrl-C reaches this program alone and all descendants can be found again."""
        assert self.home is not None and self._held is not None and self._guard is not None
        try:
            self._leaders[what] = start_session(
                command,
                self._log,
                folder=self.home,
                environment=environment,
                # the private folder is swept when the server has ended, and the logs may go
                inherited=[self._held.handle, *([self.logs.handle] if self.logs else ())],
            )
        except OSError as error:
            raise RedppError(
                f"{what} cannot be started: {error}", f"{command[0]} as a program of this machine", "install it again"
            ) from error
        self._guard.watch_session(self._leaders[what])

    def _wait(self) -> None:
        deadline, shown = time.monotonic() + START_TIMEOUT_S, -1
        while True:
            ready, wanted = self._ready()
            if ready != shown and ready <= wanted:
                self._note(f"{ready} of {wanted} workers ready")
                shown = ready
            if ready == wanted and self._answers():
                return
            self._check_leaders("ended while starting")
            if reason := self._given_up():
                raise self._failure(reason)
            if time.monotonic() > deadline:
                raise self._failure(f"{ready} of {wanted} workers ready after {START_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def _check_leaders(self, has_ended: str) -> None:
        if not self._leaders:
            raise self._failure(f"{self.title} {has_ended}")
        for what, leader in self._leaders.items():
            if leader.poll() is not None:
                raise self._failure(f"{what} {has_ended}")

    def _may_restart(self, what: str) -> bool:
        """Tell the user that ``what`` is started again, and return True; False if it has died too often lately."""
        now = time.monotonic()
        if len(self.restarts) == RESTARTS and now - self.restarts[0] < _WITHIN_S:
            return False
        self.restarts.append(now)
        self._note(f"{what} has died; starting it again")
        return True

    def _failure(self, found: str) -> RedppError:
        return RedppError(
            f"{found}. The end of its log:\n{self.log_tail()}\n",
            "a server with all workers ready",
            "read the log above; it names the cause" + (f"; all of it is in {self.logs.folder}" if self.logs else ""),
        )


def require_packages(packages: Iterable[tuple[str, str]]) -> None:
    """Refuse to start without packages, which are given as pairs of module and package name.

    Raises:
        RedppError: names those that are missing.
    """
    missing = [name for module, name in packages if find_spec(module) is None]
    if missing:
        raise RedppError(f"not installed: {', '.join(missing)}", "the serving packages", INSTALL)
