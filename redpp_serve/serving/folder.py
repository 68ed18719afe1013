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
from redpp_serve.serving.ports import Ports
from redpp_serve.serving.torchserve import TorchServe


def model_name(folder: Path) -> str:
    """The name that a packaged folder's versions are served under.

    Raises:
        RedppError: not a folder that `package` wrote.
    """
    try:
        return str(json.loads((folder / "report.json").read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RedppError(
            f"{folder} is not a packaged model: {error}", "a folder written by redpp-serve package",
            "package a model first, or correct the path",
        ) from error  # fmt: skip


def serve(
    folder: Path, *, workers: int = 1, ports: Ports | None = None, auth: bool = True, say: Callable[[str], None] = print
) -> None:
    """Serve both versions until Ctrl-C, SIGTERM or SIGHUP, then stop every process that was started.

    Raises:
        RedppError: not a packaged folder, a server that does not come up, or one that ends by itself.
    """
    server = TorchServe(folder, name=model_name(folder), workers=workers, ports=ports, auth=auth, progress=_note)
    with _stopped_by_signal() as stop:
        try:
            try:
                server.start()
                for line in _how_to_ask(server, auth):
                    say(line)
                while True:
                    server.check_alive()
                    stop.wait(1.0)
            finally:
                stop.set()
        finally:
            server.stop()
    _note("stopped")


def _how_to_ask(server: TorchServe, auth: bool) -> list[str]:
    token = server.headers("inference")["Authorization"].removeprefix("Bearer ") if auth else None
    header = f"-H 'Authorization: Bearer {token}' " if auth else ""
    sample = next(iter(sorted(server.folder.glob("sample.np?"))), "FILE")
    curl = f"curl {header}-H 'Content-Type: application/octet-stream' --data-binary @{shlex.quote(str(sample))}"
    urls = [f"{variant:<9} {server.url(version)}" for version, variant in zip(server.versions, ("original", "redpp"))]
    return [
        *urls, f"{'metrics':<9} {server.metrics_url}", *([f"{'token':<9} {token}"] if token else []),
        f"{'try':<9} {curl} {server.url(server.versions[1])}",
        "Ctrl-C stops the server.",
    ]  # fmt: skip


class _Stop(BaseException):
    """A signal asked to stop; like KeyboardInterrupt no ``except Exception`` catches it."""


@contextmanager
def _stopped_by_signal() -> Iterator[threading.Event]:
    """SIGINT, SIGTERM or SIGHUP ends the body, also while it waits for the server to start. Once the event is set, or a
    signal has come, further ones are ignored: stopping must not be interrupted half-way."""
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
