"""The outputs in a reply of either server, and the distance between two versions' outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from redpp_serve.handlers.wire import OUTPUTS_KEY, PREDICTIONS_KEY
from redpp_serve.report.data import Report

# The protocol's names of types for a tensor's bytes; BF16 and BYTES have no counterpart.
_TYPES = {
    "BOOL": "?",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    **{f"{'U' * unsigned}INT{8 * size}": f"<{'iu'[unsigned]}{size}" for size in (1, 2, 4, 8) for unsigned in (0, 1)},
}


@dataclass(frozen=True)
class Heads:
    """What is known of a network's outputs before any answer.

    Attributes:
        names: their names, in order; empty where nobody knows them.
        classes: positions of those that are class scores, so that their largest entry is an answer.
    """

    names: tuple[str, ...] = ()
    classes: tuple[int, ...] = (0,)


UNKNOWN = Heads()


def heads_of(report: Report) -> Heads:
    """Return what a package's report says of its network's outputs; that of a former release says nothing."""
    outputs = (report.verify and report.verify.outputs) or []
    if not outputs:
        return UNKNOWN
    return Heads(tuple(str(x.output) for x in outputs), tuple(k for k, x in enumerate(outputs) if x.classes))


class Difference(NamedTuple):
    """How far apart two answers are.

    Attributes:
        relative: the largest over the outputs of |original - pruned| / |original| (Euclidean); infinite where shapes
            or numbers of outputs differ, or an original of zeros is not met.
        top1: whether all outputs of class scores have their largest value at the same places; None where there are
            none.
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
        if PREDICTIONS_KEY in document:  # the outputs of each item
            rows = [r.values() if isinstance(r, dict) else r for r in document[PREDICTIONS_KEY]]
            return finite(zip(*rows, strict=True))
        outputs = document[OUTPUTS_KEY]
        if isinstance(outputs, dict):
            return finite(outputs.values())
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


def difference(
    original: Sequence[np.ndarray], pruned: Sequence[np.ndarray], scores: Sequence[int] = Heads.classes
) -> Difference:
    """Compare the outputs of one request, each of any shape; those at the positions ``scores`` are class scores."""
    if [array.shape for array in original] != [array.shape for array in pruned]:
        return Difference(math.inf, False if scores else None)
    relative = max(map(relative_difference, original, pruned))
    tops = [(classes(original[k]), classes(pruned[k])) for k in scores if k < len(original)]
    same = [a == b for a, b in tops if a is not None]
    return Difference(relative, all(same) if same else None)


def classes(output: np.ndarray) -> list[int] | None:
    """Return the classes of an output (classes,) or (rows, classes); None for anything else."""
    if output.ndim not in (1, 2) or output.shape[-1] < 2:
        return None
    top: list[int] = np.atleast_1d(output.argmax(axis=-1)).tolist()
    return top


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Euclidean norm of b - a over that of a; infinite where only that of a is zero."""
    scale = float(np.linalg.norm(a))
    return float(np.linalg.norm(a - b)) / scale if scale else (math.inf if (a != b).any() else 0.0)
