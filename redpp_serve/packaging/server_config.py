"""TorchServe's configuration files: loopback only, no models over the API, quiet logs."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from redpp_serve.errors import RedppError
from redpp_serve.loopback import Ports
from redpp_serve.options import Serving
from redpp_serve.packaging.templates import render

CONFIG = "config.properties"
MAX_REQUEST_BYTES = 16 << 20  # an input of 3 x 1024 x 1024 float32 fits
_MOST_BYTES = 2**31 - 1  # of TorchServe's requests and replies
_REST = 65536  # of a body, beside its numbers: names, shapes, an id
_HEAP_MB = 512
_LONGEST = {"bool": False, "uint8": 255, **{f"int{bits}": -(1 << bits - 1) for bits in (8, 16, 32, 64)}}
_ITEM_BYTES = {"bool": 1, "bfloat16": 4}  # in an array, where the type's name does not tell; NumPy has no bfloat16
Tensors: TypeAlias = "Iterable[tuple[tuple[int, ...], str]]"  # shape without the batch, and the name of the type


@dataclass(frozen=True)
class Limits:
    """What TorchServe takes and gives at most, bytes: far less than it could is a defence, too."""

    request: int = MAX_REQUEST_BYTES
    response: int = MAX_REQUEST_BYTES

    @property
    def heap_mb(self) -> int:
        """Memory of the Java process, MB: it holds a few copies of what passes through."""
        return _HEAP_MB + 4 * (self.request + self.response - 2 * MAX_REQUEST_BYTES >> 20)


def limits_for(inputs: Tensors, outputs: Tensors, batch: int = 1) -> Limits:
    """Return limits in which fit one item as JSON, a batch of them as arrays, and 16 MB in any case.

    Args:
        inputs: those of one item, at their largest sizes.
        outputs: the answer to it.
        batch: items that the server takes together.

    Raises:
        RedppError: TorchServe could not serve one item.
    """
    return Limits(_limit("inputs", inputs, batch), _limit("outputs", outputs, batch))


def _limit(what: str, tensors: Tensors, batch: int) -> int:
    tensors = list(tensors)
    text = _REST + sum(most_json_bytes(shape, dtype) for shape, dtype in tensors)
    if text > _MOST_BYTES:
        raise RedppError(
            f"{what} of {sum(math.prod(shape) for shape, _ in tensors)} numbers take {text} bytes of JSON",
            f"at most {_MOST_BYTES} bytes, which is TorchServe's limit",
            "give smaller sizes in --input, or let the network shrink its outputs",
        )
    arrays = _REST + batch * sum(math.prod(shape) * _item_bytes(dtype) for shape, dtype in tensors)
    return max(MAX_REQUEST_BYTES, text, min(arrays, _MOST_BYTES))


def most_json_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the most bytes that a tensor has as nested lists in JSON, with Python's own separators.

    Clients may write more digits than a type of floating point has, so any such number counts as the longest double.
    """
    size = len(json.dumps(_LONGEST.get(dtype, -sys.float_info.min)))
    for length in reversed(shape):
        size = length * (size + len(", ")) - len(", ") + len("[]")
    return size


def _item_bytes(dtype: str) -> int:
    return _ITEM_BYTES.get(dtype) or int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8


def read_limits(folder: Path) -> Limits:
    """Return the limits of a packaged folder; those of earlier releases where it names none."""
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = dict(re.findall(r"^max_(request|response)_size=([0-9]{1,10})$", text, re.MULTILINE))
    return Limits(**{key: min(_MOST_BYTES, max(MAX_REQUEST_BYTES, int(value))) for key, value in found.items()})


# Workers print to MODEL_LOG at INFO whatever the level in Python, tracebacks included; so the line for each request
# is dropped by pattern, and so is a warning that the archive leaves the number of workers to config.properties.
LOG4J2 = render("log4j2.xml")


def config_properties(
    ports: Ports = Ports(), *, workers: int = 1, token_minutes: int = 60, limits: Limits = Limits()
) -> str:
    """Return ``config.properties``. It holds no paths, so it works beside the archives on any machine.

    Args:
        ports: where the server listens on the loopback address.
        workers: worker processes for each version.
        token_minutes: minutes until the tokens that the server writes to ``key_file.json`` expire.
        limits: what it takes and gives at most.
    """
    return render(CONFIG, **asdict(ports), workers=workers, token_minutes=token_minutes, limits=limits)


def model_config(serving: Serving) -> str:
    """Return ``model-config.yaml`` of an archive: batching, and each worker's threads, precision and engine.

    The number of workers is left to ``config.properties``: it belongs to the machine, and a number here would win.
    Workers that start together choose their kernels one after the other, hence the long start-up time.
    """
    return render("model-config.yaml", **asdict(serving))
