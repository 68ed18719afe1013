"""Reading a packaged folder, and serving it until told to stop."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable
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
    """Serve both versions until Ctrl-C or SIGTERM, then stop every process that was started."""
    name = model_name(folder)
    stop = threading.Event()
    previous = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        note = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        with TorchServe(folder, name=name, workers=workers, ports=ports, auth=auth, progress=note) as server:
            for version, variant in zip(server.versions, ("original", "redpp")):
                say(f"{variant:<9} {server.url(version)}")
            say(f"{'metrics':<9} {server.metrics_url}")
            if auth:
                say(f"{'token':<9} {server.headers('inference')['Authorization'].removeprefix('Bearer ')}")
            header = '-H "Authorization: Bearer TOKEN" ' if auth else ""
            say(f"try       curl {header}-H 'Content-Type: application/octet-stream' --data-binary @FILE {server.url(server.versions[1])}")
            say("Ctrl-C stops the server.")
            while not stop.wait(1.0):
                server.check_alive()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
