"""Loading a network from a file, the only place that does. Nothing in a file runs unless the user trusts that file."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from redpp_serve.archives import CHUNK, check_claims, check_memory, damaged_entry, open_zip
from redpp_serve.capture.arch import not_installed, prepare_torchvision
from redpp_serve.capture.contents import dense, plain, unwrap
from redpp_serve.capture.foreign_weights import refuse_libraries
from redpp_serve.capture.onnx_reader import read_onnx
from redpp_serve.capture.safetensors_file import read_safetensors
from redpp_serve.capture.shards import read_index, refuse_single_shard, weights_in
from redpp_serve.capture.sniff import FileKind, first_line, is_zip, refusal, scan, shorten, sniff
from redpp_serve.errors import RedppError

MAPPED_BYTES = 1 << 30
_PART = 1 << 24  # numbers that are checked at once


@dataclass(frozen=True)
class Loaded:
    """What a file held: exactly one of ``state_dict``, ``module`` and ``exported`` is not None.

    Attributes:
        kind: the kind of file.
        sha256: digest of the file's bytes.
        state_dict: dense, finite tensors on the CPU, which may be memory-mapped from the file.
        module: a module with such tensors.
        exported: a program with such tensors.
        messages: lines for the user about what was chosen, renamed or left out.
    """

    kind: FileKind
    sha256: str
    state_dict: dict[str, Tensor] | None = None
    module: nn.Module | None = None
    exported: torch.export.ExportedProgram | None = None
    messages: list[str] = field(default_factory=list)


def load_file(path: Path, *, trust: bool, key: str | None = None) -> Loaded:
    """Load a state_dict, a module or an exported program, told apart by the file's bytes.

    Args:
        path: the file, an index of several files, or a folder with either.
        trust: the user vouches for the file (``--trust-file``), so formats that run code on load are accepted. A
            state_dict is loaded by the safe reader either way.
        key: what to take of a checkpoint that holds several networks: a key, with dots for one inside another, or a
            prefix of names.

    Raises:
        RedppError: not a kind that holds a network, a kind that needs trust, damaged or hostile bytes, weights that
            are not finite, nothing under ``key``.
    """
    path = weights_in(path)
    refuse_single_shard(path)
    kind = sniff(path)
    return _load_shards(path, key) if kind is FileKind.INDEX else _load_whole(path, kind, trust, key)


def _load_shards(path: Path, key: str | None) -> Loaded:
    """Load the files of an index, which hold weights only, and put their tensors together."""
    tensors: dict[str, Tensor] = {}
    digest, files = hashlib.sha256(path.read_bytes()), read_index(path)
    check_memory(path, sum(file.stat().st_size for file in files))
    for file, names in files.items():
        kind = sniff(file)
        if kind is FileKind.INDEX:
            raise RedppError(f"{path} names {file.name}, an index too", "files of weights", "fetch the folder again")
        part = _load_whole(file, kind, False, None)
        held = part.state_dict or {}
        if missing := [name for name in names if name not in held]:
            found = f"{file} lacks tensors that {path} says it holds: {shorten(missing)}"
            raise RedppError(found, "the files of one network", "fetch the folder again")
        tensors.update({name: held[name] for name in names})
        digest.update(part.sha256.encode())
    messages = [f"took {len(tensors)} tensors from {len(files)} files"]
    state = unwrap(path, tensors, key, messages)
    return Loaded(FileKind.INDEX, digest.hexdigest(), state_dict=state, messages=messages)


def _load_whole(path: Path, kind: FileKind, trust: bool, key: str | None) -> Loaded:
    if not kind.loadable:
        raise refusal(path, kind)
    if kind.runs_code and not trust:
        raise _untrusted(path, kind)
    before = _stored(path)
    if is_zip(path):
        _check_sums(path)
    content = _read(path, kind, _READERS[kind](path))
    digest = _sha256(path)
    if _stored(path) != before:
        raise RedppError(f"{path} changed while it was read", "a file that nobody writes to", "try again, or copy it")
    messages: list[str] = []
    content = unwrap(path, plain(content), key, messages)
    if isinstance(content, Mapping):
        content = dense(path, content)
        _check_finite(path, content)
        return Loaded(kind, digest, state_dict=content, messages=messages)
    if isinstance(content, nn.Module):
        _check_finite(path, {**dict(content.named_parameters()), **dict(content.named_buffers())})
        return Loaded(kind, digest, module=content, messages=messages)
    _check_finite(path, dict(content.state_dict))
    return Loaded(kind, digest, exported=content, messages=messages)


def _safely(path: Path) -> Callable[[], Any]:
    """Make a reader that accepts tensors and containers only; it maps large storages that are not compressed."""
    mmap = False
    if is_zip(path) and _mapped(path):
        with open_zip(path) as archive:
            mmap = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    return lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _mapped(path: Path) -> bool:
    """Return whether a file is large enough to be mapped; a process that maps a file dies when someone cuts it."""
    return path.stat().st_size > MAPPED_BYTES


def _trusting(path: Path) -> Callable[[], Any]:
    prepare_torchvision()  # the file's classes may import it
    return lambda: torch.load(path, map_location="cpu", weights_only=False)


_READERS: dict[FileKind, Callable[[Path], Callable[[], Any]]] = {
    FileKind.STATE_DICT: _safely,
    FileKind.LEGACY_STATE_DICT: _safely,
    FileKind.SAFETENSORS: lambda path: lambda: read_safetensors(path, mapped=_mapped(path)),
    FileKind.MODULE: _trusting,
    FileKind.OBJECTS: _trusting,
    FileKind.TORCHSCRIPT: lambda path: lambda: torch.jit.load(path, map_location="cpu"),
    FileKind.EXPORTED: lambda path: lambda: torch.export.load(path),
    FileKind.ONNX: lambda path: lambda: read_onnx(path),
}


def _read(path: Path, kind: FileKind, reader: Callable[[], Any]) -> Any:
    """Call a reader; turn whatever goes wrong into a refusal, for its exceptions have no common class."""
    try:
        with warnings.catch_warnings():  # torch's notes to whoever wrote the file, such as that TorchScript ends
            warnings.simplefilter("ignore")
            return reader()
    except RedppError:
        raise
    except ModuleNotFoundError as error:
        raise not_installed(error, f"{path}, a {kind.value},") from error
    except (Exception, SystemExit) as error:
        if kind.runs_code and isinstance(error, (ImportError, AttributeError)):
            found = f"{path} is a {kind.value} whose code is not importable here: {first_line(error)}"
            do = "put the folder of that code on PYTHONPATH, or save model.state_dict() where it works and give --arch"
            raise RedppError(found, "a module whose classes can be imported", do) from error
        found = f"{path} is a {kind.value} that cannot be read: {first_line(error)}"
        do = "fetch or save the file again; if it is whole, save model.state_dict() with this version of torch"
        raise RedppError(found, "a whole file", do) from error


def _untrusted(path: Path, kind: FileKind) -> RedppError:
    if kind in (FileKind.MODULE, FileKind.OBJECTS):
        refuse_libraries(scan(path).unsafe)
        why = f"naming {shorten(scan(path).unsafe)}, and runs that code when loaded"
    else:
        why = "a format that runs code of the file's choice when loaded"
    do = "save model.state_dict() and give --arch; or, if you trust whoever made this file, add --trust-file"
    return RedppError(f"{path} is a {kind.value}, {why}", "a state_dict, which runs no code", do)


def _stored(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written to, once `check_claims` has let it pass."""
    check_claims(path)
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_sums(path: Path) -> None:
    """Compare every entry with its checksum: torch does not, so damaged weights would load as numbers."""
    if name := damaged_entry(path):
        raise RedppError(f"{path} is damaged at {shorten([name])}", "a whole file", "fetch or save it again")


def _check_finite(path: Path, tensors: Mapping[str, Any]) -> None:
    there = {name: x for name, x in tensors.items() if isinstance(x, Tensor) and not is_lazy(x)}
    bad = [name for name, tensor in there.items() if not _is_finite(tensor.detach())]
    if bad:
        found = f"{path} holds NaN or infinite numbers in {len(bad)} of {len(tensors)} tensors: {shorten(bad)}"
        raise RedppError(found, "finite weights", "use an earlier checkpoint: training diverged or the file is damaged")


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
        return True
    parts = tensor.reshape(-1).split(_PART) if tensor.is_contiguous() else (tensor,)
    if all(bool(torch.isfinite(_readable(part)).all()) for part in parts):
        return True
    return not tensor.is_complex() and _is_mask(_readable(tensor))


def _readable(tensor: Tensor) -> Tensor:
    """Return 8-bit floating-point numbers as float32: isfinite lacks most of their types."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _is_mask(tensor: Tensor) -> bool:
    """Return whether a tensor is an additive attention mask, which holds 0 and -inf and is whole."""
    kept = tensor == 0
    return bool(kept.any()) and bool((kept | (tensor == -torch.inf)).all())
