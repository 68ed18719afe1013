"""Compare the two versions in a packaged folder with requests from its inputs or the user's, on a server of its own."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from redpp_serve.comparison.client import Endpoint, Payload
from redpp_serve.comparison.compare import Comparison, compare_endpoints
from redpp_serve.comparison.gains import measure_gains
from redpp_serve.comparison.triton_client import TritonEndpoint
from redpp_serve.errors import RedppError
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.loopback import ADDRESS, TritonPorts
from redpp_serve.options import ComparisonOptions, ServerOptions
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.packaging.samples import read_arrays, request_body
from redpp_serve.report.data import Report
from redpp_serve.report.folder import change_report
from redpp_serve.serving.serve import model_name, open_server
from redpp_serve.serving.server import LocalServer
from redpp_serve.variants import NAMES, ORIGINAL

_BINARY = "application/octet-stream"
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".npy", ".json")


def compare(
    folder: Path,
    options: ComparisonOptions = ComparisonOptions(),
    server: ServerOptions = ServerOptions(),
    *,
    note: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Start a server for the folder, send the same inputs to both versions, stop it, and tell the gains apart.

    Args:
        folder: written by `package`.
        options: the load; its inputs are by default the held-out synthetic ones kept in the folder.
        server: the server and its ports.
        note: called with a line of text as the server starts.

    Raises:
        RedppError: see `compare_endpoints`; or the folder, the inputs or the server are not what they should be.
    """
    name = model_name(folder)
    payloads = read_payloads(options.inputs) if options.inputs else folder_payloads(folder)
    with open_server(folder, server, name=name, note=note) as running:
        original, pruned = (endpoint(running, variant) for variant in NAMES)
        measured = compare_endpoints(original, pruned, payloads, options)
    note("measuring what engine, precision and pruning gain")
    return replace(measured, gains=tuple(measure_gains(folder, seed=options.seed)))


def endpoint(server: LocalServer, variant: str) -> Endpoint:
    """Return the endpoint of a running server for ``original``, ``pruned``, or ``default``: without a version."""
    version = {**dict(zip(NAMES, server.versions, strict=True)), "default": ""}[variant]
    headers = server.headers("inference")
    if server.kind == "torchserve":
        return Endpoint(variant, server.url(version) if version else server.default_url(), headers)
    artifact = read_artifact(server.folder / ORIGINAL.archive)
    declared = artifact.description.get("preprocess")
    preprocess = Preprocess.from_json(declared) if declared else None
    assert isinstance(server.ports, TritonPorts)
    url = f"{ADDRESS}:{server.ports.grpc}"
    return TritonEndpoint(variant, url, headers, server.name, version, artifact.graph.inputs, preprocess)


def record(folder: Path, result: Comparison) -> bool:
    """Put the comparison into the folder's report.json and report.html; return False where they cannot be written."""
    return change_report(folder, lambda report: with_comparison(report, result.to_json()))


def with_comparison(report: Report, measured: dict[str, Any]) -> Report:
    """Put what was measured beside what was counted. An accuracy on verification data stays."""
    before = report.to_json()
    kept = {"accuracy"} if report.accuracy_of else set()
    arms = {
        name: {**before[name], **{key: value for key, value in measured[name].items() if key not in kept}}
        for name in NAMES
    }
    return Report.from_json({**before, **measured, **arms})


def folder_payloads(folder: Path) -> list[Payload]:
    """Make requests from the synthetic inputs that `package` kept.

    Raises:
        RedppError: they are missing or damaged.
    """
    arrays = read_arrays(folder)
    count = len(next(iter(arrays.values())))
    return [Payload(request_body({name: x[k] for name, x in arrays.items()}), _BINARY) for k in range(count)]


def read_payloads(path: Path) -> list[Payload]:
    """Make requests from the user's inputs.

    Raises:
        RedppError: there is nothing that can be sent.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file())
        payloads = [
            Payload(p.read_bytes(), "application/json" if p.suffix.lower() == ".json" else _BINARY) for p in files
        ]
    elif path.exists() and not path.is_file():
        raise RedppError(
            f"--inputs {path} is neither a file nor a folder", "an .npz file or a folder", "point --inputs at one"
        )
    else:
        payloads = _from_arrays(path)
    if not payloads:
        raise RedppError(f"{path} holds no inputs", f"files ending in {', '.join(_SUFFIXES)}", "point --inputs at some")
    return payloads


def _from_arrays(path: Path) -> list[Payload]:
    try:
        with np.load(path, allow_pickle=False) as file:
            alone = [name for name in file.files if name != "labels"]
            name = alone[0] if len(alone) == 1 else "inputs"
            if name not in file.files:
                raise ValueError(f"it holds {', '.join(file.files) or 'nothing'}")
            given = file[name]
            inputs = np.ascontiguousarray(given)
            labels = file["labels"].tolist() if "labels" in file.files else [None] * len(given)
            if any(not isinstance(label, int | None) for label in labels):
                raise ValueError("labels that are not one integer for each input")
            if given.ndim == 0 or len(labels) != len(inputs):
                raise ValueError(f"inputs of shape {given.shape} with {len(labels)} labels")
    except _UNREADABLE as error:
        raise RedppError(
            f"--inputs {path} cannot be read: {error}",
            "an .npz file with an array 'inputs', batch first",
            "write it with numpy.savez, or give a folder of images",
        ) from error
    if inputs.dtype == np.uint8 and inputs.ndim == 4 and inputs.shape[1] in (1, 3):  # images travel as images
        return [Payload(_png(x), _BINARY, label) for x, label in zip(inputs, labels, strict=True)]
    return [Payload(request_body({name: x}), _BINARY, label) for x, label in zip(inputs, labels, strict=True)]


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()
