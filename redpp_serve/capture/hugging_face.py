"""Networks of transformers, built from the config.json beside their weights, without a look at the network.

The configuration comes from the author of the weights: its size, what it makes and how much of it are bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from redpp_serve.capture.sniff import shorten
from redpp_serve.errors import RedppError

CONFIG = "config.json"
_MAX_CONFIG = 4 << 20  # bytes
_LARGEST = 10**8  # of a whole number in a configuration, but for constants of rotary positions
_MAX_PARAMETERS = 100_000
_ROOM = 8  # times the bytes of the files there; packed weights take a bit each at least
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def go_offline() -> None:
    """Keep Hugging Face's libraries from the network; they look at these variables when they are imported."""
    os.environ.update(_OFFLINE)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in a folder; an empty one where there is none.

    Raises:
        RedppError: it is no JSON object, or far larger than one, or holds numbers beyond any network's.
    """
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError("too large")
        config = json.loads(path.read_bytes())
        large = [key for key, value in _numbers(config) if abs(value) > _LARGEST and "theta" not in key]
    except (ValueError, RecursionError):
        config, large = None, []
    if not isinstance(config, dict) or large:
        found = f"{path} {f'has numbers beyond any network: {shorten(large)}' if large else 'is no JSON object'}"
        raise RedppError(found, "the configuration that was saved with the weights", "fetch it again")
    return config


def suggested_arch(folder: Path) -> str | None:
    """Return the ``--arch`` that the configuration beside weights names, if it names one; safe to paste in a shell."""
    config = read_config(folder)
    classes, timm = config.get("architectures"), config.get("architecture")
    if isinstance(classes, list) and classes and _is_name(classes[0]):
        return f"transformers:{classes[0]}"
    return f"timm:{timm}" if _is_name(timm) else None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+", value, re.ASCII) is not None


def transformers_factory(transformers: Any, name: str, folder: Path) -> Callable[..., nn.Module]:
    """Return the builder of a class of transformers with random weights.

    Args:
        transformers: the library.
        name: an Auto class or a class of a network.
        folder: where config.json is.

    Raises:
        RedppError: no such class, or no configuration.
    """
    made = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(made, type) or not (hasattr(made, "from_config") or issubclass(made, nn.Module)):
        found = f"transformers has no network that is named {name!r}"
        do = "name an Auto class, such as transformers:AutoModelForImageClassification"
        raise RedppError(found, "a class of transformers", do)
    if not read_config(folder):
        found = f"there is no {CONFIG} in {folder}"
        raise RedppError(found, f"the {CONFIG} that was saved beside the weights", "fetch it into that folder")

    def build(**changes: Any) -> nn.Module:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **changes
        )
        if own := getattr(made, "config_class", None):
            key = getattr(own, "base_config_key", "")
            config = getattr(config, key) if key and not isinstance(config, own) and hasattr(config, key) else config
        with _bounded(sum(path.stat().st_size for path in folder.iterdir() if path.is_file())):
            return made.from_config(config) if hasattr(made, "from_config") else made(config)  # type: ignore[no-any-return]

    return build


def is_part(network: nn.Module, folder: Path) -> bool:
    """Return whether a network of transformers is one of several in the files there, as one of CLIP's encoders is."""
    own, whole = getattr(getattr(network, "config", None), "model_type", ""), read_config(folder).get("model_type")
    return bool(own and whole) and own != whole


def parts_in_words(name: str) -> str | None:
    """Name the classes that hold one encoder each of a network of two, such as CLIPModel; None where there are none."""
    transformers, stem = sys.modules["transformers"], name.removesuffix("Model")
    found = []
    for part in ("Vision", "Text"):
        classes = [f"{stem}{part}Model{ending}" for ending in ("WithProjection", "")]
        found += [each for each in classes if stem != name and isinstance(getattr(transformers, each, None), type)][:1]
    return " or ".join(f"--arch transformers:{each}" for each in found) or None


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}".strip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int):
        yield key, value


@contextlib.contextmanager
def _bounded(stored: int) -> Iterator[None]:
    """Stop a builder whose network would have far more numbers than the files beside it have bytes."""
    numbers, count = 0, 0

    def watch(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        nonlocal numbers, count
        numbers, count = numbers + (parameter.numel() if parameter is not None else 0), count + 1
        if numbers > _ROOM * stored + (1 << 20) or count > _MAX_PARAMETERS:
            found = f"{CONFIG} describes a network of more than {numbers} numbers, and its files have {stored} bytes"
            raise RedppError(found, "the configuration that was saved with the weights", "fetch it again")

    handle = register_module_parameter_registration_hook(watch)
    try:
        yield
    finally:
        handle.remove()
