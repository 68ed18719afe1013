"""The file of a network's second moments: safetensors with a JSON header, which several processes add to.

What leaves a process is the sum over at least `LEAST` inputs: the Gram matrix of a single input gives that input away
up to its sign, and so would the difference of two states of a file that are one input apart.
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.files import locked, open_regular, write_atomically
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.tensor_file import TensorFile, safetensors_parts
from redpp_serve.runtime.moments import Layout, Moments, Sums, fingerprint

FORMAT = 1
LEAST = 64  # inputs that are added up before their sum is written
_KEY = "redpp_moments"
_LOCK_S, _TRIAL_S = 60.0, 10.0
_OTHER = "moments of this very network, with the weights and the names that it was packaged with"


def load_moments(path: Path, graph: Graph) -> Moments:
    """Read the moments of a network.

    Args:
        path: a file that `add_to_file` wrote.
        graph: the original network, as it was packaged.

    Raises:
        RedppError: no such file, another network's, another format, damaged, or of fewer than `LEAST` inputs.
    """
    try:
        with _opened(path, graph) as (file, sums):
            sums.tensors = {name: file[name] for name in file.entries}
    except OSError as error:
        raise _damaged(path, str(error)) from error
    for name, tensor in sums.tensors.items():
        if not bool(torch.isfinite(tensor).all()) or (name.endswith("/squares") and bool((tensor < 0).any())):
            raise _damaged(path, f"{name!r} holds what is no sum of finite numbers")
        if name.endswith("/gram") and bool((tensor.diagonal(dim1=-2, dim2=-1) < 0).any()):
            raise _damaged(path, f"{name!r} has a negative square")
    return sums.moments(fingerprint(graph))


def add_to_file(path: Path, sums: Sums, graph: Graph) -> bool:
    """Add sums to those in a file, or make it; readable by this user alone. One tensor at a time is in memory.

    Args:
        path: the file.
        sums: sums of that network's `Layout`, over at least `LEAST` inputs.
        graph: the network.

    Returns:
        Whether they were written: False where another process held the file's lock for a minute, or where the file
        system has no locks.

    Raises:
        RedppError: fewer inputs, or a file that `load_moments` would refuse.
        OSError: the file cannot be written.
    """
    if sums.images < LEAST:
        raise _too_few(path, sums.images)
    with locked(lock_path(path), _LOCK_S) as held:
        if not held:
            return False
        if not path.exists():
            _write(path, sums, graph, iter(sums.tensors.values()))
            return True
        with _opened(path, graph) as (file, total):
            total.images, total.skipped = total.images + sums.images, total.skipped + sums.skipped
            total.counts = {key: count + sums.counts[key] for key, count in total.counts.items()}
            total.tensors = sums.tensors  # for their names and shapes, in this process's order
            _write(path, total, graph, (tensor + file[name] for name, tensor in sums.tensors.items()))
    return True


def check_file(path: Path, graph: Graph) -> None:
    """Refuse a place that a network's moments cannot be added to, before anybody waits for them.

    Raises:
        RedppError: a folder that cannot be written to, or a file that `load_moments` would refuse.
    """
    trial = path.with_name(f".{path.name}.trial")
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} is no folder")
        write_atomically(trial, b"", durable=False)
        trial.unlink()
        with locked(lock_path(path), _TRIAL_S) as held:
            if not held:
                raise OSError("its lock cannot be had: another process holds it, or the file system has no locks")
        if path.exists():
            with _opened(path, graph):
                pass
    except OSError as error:
        raise RedppError(
            f"moments cannot be written to {path}: {error}",
            "a file in a folder that exists and can be written to",
            "choose another place with --observe-to",
        ) from error


def lock_path(path: Path) -> Path:
    """Return the lock file of a file of moments, which stays beside it."""
    return path.with_name(f".{path.name}.lock")


def _write(path: Path, sums: Sums, graph: Graph, tensors: Iterator[Tensor]) -> None:
    header = {
        "format": FORMAT,
        "fingerprint": fingerprint(graph),
        "images": sums.images,
        "skipped": sums.skipped,
        "counts": sums.counts,
        "written": int(time.time()),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in sums.tensors.items()}
    parts = safetensors_parts(shapes, torch.float64, tensors, {_KEY: json.dumps(header)})
    write_atomically(path, parts, mode=0o600, durable=False)


@contextmanager
def _opened(path: Path, graph: Graph) -> Iterator[tuple[TensorFile, Sums]]:
    """Open a file and check all but its tensors' numbers; the sums that it yields lack the tensors."""
    try:
        with open_regular(path) as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
            file, sums = _checked(path, data, graph)
            yield file, sums
    except FileNotFoundError as error:
        raise RedppError(
            f"{path} does not exist", "a file that a server with --observe wrote", "correct the path, or wait for it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # mmap: of an empty file
        raise _damaged(path, str(error)) from error


def _checked(path: Path, data: mmap.mmap, graph: Graph) -> tuple[TensorFile, Sums]:
    file = TensorFile(data)
    header = json.loads(file.metadata[_KEY])
    if header["format"] != FORMAT:
        raise RedppError(
            f"{path} has format {header['format']!r}",
            f"format {FORMAT}, which this release reads",
            "observe again with this release",
        )
    if header["fingerprint"] != fingerprint(graph):
        raise RedppError(
            f"{path} holds the moments of another network", _OTHER, "give the file of this network, or observe it"
        )
    images, skipped, counts = header["images"], header["skipped"], header["counts"]
    if not all(type(number) is int and number >= 0 for number in (images, skipped, *counts.values())):
        raise ValueError("counts of other than whole numbers")
    if images < LEAST:
        raise _too_few(path, images)
    _check_tensors(file, counts, Layout.of(graph))
    return file, Sums(images, skipped, counts)


def _check_tensors(file: TensorFile, counts: dict[str, int], layout: Layout) -> None:
    """Raise ValueError unless the file holds just the tensors that the layout asks for."""
    shapes = layout.shapes()
    outputs = {name: entry for name, entry in file.entries.items() if name.startswith("output/")}
    for name, entry in outputs.items():
        _, _, what = name.rpartition("/")
        total = outputs[f"{name.removesuffix(what)}total"].shape
        shapes[name] = 2 * total if what == "gram" else total
        if len(total) != 1 or entry.dtype != torch.float64:
            raise ValueError(f"{name[:60]!r} has shape {entry.shape}")
    found = {name: entry.shape for name, entry in file.entries.items() if entry.dtype == torch.float64}
    if found != shapes or len(found) != len(file.entries):
        wrong = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
        raise ValueError(f"its sums are not those of this release: {wrong[:3]}")
    keys = {name.rpartition("/")[0] for name in found}
    if set(counts) != keys or not all(counts.values()):
        raise ValueError("counts that do not belong to its sums")
    allowed = {f"output/{name}" for name in layout.outputs}
    if {key for key in keys if key.startswith("output/")} - allowed:
        raise ValueError("sums of outputs that the network does not have")


def _damaged(path: Path, why: str) -> RedppError:
    return RedppError(
        f"{path} cannot be read as moments: {why[:200]}",
        "an unchanged file that a server with --observe wrote",
        "fetch it again if it was copied, or remove it and observe anew",
    )


def _too_few(path: Path, images: int) -> RedppError:
    return RedppError(
        f"{images} inputs for {path}",
        f"sums over at least {LEAST}, from which no input can be told",
        "observe more requests",
    )
