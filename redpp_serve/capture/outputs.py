"""What a forward returns as a flat list of tensors, each under a name that clients can use.

Keys of a dict, fields of a named tuple, of a dataclass or of a model's output class, and positions, joined by dots:
``logits``, ``aux.0``. An array of NumPy is the tensor of its numbers. What else is no tensor is left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LONGEST = 200  # characters of a name
_SHOWN = 40  # characters of a text among the outputs that a message shows


def are_close(mine: Tensor, theirs: Tensor, relative: float) -> bool:
    """Compare two outputs of one shape, NaN with NaN, up to a share of the largest finite value of the second."""
    mine, theirs = mine.detach().double(), theirs.detach().double()
    finite = theirs[theirs.isfinite()]
    tolerance = relative * float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(mine, theirs, rtol=0.0, atol=tolerance, equal_nan=True)


def tensors_in(returned: Any) -> list[Tensor]:
    """Return the tensors that a forward returns, in order."""
    leaves = (leaf for _, leaf in _leaves(returned, ()) if _is_tensor(leaf))
    return [leaf if isinstance(leaf, Tensor) else torch.from_numpy(leaf) for leaf in leaves]


def names_in(returned: Any, taken: Collection[str] = ()) -> tuple[str, ...]:
    """Return the names of the tensors that a forward returns, in order.

    They consist of letters, digits, ``_``, ``.`` and ``-``, and are unique; none is among those that are ``taken``. A
    single tensor is ``output_0``, those of a plain tuple ``output_0``, ``output_1`` and so on.
    """
    names: list[str] = []
    for path, leaf in _leaves(returned, ()):
        if _is_tensor(leaf):
            names.append(_unique(_name(path), {*names, *taken}))
    return tuple(names)


def left_out(returned: Any) -> list[str]:
    """Return a phrase for each thing that a forward returns beside tensors, such as ``aux (None)``."""
    found = [(path, leaf) for path, leaf in _leaves(returned, ()) if not _is_tensor(leaf)]
    return [f"{_name(path)} ({_words(leaf)})" for path, leaf in found]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")


def _leaves(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """List what lies in nested containers, each with its path."""
    parts = _parts(value)
    if parts is None:
        yield path, value
        return
    for key, part in parts:
        yield from _leaves(part, (*path, key))


def _parts(value: Any) -> list[tuple[str | int, Any]] | None:
    """Return what a container holds by key, field or position; None for what is no container."""
    if isinstance(value, Mapping):
        return [(key if isinstance(key, int) else str(key), part) for key, part in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
    if isinstance(value, tuple):
        # torch's own named results, as of max or topk, keep their fields' names here
        fields: Sequence[str] = getattr(type(value), "_fields", getattr(type(value), "__match_args__", ()))
        return list(zip(fields or range(len(value)), value, strict=True))
    return list(enumerate(value)) if isinstance(value, list) else None


def _name(path: tuple[str | int, ...]) -> str:
    """Join a path; a position at its beginning is that of an output."""
    if not path:
        return "output_0"
    first = f"output_{path[0]}" if isinstance(path[0], int) else path[0]
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", ".".join([first, *map(str, path[1:])]))
    return name[:_LONGEST] or "output"


def _unique(name: str, taken: Collection[str]) -> str:
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}_output" if number == 1 else f"{name}_output_{number}", number + 1
    return unique


def _words(leaf: Any) -> str:
    if leaf is None:
        return "None"
    if isinstance(leaf, str):
        return f"the text {leaf[:_SHOWN]!r}"
    if isinstance(leaf, (bool, int, float)):
        return f"the number {leaf}"
    return f"of type {type(leaf).__name__}"
