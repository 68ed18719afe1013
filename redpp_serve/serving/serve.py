"""`serve`, `promote` and `rollback`: serve a packaged folder until told to stop, and move its default version."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.loopback import consecutive_ports
from redpp_serve.options import ServerOptions
from redpp_serve.report.folder import not_packaged, read_report
from redpp_serve.serving.health import curl
from redpp_serve.serving.observing import Observing
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
    name = read_report(folder).name
    if name is None:
        raise not_packaged(folder, "its report has no name")
    return name


def open_server(
    folder: Path,
    options: ServerOptions = ServerOptions(),
    *,
    name: str,
    note: Callable[[str], None] = lambda line: None,
) -> LocalServer:
    """Return a server for a packaged folder; it starts on entering its context or by ``start``.

    Args:
        folder: the packaged folder; only read.
        options: which server, and where it listens.
        name: the model's name in URLs, see `model_name`.
        note: takes lines of text for the user.

    Raises:
        RedppError: there is nothing in the folder that the server could serve.
    """
    kind: type[LocalServer] = TorchServe if options.server == TorchServe.kind else TritonServer
    ports = options.port and consecutive_ports(kind.ports_type, options.port)
    return kind(folder, name=name, workers=options.workers, ports=ports, auth=not options.demo_auth_off, note=note)


def serve(
    folder: Path,
    options: ServerOptions = ServerOptions(),
    *,
    observe: Observing | None = None,
    note: Callable[[str], None] = print,
) -> None:
    """Serve both versions until Ctrl-C, SIGTERM or SIGHUP, then stop every process that was started.

    Args:
        folder: the packaged folder; only read.
        options: which server, and where it listens.
        observe: have the original add up moments, see `observing.observing`.
        note: takes the lines that say how to ask; progress and warnings go to standard error.

    Raises:
        RedppError: not a packaged folder, a server that does not come up, or one that ends by itself.
    """
    server = open_server(folder, options, name=model_name(folder), note=_warn)
    if observe:
        server.environment |= observe.environment()
    for other in find_all(folder, options.server):
        _warn(
            f"note: process {other.pid} already serves {folder} with {options.server}; "
            "promote, rollback and health will be ambiguous"
        )
    with suppress(Stopped), stopped_by_signal() as ignore_signals:
        try:
            try:
                server.start()
                running = server.running()
                with register(running):
                    for line in (*(observe.lines() if observe else ()), *_how_to_ask(server, running)):
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
    folder = shlex.quote(str(running.folder))
    lines = {
        **running.urls,
        "metrics": running.metrics_urls[0],
        "token": next(iter(running.headers["inference"].values()), "").removeprefix("Bearer "),
        "try": curl(running, server.home or Path(), running.urls[PRUNED.name]),
        "promote": f"redpp-serve promote {folder}: default, now original, becomes pruned; rollback undoes it",
    }
    return [*(f"{key:<9} {value}" for key, value in lines.items() if value), "Ctrl-C stops the server."]


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
