"""What two versions answered to one request, on either server, and how far apart their outputs are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

# The protocol's names of types for a tensor's bytes; BF16 and BYTES have no counterpart.
_TYPES = {
    "BOOL": "?",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
}


class Difference(NamedTuple):
    """How far apart two answers are.

    Attributes:
        relative: the largest over the outputs of |original - pruned| / |original| (Euclidean); infinite where shapes
            or numbers of outputs differ.
        top1: whether the first output has its largest value at the same places; None where it is no vector of
            classes.
    """

    relative: float
    top1: bool | None


def read_outputs(body: bytes) -> list[numpy.ndarray]:
    """The network's outputs, float64, in a reply of TorchServe's handler, or of Triton over HTTP with JSON or binary
    tensors.

    Raises:
        ValueError: none of them, or numbers that are not finite.
    """
    try:
        document, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        outputs = document["outputs"]
        if all(isinstance(output, dict) for output in outputs):
            arrays = _tensors(outputs, body[end:])
        else:
            arrays = [numpy.asarray(output, dtype=numpy.float64) for output in outputs]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a reply without outputs that can be read: {error!r}") from error
    if not arrays or not all(numpy.isfinite(array).all() for array in arrays):
        raise ValueError("a reply without outputs, or with NaN or infinity")
    return arrays


def _tensors(outputs: Sequence[dict[str, Any]], binary: bytes) -> list[numpy.ndarray]:
    """Tensors of the v2 protocol: numbers in ``data``, or consecutive bytes behind the JSON."""
    arrays, offset = [], 0
    for output in outputs:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = numpy.asarray(output["data"], dtype=numpy.float64)
        else:
            if offset + size > len(binary):
                raise ValueError("a reply that ends within its tensors")
            array = numpy.frombuffer(binary[offset : offset + size], _TYPES[output["datatype"]]).astype(numpy.float64)
            offset += size
        arrays.append(array.reshape(output["shape"]))
    return arrays


def difference(original: Sequence[numpy.ndarray], pruned: Sequence[numpy.ndarray]) -> Difference:
    """Compare the outputs of one request, each of any shape."""
    if [array.shape for array in original] != [array.shape for array in pruned]:
        return Difference(math.inf, False)
    relative = max(_relative(a, b) for a, b in zip(original, pruned))
    first, other = original[0], pruned[0]
    if first.ndim == 0 or first.ndim > 2 or first.shape[-1] < 2:
        return Difference(relative, None)
    return Difference(relative, bool((first.argmax(-1) == other.argmax(-1)).all()))


def _relative(a: numpy.ndarray, b: numpy.ndarray) -> float:
    scale = float(numpy.linalg.norm(a))
    return float(numpy.linalg.norm(a - b)) / scale if scale else (math.inf if (a != b).any() else 0.0)
