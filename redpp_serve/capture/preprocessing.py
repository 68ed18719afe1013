"""Decide how images become a network's input: as the user declares, completed by the architecture and the input."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from redpp_serve.capture.preprocess_hints import Declared, read_file
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.graph.sizes import largest
from redpp_serve.handlers.preprocess import BYTES, INTERPOLATIONS, MODES, TO_CORNER, Preprocess

KEYS = (
    *("mode", "mean", "std", "bytes", "fit", "crop_pct", "resize", "interpolation"),
    *("fill", "background", "upright", "height", "width", "multiple"),
)
_GEOMETRY, _VALUES = ("fit", "crop_pct", "resize", "size", "fill", "down", "multiple"), ("mean", "std", "bytes")
_WORDS: dict[str, Declared] = {
    "imagenet": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "fit": "crop", "crop_pct": 0.875},
    "bytes": {"bytes": True},
    "bgr": {"mode": "BGR"},
    **{"crop": {"fit": "crop"}, **{fit: {"fit": fit, "crop_pct": 1.0} for fit in ("squash", "pad")}},
    **{name: {"interpolation": name} for name in INTERPOLATIONS},
}
_NONE = "none"


def read_declared(text: str) -> Declared | None:
    """Read ``--preprocess``: words joined by commas, a JSON object of `KEYS`, or a file; None for ``none``.

    Raises:
        RedppError: none of these.
    """
    if text.lstrip().startswith("{"):
        return _json(text)
    words = text.lower().split(",")
    if words == [_NONE]:
        return None
    if all(word in _WORDS for word in words):
        return {key: value for word in words for key, value in _WORDS[word].items()}
    if Path(text).is_file():
        return read_file(Path(text))
    raise RedppError(
        f"--preprocess is {text}",
        f"words joined by commas ({', '.join(_WORDS)}; or none), a JSON object, or a preprocessor_config.json",
        'correct it, e.g. --preprocess imagenet or --preprocess \'{"mean": [0.5], "std": [0.5]}\'',
    )


def choose_preprocess(
    text: str | None, hints: Declared | None, inputs: Sequence[InputSpec]
) -> tuple[Preprocess | None, list[str]]:
    """Return how pictures become the network's input, None where they do not, and lines for the user.

    Args:
        text: what the user gave; it replaces what it names of the hints: geometry, values, interpolation.
        hints: what the architecture declares, see `preprocess_hints`.
        inputs: the network's.

    Raises:
        RedppError: the user's declaration cannot be applied to the input.
    """
    given = read_declared(text) if text is not None else None
    if text is not None and given is None:
        return None, []
    if given is not None:
        kept = {key: value for key, value in (hints or {}).items() if not _replaced(key, given)}
        return _complete({"fit": "crop", **kept, **given}, _only(inputs)), []
    if len(inputs) != 1 or _layout(inputs[0]) not in ("CHW", "HWC"):
        return None, []
    (spec,) = inputs
    if spec.dtype == "uint8":
        hints = {**{key: value for key, value in (hints or {}).items() if key not in _VALUES}, "bytes": True}
    if hints is not None and (unheld := _unheld(hints, spec)):
        return None, [f"images are refused: the processor's {unheld[0]}; {unheld[1]}"]
    small = hints is not None and min(_sides(spec)) < min(hints.get("size", (0,))) / 2
    if hints is None or (small and hints.get("fit") not in TO_CORNER):
        return None, []  # a network for small pictures of its own, such as CIFAR's
    try:
        found = _complete({"fit": "crop", **hints}, spec)
    except RedppError:
        return None, ["the preprocessing that the architecture declares is for other channels: images are refused"]
    return found, [f"images are {found.in_words()}, as the architecture declares; --preprocess changes that"]


def _replaced(key: str, given: Declared) -> bool:
    """Return whether what the user gave replaces a hint."""
    together = next((group for group in (_GEOMETRY, _VALUES) if key in group), (key,))
    return any(name in given for name in together)


def _complete(declared: Declared, spec: InputSpec) -> Preprocess:
    layout = _layout(spec)
    if not layout or spec.dtype == "bool":
        raise RedppError(
            f"--preprocess for an input of shape {spec.shape} and dtype {spec.dtype}",
            "one image input: 1 or 3 channels before or after height and width",
            "leave out --preprocess",
        )
    if unheld := _unheld(declared, spec):
        raise RedppError(f"--preprocess for {unheld[0]}", "an input that holds them", unheld[1])
    height, width = _sides(spec)
    channels = 1 if layout == "HW" else spec.shape[layout.index("C")]
    try:
        mean, std = _values(declared, spec)
        document = {
            "mode": declared.get("mode", "L" if channels == 1 else "RGB"),
            "height": declared.get("height", height),
            "width": declared.get("width", width),
            "mean": _each(mean, channels),
            "std": _each(std, channels),
            "fit": declared["fit"],
            "resize": _resize(declared, height, width),
            "interpolation": declared.get("interpolation", "bilinear"),
            "fill": _each(declared.get("fill", 0), 1),
            "background": _each(declared["background"], 3) if declared.get("background") is not None else None,
            "upright": declared.get("upright", True),
            "layout": layout,
            "down": declared.get("down", False),
            "multiple": declared.get("multiple", 1),
        }
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RedppError(
            f"--preprocess gives a preprocessing that makes no sense: {error}",
            "numbers, or lists with one number for each channel",
            "correct it",
        ) from error
    return Preprocess.from_json(document)


def _unheld(declared: Declared, spec: InputSpec) -> tuple[str, str] | None:
    """Say which pictures an input does not hold that are put into its corner, and what to do; None where it does."""
    fit, multiple = declared.get("fit"), int(declared.get("multiple", 1))
    shape, at = largest(spec), _layout(spec).index("H")
    if fit == "mirror" and any(shape[axis] % multiple for axis in (at, at + 1)):
        what = f"pictures that are filled up to multiples of {multiple}, and an input of {'x'.join(map(str, shape))}"
        return what, f"package it for sides that are multiples of {multiple}"
    if fit not in ("edges", "longest") or declared.get("resize") is None:
        return None
    longest = _each(declared["resize"], 2)[1] // multiple * multiple
    if min(shape[at : at + 2]) >= longest:
        return None
    wanted = [longest if axis in (at, at + 1) else size for axis, size in enumerate(shape)]
    what = f"pictures of up to {longest} pixels on each side, and an input of {'x'.join(map(str, shape))}"
    return what, f"package it with --input {'x'.join(map(str, wanted))}, or for sizes that vary up to that"


def _values(declared: Declared, spec: InputSpec) -> tuple[Any, Any]:
    """Return mean and std as declared; a network that reads integers takes bytes as they are."""
    integer = not getattr(torch, spec.dtype).is_floating_point
    named = [key for key in ("mean", "std") if key in declared]
    values = declared.get("mean", 0.0), declared.get("std", 1.0)
    if declared.get("bytes") and named:
        raise RedppError(
            f"--preprocess with bytes and {named[0]}",
            "bytes as they are, or normalised",
            f"leave out bytes or {named[0]}",
        )
    plain = [set(_each(value, 1)) for value in values] == [{0.0}, {1.0}]
    if integer and not plain:
        raise RedppError(
            f"--preprocess normalises images, and input {spec.name} reads {spec.dtype}",
            "bytes as they are, 0 to 255, for a network that normalises by itself",
            "give --preprocess bytes",
        )
    return (0.0, BYTES) if integer or declared.get("bytes") else values


def _resize(declared: Declared, height: int, width: int) -> list[int] | None:
    """Return (height, width) to resize to: as declared for this size, or in the same proportion to it."""
    if declared["fit"] == "mirror":
        return None
    if declared.get("resize") is not None:
        tall, wide = _each(declared["resize"], 2)
        if declared["fit"] in TO_CORNER:
            return [tall, wide]
        own_height, own_width = declared.get("size", (height, width))
        if (own_height, own_width) == (height, width):
            return [tall, wide]
        return [math.floor(tall * height / own_height), math.floor(wide * width / own_width)]
    share = float(declared.get("crop_pct", 1.0))
    if not 0.0 < share <= 1.0:
        raise ValueError(f"crop_pct {share:g} is not above 0 and at most 1")
    return [math.floor(height / share), math.floor(width / share)] if share < 1.0 else None


def _each(value: Any, count: int) -> list[Any]:
    """Return a list; one number serves every place."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise TypeError(f"{value!r} is no number")
    return values * count if len(values) == 1 else values


def _layout(spec: InputSpec) -> str:
    """Return the order of the dimensions of an image input, empty for another input."""
    shape, channels = spec.shape, set(MODES.values())
    if len(shape) == 3 and shape[0] in channels:
        return "CHW"
    if len(shape) == 3 and shape[2] in channels:
        return "HWC"
    return "HW" if len(shape) == 2 else ""


def _sides(spec: InputSpec) -> tuple[int, int]:
    at = _layout(spec).index("H")
    return spec.shape[at], spec.shape[at + 1]


def _only(inputs: Sequence[InputSpec]) -> InputSpec:
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise RedppError(f"--preprocess for a network with inputs {names}", "one image input", "leave out --preprocess")
    return inputs[0]


def _json(text: str) -> Declared:
    do = 'quote it: --preprocess \'{"mean": [0.5], "std": [0.5]}\''
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RedppError(f"--preprocess is no JSON: {error}", "a JSON object", do) from error
    if unknown := [key for key in found if key not in KEYS]:
        raise RedppError(f"--preprocess with the key {unknown[0]!r}", f"keys of {', '.join(KEYS)}", "correct it")
    return dict(found)
