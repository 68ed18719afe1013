"""Requests from the inputs that a package keeps or from the user's, one item each or several."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from redpp_serve.archives import ZIP_ERRORS, check_arrays
from redpp_serve.comparison.client import Payload
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.sizes import choice_in_words, closest, drawn, in_words, is_varying, planned, resized, sizes_in
from redpp_serve.handlers.image_files import SUFFIXES
from redpp_serve.handlers.payload import BadRequest, parse
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.packaging.samples import as_array, read_arrays, read_samples, request_body, sized
from redpp_serve.variants import ORIGINAL

_BINARY = "application/octet-stream"
_UNREADABLE = (*ZIP_ERRORS, KeyError, TypeError, AttributeError)
_SUFFIXES = (*SUFFIXES, ".npy", ".npz", ".json")


def declared_preprocess(artifact: LoadedArtifact) -> Preprocess | None:
    """Return how a server turns images into the network's input; None where it takes none."""
    document = artifact.description.get("preprocess")
    return Preprocess.from_json(document) if document else None


def payloads_of(folder: Path, inputs: Path | None = None, seed: int = 0) -> list[Payload]:
    """Make requests of one item each, from the user's inputs or the package's.

    Args:
        folder: the package.
        inputs: see `read_payloads`; None for the package's.
        seed: see `folder_payloads`.

    Raises:
        RedppError: there is nothing that can be sent, or the network does not take it.
    """
    if inputs is None:
        return folder_payloads(folder, seed)
    artifact = read_artifact(folder / ORIGINAL.archive)
    payloads = read_payloads(inputs, declared_preprocess(artifact))
    return by_sizes(payloads, artifact) if is_varying(artifact.graph.inputs) else payloads


def folder_payloads(folder: Path, seed: int = 0) -> list[Payload]:
    """Make requests from the synthetic inputs that `package` kept; where sizes vary, of many sizes.

    Args:
        folder: the package.
        seed: of the sizes.

    Raises:
        RedppError: they are missing or damaged.
    """
    arrays = read_arrays(folder)
    count = len(next(iter(arrays.values())))
    archive = folder / ORIGINAL.archive
    artifact = read_artifact(archive) if archive.is_file() else None  # the inputs may lie alone
    if artifact is None or not is_varying(artifact.graph.inputs):
        return [Payload(request_body({name: x[k] for name, x in arrays.items()}), _BINARY) for k in range(count)]
    specs = artifact.graph.inputs
    samples = read_samples(folder, specs)
    payloads = []
    for k, sizes in enumerate(drawn(specs, count, seed)):
        generator = torch.Generator().manual_seed(seed + k)
        one = [sized(x[k : k + 1], resized(spec, sizes), generator)[0] for spec, x in zip(specs, samples, strict=True)]
        payloads.append(Payload(request_body({s.name: as_array(x) for s, x in zip(specs, one, strict=True)}), _BINARY))
    return by_sizes(payloads, artifact)


def by_sizes(payloads: Sequence[Payload], artifact: LoadedArtifact) -> list[Payload]:
    """Note which of the planned sizes each payload is nearest to.

    Raises:
        RedppError: the network does not take one of them.
    """
    inputs, choices = artifact.graph.inputs, planned(artifact.graph.inputs)
    found = list[Payload]()
    for payload, tensors in zip(payloads, _parsed(payloads, artifact), strict=True):
        near = choices[closest(choices, sizes_in(inputs, [x.shape for x in tensors]))]
        found.append(replace(payload, sizes=choice_in_words(near)))
    return found


def batched(payloads: Sequence[Payload], artifact: LoadedArtifact, items: int) -> list[Payload]:
    """Join inputs to requests of several items each, as arrays, whatever the inputs were sent as before.

    Args:
        payloads: of one item each. Those that do not fill a request are left out; too few for one are repeated.
        artifact: of the network that takes them.
        items: in each request. Of 1 their labels stay.

    Raises:
        RedppError: the network does not take one of them, or their sizes differ.
    """
    inputs = artifact.graph.inputs
    rows = [[as_array(x) for x in tensors] for tensors in _parsed(payloads, artifact)]
    if len({tuple(x.shape for x in row) for row in rows}) > 1:
        raise RedppError(
            "a sweep of batches with inputs of several sizes",
            "inputs of one size, which fit into one request",
            "leave batch out of --sweep, or give inputs of one size with --inputs",
        )
    found = []
    for first in range(0, max(len(rows) - items, 0) + 1, items):
        some = [rows[(first + k) % len(rows)] for k in range(items)]
        arrays = {spec.name: np.stack(column) for spec, column in zip(inputs, zip(*some, strict=True), strict=True)}
        label = payloads[first].label if items == 1 else None
        found.append(Payload(request_body(arrays), _BINARY, label, items=items))
    return found


def _parsed(payloads: Sequence[Payload], artifact: LoadedArtifact) -> Iterator[tuple[Tensor, ...]]:
    """Yield what the server makes of each payload.

    Raises:
        RedppError: the network does not take one of them.
    """
    inputs, preprocess = artifact.graph.inputs, declared_preprocess(artifact)
    for number, payload in enumerate(payloads, 1):
        try:
            yield parse({"body": payload.body}, inputs, preprocess)
        except BadRequest as error:
            raise RedppError(
                f"input {number} of {len(payloads)}: {error}",
                "; ".join(f"{spec.name} of {in_words(spec)}" for spec in inputs),
                "leave it out of --inputs, or package the model for such inputs",
            ) from error


def read_payloads(path: Path, preprocess: Preprocess | None = None) -> list[Payload]:
    """Make requests from the user's inputs.

    Args:
        path: an .npz file, or a folder of files that each hold a request.
        preprocess: how the server turns images into the network's input; None where it takes none.

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
        payloads = _from_arrays(path, preprocess)
    if not payloads:
        raise RedppError(f"{path} holds no inputs", f"files ending in {', '.join(_SUFFIXES)}", "point --inputs at some")
    return payloads


def _from_arrays(path: Path, preprocess: Preprocess | None) -> list[Payload]:
    try:
        check_arrays(path, any_ratio=True)
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
            if given.ndim == 0 or not given.size or len(labels) != len(inputs):
                raise ValueError(f"inputs of shape {given.shape} with {len(labels)} labels")
    except _UNREADABLE as error:
        raise RedppError(
            f"--inputs {path} cannot be read: {error}",
            "an .npz file with an array 'inputs', batch first",
            "write it with numpy.savez, or give a folder of images",
        ) from error
    bodies = [_image_body(name, x, preprocess) if preprocess else request_body({name: x}) for x in inputs]
    return [Payload(body, _BINARY, label) for body, label in zip(bodies, labels, strict=True)]


def _image_body(name: str, array: np.ndarray, preprocess: Preprocess) -> bytes:
    """Return bytes (uint8), in the network's order of dimensions and channels, as an image; other arrays as numbers.

    Bytes of the network's own size are already cut out: they travel as numbers where the server would resize or
    fill them up.
    """
    pixels = preprocess.as_picture(array)
    if pixels is None:
        return request_body({name: array})
    changed = preprocess.fit == "mirror" or preprocess.target != pixels.shape[:2]
    if array.shape == preprocess.shape and changed:
        return request_body({name: preprocess.values(array)})
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
