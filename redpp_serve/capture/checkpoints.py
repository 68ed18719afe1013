"""Loading the tensors of a checkpoint into an architecture, strictly: what does not fit is named.

`entry_names` finds which entry is which tensor, `reparametrised` computes weights that either side keeps in parts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from redpp_serve.capture.entry_names import NameFit, equal, fit_names, has_shape, is_computed, tied_names
from redpp_serve.capture.foreign_weights import refuse_foreign
from redpp_serve.capture.reparametrised import make_plain, remove_unfilled
from redpp_serve.capture.sniff import first_line, shorten
from redpp_serve.errors import RedppError

GIVE_ARCH = "give the --arch and --arch-args (num_classes, ...) that the weights were trained with"


def load_into(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    whose: str = "the architecture",
    do: str = GIVE_ARCH,
    part: bool = False,
) -> list[str]:
    """Copy ``state_dict`` into ``module``: but for what wrappers add to names, every name and shape must match.

    Buffers that the module computes itself, and counters that evaluation does not read, may be missing or left over.
    Entries of losses, metrics and averages are left out. Masks and norms of ``torch.nn.utils`` are applied.

    Args:
        module: gets the tensors.
        state_dict: the tensors by name.
        whose: the module, in messages.
        do: what to do where they do not fit.
        part: whether the module is one of several networks in the file; entries of the others are left out.

    Returns:
        Messages for the user: prefixes, what was left out or applied, changes of precision.

    Raises:
        RedppError: missing or unexpected names, other shapes, the first five of each; several networks that fit;
            weights of another kind, such as quantized ones.
    """
    fit = fit_names(module, state_dict)
    if part:
        fit = _without_others(fit, module)
    tensors, messages = dict(fit.named), list(fit.messages)
    messages += _apply_parts(module, tensors)
    own = module.state_dict()
    messages += _share_tied(own, tensors)
    messages += _set_aside_buffers(module, own, tensors)
    shapes = [
        f"{name} is {_shape(value)}, not {_shape(own[name])}"
        for name, value in tensors.items()
        if isinstance(own.get(name), Tensor) and not has_shape(own[name], value)
    ]
    if shapes:
        missing, unexpected = [name for name in own if name not in tensors], [n for n in tensors if n not in own]
    else:
        _refuse_other_kinds(own, tensors)
        missing, unexpected = _copy(module, own, tensors, fit.metadata)
    missing = [name for name in missing if not is_computed(name)]
    if missing or unexpected or shapes or fit.outside:
        refuse_foreign([*unexpected, *fit.outside])
        raise _misfit(fit, {"missing": missing, "unexpected": unexpected, "of another shape": shapes}, whose, do)
    return messages + _conversions(own, tensors)


def _without_others(fit: NameFit, module: nn.Module) -> NameFit:
    """Leave out the entries that a module does not have, once all that it needs is there."""
    own = module.state_dict()
    named = {name: value for name, value in fit.named.items() if name in own}
    others = [*fit.outside, *(name for name in fit.named if name not in own)]
    if not others or any(name not in named and not is_computed(name) for name in own):
        return fit
    line = f"left out {len(others)} entries of other networks in the file: {shorten(others)}"
    return replace(fit, named=named, outside=[], messages=[*fit.messages, line])


def _misfit(fit: NameFit, problems: Mapping[str, list[str]], whose: str, do: str) -> RedppError:
    expected, under = "the same names and shapes", f" under the prefix {fit.prefix!r}" if fit.prefix else ""
    if not any(problems.values()):
        found = f"the weights{under} fit {whose}, but the file holds {len(fit.outside)} more: {shorten(fit.outside)}"
        do = f"give the architecture of the whole, or take this part alone with --weights-key {fit.prefix}"
        return RedppError(found, "weights that all belong to the network", do)
    parts = [f"{len(names)} {what}: {shorten(names)}" for what, names in problems.items() if names]
    if fit.outside:
        parts.append(f"{len(fit.outside)} elsewhere: {shorten(fit.outside)}")
    return RedppError(f"the weights{under} do not fit {whose}; {'; '.join(parts)}", expected, do)


def _apply_parts(module: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Make weights plain that the file or the module keeps in parts, unless both do so alike."""
    freed = remove_unfilled(module, tensors, module.state_dict())
    applied: dict[str, list[str]] = {}
    used: set[str] = set()
    for name in module.state_dict():
        if name not in tensors:
            made = make_plain(name, tensors, _owner(module, name))
            if made is not None:
                what, tensors[name], parts = made
                used.update(parts)
                applied.setdefault(what, []).append(name)
    for part in used:
        del tensors[part]
    messages = [f"applied {what} that the file keeps apart: {shorten(names)}" for what, names in applied.items()]
    if plain := [name for name in freed if not any(name in names for names in applied.values())]:
        messages.append(f"took off masks or norms of the architecture that the file has applied: {shorten(plain)}")
    return messages


def _owner(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def _share_tied(own: Mapping[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """Give names that share memory in the module the tensor that the file has under one of them.

    Raises:
        RedppError: the file has different tensors for such names.
    """
    came = []
    for names in tied_names(own):
        there = [name for name in names if name in tensors]
        if not there:
            continue
        first = tensors[there[0]]
        if odd := [name for name in there[1:] if not equal(tensors[name], first)]:
            raise RedppError(
                f"{shorten([there[0], *odd])} are one tensor in the architecture and differ in the file",
                "equal tensors, or an architecture that does not share them",
                "give the architecture that the weights were trained with, without tied weights",
            )
        for name in names:
            if name not in tensors:
                tensors[name] = first
                came.append(f"{name} (with {there[0]})")
    return [f"took weights for names that share memory: {shorten(came)}"] if came else []


def _set_aside_buffers(module: nn.Module, own: Mapping[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """Take out entries of buffers that the module computes itself; where their shapes agree, the file's values stay."""
    computed = {name: value for name, value in module.named_buffers() if name not in own}
    found = [name for name in tensors if name not in own and (name in computed or is_computed(name))]
    for name in found:
        value = tensors.pop(name)
        if name in computed and computed[name].shape == value.shape:
            computed[name].copy_(value)
    kept = [name for name in found if not name.endswith("num_batches_tracked")]
    return [f"the architecture computes these buffers itself: {shorten(kept)}"] if kept else []


def _refuse_other_kinds(own: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse conversions that change what numbers mean; a single number may be a counter of another type."""
    odd = [
        f"{name} is {value.dtype}, not {own[name].dtype}".replace("torch.", "")
        for name, value in tensors.items()
        if isinstance(own.get(name), Tensor)
        and value.numel() > 1
        and _kind(value) != _kind(own[name])
        and not _is_mask(value, own[name])
    ]
    if odd:
        do = "give the weights as the network computes with them, from before they were quantized or converted"
        raise RedppError(f"the file holds numbers of another kind: {shorten(odd)}", "the same kind of numbers", do)


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "floating" if tensor.is_floating_point() else "whole"


def _is_mask(value: Tensor, own: Tensor) -> bool:
    """Return whether one of two tensors is of truth values, and the other holds 0 and 1 only."""
    whole = torch.bool in (value.dtype, own.dtype)
    return whole and bool(((value == 0) | (value == 1)).all())


def _copy(
    module: nn.Module, own: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None
) -> tuple[list[str], list[str]]:
    """Return missing and unexpected names, after modules have renamed what old files call otherwise."""
    holder = OrderedDict(tensors)
    # safetensors keeps no version numbers, and some modules insist on them
    holder._metadata = metadata or getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    try:
        result = module.load_state_dict(holder, strict=False)
    except Exception as error:
        found = f"the module refuses the weights: {first_line(error)}"
        raise RedppError(found, "weights of this module", GIVE_ARCH) from error
    return list(result.missing_keys), list(result.unexpected_keys)


def _conversions(own: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    pairs = [(value.dtype, own[name].dtype) for name, value in tensors.items() if isinstance(own.get(name), Tensor)]
    changed = sorted({f"{old} to {new}" for old, new in pairs if old != new})
    return [f"converted weights from {change}".replace("torch.", "") for change in changed]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
