"""Weights in several files, and folders of them, as Hugging Face's libraries write both.

An index (``*.index.json``) says in its ``weight_map`` which file holds which tensor. Its names come from the author of
the weights, so none may lead out of the folder.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from redpp_serve.capture.sniff import shorten
from redpp_serve.errors import RedppError

MAX_INDEX = 32 << 20  # bytes
MAX_SHARDS = 1000
# Names of weights in a folder, the first that is there counts; safetensors run no code.
_WHOLE = (
    *("model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    *("diffusion_pytorch_model.safetensors.index.json", "open_clip_model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"),
)
_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt2")
_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.(safetensors|bin|pt|pth)")


def weights_in(path: Path) -> Path:
    """Return the file that holds the weights of a folder; the path itself where it is none, or no file stands out."""
    if not os.path.isdir(path):  # which takes any name, also one that is too long
        return path
    for name in _WHOLE:
        if (path / name).is_file():
            return path / name
    files = [inner for inner in sorted(path.iterdir()) if inner.name.endswith((*_ENDINGS, ".index.json"))]
    indices = [inner for inner in files if inner.name.endswith(".index.json")]
    chosen = indices or files
    return chosen[0] if len(chosen) == 1 else path


def refuse_single_shard(path: Path) -> None:
    """Refuse one of the files that weights are divided into.

    Raises:
        RedppError: the file's name says that it is one of several.
    """
    found = _SHARD.fullmatch(path.name)
    if found is None or int(found[2]) < 2:
        return
    index = sorted(path.parent.glob("*.index.json"))
    do = f"give {index[0]}" if len(index) == 1 else "give the *.index.json file beside it, or the folder of both"
    raise RedppError(f"{path} is part {int(found[1])} of {int(found[2])} of a network's weights", "all of them", do)


def read_index(path: Path) -> dict[Path, list[str]]:
    """Return the files of an index, each with the names of its tensors.

    Raises:
        RedppError: no such index, names that lead out of its folder, files that are missing.
    """
    if path.stat().st_size > MAX_INDEX:
        raise _bad(path, f"has {path.stat().st_size} bytes, more than {MAX_INDEX}")
    try:
        content: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise _bad(path, "is no JSON") from None
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise _bad(path, "has no weight_map from names of tensors to names of files")
    files: dict[str, list[str]] = {}
    for name, file in names.items():
        files.setdefault(file, []).append(name)
    if len(files) > MAX_SHARDS:
        raise _bad(path, f"names {len(files)} files, more than {MAX_SHARDS}")
    if out := [file for file in files if re.search(r"[/\\\x00-\x1f]", file) or file in ("", ".", "..")]:
        raise _bad(path, f"names files that lead out of its folder: {shorten(out)}")
    if missing := [file for file in files if not (path.parent / file).is_file()]:
        raise _bad(path, f"names files that are not there: {shorten(missing)}", "fetch them too, into the same folder")
    return {path.parent / file: held for file, held in files.items()}


def _bad(path: Path, found: str, do: str = "fetch the folder again from the author of the weights") -> RedppError:
    return RedppError(f"{path}, the index of weights in several files, {found}", "an index and its files", do)
