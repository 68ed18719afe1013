"""Inputs as a package keeps them and as requests carry them: .npy for one input, .npz by name for several."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from redpp_serve.archives import ZIP_ERRORS, check_arrays
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.graph.ranges import BOTH, random_integers
from redpp_serve.graph.sizes import tiled
from redpp_serve.handlers.preprocess import Preprocess

INPUTS = "inputs.npz"  # the file of a package that holds some inputs, each with a batch dimension


def sample_name(inputs: Sequence[InputSpec]) -> str:
    """Return the name of the file in a package that holds one request."""
    return "sample.npy" if len(inputs) == 1 else "sample.npz"


def request_body(inputs: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Write one input without batch dimension as the body of a request."""
    stream = io.BytesIO()
    if len(inputs) == 1:
        np.save(stream, next(iter(inputs.values())))
    else:
        np.savez(stream, **inputs)  # type: ignore[arg-type]
    return stream.getvalue()


def example_image(preprocess: Preprocess) -> bytes:
    """Return a PNG of smooth colours, half as wide again as the network's input, so that its proportions matter.

    Where an image is only filled up, it is one that comes to the network's size so.
    """
    if preprocess.fit == "mirror":
        height, width = preprocess.height - 1, preprocess.width - 1
    else:
        height, width = preprocess.height, preprocess.width * 3 // 2 + 1
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [128 + 127 * np.sin(9 * x + shift) * np.cos(7 * y - shift) for shift in (0, 1, 2)]
    stream = io.BytesIO()
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def read_arrays(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the inputs that a package keeps, (n, ...) by name.

    Raises:
        RedppError: they are missing or damaged.
    """
    path = folder / INPUTS
    try:
        check_arrays(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if not arrays or any(x.ndim == 0 or not x.size for x in arrays.values()):
            raise ValueError("no arrays with a batch dimension")
    except (*ZIP_ERRORS, KeyError, TypeError, AttributeError) as error:
        raise RedppError(
            f"{path} cannot be read: {error}",
            "the synthetic inputs that redpp-serve package keeps there",
            "package the model again, or give a command that takes --inputs others",
        ) from error
    return arrays


def read_samples(folder: Path, inputs: Sequence[InputSpec]) -> tuple[torch.Tensor, ...]:
    """Return the inputs that a package keeps, (n, ...) for each network input.

    Raises:
        RedppError: they are missing, damaged, or do not fit the network.
    """
    arrays = read_arrays(folder)
    shapes = {name: x.shape[1:] for name, x in arrays.items()}
    if shapes != {spec.name: spec.shape for spec in inputs} or len({len(x) for x in arrays.values()}) != 1:
        raise RedppError(
            f"{folder / INPUTS} holds inputs of shapes {shapes}",
            f"those of the network, { ({spec.name: spec.shape for spec in inputs}) }",
            "package the model again",
        )
    return tuple(torch.from_numpy(arrays[spec.name]).to(getattr(torch, spec.dtype)) for spec in inputs)


def sized(x: torch.Tensor, spec: InputSpec, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return inputs (n, ...) at the shape of a spec: numbers cut or begun anew, integers of sizes that vary drawn."""
    if x.is_floating_point() or not spec.varying:
        return tiled(x, (len(x), *spec.shape))
    drawn = random_integers(spec, len(x), generator or torch.Generator().manual_seed(0))
    alone = spec.shape[-1] == 1 and (spec.ranges or BOTH) == BOTH  # a mask that hides its only place has no meaning
    return torch.ones_like(drawn) if alone else drawn


def as_array(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """Convert a tensor; NumPy has no bfloat16, and the handlers take float32 for it."""
    found: np.ndarray[Any, Any] = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return found
