"""Read a user's unlabelled inputs: an .npz file, or a folder of images or .npy files. Nothing of them is kept.

They are fitted to and judged by while a network is pruned; the package holds second moments of neither, only weights.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from redpp_serve.archives import ZIP_ERRORS, check_arrays
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.ranges import outside
from redpp_serve.handlers.image_files import SUFFIXES, ImageRefused
from redpp_serve.handlers.preprocess import Preprocess

LEAST, MOST = 16, 512  # inputs that help, and that are used
_LISTED = 100_000  # entries of a folder that are looked at
_EXPECTED = (
    "an .npz file with one array for each input of the network (batch first; a single one may have any name but "
    "'labels'), or a folder of .npy files or of images, at least {least} of them"
)


def load_inputs(path: Path, graph: Graph, preprocess: Preprocess | None, seed: int = 0) -> tuple[Tensor, ...]:
    """Return at most `MOST` inputs, (images, ...) for each network input, as the network reads them.

    Of a larger file or folder a random sample is taken, which ``seed`` decides. Bytes (uint8) for a network that reads
    floating point are images: they are normalised as ``preprocess`` says, and divided by 255 where nothing says.

    Raises:
        RedppError: the path holds something else, too few inputs, or values that are not finite.
    """
    if path.is_dir():
        found = _folder(path, graph, preprocess, seed)
    elif path.is_file():
        found = _arrays(path, graph.inputs, seed)
    else:
        raise _refused(path, "does not exist")
    tensors = []
    for spec, array in zip(graph.inputs, found, strict=True):
        tensors.append(_as_input(path, spec, array, preprocess))
    count = len(tensors[0])
    if any(len(x) != count for x in tensors):
        raise _refused(path, f"holds arrays of different lengths, {[len(x) for x in tensors]}")
    if count < LEAST:
        raise _refused(path, f"holds {count} input{'s' * (count != 1)}")
    return tuple(tensors)


def _arrays(path: Path, inputs: Sequence[InputSpec], seed: int) -> list[np.ndarray]:
    try:
        check_arrays(path, any_ratio=True)
        with np.load(path, allow_pickle=False) as file:
            if isinstance(file, np.ndarray):
                raise _refused(path, "holds a single .npy array")
            names = [name for name in file.files if name != "labels"]
            if not names:
                raise _refused(path, "holds labels only" if file.files else "holds no array")
            wanted = [spec.name for spec in inputs]
            if len(inputs) == 1 and wanted[0] not in names:
                wanted = ["inputs"] if "inputs" in names else names
            if len(wanted) != len(inputs) or not set(wanted) <= set(names):
                raise _refused(path, f"holds the arrays {', '.join(names)}, not {', '.join(s.name for s in inputs)}")
            arrays = [file[name] for name in wanted]
    except (*ZIP_ERRORS, TypeError, AttributeError) as error:
        raise _refused(path, f"cannot be read: {error}") from error
    if any(array.ndim == 0 for array in arrays):
        raise _refused(path, "holds a single number")
    picks = _sample(min(len(array) for array in arrays), seed)
    return [array[picks] if len(array) > MOST else array for array in arrays]


def _folder(path: Path, graph: Graph, preprocess: Preprocess | None, seed: int) -> list[np.ndarray]:
    if len(graph.inputs) != 1:
        raise _refused(path, f"is a folder, and the network has {len(graph.inputs)} inputs")
    names = sorted(itertools.islice(_files(path), _LISTED))
    kinds = {Path(name).suffix.lower() for name in names}
    if not names:
        raise _refused(path, "holds neither images nor .npy files")
    if ".npy" in kinds and len(kinds) > 1:
        raise _refused(path, "holds both .npy files and images")
    if ".npy" not in kinds and preprocess is None:
        raise RedppError(
            f"--inputs {path} is a folder of images, and nothing says how they become the network's input",
            "the preprocessing that the network was trained with",
            'add --preprocess imagenet or --preprocess \'{"mean": [0.5], "std": [0.5]}\', or give .npy files',
        )
    arrays, refused = [], []
    for place in _sample(len(names), seed):
        file = path / names[place]
        try:
            if preprocess is not None and ".npy" not in kinds:
                arrays.append(preprocess.image(file.read_bytes()).numpy())
            else:
                check_arrays(file)
                arrays.append(np.load(file, allow_pickle=False))
        except (ImageRefused, *ZIP_ERRORS) as error:
            refused.append(f"{names[place]}: {error}")
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise _refused(path, f"holds files of different shapes, {sorted(shapes)[:3]}")
    if len(arrays) < LEAST and refused:
        raise _refused(path, f"holds {len(arrays)} readable inputs; {refused[0]}")
    return [np.stack(arrays) if arrays else np.empty((0, *graph.inputs[0].shape), np.float32)]


def _files(path: Path) -> Iterator[str]:
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.lower().endswith((*SUFFIXES, ".npy")) and entry.is_file():
                yield entry.name


def _sample(count: int, seed: int) -> list[int]:
    """Return the places of at most `MOST` of ``count`` inputs, ascending."""
    if count <= MOST:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, MOST, replace=False).tolist())


def _as_input(path: Path, spec: InputSpec, array: np.ndarray, preprocess: Preprocess | None) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    if array.dtype.kind not in "fiub":
        raise _refused(path, f"holds values of type {array.dtype} for input {spec.name}")
    if array.shape[1:] != spec.shape:
        raise _refused(path, f"holds inputs of shape {array.shape[1:]} for input {spec.name} of shape {spec.shape}")
    if not dtype.is_floating_point and array.dtype.kind == "f":
        raise _refused(path, f"holds {array.dtype} for input {spec.name}, which reads {spec.dtype}")
    x = torch.from_numpy(np.ascontiguousarray(array))
    if dtype.is_floating_point and x.dtype == torch.uint8:
        x = x.float() / 255 if preprocess is None else torch.from_numpy(preprocess.values(x.numpy()))
    x = x.to(dtype)
    if wrong := outside(spec, x):
        raise _refused(path, f"holds input {spec.name} with {wrong}")
    if dtype.is_floating_point and not bool(x.isfinite().all()):
        bad = int((~x.flatten(1).isfinite().all(1)).sum())
        raise _refused(path, f"holds NaN or infinity in {bad} of {len(x)} inputs")
    if len(x) > 1 and bool((x == x[:1]).all()):
        raise _refused(path, f"holds {len(x)} times the same input")
    return x


def _refused(path: Path, found: str) -> RedppError:
    return RedppError(
        f"--inputs {path} {found}",
        _EXPECTED.format(least=LEAST),
        "correct it, or leave out --inputs to prune without data",
    )
