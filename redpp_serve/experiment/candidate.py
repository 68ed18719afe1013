"""The pruned version of one package against the original of another: a folder of links that a server takes for one."""

from __future__ import annotations

import zipfile
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.packaging.mar import ARTIFACT
from redpp_serve.runtime.artifact import load
from redpp_serve.runtime.graph import InputSpec
from redpp_serve.serving.folder import model_name


def mixed_folder(original: Path, candidate: Path, into: Path) -> Path:
    """``into``, a new folder with the original of the first package and the pruned version of the second.

    Raises:
        RedppError: one is no package, or their networks take different inputs.
    """
    name, other = model_name(original), model_name(candidate)
    ours, theirs = _inputs(original / "original.mar"), _inputs(candidate / "redpp.mar")
    if ours != theirs:
        raise RedppError(
            f"{original} takes {_words(ours)}, and {candidate} takes {_words(theirs)}",
            "two packages whose inputs have the same names, shapes and types, or no user's request suits both",
            "package the candidate from a network with the same inputs",
        )
    into.mkdir()
    for path in original.iterdir():
        if path.name not in ("redpp.mar", "triton"):
            (into / path.name).symlink_to(path.resolve())
    (into / "redpp.mar").symlink_to((candidate / "redpp.mar").resolve())
    if (original / "triton").is_dir() and (candidate / "triton").is_dir():
        model = into / "triton" / name
        model.mkdir(parents=True)
        for part, source in (("config.pbtxt", original / "triton" / name), ("1", original / "triton" / name),
                             ("2", candidate / "triton" / other)):  # fmt: skip
            (model / part).symlink_to((source / part).resolve())
    return into


def _inputs(archive: Path) -> tuple[InputSpec, ...]:
    try:
        with zipfile.ZipFile(archive) as file:
            return load(file.read(ARTIFACT)).graph.inputs
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise RedppError(f"{archive} cannot be read: {error}", "an archive that redpp-serve package wrote",
                         "package the model again, or correct the path") from error  # fmt: skip


def _words(inputs: tuple[InputSpec, ...]) -> str:
    return ", ".join(f"{i.name} {'x'.join(map(str, i.shape)) or 'of one number'} {i.dtype}" for i in inputs)
