"""The TorchServe archive: artifact, handler and a copy of the serving code, in one deterministic zip.

Self-contained: it runs on a stock TorchServe with torch, numpy and pillow where this project is not installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING

from redpp_serve.errors import RedppError
from redpp_serve.files import deterministic_zip
from redpp_serve.graph.artifact import load

if TYPE_CHECKING:  # Python 3.10 has it elsewhere
    from importlib.resources.abc import Traversable

ARTIFACT, CONFIG = "model.redpp", "model-config.yaml"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")
_MODULES = ("__init__.py", "errors.py", "files.py", "variants.py")
_PACKAGES = ("graph", "runtime", "handlers", "kernels")
_SUFFIXES = (".py", ".json")  # the code, and the times of known devices that the planner starts from

_HANDLER = '''"""Entry point of this archive. Its own copy of the code comes first: the archive is what was tested."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from redpp_serve.handlers.torchserve import RedppHandler  # noqa: E402


class Service(RedppHandler):
    """TorchServe takes the one class that is defined here."""
'''


def build_mar(artifact: bytes, *, name: str, version: str, model_config: str) -> bytes:
    """The archive's bytes; equal arguments give equal bytes.

    Args:
        artifact: what `runtime.artifact.build` returned; its description holds the same ``version``.
        name: the model's name in URLs.
        version: the version in URLs, such as ``1.0``.
        model_config: text of ``model-config.yaml``, see `server_config.model_config`.

    Raises:
        RedppError: a name or version that TorchServe does not take, or another version in the artifact.
    """
    check_name(name)
    described = load(artifact).description.get("version")
    if described != version or not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version):
        raise RedppError(
            f"version {version!r} for an artifact that says {described!r}",
            "numbers with dots, such as 1.0, the same in both",
            "build the artifact with this version in its description",
        )
    manifest = {
        "createdOn": "01/01/1980 00:00:00",
        "runtime": "python",
        "model": {
            "modelName": name,
            "modelVersion": version,
            "serializedFile": ARTIFACT,
            "handler": "handler.py",
            "configFile": CONFIG,
        },
        "archiverVersion": "0.12.0",
    }
    entries = {
        "MAR-INF/MANIFEST.json": json.dumps(manifest, indent=2).encode(),
        ARTIFACT: artifact,
        "handler.py": _HANDLER.encode(),
        CONFIG: model_config.encode(),
    }
    return deterministic_zip({**entries, **serving_sources()})


def check_name(name: str) -> None:
    """Refuse a model name that TorchServe refuses, or that would leave its folder or shell word.

    Raises:
        RedppError: the name does not match.
    """
    if not _NAME.fullmatch(name):
        raise RedppError(
            f"the model name {name!r}",
            "a letter or digit, then letters, digits, '_', '-' or '.'",
            "choose another name with --name",
        )


def serving_sources() -> dict[str, bytes]:
    """Path in an archive to bytes, for all code and data that serving needs, in a fixed order."""
    root = files("redpp_serve")
    sources = {f"redpp_serve/{module}": root.joinpath(module).read_bytes() for module in _MODULES}
    for package in _PACKAGES:
        sources.update(_serving_files(files(f"redpp_serve.{package}"), f"redpp_serve/{package}"))
    return sources


def _serving_files(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            yield from _serving_files(entry, f"{path}/{entry.name}")
        elif entry.name.endswith(_SUFFIXES):
            yield f"{path}/{entry.name}", entry.read_bytes()
