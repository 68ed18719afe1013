"""Triton Inference Server on the loopback address with both versions of a model."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redpp_serve.errors import RedppError
from redpp_serve.files import read_bounded
from redpp_serve.handlers.tracing import TRACE_HEADERS
from redpp_serve.loopback import ADDRESS, TritonPorts
from redpp_serve.processes import free_shared_memory, kill_session, session, shared_memory, terminate
from redpp_serve.serving.server import GRACE_S, Keeper, LocalServer, require_packages
from redpp_serve.serving.switching import STAND_INS, TRITON_VERSIONS, load_triton_versions, triton_versions
from redpp_serve.serving.triton_binary import TritonBinary, find_triton, link_backend
from redpp_serve.serving.workers import Workers, ready_triton_versions, ready_triton_workers, triton_workers
from redpp_serve.variants import ORIGINAL

if TYPE_CHECKING:
    from psutil import Process

_EXIT_S = 5  # the server's own limit for requests in flight when it is told to end
_PACKAGES = {"tritonclient": "tritonclient", "google.protobuf": "protobuf", "psutil": "psutil"}
_MODELS, _BACKENDS, _SCRATCH = "models", "backends", "tmp"
# gRPC looks for the restriction's key behind this prefix; with it in HTTP's key too, one header serves both.
_KEY, _PREFIX = "redpp-token", "triton-grpc-protocol-"
_GUARDED = "model-repository,shared-memory,trace,logging"
FORWARDED = f"(?i)({'|'.join(TRACE_HEADERS)})"  # headers that Triton hands to the model as parameters


class TritonServer(LocalServer):
    """Triton Inference Server, by default on free ports; see `LocalServer` for what both servers share.

    `switching` explains how requests without a version find theirs. Loading models, shared memory, traces and log
    settings always need the token for management; inference needs its own token with ``auth``. Metrics, health,
    metadata and statistics need none. Triton takes tokens on its command line only, so other users of this machine who
    may list its processes can read them.

    Args:
        folder: the packaged folder with ``triton/NAME``, a model repository with versions 1 and 2; only read.
    """

    kind = "triton"
    title = "tritonserver"
    ports_type = TritonPorts

    def _open(self) -> tuple[str, str]:
        self._model = self.folder / "triton" / self.name
        _check_repository(self._model)
        self._tokens = {api: secrets.token_hex(24) for api in ("inference", "management")}
        self._binary: TritonBinary | None = None
        self._config: dict[str, Any] = {}
        self._wanted = set(triton_versions(ORIGINAL.name))
        self._workers = Workers(lambda: ready_triton_workers(self.running(), self._session))
        original, pruned = TRITON_VERSIONS
        return original, pruned

    @property
    def management_url(self) -> str:
        """Base of ``/v2/repository/...``."""
        return f"http://{ADDRESS}:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        """Triton's own metrics with this project's among them."""
        return f"http://{ADDRESS}:{self.ports.metrics}/metrics"

    @property
    def grpc_address(self) -> str:
        """Host and port of Triton's gRPC."""
        return f"{ADDRESS}:{self.ports.grpc}"

    def _front_options(self) -> list[str]:
        return ["--server", str(self.ports.http)]

    def default_url(self) -> str:
        """Return where to POST inputs without naming a version."""
        return f"{self.management_url}/v2/models/{self.name}/infer"

    def url(self, version: str) -> str:
        """Return where to POST inputs for one of ``versions``."""
        return f"{self.management_url}/v2/models/{self.name}/versions/{version}/infer"

    def headers(self, api: str = "inference") -> dict[str, str]:
        """Return the HTTP headers, which are gRPC's metadata too, with the token for an API."""
        return {_PREFIX + _KEY: self._tokens[api]} if self.auth or api == "management" else {}

    @property
    def model_config(self) -> dict[str, Any]:
        """What Triton has loaded the model with."""
        return self._config

    def read_config(self) -> dict[str, Any]:
        """Return the packaged configuration with the wanted number of workers, in the form of Triton's JSON.

        Raises:
            RedppError: it is no model configuration.
        """
        from google.protobuf import json_format, text_format  # noqa: PLC0415
        from tritonclient.grpc import model_config_pb2  # noqa: PLC0415

        path = self._model / "config.pbtxt"
        try:
            config = text_format.Parse(read_bounded(path).decode(), model_config_pb2.ModelConfig())
        except (OSError, ValueError, RecursionError, text_format.ParseError) as error:
            raise RedppError(
                f"{path} cannot be read: {error}", "a model configuration of Triton", "package the model again"
            ) from error
        for group in config.instance_group or [config.instance_group.add()]:
            group.count = self.workers
        return dict(json_format.MessageToDict(config, preserving_proto_field_name=True))

    def check_alive(self) -> None:
        """Raise a RedppError when the server or its workers die again and again.

        Triton itself does not restart a worker that has died: it answers 500 for it ever after, and calls itself
        ready. Such a version is loaded anew here; meanwhile requests for it fail, those for the others do not. Now and
        then a worker's death takes the server with it (2.51 aborts on a lock that a killed worker held): it is started
        again, with the same ports, tokens and default version.
        """
        if not self._leaders:
            raise self._failure(f"{self.title} has ended")
        self._keep_front()
        ended = self._leaders[self.title].poll() is not None
        dead = set() if ended else self._dead()
        if not ended and not dead:
            return
        what = self.title if ended else f"a worker of version {' and '.join(sorted(dead))}"
        if not self._may_restart(what):
            raise self._failure(f"{what} dies again and again")
        try:
            self._restart() if ended else self._revive(dead)
        except RedppError:
            if not self._ends_soon():  # the next look finds it ended; one that has just started may abort too
                raise

    def handover(self) -> dict[str, Any]:
        """Return what another process needs to `adopt` this server; its tokens are on its command line alone."""
        return {**super().handover(), "tokens": self._tokens}

    def adopt(self, document: Mapping[str, Any], keeper: Keeper) -> bool:
        """Go on with a server whose supervisor was killed, see `LocalServer`."""
        if adopted := super().adopt(document, keeper):
            self._tokens = dict(document["tokens"])
        return adopted

    def stop(self) -> None:
        """End the server and its workers, remove the private folder and their shared memory."""
        home = self.home
        super().stop()
        if home:
            free_shared_memory(home)

    def dead(self, patience_s: float) -> set[str]:
        """Return the versions all of whose workers have died and are not loaded again, see `LocalServer`."""
        return self._workers.dead(patience_s)

    def _prepare(self) -> None:
        require_packages(_PACKAGES.items())
        self._binary = find_triton(self._note)
        self._config = self.read_config()

    def _launch(self, home: Path) -> None:
        assert self._binary is not None
        (home / _SCRATCH).mkdir()
        self._link_repository(home / _MODELS / self.name)
        link_backend(self._binary, home / _BACKENDS)
        restricted = [("management", _GUARDED), *([("inference", "inference")] if self.auth else [])]
        command = [
            str(self._binary.program),
            f"--model-repository={home / _MODELS}",
            f"--backend-directory={home / _BACKENDS}",
            "--model-control-mode=explicit",
            f"--load-model={self.name}",
            "--disable-auto-complete-config",
            *(f"--{protocol}-address={ADDRESS}" for protocol in ("http", "grpc", "metrics")),
            *(f"--{protocol}-port={getattr(self.ports, protocol)}" for protocol in ("http", "grpc", "metrics")),
            f"--exit-timeout-secs={_EXIT_S}",
            "--log-info=false",
            "--log-format=ISO8601",
            *(f"--{protocol}-header-forward-pattern={FORWARDED}" for protocol in ("http", "grpc")),
            f"--backend-config=python,shm-region-prefix-name={shared_memory(home)}",
            *(f"--http-restricted-api={apis}:{_PREFIX}{_KEY}={self._tokens[token]}" for token, apis in restricted),
            *(f"--grpc-restricted-protocol={apis}:{_KEY}={self._tokens[token]}" for token, apis in restricted),
        ]
        if not Path("/proc/driver/nvidia/version").exists():
            command.append("--allow-gpu-metrics=false")
        environment = self._surroundings()
        libraries = [*map(str, self._binary.libraries), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        environment |= {
            # the workers' Python finds this environment's packages by the interpreter that is first in PATH
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")]),
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "TMPDIR": str(home / _SCRATCH),
            "PYTHONPYCACHEPREFIX": str(home / _SCRATCH / "compiled"),  # not from the package, where anybody may put it
        }
        self._spawn(self.title, command, environment)

    def _link_repository(self, model: Path) -> None:
        """Write a view of the repository with the wanted number of workers, and the stand-ins for the original."""
        from google.protobuf import json_format, text_format  # noqa: PLC0415
        from tritonclient.grpc import model_config_pb2  # noqa: PLC0415

        model.mkdir(parents=True)
        for path in self._model.iterdir():
            if path.name not in (*TRITON_VERSIONS, "config.pbtxt"):
                (model / path.name).symlink_to(path)
        for number in (*TRITON_VERSIONS, *STAND_INS):
            (model / number).mkdir()
            # Triton takes new files for a changed model and would load it anew at the next promotion or rollback. Where
            # a file has this name, Python cannot write compiled code.
            (model / number / "__pycache__").touch()
            for path in (self._model / (number if number in TRITON_VERSIONS else TRITON_VERSIONS[0])).iterdir():
                if path.name != "__pycache__":
                    (model / number / path.name).symlink_to(path)
        policy = {"specific": {"versions": sorted(self._wanted)}}
        config = json_format.ParseDict({**self._config, "version_policy": policy}, model_config_pb2.ModelConfig())
        (model / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")

    def _ready(self) -> tuple[int, int]:
        """Triton loads every worker of a version before it calls that version ready."""
        loaded = self._loaded() & set(TRITON_VERSIONS)
        return self.workers * len(loaded), self.workers * len(TRITON_VERSIONS)

    def _answers(self) -> bool:
        """Triton opens gRPC first, HTTP after it, and metrics last."""
        ready = f"{self.management_url}/v2/health/ready"
        return self._wanted <= self._loaded() and self._gives(ready) and super()._answers()

    def _loaded(self) -> set[str]:
        return ready_triton_versions(self.running())

    def _dead(self) -> set[str]:
        """Return versions that lack a worker though Triton calls them ready, before and after a look at its workers."""
        before = self._loaded()
        if before:  # other processes promote and roll back
            self._wanted = before | set(TRITON_VERSIONS)
        living = triton_workers(self._session(), self.name, (*TRITON_VERSIONS, *STAND_INS))
        lacking = {version for version in before if len(living[version]) < self.workers}
        return lacking & self._loaded() if lacking else set()

    def _session(self) -> list[Process]:
        return session(self._leaders[self.title].pid)

    def _revive(self, dead: set[str]) -> None:
        """Load dead versions anew: without them, then with them. A stand-in is followed by the other number."""
        loaded = self._loaded()
        fresh = {number for number in STAND_INS if number not in loaded} if dead & set(STAND_INS) else set()
        self._load((loaded - dead) | fresh)
        if dead & set(TRITON_VERSIONS):
            self._load(self._loaded() | set(TRITON_VERSIONS))

    def _load(self, versions: set[str]) -> None:
        try:
            load_triton_versions(self.running(), versions)
        except RedppError as error:
            raise self._failure(error.found) from error

    def _restart(self) -> None:
        """Start the server again in the place of one that has ended."""
        assert self.home is not None
        kill_session(self._leaders[self.title])
        free_shared_memory(self.home)
        for part in (_MODELS, _BACKENDS, _SCRATCH):
            shutil.rmtree(self.home / part)
        self._launch(self.home)
        self._wait()

    def _ends_soon(self) -> bool:
        try:
            self._leaders[self.title].wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _terminate(self) -> None:
        """Ask the server to end, and wait; it ends its workers."""
        if server := self._leaders.get(self.title):
            terminate(session(server.pid), lambda process: process.pid == server.pid, GRACE_S)


def _check_repository(model: Path) -> None:
    needed = ("config.pbtxt", *(f"{version}/model.py" for version in TRITON_VERSIONS))
    missing = [name for name in needed if not (model / name).is_file()]
    if missing:
        raise RedppError(
            f"{model} holds no {' and no '.join(missing)}",
            "a model repository for Triton with both versions",
            "write one with 'redpp-serve package', and give that folder",
        )
