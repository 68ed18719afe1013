"""The TorchServe archive: artifact, handler and a copy of the serving code, in one deterministic zip.

It runs on a stock TorchServe with torch, numpy and pillow where this project is not installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redpp_serve.archives import ZIP_ERRORS, check_claims, open_zip, read_entry, read_small
from redpp_serve.errors import RedppError
from redpp_serve.files import deterministic_zip
from redpp_serve.graph.artifact import Artifact, LoadedArtifact, load
from redpp_serve.packaging.bounds import check_runs
from redpp_serve.packaging.templates import render

if TYPE_CHECKING:  # Python 3.10 has it elsewhere
    from importlib.resources.abc import Traversable

ARTIFACT, CONFIG, MANIFEST = "model.redpp", "model-config.yaml", "MAR-INF/MANIFEST.json"
WRITTEN = "an archive that redpp-serve package wrote"
_MOST_MANIFEST = 1 << 20  # bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-.]*")
_MODULES = ("__init__.py", "errors.py", "files.py", "variants.py")
_PACKAGES = ("graph", "engines", "runtime", "handlers", "kernels")
_SUFFIXES = (".py", ".json")  # the code, and the times of known devices that the planner starts from


def build_mar(artifact: Artifact, *, name: str, model_config: str) -> bytes:
    """Return the archive's bytes; equal arguments give equal bytes.

    Args:
        artifact: its description holds the ``version`` in URLs, such as ``1.0``.
        name: the model's name in URLs.
        model_config: text of ``model-config.yaml``, see `server_config.model_config`.

    Raises:
        RedppError: a name or version that TorchServe does not take.
    """
    check_name(name)
    version = artifact.description.get("version")
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version):
        raise RedppError(
            f"an artifact of version {version!r}",
            "numbers with dots, such as 1.0",
            "build the artifact with such a version in its description",
        )
    entries = {
        MANIFEST: json.dumps(manifest_of(name, version), indent=2).encode(),
        ARTIFACT: artifact.data,
        "handler.py": render("handler.py").encode(),
        CONFIG: model_config.encode(),
    }
    return deterministic_zip({**entries, **serving_sources()})


def manifest_of(name: str, version: str) -> dict[str, Any]:
    """Return what an archive says about itself to TorchServe."""
    return {
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


def read_artifact(archive: Path, batch: int = 1) -> LoadedArtifact:
    """Load the artifact in an archive, once its network has proved to run within bounds at a batch size.

    Raises:
        RedppError: no archive of `package`, a damaged one, or a network that `check_runs` refuses.
    """
    artifact = load(artifact_bytes(archive))
    check_runs(artifact.graph, batch)
    return artifact


def artifact_bytes(archive: Path) -> bytes:
    """Return the artifact in an archive as a file.

    Raises:
        RedppError: no archive of `package`, or a damaged one.
    """
    try:
        check_claims(archive)
        with open_zip(archive, WRITTEN) as file:
            return read_entry(file, file.getinfo(ARTIFACT))
    except (*ZIP_ERRORS, KeyError) as error:
        raise unreadable(archive, error) from error


def manifest(archive: Path) -> dict[str, Any]:
    """Return what an archive says about itself to TorchServe.

    Raises:
        RedppError: no archive of `package`, or a damaged one.
    """
    try:
        with open_zip(archive, WRITTEN) as file:
            found = json.loads(read_small(file, MANIFEST, _MOST_MANIFEST))
        if not isinstance(found, dict) or not isinstance(found["model"]["modelVersion"], str):
            raise ValueError(f"{MANIFEST} names no version")
        return found
    except (*ZIP_ERRORS, LookupError, TypeError) as error:
        raise unreadable(archive, error) from error


def unreadable(archive: Path, why: object) -> RedppError:
    """Return the refusal of an archive that is none of `package`, or a damaged one."""
    return RedppError(f"{archive} cannot be read: {why}", WRITTEN, "package the model again, or correct the path")


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
    """Return path in an archive -> bytes, in a fixed order, of all code and data that serving needs."""
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
