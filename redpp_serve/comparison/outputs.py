"""The outputs in a reply of either server, and the distance between two versions' outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from redpp_serve.handlers.wire import OUTPUTS_KEY

# The protocol's names of types for a tensor's bytes; BF16 and BYTES have no counterpart.
_TYPES = {
    "BOOL": "?",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    **{f"{'U' * unsigned}INT{8 * size}": f"<{'iu'[unsigned]}{size}" for size in (1, 2, 4, 8) for unsigned in (0, 1)},
}


class Difference(NamedTuple):
    """How far apart two answers are.

    Attributes:
        relative: the largest over the outputs of |original - pruned| / |original| (Euclidean); infinite where shapes
            or numbers of outputs differ, or an original of zeros is not met.
        top1: whether the first output has its largest value at the same places; None where it is no vector of
            classes.
    """

    relative: float
    top1: bool | None


def read_outputs(body: bytes) -> list[np.ndarray]:
    """Read the network's outputs, float64, in a reply of TorchServe's handler or of Triton (JSON or binary tensors).

    Raises:
        ValueError: there are no outputs, or numbers that are not finite.
    """
    try:
        document, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        outputs = document[OUTPUTS_KEY]
        if all(isinstance(output, dict) for output in outputs):
            return finite(_tensors(outputs, body[end:]))
        return finite(outputs)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a reply without outputs that can be read: {error!r}") from error


def finite(outputs: Iterable[Any]) -> list[np.ndarray]:
    """Return the outputs as arrays, float64.

    Raises:
        ValueError: there are none, or numbers that are not finite.
    """
    arrays = [np.asarray(output, dtype=np.float64) for output in outputs]
    if not arrays or not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a reply without outputs, or with NaN or infinity")
    return arrays


def _tensors(outputs: Sequence[dict[str, Any]], binary: bytes) -> list[np.ndarray]:
    """Read tensors of the v2 protocol: numbers in ``data``, or consecutive bytes behind the JSON."""
    arrays, offset = [], 0
    for output in outputs:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.asarray(output["data"], dtype=np.float64)
        else:
            if offset + size > len(binary):
                raise ValueError("a reply that ends within its tensors")
            array = np.frombuffer(binary[offset : offset + size], _TYPES[output["datatype"]])
            offset += size
        arrays.append(array.reshape(output["shape"]))
    return arrays


def difference(original: Sequence[np.ndarray], pruned: Sequence[np.ndarray]) -> Difference:
    """Compare the outputs of one request, each of any shape."""
    if [array.shape for array in original] != [array.shape for array in pruned]:
        return Difference(math.inf, False)
    relative = max(_relative(a, b) for a, b in zip(original, pruned, strict=True))
    top = classes(original[0])
    return Difference(relative, None if top is None else top == classes(pruned[0]))


def classes(output: np.ndarray) -> list[int] | None:
    """Return the classes of an output (classes,) or (rows, classes); None for anything else."""
    if output.ndim not in (1, 2) or output.shape[-1] < 2:
        return None
    top: list[int] = np.atleast_1d(output.argmax(axis=-1)).tolist()
    return top


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    scale = float(np.linalg.norm(a))
    return float(np.linalg.norm(a - b)) / scale if scale else (math.inf if (a != b).any() else 0.0)
