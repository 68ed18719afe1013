"""`serve`, `promote` and `rollback`: serve a packaged folder until told to stop, and move its default version."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.loopback import Ports, TritonPorts
from redpp_serve.serving.health import sample_request
from redpp_serve.serving.running import Running, find, find_all, register
from redpp_serve.serving.server import LocalServer
from redpp_serve.serving.switching import switch
from redpp_serve.serving.torchserve import TorchServe
from redpp_serve.serving.triton_server import TritonServer
from redpp_serve.signals import Stopped, stopped_by_signal
from redpp_serve.variants import PRUNED

KINDS = (TorchServe.kind, TritonServer.kind)


def model_name(folder: Path) -> str:
    """Return the name that a packaged folder's versions are served under.

    Raises:
        RedppError: not a folder that `package` wrote.
    """
    try:
        return str(json.loads((folder / "report.json").read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RedppError(
            f"{folder} is not a packaged model: {error}",
            "a folder written by redpp-serve package",
            "package a model first, or correct the path",
        ) from error


def open_server(
    kind: str,
    folder: Path,
    *,
    name: str,
    workers: int = 1,
    ports: Ports | TritonPorts | None = None,
    auth: bool = True,
    note: Callable[[str], None] = lambda line: None,
) -> LocalServer:
    """Return a server of that kind for a packaged folder; it starts on entering its context or by ``start``.

    Args:
        kind: one of `KINDS`.
        folder: the packaged folder; only read.
        name: the model's name in URLs, see `model_name`.
        workers: processes for each version.
        ports: of the type that the kind has; free ones by default.
        auth: require a token for requests.
        note: takes lines of text for the user.

    Raises:
        RedppError: no such kind, or nothing in the folder that it could serve.
    """
    if kind == TorchServe.kind and isinstance(ports, Ports | None):
        return TorchServe(folder, name=name, workers=workers, ports=ports, auth=auth, note=note)
    if kind == TritonServer.kind and isinstance(ports, TritonPorts | None):
        return TritonServer(folder, name=name, workers=workers, ports=ports, auth=auth, note=note)
    raise RedppError(f"server {kind!r}", " or ".join(KINDS), "choose one of them with --server")


def serve(
    folder: Path,
    *,
    kind: str = TorchServe.kind,
    workers: int = 1,
    ports: Ports | TritonPorts | None = None,
    auth: bool = True,
    note: Callable[[str], None] = print,
) -> None:
    """Serve both versions until Ctrl-C, SIGTERM or SIGHUP, then stop every process that was started.

    Args:
        note: takes the lines that say how to ask; progress and warnings go to standard error.

    The other arguments are those of `open_server`.

    Raises:
        RedppError: not a packaged folder, a server that does not come up, or one that ends by itself.
    """
    server = open_server(kind, folder, name=model_name(folder), workers=workers, ports=ports, auth=auth, note=_warn)
    for other in find_all(folder, kind):
        _warn(
            f"note: process {other.pid} already serves {folder} with {kind}; "
            "promote, rollback and health will be ambiguous"
        )
    with suppress(Stopped), stopped_by_signal() as ignore_signals:
        try:
            try:
                server.start()
                running = server.running()
                with register(running):
                    for line in _how_to_ask(server, running):
                        note(line)
                    while True:
                        server.check_alive()
                        time.sleep(1.0)
            finally:
                ignore_signals()
        finally:  # also when a signal comes just before the line above
            server.stop()
    _warn("stopped")


def roll_out(folder: Path, variant: str, kind: str | None = None) -> Running:
    """Have the running server give requests without a version to ``original`` or ``pruned``.

    Raises:
        RedppError: none runs, it refuses, or an experiment divides its requests.
    """
    running = find(folder, kind)
    if "gateway" in running.extra:
        command = "promote" if variant == PRUNED.name else "rollback"
        raise RedppError(
            f"an experiment divides the requests for {folder}",
            "a server of redpp-serve serve",
            f"use redpp-serve ab {command} {folder}",
        )
    switch(running, variant)
    return running


def _how_to_ask(server: LocalServer, running: Running) -> list[str]:
    headers = running.headers["inference"]
    request = sample_request(running)
    path = request.path
    if path is None:  # it is in no file of the folder
        assert server.home is not None
        path = server.home / "sample.request"
        path.write_bytes(request.body)
    given = "".join(f"-H {shlex.quote(f'{key}: {value}')} " for key, value in {**headers, **request.headers}.items())
    folder = shlex.quote(str(running.folder))
    lines = {
        **running.urls,
        "metrics": running.metrics_urls[0],
        "token": next(iter(headers.values()), "").removeprefix("Bearer "),
        "try": f"curl {given}--data-binary @{shlex.quote(str(path))} {running.urls[PRUNED.name]}",
        "promote": f"redpp-serve promote {folder}: default, now original, becomes pruned; rollback undoes it",
    }
    return [*(f"{key:<9} {value}" for key, value in lines.items() if value), "Ctrl-C stops the server."]


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
