"""A real Triton Inference Server on the loopback address with both versions of a model.

Which versions Triton Inference Server has loaded, and how requests without a version find theirs.

Triton gives a request that names no version to the highest number. Version 1 is the original and 2 the pruned network,
so such requests would always get the pruned one, and without version 2 nobody could compare. Therefore the server sees
a third version, a link to the original's folder: while it is loaded, requests without a version go to the original;
promoting unloads it, rolling back loads it again. Versions 1 and 2 stay loaded and keep their processes throughout,
Triton finishes the requests of a version before it ends it, and hands out a new version only once it is ready, so no
request fails. The price is one more process of the original as long as it is the default.

The third version alternates between two numbers: one that has died is replaced by the other before it goes.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from redpp_serve.errors import RedppError
from redpp_serve.loopback import ADDRESS, TritonPorts, ask, free_ports
from redpp_serve.processes import free_shared_memory, kill_session, session
from redpp_serve.serving.server import START_TIMEOUT_S, LocalServer, require_packages
from redpp_serve.serving.triton_binary import TritonBinary, find_triton, link_backend

VERSIONS = ("1", "2")  # of the original and of the pruned network
STAND_INS = ("3", "4")  # numbers for the original above both


def versions_for(variant: str) -> tuple[str, ...]:
    """The versions to load so that requests without one go to ``original`` or ``pruned``."""
    return (*VERSIONS, STAND_INS[0]) if variant == "original" else VERSIONS


def variant_of(loaded: Iterable[str]) -> str:
    """Where requests without a version go while these versions are loaded."""
    return "original" if set(loaded) & set(STAND_INS) else "pruned"


def loaded_versions(index: list[dict[str, str]], name: str) -> set[str]:
    """The versions that answer, from the document of Triton's repository index."""
    return {entry["version"] for entry in index if entry["name"] == name and entry.get("state") == "READY"}


def load_request(config: dict[str, Any], versions: Iterable[str]) -> bytes:
    """The body that has Triton load these versions and no other. ``config`` is what the model was loaded with: Triton
    keeps the processes of versions that stay only where nothing else in it differs.
    """
    policy = {"specific": {"versions": sorted(versions)}}
    return json.dumps({"parameters": {"config": json.dumps({**config, "version_policy": policy})}}).encode()


_GRACE_S = 15.0
_EXIT_S = 5  # the server's own limit for requests in flight when it is told to end
_LOAD_S = 120.0
_DEATHS, _WITHIN_S = 3, 60.0
_PACKAGES = {"tritonclient": "tritonclient", "google.protobuf": "protobuf", "psutil": "psutil"}
_MODELS, _BACKENDS, _SCRATCH = "models", "backends", "tmp"
# gRPC looks for the restriction's key behind this prefix; with it in HTTP's key too, one header serves both.
_KEY, _PREFIX = "redpp-token", "triton-grpc-protocol-"
_GUARDED = "model-repository,shared-memory,trace,logging"


class TritonServer(LocalServer):
    """Triton, by default on free ports; see `LocalServer` for what both servers share, and `triton_versions` for how
    requests without a version find theirs.

    Loading models, shared memory, traces and log settings always need the token for management; inference needs its own
    token with ``auth``. Metrics, health, metadata and statistics need none. Triton takes tokens on its command line
    only, so other users of this machine who may list its processes can read them.

    Args:
        folder: holds ``triton/NAME``, a model repository with versions 1 and 2; only read.
        workers: processes of each version.
    """

    kind = "triton"
    title = "tritonserver"

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        workers: int = 1,
        ports: TritonPorts | None = None,
        auth: bool = True,
        progress: Callable[[str], None] = lambda line: None,
        timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        super().__init__(
            folder,
            name=name,
            versions=VERSIONS,
            workers=workers,
            ports=ports or free_ports(TritonPorts),
            auth=auth,
            progress=progress,
            timeout_s=timeout_s,
        )
        self._model = self.folder / "triton" / name
        _check_repository(self._model)
        self._tokens = {api: secrets.token_hex(24) for api in ("inference", "management")}
        self._binary: TritonBinary | None = None
        self._config: dict[str, Any] = {}
        self._wanted = set(versions_for("original"))
        self._revived: deque[float] = deque(maxlen=_DEATHS)

    @property
    def management_url(self) -> str:
        """Base of ``/v2/repository/...``."""
        return f"http://{ADDRESS}:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        """This project's metrics and Triton's own."""
        return f"http://{ADDRESS}:{self.ports.metrics}/metrics"

    @property
    def grpc_address(self) -> str:
        """Host and port of gRPC, as tritonclient takes it."""
        return f"{ADDRESS}:{self.ports.grpc}"

    def url(self, version: str) -> str:
        """Where to POST inputs for one of ``versions``."""
        return f"{self.management_url}/v2/models/{self.name}/versions/{version}/infer"

    def default_url(self) -> str:
        """Where to POST inputs without naming a version."""
        return f"{self.management_url}/v2/models/{self.name}/infer"

    def headers(self, api: str = "inference") -> dict[str, str]:
        """The HTTP headers, which are gRPC's metadata too, with the token for ``inference`` or ``management``."""
        return {_PREFIX + _KEY: self._tokens[api]} if self.auth or api == "management" else {}

    @property
    def model_config(self) -> dict[str, Any]:
        """What Triton has loaded the model with."""
        return self._config

    def check_alive(self) -> None:
        """Raise a RedppError when the server or its workers die again and again.

        Triton itself does not restart a worker that has died: it answers 500 for it ever after, and calls itself
        ready. Such a version is loaded anew here; meanwhile requests for it fail, those for the others do not. Now and
        then a worker's death takes the server with it (2.51 aborts on a lock that a killed worker held): it is started
        again, with the same ports, tokens and default version.
        """
        if not self._leaders:
            raise self._failure(f"{self.title} has ended")
        ended = self._leaders[self.title].poll() is not None
        dead = set() if ended else self._dead()
        if not ended and not dead:
            return
        what = self.title if ended else f"a worker of version {' and '.join(sorted(dead))}"
        now = time.monotonic()
        if len(self._revived) == _DEATHS and now - self._revived[0] < _WITHIN_S:
            raise self._failure(f"{what} dies again and again")
        self._revived.append(now)
        self._progress(f"{what} has died; starting it again")
        try:
            self._restart() if ended else self._revive(dead)
        except RedppError:
            if not self._ends_soon():  # the next look finds it ended; one that has just started may abort too
                raise

    def _ends_soon(self) -> bool:
        try:
            self._leaders[self.title].wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _restart(self) -> None:
        """Start the server again in the place of one that has ended."""
        assert self.home is not None
        kill_session(self._leaders[self.title])
        free_shared_memory(self._shared_memory())
        for part in (_MODELS, _BACKENDS, _SCRATCH):
            shutil.rmtree(self.home / part)
        self._launch(self.home)
        self._wait(time.monotonic() + self._timeout_s)

    def stop(self) -> None:
        """End the server and its workers, remove the private folder and their shared memory."""
        prefix = self._shared_memory()
        super().stop()
        free_shared_memory(prefix)

    def _prepare(self) -> None:
        require_packages(_PACKAGES.items())
        self._binary = find_triton(self._progress)
        self._config = _read_config(self._model / "config.pbtxt", self.workers)

    def _launch(self, home: Path) -> None:
        assert self._binary is not None
        (home / _SCRATCH).mkdir()
        self._link_repository(home / _MODELS / self.name)
        link_backend(self._binary, home / _BACKENDS)
        http_key, ports = _PREFIX + _KEY, self.ports
        restricted = [("management", _GUARDED), *([("inference", "inference")] if self.auth else [])]
        command = [
            str(self._binary.program),
            f"--model-repository={home / _MODELS}",
            f"--backend-directory={home / _BACKENDS}",
            "--model-control-mode=explicit",
            f"--load-model={self.name}",
            "--disable-auto-complete-config",
            f"--http-address={ADDRESS}",
            f"--grpc-address={ADDRESS}",
            f"--metrics-address={ADDRESS}",
            f"--http-port={ports.http}",
            f"--grpc-port={ports.grpc}",
            f"--metrics-port={ports.metrics}",
            f"--exit-timeout-secs={_EXIT_S}",
            "--log-info=false",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory()}",
            *(f"--http-restricted-api={apis}:{http_key}={self._tokens[token]}" for token, apis in restricted),
            *(f"--grpc-restricted-protocol={apis}:{_KEY}={self._tokens[token]}" for token, apis in restricted),
        ]
        if not _has_gpu():
            command.append("--allow-gpu-metrics=false")
        environment = dict(os.environ)
        libraries = [*map(str, self._binary.libraries), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        environment |= {
            # the workers' Python finds this environment's packages by the interpreter that is first in PATH
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")]),
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "TMPDIR": str(home / _SCRATCH),
        }
        self._spawn(self.title, command, environment)

    def _link_repository(self, model: Path) -> None:
        """A view of the repository with the wanted number of workers, and the stand-ins for the original."""
        from google.protobuf import json_format, text_format
        from tritonclient.grpc import model_config_pb2

        model.mkdir(parents=True)
        for path in self._model.iterdir():
            if path.name not in (*VERSIONS, "config.pbtxt"):
                (model / path.name).symlink_to(path)
        for number in (*VERSIONS, *STAND_INS):
            (model / number).mkdir()
            # Triton takes new files for a changed model and would load it anew at the next promotion or rollback. Where
            # a file has this name, Python cannot write compiled code.
            (model / number / "__pycache__").touch()
            for path in (self._model / (number if number in VERSIONS else VERSIONS[0])).iterdir():
                if path.name != "__pycache__":
                    (model / number / path.name).symlink_to(path)
        policy = {"specific": {"versions": sorted(self._wanted)}}
        config = json_format.ParseDict({**self._config, "version_policy": policy}, model_config_pb2.ModelConfig())
        (model / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")

    def _ready(self) -> tuple[int, int]:
        """Triton loads every worker of a version before it calls that version ready."""
        ready = self._loaded()
        return self.workers * len(ready & set(VERSIONS)), self.workers * len(VERSIONS)

    def _answers(self) -> bool:
        return self._wanted <= self._loaded()

    def _loaded(self) -> set[str]:
        """The versions that Triton calls ready; none while it does not answer."""
        try:
            status, body = ask(self.ports.http, "/v2/repository/index", self.headers("management"), "POST", b"{}")
            return loaded_versions(json.loads(body), self.name) if status == 200 else set()
        except (OSError, ValueError, http.client.HTTPException):
            return set()

    def _dead(self) -> set[str]:
        """The versions that Triton calls ready, before and after a look at its processes, but that lack a worker."""
        before = self._loaded()
        if before:  # other processes promote and roll back
            self._wanted = before | set(VERSIONS)
        living = self._workers()
        lacking = {version for version in before if living.get(version, 0) < self.workers}
        return lacking & self._loaded() if lacking else set()

    def _workers(self) -> dict[str, int]:
        """Version to the number of its living processes; each has the path of its model.py on its command line."""
        from psutil import Error

        assert self.home is not None
        paths = {str(self.home / _MODELS / self.name / v / "model.py"): v for v in (*VERSIONS, *STAND_INS)}
        counts: dict[str, int] = {}
        for process in session(self._leaders[self.title]):
            try:
                found = next((paths[word] for word in process.cmdline() if word in paths), None)
            except Error:  # it has just ended
                continue
            if found:
                counts[found] = counts.get(found, 0) + 1
        return counts

    def _revive(self, dead: set[str]) -> None:
        """Load dead versions anew: without them, then with them. A stand-in is followed by the other number."""
        loaded = self._loaded()
        fresh = {number for number in STAND_INS if number not in loaded} if dead & set(STAND_INS) else set()
        self._load((loaded - dead) | fresh)
        if dead & set(VERSIONS):
            self._load(self._loaded() | set(VERSIONS))

    def _load(self, versions: set[str]) -> None:
        body = load_request(self._config, versions)
        path = f"/v2/repository/models/{self.name}/load"
        try:
            status, reply = ask(self.ports.http, path, self.headers("management"), "POST", body, _LOAD_S)
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(f"tritonserver does not answer: {error}") from error
        if status != 200:
            raise self._failure(f"tritonserver answers {status} to loading: {reply.decode(errors='replace')[:300]}")

    def _terminate(self) -> None:
        """Ask the server to end, and wait; it ends its workers."""
        from psutil import wait_procs

        if server := self._leaders.get(self.title):
            server.terminate()
            wait_procs(session(server), timeout=_GRACE_S)

    def _shared_memory(self) -> str:
        """What the names of this run's shared memory begin with; that of workers which were killed is left behind."""
        return f"{self.home.name}-" if self.home else ""


def _check_repository(model: Path) -> None:
    missing = [
        name
        for name in ("config.pbtxt", *(f"{version}/model.py" for version in VERSIONS))
        if not (model / name).is_file()
    ]
    if missing:
        raise RedppError(
            f"{model} holds no {' and no '.join(missing)}",
            "a model repository for Triton with both versions",
            "write one with 'redpp-serve package', and give that folder",
        )


def _read_config(path: Path, workers: int) -> dict[str, Any]:
    """The model's configuration with that many workers, in the form of Triton's JSON."""
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (OSError, ValueError, text_format.ParseError) as error:
        raise RedppError(
            f"{path} cannot be read: {error}", "a model configuration of Triton", "package the model again"
        ) from error
    for group in config.instance_group or [config.instance_group.add()]:
        group.count = workers
    return dict(json_format.MessageToDict(config, preserving_proto_field_name=True))


def _has_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists()
