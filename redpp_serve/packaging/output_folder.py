"""A packaged folder appears whole or not at all, and replaces nothing but an earlier one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.variants import VARIANTS

_WRITTEN = {
    *(f"{name}.mar" for variant in VARIANTS for name in (variant.name, variant.former_name)),
    "config.properties",
    "log4j2.xml",
    "model-config.yaml",
    "README.md",
    "inputs.npz",
    "sample.npy",
    "sample.npz",
    "triton",
    "report.json",
    "report.html",
    "key_file.json",
    "logs",  # the last two by TorchServe
}


def check_out(out: Path) -> None:
    """Refuse to replace anything but an earlier package and what TorchServe writes when it is started in one.

    Raises:
        RedppError: names what would be lost.
    """
    if not out.exists() and not out.is_symlink():
        return
    try:
        entries = sorted(path.name for path in out.iterdir())
        ours = (
            not entries
            or json.loads((out / "report.json").read_text(encoding="utf-8"))["tool"]["name"] == "redpp-serve"
        )
    except (OSError, ValueError, KeyError, TypeError):
        entries, ours = [], False
    foreign = [name for name in entries if name not in _WRITTEN]
    if not ours or foreign:
        lost = f"holds {', '.join(foreign[:5])}, which" if ours else "exists and"
        raise RedppError(
            f"{out} {lost} was not written by this tool",
            "a new or empty folder, or an earlier package",
            "choose another folder with --out, or move away what is there",
        )


@contextmanager
def all_or_nothing(out: Path, checkpoint: Path | None) -> Iterator[None]:
    """Only an interrupted run leaves its inputs behind, for the next one; a failed one not even an empty folder."""
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        yield
    except Exception as error:
        _forget(checkpoint)
        for folder in filter(Path.is_dir, made):
            if not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise RedppError(
                f"{out} cannot be written: {error}",
                "a folder with enough free space and write permission",
                "free some space or choose another folder with --out",
            ) from error
        raise
    _forget(checkpoint)


def replace(new: Path, out: Path, aside: Path) -> None:
    """Move the new folder to ``out``; what is there goes to ``aside``, and comes back if that fails."""
    try:
        if out.exists():
            os.replace(out, aside)
        os.replace(new, out)
    except BaseException:  # also Ctrl-C between the two
        if aside.exists() and not out.exists():
            os.replace(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _forget(checkpoint: Path | None) -> None:
    for path in (
        (checkpoint, *(checkpoint.with_name(f"{checkpoint.name}.{x}") for x in ("distil", "tune")))
        if checkpoint
        else ()
    ):
        with suppress(OSError):  # where it could not be written it cannot be removed either
            path.unlink(missing_ok=True)
