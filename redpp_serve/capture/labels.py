"""The names of a network's classes: from a file, a Hugging Face config.json, or a library's own for ImageNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from redpp_serve.errors import RedppError

LIBRARIES = ("torchvision", "timm")
_MOST_BYTES = 16 << 20
_FORMS = (
    'a text file with one name a line, a JSON list of names, a JSON object {"0": name, ...} or a config.json with '
    f"id2label; or {' or '.join(LIBRARIES)} for their 1000 classes of ImageNet"
)


def read_labels(text: str) -> tuple[str, ...]:
    """Read ``--labels``: the name of each class, in the order of the network's scores.

    Raises:
        RedppError: no such file, a file of another form, or a library that is not installed.
    """
    if text in LIBRARIES:
        return _torchvision() if text == "torchvision" else _timm()
    try:
        with Path(text).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        words = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        why = "it is no text" if isinstance(error, UnicodeDecodeError) else error.strerror or "it cannot be read"
        raise _wrong(f"{text!r}, {why}") from error
    if len(data) > _MOST_BYTES:
        raise _wrong(f"{text!r} of more than {_MOST_BYTES} bytes")
    found = _from_json(words, text) if words.lstrip()[:1] in ("[", "{") else words.splitlines()
    labels = tuple(" ".join(label.split()) for label in found)
    if not any(labels):
        raise _wrong(f"{text!r} without a name")
    if wrong := next((label for label in labels if not label.isprintable()), None):
        raise _wrong(f"the name {wrong[:40]!a} in {text!r}, which cannot be printed")
    return labels


def _from_json(words: str, text: str) -> list[str]:
    try:
        document: Any = json.loads(words)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{text!r}, which starts as JSON and is none") from error
    if isinstance(document, dict):
        document = document.get("id2label", document)
    if isinstance(document, dict):
        if set(document) != {str(k) for k in range(len(document))}:
            raise _wrong(f"{text!r} with other keys than 0 to {len(document) - 1}")
        document = [document[str(k)] for k in range(len(document))]
    if not isinstance(document, list):
        raise _wrong(f"{text!r} whose names are no list")
    # torchvision's and Keras's files give a WordNet identifier first: ["n01440764", "tench"].
    names = [one[-1] if isinstance(one, list) and one else one for one in document]
    if not all(isinstance(name, str) for name in names):
        raise _wrong(f"{text!r} with names that are no texts")
    return names


def _torchvision() -> tuple[str, ...]:
    from redpp_serve.capture.arch import import_library  # noqa: PLC0415  with torch

    return tuple(import_library("torchvision").models.ResNet50_Weights.DEFAULT.meta["categories"])


def _timm() -> tuple[str, ...]:
    from redpp_serve.capture.arch import import_library  # noqa: PLC0415  with torch

    info = import_library("timm").data.ImageNetInfo()
    return tuple(info.index_to_description(k) for k in range(info.num_classes()))


def _wrong(found: str) -> RedppError:
    return RedppError(f"--labels is {found}", _FORMS, "correct --labels, or leave it out")
