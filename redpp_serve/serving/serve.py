"""Reading a packaged folder, and serving it until told to stop."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.loopback import Ports, TritonPorts
from redpp_serve.serving.health import sample_request
from redpp_serve.serving.running import Running, find, find_all, register
from redpp_serve.serving.server import LocalServer, open_server
from redpp_serve.serving.switching import switch


def model_name(folder: Path) -> str:
    """The name that a packaged folder's versions are served under.

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


def serve(
    folder: Path,
    *,
    kind: str = "torchserve",
    workers: int = 1,
    ports: Ports | TritonPorts | None = None,
    auth: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Serve both versions until Ctrl-C, SIGTERM or SIGHUP, then stop every process that was started.

    Raises:
        RedppError: not a packaged folder, a server that does not come up, or one that ends by itself.
    """
    server = open_server(kind, folder, name=model_name(folder), workers=workers, ports=ports, auth=auth, progress=_note)
    for other in find_all(folder, kind):
        _note(
            f"note: process {other.pid} serves {folder} with {kind} already; promote, rollback and health will not know which is meant"
        )
    with _stopped_by_signal() as stop:
        try:
            try:
                server.start()
                running = server.running()
                with register(running):
                    for line in _how_to_ask(server, running):
                        say(line)
                    while True:
                        server.check_alive()
                        stop.wait(1.0)
            finally:
                stop.set()
        finally:
            server.stop()
    _note("stopped")


def roll_out(folder: Path, variant: str, kind: str | None = None) -> Running:
    """Have the running server give requests without a version to ``original`` or ``pruned``.

    Raises:
        RedppError: none runs, it refuses, or an experiment divides its requests.
    """
    running = find(folder, kind)
    if "gateway" in running.extra:
        command = "promote" if variant == "pruned" else "rollback"
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
    if path is None:  # not a file of the folder's
        assert server.home is not None
        path = server.home / "sample.request"
        path.write_bytes(request.body)
    given = "".join(f"-H {shlex.quote(f'{key}: {value}')} " for key, value in {**headers, **request.headers}.items())
    folder = shlex.quote(str(running.folder))
    lines = {
        **running.urls,
        "metrics": running.metrics_urls[0],
        "token": next(iter(headers.values()), "").removeprefix("Bearer "),
        "try": f"curl {given}--data-binary @{shlex.quote(str(path))} {running.urls['pruned']}",
        "promote": f"redpp-serve promote {folder}: default, now original, becomes pruned; rollback undoes it",
    }
    return [*(f"{key:<9} {value}" for key, value in lines.items() if value), "Ctrl-C stops the server."]


class _Stop(BaseException):
    """A signal asked to stop; like KeyboardInterrupt no ``except Exception`` catches it."""


@contextmanager
def _stopped_by_signal() -> Iterator[threading.Event]:
    """SIGINT, SIGTERM or SIGHUP ends the body, also while it waits for the server to start. Once the event is set, or a
    signal has come, further ones are ignored: stopping must not be interrupted half-way.
    """
    stop = threading.Event()

    def ask(*_: object) -> None:
        if not stop.is_set():
            stop.set()
            raise _Stop

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    except _Stop:
        pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
