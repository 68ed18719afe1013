"""The server that `serve` runs, as an A/B test uses it: neither started nor ended by the test."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redpp_serve.ab.spec import Spec
from redpp_serve.errors import RedppError
from redpp_serve.loopback import ask
from redpp_serve.processes import started
from redpp_serve.serving.running import ATTACHED, Running, find_all
from redpp_serve.serving.server import Keeper
from redpp_serve.serving.torchserve import TorchServe
from redpp_serve.serving.triton_server import TritonServer
from redpp_serve.serving.workers import Workers, ready_triton_workers, torchserve_workers
from redpp_serve.variants import NAMES

if TYPE_CHECKING:
    from psutil import Process


class AttachedServer:
    """A server that another process supervises, by the note that it has left; stands in for a `LocalServer`.

    Args:
        note: describes it.
    """

    def __init__(self, note: Running) -> None:
        self._note = note
        self.name, self.folder, self.versions = note.name, Path(note.folder), note.versions
        self.metrics_url, self.environment = note.metrics_urls[0], dict[str, str]()
        listed = partial(torchserve_workers, self._listed, self.versions)
        ready = {TorchServe.kind: listed, TritonServer.kind: partial(ready_triton_workers, note, self._processes)}
        self._workers = Workers(ready[note.kind])

    @property
    def front_url(self) -> str:
        """Base of the Open Inference Protocol; empty where the server's release had none."""
        return self._note.front_url

    @property
    def grpc_address(self) -> str:
        """Host and port of the server's own gRPC."""
        return self._note.grpc

    def default_url(self) -> str:
        """Return where to POST inputs without naming a version."""
        return self._note.urls["default"]

    def url(self, version: str) -> str:
        """Return where to POST inputs for one of ``versions``."""
        return self._note.urls[NAMES[self.versions.index(version)]]

    def headers(self, api: str = "inference") -> dict[str, str]:
        """Return the headers with the server's token for ``inference`` or ``management``."""
        return self._note.headers[api]

    def start(self, keeper: Keeper | None = None) -> None:
        """Refuse to go on where it has ended.

        Raises:
            RedppError: it has.
        """
        self.check_alive()

    def adopt(self, document: Mapping[str, Any], keeper: Keeper) -> bool:
        """Return True if it is the server that a former supervisor of the test was attached to."""
        return bool(document["pid"] == self._note.pid)

    def handover(self) -> dict[str, Any]:
        """Return what `adopt` compares."""
        return {"pid": self._note.pid}

    def stop(self) -> None:
        """Leave it running."""

    def check_alive(self) -> None:
        """Raise a RedppError if the process that supervises it has ended."""
        if started(self._note.pid) != self._note.created:
            raise RedppError(
                f"the server of process {self._note.pid}, which the A/B test is attached to, has ended",
                "the server that redpp-serve serve has started",
                "start it again",
            )

    def dead(self, patience_s: float) -> set[str]:
        """Return the versions that have no worker to answer now, as `LocalServer.dead` does."""
        return self._workers.dead(patience_s)

    def _processes(self) -> list[Process]:
        import psutil  # noqa: PLC0415

        with suppress(psutil.Error):  # it has ended meanwhile
            return psutil.Process(self._note.pid).children(recursive=True)
        return []

    def _listed(self) -> tuple[int, bytes]:
        return ask(f"{self._note.management_url}/models/{self.name}/all", self.headers("management"))

    def running(self, extra: dict[str, str] | None = None) -> Running:
        """Describe the server as one that this process speaks for."""
        named = {**(extra or {}), ATTACHED: str(self._note.pid)}
        return replace(self._note, pid=os.getpid(), created=started(os.getpid()) or 0.0, extra=named)


def find_served(spec: Spec) -> AttachedServer:
    """Return the server that `serve` runs for a test's folder.

    Raises:
        RedppError: none runs, or more than one.
    """
    found = [running for running in find_all(spec.folder, spec.kind) if not running.extra]
    if len(found) != 1:
        serve = f"redpp-serve serve {shlex.quote(str(spec.folder))} --server {spec.kind}"
        raise RedppError(
            f"{len(found) or 'no'} servers of kind {spec.kind} run for {spec.folder}",
            "one server, to attach the A/B test to",
            "stop the others" if found else f"start one with {serve}, or leave --attach out",
        )
    return AttachedServer(found[0])
