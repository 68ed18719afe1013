"""What a checkpoint holds: the weights among its entries, as tensors by name that are plain in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redpp_serve.archives import BOMB_RATIO, BOMB_SLACK
from redpp_serve.capture.entry_names import canonical
from redpp_serve.capture.foreign_weights import refuse_foreign
from redpp_serve.capture.sniff import shorten
from redpp_serve.errors import RedppError

# Where training scripts keep the weights inside a checkpoint. Averaged weights come first: they are the ones evaluated.
WRAPPERS = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights"),
)
MAX_NESTING = 3


class StateDict(dict[str, Tensor]):
    """Tensors by name with the modules' version numbers (``_metadata``), which `nn.Module.load_state_dict` reads."""

    _metadata: dict[str, Any]


def plain(content: Any, depth: int = 0) -> Any:
    """Return dicts as plain ones, `StateDict` where a file gives ``_metadata``.

    Dicts of a file may come with attributes in place of their methods.
    """
    if not isinstance(content, dict) or depth > MAX_NESTING:
        return content
    items = {key: plain(value, depth + 1) for key, value in dict.items(content)}
    return _with_metadata(items, getattr(content, "__dict__", {}).get("_metadata"))


def unwrap(path: Path, content: Any, key: str | None, messages: list[str]) -> Any:
    """Return the module, program or dict of tensors inside a checkpoint.

    Args:
        path: the file, for errors.
        content: what it holds, see `plain`.
        key: which of several networks to take: a key, with dots for one inside another, or a prefix of names.
        messages: gains a line for each choice.

    Raises:
        RedppError: no weights, several sets of them, weights of another kind, or nothing under ``key``.
    """
    if key is not None:
        content = _under(path, content, key.strip("."))
        messages.append(f"took what stands under {key!r}")
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


def dense(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Detach tensors, each plain in memory and no larger than the file can hold; keep ``_metadata``.

    Raises:
        RedppError: sparse, quantized or missing tensors, or more bytes than the file has.
    """
    tensors = {key: Tensor.detach(value) for key, value in content.items() if isinstance(value, Tensor)}
    odd = {key: word for key, value in tensors.items() if (word := _oddity(value))}
    if odd:
        found = f"{path} holds {' and '.join(sorted(set(odd.values())))} tensors: {shorten(odd)}"
        raise RedppError(found, "dense floating-point weights", "save the network before quantizing or sparsifying it")
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if declared > BOMB_RATIO * path.stat().st_size + BOMB_SLACK:  # a few stored bytes read again by stride 0
        found = f"{path} has {path.stat().st_size} bytes and declares tensors of {declared} bytes"
        raise RedppError(found, "tensors that the file stores in full", "save contiguous tensors")
    return _with_metadata(tensors, getattr(content, "_metadata", None))


def _oddity(tensor: Tensor) -> str:
    if tensor.is_quantized or "float4" in str(tensor.dtype):
        return "quantized"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "sparse"
    return "" if tensor.device.type == "cpu" else "missing"


def _under(path: Path, content: Any, key: str) -> Any:
    """Return what a checkpoint holds under a key, a path of keys, a module's name or a prefix of names."""
    parts = key.split(".")
    for size in range(len(parts), 0, -1) if isinstance(content, Mapping) else ():
        inner = content.get(".".join(parts[:size]))
        if isinstance(inner, (Mapping, nn.Module)):
            return _under(path, inner, ".".join(parts[size:])) if parts[size:] else inner
    found = unwrap(path, content, None, []) if not isinstance(content, Mapping) or _holds(content) else {}
    if isinstance(found, nn.Module) and key in dict(found.named_modules()):
        return found.get_submodule(key)
    state = found if isinstance(found, Mapping) else {}
    if not state and isinstance(content, Mapping):  # numbers stand beside the tensors
        state = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    for strip in (str, canonical):
        if taken := {strip(name): value for name, value in state.items() if strip(name).startswith(f"{strip(key)}.")}:
            taken = {name.removeprefix(f"{strip(key)}."): value for name, value in taken.items()}
            versions = getattr(state, "_metadata", {})
            return _with_metadata(taken, {strip(p).removeprefix(f"{strip(key)}."): v for p, v in versions.items()})
    known = {str(name).partition(".")[0] for name in (*state, *(content if isinstance(content, Mapping) else ()))}
    found = f"{path} holds no weights under {key!r}, which --weights-key names"
    raise RedppError(found, f"one of {shorten(sorted(known))}" if known else "a checkpoint", "correct --weights-key")


def _tensors_of(path: Path, content: Mapping[Any, Any], holding: list[Any], messages: list[str]) -> dict[str, Tensor]:
    if holding:
        do = f"choose with --weights-key, as in --weights-key {holding[0]}"
        found = f"{path} holds several sets of weights, under the keys {shorten(map(str, holding))}"
        raise RedppError(found, "one state_dict", do)
    refuse_foreign(key for key in content if isinstance(key, str))
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if {"state", "param_groups"} <= content.keys():
        do = "give the file of the same training that holds the network's weights"
        raise RedppError(f"{path} holds the state of an optimizer, no weights", "one state_dict", do)
    if not tensors:
        found = f"{path} holds no weights, under the keys {shorten(map(str, content))}"
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


def _with_metadata(tensors: dict[str, Tensor], metadata: Any) -> dict[str, Tensor]:
    """Add version numbers to tensors, as far as they are what modules write."""
    if not isinstance(metadata, dict):
        return tensors
    state = StateDict(tensors)
    pairs = dict.items(metadata)
    state._metadata = {key: value for key, value in pairs if isinstance(key, str) and isinstance(value, dict)}
    return state
