"""What the local model servers have in common: a private folder, processes in sessions of their own, a log, an end.

Everything a server writes (process id, sockets, unpacked archives, tokens, logs) goes to its private folder, so
that several servers run side by side and nothing is left behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from redpp_serve.errors import RedppError
from redpp_serve.loopback import Ports, TritonPorts, check_ports
from redpp_serve.processes import Guard, kill_session, started
from redpp_serve.serving.running import Running

KINDS = ("torchserve", "triton")
VARIANTS = ("original", "pruned")
START_TIMEOUT_S = 300.0
INSTALL = "pip install 'redpp-serve[serve]'"
_POLL_S = 0.1


class LocalServer(ABC):
    """Both versions of a model on the loopback address. Starts on entering the context, stops on leaving it, also after
    an exception or Ctrl-C.

    Args:
        folder: written by `package`; only read.
        name: the model's name in URLs.
        versions: of the original and of the pruned network, as in URLs.
        workers: processes for each version.
        ports: where to listen.
        auth: require a token for requests (see `headers`).
        progress: called with a line of text when the number of ready workers changes.
        timeout_s: how long the start may take, seconds.

    Attributes:
        home: its private folder with log and tokens; None when not running.

    Requests that name no version go to the original after the start, to the pruned network after `promote`.
    """

    kind: ClassVar[str]
    title: ClassVar[str]  # what messages call it
    content_type: ClassVar[str] = "application/octet-stream"

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        versions: tuple[str, str],
        workers: int,
        ports: Any,
        auth: bool,
        progress: Callable[[str], None],
        timeout_s: float,
    ) -> None:
        from redpp_serve.packaging.mar import check_name  # with torch, which commands on a running server do not need

        check_name(name)
        self.folder, self.name, self.versions = Path(folder).resolve(), name, versions
        self.workers, self.auth, self.ports = workers, auth, ports
        self.home: Path | None = None
        self._progress, self._timeout_s = progress, timeout_s
        self._leaders: dict[str, subprocess.Popen[bytes]] = {}  # what each is -> the leader of its session
        self._guard: Guard | None = None

    @property
    @abstractmethod
    def management_url(self) -> str:
        """Base of the management API."""

    @property
    @abstractmethod
    def metrics_url(self) -> str:
        """What Prometheus scrapes for this project's metrics."""

    @abstractmethod
    def url(self, version: str) -> str:
        """Where to POST inputs for one of ``versions``."""

    @abstractmethod
    def default_url(self) -> str:
        """Where to POST inputs without naming a version."""

    @abstractmethod
    def headers(self, api: str = "inference") -> dict[str, str]:
        """The request headers that carry the token for ``inference`` or ``management``; call it while the server runs."""

    @property
    def model_config(self) -> dict[str, Any]:
        """What the server was told about the model, where `switching` has to repeat it."""
        return {}

    @abstractmethod
    def _prepare(self) -> None:
        """Find what has to be installed; raises a RedppError before anything starts."""

    @abstractmethod
    def _launch(self, home: Path) -> None:
        """Write what the server reads, and spawn its processes."""

    @abstractmethod
    def _ready(self) -> tuple[int, int]:
        """How many workers are ready, and how many have to be; fewer than that also while something else is not up."""

    @abstractmethod
    def _terminate(self) -> None:
        """Ask every process to end, and wait a while."""

    def _given_up(self) -> str:
        """Why waiting on is useless; empty while it is not."""
        return ""

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start, and return when every worker of both versions answers.

        Raises:
            RedppError: something is not installed, a port in use, or a server that does not come up (with its log).
        """
        self._prepare()
        check_ports(self.ports)
        try:
            parent = tempfile.gettempdir()
            # A socket's path may not exceed about 100 bytes.
            self.home = Path(tempfile.mkdtemp(prefix="redpp-", dir=parent if len(parent) < 60 else "/tmp"))
            self._guard = Guard(self.home)
            self._launch(self.home)
            self._wait(time.monotonic() + self._timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process, and remove the private folder. Does nothing when not running."""
        try:
            self._terminate()
        finally:
            for leader in self._leaders.values():
                kill_session(leader)
            if self.home:
                shutil.rmtree(self.home, ignore_errors=True)
            if self._guard:
                self._guard.dismiss()
            self.home, self._leaders, self._guard = None, {}, None

    def check_alive(self) -> None:
        """Raise a RedppError with the end of the log when a process has ended by itself."""
        if not self._leaders:
            raise self._failure(f"{self.title} has ended")
        for what, leader in self._leaders.items():
            if leader.poll() is not None:
                raise self._failure(f"{what} has ended")

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that the server and its workers wrote; empty when it does not run."""
        path = self.home / "server.log" if self.home else None
        if path is None or not path.exists():
            return ""
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])

    def running(self, extra: dict[str, Any] | None = None) -> Running:
        """What other commands need to find this server, for `registry.register`; this process supervises it."""
        urls = {variant: self.url(version) for variant, version in zip(VARIANTS, self.versions)}
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
        )

    def promote(self) -> None:
        """Requests that name no version go to the pruned network from now on; none of them fails on the way.

        Raises:
            RedppError: the server refuses or does not answer.
        """
        from redpp_serve.serving.switching import switch

        switch(self.running(), "pruned")

    def rollback(self) -> None:
        """Requests that name no version go to the original from now on; none of them fails on the way.

        Raises:
            RedppError: the server refuses or does not answer.
        """
        from redpp_serve.serving.switching import switch

        switch(self.running(), "original")

    def default_variant(self) -> str:
        """Where requests that name no version go now: ``original`` or ``pruned``.

        Raises:
            RedppError: the server does not answer.
        """
        from redpp_serve.serving.switching import default_variant

        return default_variant(self.running())

    def _spawn(self, what: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """In a session of its own: Ctrl-C reaches this program alone, and all descendants can be found again."""
        assert self.home is not None
        try:
            with (self.home / "server.log").open("ab") as log:
                self._leaders[what] = subprocess.Popen(
                    command,
                    cwd=self.home,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise RedppError(
                f"{what} cannot be started: {error}", f"{command[0]} as a program of this machine", "install it again"
            ) from error
        if self._guard:
            self._guard.watch(self._leaders[what])

    def _wait(self, deadline: float) -> None:
        shown = -1
        while True:
            ready, wanted = self._ready()
            if ready != shown and ready <= wanted:
                self._progress(f"{ready} of {wanted} workers ready")
                shown = ready
            if ready == wanted and self._answers():
                return
            for what, leader in self._leaders.items():
                if leader.poll() is not None:
                    raise self._failure(f"{what} ended while starting")
            if reason := self._given_up():
                raise self._failure(reason)
            if time.monotonic() > deadline:
                raise self._failure(f"{ready} of {wanted} workers ready after {self._timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        """Whether what is no worker answers too."""
        return True

    def _failure(self, found: str) -> RedppError:
        return RedppError(
            f"{found}. The end of its log:\n{self.log_tail()}\n",
            "a server with all workers ready",
            "read the log above; it names the cause",
        )


def open_server(
    kind: str,
    folder: Path,
    *,
    name: str,
    workers: int = 1,
    ports: Ports | TritonPorts | None = None,
    auth: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> LocalServer:
    """A server of that kind for a packaged folder; it starts on entering its context or by ``start``.

    Raises:
        RedppError: no such kind, or nothing in the folder that it could serve.
    """
    if kind == "torchserve":
        from redpp_serve.serving.torchserve import TorchServe

        assert ports is None or isinstance(ports, Ports)
        return TorchServe(folder, name=name, workers=workers, ports=ports, auth=auth, progress=progress)
    if kind == "triton":
        from redpp_serve.serving.triton_server import TritonServer

        assert ports is None or isinstance(ports, TritonPorts)
        return TritonServer(folder, name=name, workers=workers, ports=ports, auth=auth, progress=progress)
    raise RedppError(f"server {kind!r}", " or ".join(KINDS), "choose one of them with --server")


def require_packages(packages: Iterable[tuple[str, str]]) -> None:
    """Refuse to start without packages that are given as pairs of module and package name.

    Raises:
        RedppError: names those that are missing.
    """
    missing = [name for module, name in packages if find_spec(module) is None]
    if missing:
        raise RedppError(f"not installed: {', '.join(missing)}", "the serving packages", INSTALL)
