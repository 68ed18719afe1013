"""Loading a network from a file, the only place that does. Nothing in a file runs unless the user trusts that file."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from redpp_serve.capture.arch import import_library
from redpp_serve.capture.sniff import (
    BOMB_RATIO,
    BOMB_SLACK,
    ZIP_ERRORS,
    FileKind,
    first_line,
    is_zip,
    open_zip,
    refusal,
    scan,
    shorten,
    sniff,
)
from redpp_serve.errors import RedppError

CHUNK = 1 << 20
# Where training scripts keep the weights inside a checkpoint. Averaged weights come first: they are the ones evaluated.
WRAPPERS = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights"),
)
PREFIXES = ("module.", "_orig_mod.")  # of nn.DataParallel (and DistributedDataParallel), of torch.compile
MAX_NESTING = 3


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


def load_file(path: Path, *, trust: bool) -> Loaded:
    """Load a state_dict, a module or an exported program, told apart by the file's bytes.

    Args:
        path: the file.
        trust: the user vouches for the file (``--trust-file``), so formats that run code on load are accepted. A
            state_dict is loaded by the safe reader either way.

    Raises:
        RedppError: not a kind that holds a network, a kind that needs trust, damaged or hostile bytes, weights that
            are not finite.
    """
    kind = sniff(path)
    if not kind.loadable:
        raise refusal(path, kind)
    if kind.runs_code and not trust:
        raise _untrusted(path, kind)
    digest = _sha256(path)
    if kind is FileKind.SAFETENSORS:
        content: Any = _read(path, kind, lambda: safetensors.torch.load_file(path, device="cpu"))
    else:
        if is_zip(path):
            _check_sums(path)
        content = _read(path, kind, _READERS[kind](path))
    messages: list[str] = []
    content = _unwrap(path, content, messages)
    if isinstance(content, Mapping):
        content = _strip_prefixes(_dense(path, content), messages)
        _check_finite(path, content)
        return Loaded(kind, digest, state_dict=content, messages=messages)
    if isinstance(content, nn.Module):
        _check_finite(path, {**dict(content.named_parameters()), **dict(content.named_buffers())})
        return Loaded(kind, digest, module=content, messages=messages)
    _check_finite(path, dict(content.state_dict))
    return Loaded(kind, digest, exported=content, messages=messages)


def _safely(path: Path) -> Callable[[], Any]:
    """Make a reader that accepts tensors and containers only; it memory-maps storages that are not compressed."""
    mmap = False
    if is_zip(path):
        with open_zip(path) as archive:
            mmap = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    return lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _trusting(path: Path) -> Callable[[], Any]:
    for library in ("torchvision", "timm"):
        if any(name.startswith(f"{library}.") for name in scan(path).globals):
            import_library(library)  # a bare import fails beside a CPU-only torch
    return lambda: torch.load(path, map_location="cpu", weights_only=False)


_READERS: dict[FileKind, Callable[[Path], Callable[[], Any]]] = {
    FileKind.STATE_DICT: _safely,
    FileKind.LEGACY_STATE_DICT: _safely,
    FileKind.MODULE: _trusting,
    FileKind.OBJECTS: _trusting,
    FileKind.TORCHSCRIPT: lambda path: lambda: torch.jit.load(path, map_location="cpu"),
    FileKind.EXPORTED: lambda path: lambda: torch.export.load(path),
}


def _read(path: Path, kind: FileKind, reader: Callable[[], Any]) -> Any:
    """Call a reader; turn whatever goes wrong into a refusal, for its exceptions have no common class."""
    try:
        with warnings.catch_warnings():  # torch's notes to whoever wrote the file, such as that TorchScript ends
            warnings.simplefilter("ignore")
            return reader()
    except Exception as error:
        if kind.runs_code and isinstance(error, (ImportError, AttributeError)):
            found = f"{path} is a {kind.value} whose code is not importable here: {first_line(error)}"
            do = "put the folder of that code on PYTHONPATH, or save model.state_dict() where it works and give --arch"
            raise RedppError(found, "a module whose classes can be imported", do) from error
        found = f"{path} is a {kind.value} that cannot be read: {first_line(error)}"
        do = "fetch or save the file again; if it is whole, save model.state_dict() with this version of torch"
        raise RedppError(found, "a whole file", do) from error


def _untrusted(path: Path, kind: FileKind) -> RedppError:
    if kind in (FileKind.MODULE, FileKind.OBJECTS):
        why = f"naming {shorten(scan(path).unsafe)}, and runs that code when loaded"
    else:
        why = "a format that runs code of the file's choice when loaded"
    do = "save model.state_dict() and give --arch; or, if you trust whoever made this file, add --trust-file"
    return RedppError(f"{path} is a {kind.value}, {why}", "a state_dict, which runs no code", do)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_sums(path: Path) -> None:
    """Compare every entry with its checksum: torch does not, so damaged weights would load as numbers."""
    name = "its table of contents"
    try:
        with open_zip(path) as archive:
            for info in archive.infolist():
                name = info.filename
                with archive.open(info) as entry:
                    # no checksum: torch.serialization.set_crc32_options(False)
                    while info.CRC and entry.read(CHUNK):
                        pass
    except ZIP_ERRORS as error:
        raise RedppError(f"{path} is damaged at {name[:80]}", "a whole file", "fetch or save it again") from error


def _unwrap(path: Path, content: Any, messages: list[str]) -> Any:
    """Return the module, program or dict of tensors inside a checkpoint; note which of its entries was chosen."""
    for _ in range(MAX_NESTING):
        if isinstance(content, (nn.Module, torch.export.ExportedProgram)) or _is_state_dict(content):
            return content
        if not isinstance(content, Mapping):
            break
        holding = [key for key, value in content.items() if isinstance(value, (Mapping, nn.Module)) and _holds(value)]
        chosen = next((key for key in WRAPPERS if key in holding), holding[0] if len(holding) == 1 else None)
        if chosen is None:
            return _tensors_of(path, content, holding, messages)
        beside = [str(key) for key in content if key != chosen]
        messages.append(f"took the weights under {chosen!r}" + (f", not {shorten(beside)}" if beside else ""))
        content = content[chosen]
    found = f"{path} holds a {type(content).__name__}, not weights by name"
    raise RedppError(found, "a state_dict, or a checkpoint with one inside", "save model.state_dict()")


def _tensors_of(path: Path, content: Mapping[Any, Any], holding: list[Any], messages: list[str]) -> dict[str, Tensor]:
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if holding or not tensors:
        keys = shorten(str(key) for key in holding or content)
        found = f"{path} holds {'several sets of weights' if holding else 'no weights'}, under the keys {keys}"
        raise RedppError(found, "one state_dict", "save the state_dict alone with torch.save")
    messages.append(f"left out entries that are not tensors: {shorten(str(key) for key in content.keys() - tensors)}")
    return tensors


def _is_state_dict(value: Any) -> bool:
    """Return whether a value is tensors by name, and at most what modules add through ``get_extra_state``."""
    if not isinstance(value, Mapping) or not any(isinstance(tensor, Tensor) for tensor in value.values()):
        return False
    return all(isinstance(k, str) and (isinstance(v, Tensor) or k.endswith("_extra_state")) for k, v in value.items())


def _holds(value: Any, depth: int = 1) -> bool:
    """Return whether a value holds weights; an optimizer's state does not count, its tensors are keyed by number."""
    if isinstance(value, nn.Module) or _is_state_dict(value):
        return True
    return (
        isinstance(value, Mapping)
        and depth < MAX_NESTING
        and any(key in WRAPPERS and _holds(inner, depth + 1) for key, inner in value.items())
    )


def _dense(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Detach tensors, each plain in memory and no larger than the file can hold; keep ``_metadata``."""
    tensors = {key: value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    odd = [k for k, v in tensors.items() if v.layout is not torch.strided or v.is_quantized or v.device.type != "cpu"]
    if odd:
        found = f"{path} holds sparse, quantized or missing tensors: {shorten(odd)}"
        raise RedppError(found, "dense floating-point weights", "save the network before quantizing or sparsifying it")
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if declared > BOMB_RATIO * path.stat().st_size + BOMB_SLACK:  # a few stored bytes read again by stride 0
        found = f"{path} has {path.stat().st_size} bytes and declares tensors of {declared} bytes"
        raise RedppError(found, "tensors that the file stores in full", "save contiguous tensors")
    return _with_metadata(tensors, getattr(content, "_metadata", None))


class StateDict(dict[str, Tensor]):
    """Tensors by name with the modules' version numbers (``_metadata``), which `nn.Module.load_state_dict` reads."""

    _metadata: dict[str, Any]


def _with_metadata(tensors: dict[str, Tensor], metadata: Any) -> dict[str, Tensor]:
    if not isinstance(metadata, Mapping):
        return tensors
    state = StateDict(tensors)
    state._metadata = dict(metadata)
    return state


def _strip_prefixes(state: dict[str, Tensor], messages: list[str]) -> dict[str, Tensor]:
    """Undo the names that DataParallel, torch.compile and AveragedModel wrap around a network's own."""
    metadata = getattr(state, "_metadata", None)
    if "n_averaged" in state and all(key.startswith("module.") for key in state if key != "n_averaged"):
        state = {key: value for key, value in state.items() if key != "n_averaged"}
        messages.append("left out n_averaged, the counter of torch.optim.swa_utils.AveragedModel")
    while state and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        metadata = metadata and {key.removeprefix(prefix): value for key, value in metadata.items()}
        messages.append(f"stripped the prefix {prefix!r} from every name")
    inner = {key.replace("._orig_mod.", "."): value for key, value in state.items()}
    if inner.keys() != state.keys() and len(inner) == len(state):
        state = inner
        messages.append("stripped '_orig_mod.' inside names")
    return _with_metadata(dict(state), metadata)


def _check_finite(path: Path, tensors: Mapping[str, Any]) -> None:
    bad = [name for name, tensor in tensors.items() if isinstance(tensor, Tensor) and not _is_finite(tensor.detach())]
    if bad:
        found = f"{path} holds NaN or infinite numbers in {len(bad)} of {len(tensors)} tensors: {shorten(bad)}"
        raise RedppError(found, "finite weights", "use an earlier checkpoint: training diverged or the file is damaged")


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.device.type == "meta":
        return True
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # isfinite lacks most 8-bit types
    # an additive attention mask is a buffer of 0 and -inf, and whole
    return bool(torch.isfinite(tensor).all()) or bool(((tensor == 0) | (tensor == -torch.inf)).all())
