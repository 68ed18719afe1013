"""One request as a handler sees it, and its answer in the form that the request asks for.

Bodies of arrays, images and JSON are answered as JSON, or as ``.npy`` or ``.npz`` where the header ``Accept`` asks for
it; `open_inference` adds the Open Inference Protocol.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.payload import BadRequest
from redpp_serve.handlers.wire import CLASSES_KEY, OUTPUTS_KEY, PREDICTIONS_KEY, TOP_HEADER

JSON, BINARY, NPY, NPZ = "application/json", "application/octet-stream", "application/x-npy", "application/x-npz"


class NotFinite(ValueError):
    """An output holds NaN or infinity, which no answer may."""


@dataclass(frozen=True)
class Served:
    """What a loaded model takes and gives.

    Attributes:
        name: the model's name in URLs.
        version: its version in URLs.
        inputs: what the network takes.
        outputs: the names of what it gives, in order.
        names_outputs: whether a JSON answer names them.
        labels: the names of the classes; none where nobody gave them.
    """

    name: str
    version: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    names_outputs: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The body of a reply with its headers."""

    body: bytes = b""
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """The tensors of one request, (N, ...) for each input, and what turns its outputs, (N, ...), into an answer."""

    tensors: tuple[Tensor, ...]
    answer: Callable[[Sequence[Tensor]], Answer]


def check_finite(outputs: Sequence[Tensor]) -> None:
    """Raise a NotFinite where an output holds NaN or infinity."""
    # A sum is one pass over the memory and hides neither; it may overflow by itself, so it only acquits.
    for y in outputs:
        if y.is_floating_point() and not math.isfinite(float(y.sum())) and not bool(torch.isfinite(y).all()):
            raise NotFinite


def plain_answer(
    headers: Mapping[str, str], served: Served, *, one: bool, listed: bool = False
) -> Callable[[Sequence[Tensor]], Answer]:
    """Return what answers a request of arrays, images or JSON.

    Args:
        headers: the request's, with names in lower case.
        served: the model.
        one: the request holds one item, whose outputs have no leading dimension.
        listed: the request lists ``instances``, and its answer lists ``predictions``.

    Raises:
        BadRequest: the headers ask for what cannot be given.
    """
    top = _top(headers.get(TOP_HEADER.lower()))
    kind = _accepted(headers.get("accept", ""), served)

    def answer(outputs: Sequence[Tensor]) -> Answer:
        if top:
            rows = best_classes(outputs[0], top, served.labels)
            return Answer(_json({CLASSES_KEY: rows[0] if one else rows}))
        if kind != JSON:
            return Answer(_binary([y[0] if one else y for y in outputs], kind, served), kind)
        if listed:
            return Answer(
                _json({PREDICTIONS_KEY: [_document([y[i] for y in outputs], served) for i in _rows(outputs)]})
            )
        return Answer(_json({OUTPUTS_KEY: _document([y[0] if one else y for y in outputs], served)}))

    return answer


def best_classes(scores: Tensor, count: int, labels: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Return for each row of ``scores`` (N, ...) its largest values, falling, with their places and classes' names."""
    values, places = scores.flatten(1).sort(dim=1, descending=True, stable=True)
    return [
        [
            {"index": place, "value": value, **({"label": labels[place]} if place < len(labels) else {})}
            for value, place in zip(some[:count], where[:count], strict=True)
        ]
        for some, where in zip(values.tolist(), places.tolist(), strict=True)
    ]


def readable(y: Tensor) -> Tensor:
    """Make an output row-major, and float32 instead of bfloat16, which clients with numpy cannot read."""
    return (y.float() if y.dtype is torch.bfloat16 else y).contiguous()


def _rows(outputs: Sequence[Tensor]) -> range:
    return range(len(outputs[0]))


def _document(outputs: Sequence[Tensor], served: Served) -> Any:
    lists = [y.tolist() for y in outputs]
    return dict(zip(served.outputs, lists, strict=True)) if served.names_outputs else lists


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def _binary(outputs: Sequence[Tensor], kind: str, served: Served) -> bytes:
    stream, arrays = io.BytesIO(), [readable(y).numpy() for y in outputs]
    if kind == NPY:
        np.save(stream, arrays[0])
    else:
        np.savez(stream, **dict(zip(served.outputs, arrays, strict=True)))  # type: ignore[arg-type]
    return stream.getvalue()


def _top(text: str | None) -> int:
    if text is None:
        return 0
    if not text.isascii() or not text.isdecimal() or not 0 < len(text) < 7 or int(text) < 1:
        raise BadRequest(f"{TOP_HEADER}: {text[:40]!r}, expected how many classes to name, such as 5")
    return int(text)


def _accepted(accept: str, served: Served) -> str:
    asked = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    kind = next((kind for kind in asked if kind in (JSON, NPY, NPZ)), JSON)
    if kind == NPY and len(served.outputs) > 1:
        raise BadRequest(f"Accept: {NPY} for a network of {len(served.outputs)} outputs, expected Accept: {NPZ}")
    return kind
