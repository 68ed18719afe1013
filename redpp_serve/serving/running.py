"""Notes on this user's running servers: the command that starts one writes it, so that other commands find it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from redpp_serve.errors import RedppError
from redpp_serve.files import read_bounded, write_atomically
from redpp_serve.processes import started
from redpp_serve.state_folders import state_folder

ATTACHED = "attached"  # in the extra of a test that uses a server of `serve`: that one's process


@dataclass(frozen=True)
class Running:
    """A server that runs now.

    Attributes:
        folder: the packaged folder, absolute.
        name: the model's name in URLs.
        kind: ``torchserve`` or ``triton``.
        pid: of the redpp-serve process that supervises the server.
        created: when that process started, see `started`; a later process with its number is another one.
        versions: the numbers of the original and of the pruned version in URLs.
        urls: where to POST inputs: ``original``, ``pruned`` and ``default`` (without a version).
        management_url: base of the server's management API.
        metrics_urls: what Prometheus scrapes.
        headers: request headers with the tokens, for ``inference`` and ``management``.
        model_config: what Triton's model was loaded with; empty for TorchServe.
        extra: an experiment's gateway, state folder, split and metrics; empty for `serve`.
        front_url: base of the Open Inference Protocol, and of ``/healthz`` without a token.
        grpc: host and port of the server's own gRPC.
    """

    folder: str
    name: str
    kind: str
    pid: int
    created: float
    versions: tuple[str, str]
    urls: dict[str, str]
    management_url: str
    metrics_urls: list[str]
    headers: dict[str, dict[str, str]] = field(default_factory=lambda: {"inference": {}, "management": {}})
    model_config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    front_url: str = ""
    grpc: str = ""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Running:
        """Read what ``dataclasses.asdict`` returned, after JSON.

        Raises:
            TypeError, KeyError: it was written by another release.
        """
        return cls(**{**document, "versions": tuple(document["versions"])})


@contextmanager
def register(running: Running) -> Iterator[None]:
    """Let other commands find the server while the body runs.

    Raises:
        RedppError: the state folder is not this user's alone, or cannot be written to.
    """
    _write(running)
    try:
        yield
    finally:
        _note_path(running).unlink(missing_ok=True)


def write_note(running: Running) -> None:
    """Write the note on a server, unless it is there.

    Raises:
        RedppError: the state folder is not this user's alone, or cannot be written to.
    """
    if not _note_path(running).exists():
        _write(running)


def _write(running: Running) -> None:
    path = _note_path(running)
    try:
        write_atomically(path, json.dumps(asdict(running)), mode=0o600, durable=False)  # it holds tokens
    except OSError as error:
        raise RedppError(
            f"{path} cannot be written: {error}", "a folder for notes on running servers", "point XDG_STATE_HOME at one"
        ) from error


def _note_path(running: Running) -> Path:
    return state_folder() / f"{package_key(Path(running.folder))}-{running.pid}.json"


def find(folder: Path, kind: str | None = None) -> Running:
    """Return the server that runs for a packaged folder.

    Args:
        folder: any path to the packaged folder.
        kind: only look for ``torchserve`` or ``triton``.

    Raises:
        RedppError: none runs, or more than one does, or the state folder is not this user's alone.
    """
    found = find_some(folder, kind)
    if len(found) > 1:
        which = ", ".join(f"{running.kind} of process {running.pid}" for running in found)
        raise RedppError(
            f"{len(found)} servers are running for {folder}: {which}",
            "one server that can be meant",
            "stop the others, or choose by --server where they differ in kind",
        )
    return found[0]


def find_some(folder: Path, kind: str | None = None) -> list[Running]:
    """Return the servers that run for a packaged folder, at least one; not those that an A/B test speaks for.

    Raises:
        RedppError: none runs, or the state folder is not this user's alone.
    """
    found = find_all(folder, kind)
    spoken_for = {running.extra.get(ATTACHED) for running in found}
    found = [running for running in found if str(running.pid) not in spoken_for]
    if not found:
        raise RedppError(
            f"no {kind or 'server'} is running for {folder}",
            "a server that this user has started for this folder",
            f"start one with redpp-serve serve {shlex.quote(str(folder))}" + (f" --server {kind}" if kind else ""),
        )
    return found


def find_all(folder: Path, kind: str | None = None) -> list[Running]:
    """Return every server that runs for a packaged folder.

    Raises:
        RedppError: the state folder is not this user's alone.
    """
    paths = sorted(state_folder().glob(f"{package_key(folder)}-*.json"))
    return [running for path in paths if (running := _living(path)) and kind in (None, running.kind)]


def package_key(folder: Path) -> str:
    """Return what begins the names of a packaged folder's files of state, whatever path leads to the folder."""
    return sha256(os.fsencode(folder.resolve())).hexdigest()[:24]


def _living(path: Path) -> Running | None:
    """Return the note if its process still runs; remove a note that a killed process left."""
    running = _read(path)
    begun = started(running.pid) if running else None
    if running and begun is not None and abs(begun - running.created) < 1:
        return running
    path.unlink(missing_ok=True)
    return None


def _read(path: Path) -> Running | None:
    try:
        return Running.from_json(json.loads(read_bounded(path)))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # gone, or written by another release
        return None
