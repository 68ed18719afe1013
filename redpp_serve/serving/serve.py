"""`serve`, `promote` and `rollback`: serve a packaged folder until told to stop, and move its default version."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.logs import Logs, open_logs
from redpp_serve.loopback import consecutive_ports
from redpp_serve.options import ServerOptions
from redpp_serve.report.folder import not_packaged, read_report
from redpp_serve.serving.health import answering, curl
from redpp_serve.serving.observing import Observing
from redpp_serve.serving.running import Running, find, find_all, register
from redpp_serve.serving.server import LocalServer
from redpp_serve.serving.switching import switch
from redpp_serve.serving.torchserve import TorchServe
from redpp_serve.serving.triton_server import TritonServer
from redpp_serve.signals import Stopped, stopped_by_signal
from redpp_serve.variants import PRUNED

KINDS = (TorchServe.kind, TritonServer.kind)
_ASKED, _PATIENCE_S, _POLL_S = 5, 3.0, 0.05  # requests that see a move, and how long they may wait for it


def model_name(folder: Path) -> str:
    """Return the name that a packaged folder's versions are served under.

    Raises:
        RedppError: not a folder that `package` wrote.
    """
    name = read_report(folder).name
    if name is None:
        raise not_packaged(folder, "its report has no name")
    return name


def checked_name(folder: Path, options: ServerOptions) -> str:
    """Return the name of a package whose code may be run, see `packaging.trust.check_package`.

    Raises:
        RedppError: not a packaged folder, a damaged one, or one with code of somebody else.
    """
    from redpp_serve.packaging.trust import check_package  # noqa: PLC0415  with torch, which other commands do without

    name = model_name(folder)
    check_package(folder, options.server, name=name, trust=options.trust_package)
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
    log_format: str = "text",
    note: Callable[[str], None] = print,
) -> None:
    """Serve both versions until Ctrl-C, SIGTERM or SIGHUP, then stop every process that was started.

    Args:
        folder: the packaged folder; only read.
        options: which server, and where it listens.
        observe: have the original add up moments, see `observing.observing`.
        log_format: ``text`` or ``json``, see `logs.Logs`.
        note: takes the lines that say how to ask; progress and warnings go to standard error.

    Raises:
        RedppError: not a packaged folder, a server that does not come up, or one that ends by itself.
    """
    logs: Logs | None = None

    def warn(line: str) -> None:
        _warn(line)
        if logs:
            logs.say(line)

    server = open_server(folder, options, name=checked_name(folder, options), note=warn)
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
                server.logs = logs = open_logs(f"{server.name}-serve-{server.kind}", log_format)
                server.start()
                running = server.running()
                with register(running):
                    for line in (*(observe.lines() if observe else ()), *_how_to_ask(server, running)):
                        note(line)
                    while True:
                        server.check_alive()
                        if not logs.look():
                            warn(f"the log folder {logs.folder} was lost: the server's log goes on when it restarts")
                        time.sleep(1.0)
            except RedppError as error:
                if logs:
                    logs.say(str(error))
                raise
            finally:
                ignore_signals()
        finally:  # also when a signal comes just before the line above
            server.stop()
            if logs:
                logs.say("stopped")
                logs.close()
    _warn("stopped")


def roll_out(folder: Path, variant: str, kind: str | None = None) -> str:
    """Have the running server give requests without a version to ``original`` or ``pruned``.

    Returns:
        What was done, as requests have shown.

    Raises:
        RedppError: none runs, it refuses, another version still answers, or an experiment divides its requests.
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
    done = f"requests to {running.urls['default']} now go to {variant}"
    problem = _see_moved(running, variant)
    return f"{done}, which {problem}" if problem else done


def _see_moved(running: Running, variant: str) -> str:
    """Return once requests without a version are answered by ``variant``; or why that one does not answer.

    Raises:
        RedppError: another one answers.
    """
    deadline, moved = time.monotonic() + _PATIENCE_S, 0
    while moved < _ASKED:
        answered, problem = answering(running)
        if problem:
            return problem
        moved = moved + 1 if answered == variant else 0
        if not moved and time.monotonic() > deadline:
            raise RedppError(
                f"requests to {running.urls['default']} are still answered by {answered or 'a version without a name'}",
                f"answers of {variant}",
                "try again, or start the server again",
            )
        if not moved:
            time.sleep(_POLL_S)
    return ""


def _how_to_ask(server: LocalServer, running: Running) -> list[str]:
    folder = shlex.quote(str(running.folder))
    lines = {
        **running.urls,
        "metrics": running.metrics_urls[0],
        "token": next(iter(running.headers["inference"].values()), "").removeprefix("Bearer "),
        "try": curl(running, server.home or Path(), running.urls[PRUNED.name]),
        "promote": f"redpp-serve promote {folder}: default, now original, becomes pruned; rollback undoes it",
        "v2": f"{running.front_url} speaks the Open Inference Protocol; /healthz is for load balancers",
        "grpc": running.grpc,
        "logs": str(server.logs.folder) if server.logs else "",
    }
    return [*(f"{key:<9} {value}" for key, value in lines.items() if value), "Ctrl-C stops the server."]


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
