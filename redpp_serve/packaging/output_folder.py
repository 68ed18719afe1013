"""A packaged folder appears whole or not at all, and replaces nothing but an earlier one."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from redpp_serve import __version__
from redpp_serve.capture import Captured
from redpp_serve.errors import RedppError
from redpp_serve.packaging.samples import INPUTS
from redpp_serve.pruning.checkpoint import fingerprint, frontier_of
from redpp_serve.pruning.inputs import Sources
from redpp_serve.report.folder import PAGE, REPORT, read_report
from redpp_serve.state_folders import left_scratch, scratch_folder
from redpp_serve.variants import VARIANTS

_OURS = {
    *(f"{name}.mar" for variant in VARIANTS for name in (variant.name, variant.former_name)),
    "config.properties",
    "log4j2.xml",
    "model-config.yaml",
    "README.md",
    INPUTS,
    "sample.npy",
    "sample.npz",
    "triton",
    REPORT,
    PAGE,
    "key_file.json",  # TorchServe writes this and the logs where it is started
    "logs",
}
_ORIGIN = "made_from"  # in a report's source, see `with_origin`


def checkpoint_of(out: Path) -> Path:
    """Return the file beside a package's folder that keeps the synthetic inputs of a run."""
    return out.parent / f".{out.name}.inputs.safetensors"


def frontier_files(out: Path) -> list[Path]:
    """Return the files that may hold the frontier of the last run for a package's folder, the latest kind first."""
    return [frontier_of(checkpoint_of(out)), out / REPORT]


def check_out(out: Path) -> None:
    """Refuse to replace anything but an earlier package and what TorchServe writes when it is started in one.

    Raises:
        RedppError: names what would be lost; or the system takes no such path.
    """
    try:
        if not out.exists() and not out.is_symlink():
            return
    except OSError as error:
        do = "choose another folder with --out"
        raise RedppError(f"{out} cannot be written: {error.strerror}", "a path that the system takes", do) from error
    try:
        entries = sorted(path.name for path in out.iterdir())
        ours = not entries or read_report(out).tool.name == "redpp-serve"
    except (OSError, RedppError):
        entries, ours = [], False
    foreign = [name for name in entries if name not in _OURS]
    if not ours or foreign:
        lost = f"holds {', '.join(foreign[:5])}, which" if ours else "exists and"
        raise RedppError(
            f"{out} {lost} was not written by this tool",
            "a new or empty folder, or an earlier package",
            "choose another folder with --out, or move away what is there",
        )


def with_origin(captured: Captured, sources: Sources, files: Iterable[Path | None], *rest: object) -> Captured:
    """Add to the source of a captured network a digest of all that decides its package, see `already_made`.

    Args:
        captured: the network.
        sources: real inputs, and widths of an earlier run.
        files: those whose bytes count: verification data, moments.
        rest: options, and how the network is called and served, whose ``repr`` says what they are.

    Raises:
        OSError: a file cannot be read.
    """
    graph = captured.graph
    named = (sorted(graph.buffers or ()), graph.output_names, sorted(graph.classes or ()), graph.classes is None)
    bytes_of = [path and hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    releases = (__version__, metadata.version("torch"))
    key = fingerprint([graph], sources.inputs, named, sources.widths, bytes_of, releases, rest)
    return replace(captured, source={**captured.source, _ORIGIN: key})


def already_made(out: Path, captured: Captured) -> bool:
    """Return True if a folder holds the package of a network `with_origin`, and False if there is nothing.

    Raises:
        RedppError: it holds another package.
    """
    if not out.exists() or not any(out.iterdir()):
        return False
    if read_report(out).source.get(_ORIGIN) != captured.source[_ORIGIN]:
        raise RedppError(
            f"{out} holds the package of another network, other options or another release",
            "with --once, a new folder or what this very command has written",
            "choose a new folder with --out, or leave --once out to replace what is there",
        )
    return True


@contextmanager
def all_or_nothing(out: Path, checkpoint: Path | None) -> Iterator[None]:
    """Clean up after the run that the body is.

    Only an interrupted run leaves its checkpoints, for the next one to go on from; a failed one does not even leave an
    empty folder.

    Raises:
        RedppError: in place of an OSError.
    """
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


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out``, which takes its place when the body ends without an exception.

    A package that a killed run had put aside comes back first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.redpp-"
    for left in left_scratch(out.parent, prefix):
        if (left / "old").exists() and not out.exists():
            os.replace(left / "old", out)
        shutil.rmtree(left, ignore_errors=True)
    with scratch_folder(out.parent, prefix) as scratch:
        new, aside = scratch / "new", scratch / "old"
        new.mkdir(mode=0o755)
        yield new
        try:
            if out.exists():
                os.replace(out, aside)
            os.replace(new, out)
        except BaseException:  # also Ctrl-C between the two
            if aside.exists() and not out.exists():
                os.replace(aside, out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write path -> content below a folder; folders that are missing are made."""
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _forget(checkpoint: Path | None) -> None:
    if checkpoint is None:
        return
    for suffix in ("", ".distil", ".tune"):
        with suppress(OSError):  # where it could not be written it cannot be removed either
            checkpoint.with_name(f"{checkpoint.name}{suffix}").unlink(missing_ok=True)
