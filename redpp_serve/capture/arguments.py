"""How a forward takes its inputs: the call that fits the names which the user gave, found by trying.

A call is a pattern of arguments with a place for each tensor. The user's names choose it: arguments of forward, keys of
a dict, fields of a dataclass or named tuple, and with dots what lies inside of one (``batch.image``, ``pair.0``).
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from redpp_serve.capture.inputs import are_numbered, require_names
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_ANY_POSITIONAL, _ANY_KEYWORD = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_CONTAINERS = ("dict", "tuple", "list", "namespace")  # that a group of inputs is tried as, in this order


class Place(int):
    """The place of one input in a pattern, by its index."""


@dataclass(frozen=True)
class Made:
    """An object of the pattern that a class or function makes from named parts."""

    make: Callable[..., Any]
    parts: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One way of calling a forward.

    Attributes:
        args: patterns of the positional arguments.
        kwargs: patterns of the keyword arguments.
        names: the inputs' names, in the order of their places.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...]

    def arguments(self, tensors: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and the keyword arguments, with the tensors in their places."""
        return [_fill(a, tensors) for a in self.args], {k: _fill(a, tensors) for k, a in self.kwargs.items()}

    def __str__(self) -> str:
        words = [_Word(name) for name in self.names]
        args, kwargs = self.arguments(words)
        return f"forward({', '.join([*map(_text, args), *(f'{k}={_text(v)}' for k, v in kwargs.items())])})"


def calls(network: nn.Module, inputs: Sequence[InputSpec], constants: Mapping[str, Any]) -> Iterator[Call]:
    """List the calls that may fit the inputs, in the order in which they are tried.

    Unnamed inputs are forward's arguments in order; or the items of its only one. Named inputs are arguments of these
    names; else the keys of forward's only argument, as the class of its annotation, a dict, a tuple, a list, or an
    object with attributes; else arguments in order.

    Args:
        network: whose forward is called.
        inputs: what the user gave, under names or numbered.
        constants: further arguments of forward by name; what is no argument of forward is a key beside the inputs.
    """
    signature, hints = signature_of(network)
    free = any(p.kind is _ANY_KEYWORD for p in signature.parameters.values())
    fixed = {name: value for name, value in constants.items() if free or name in signature.parameters}
    inner = {name: value for name, value in constants.items() if name not in fixed}
    parameters = {name: p for name, p in signature.parameters.items() if name not in fixed}
    require_names(inputs, parameters)
    if are_numbered(inputs):
        found = _in_order(len(inputs), parameters, hints)
    else:
        found = _by_name([spec.name for spec in inputs], inner, parameters, hints)
    seen = set()
    for call in found:
        complete = _with_constants(call, fixed, parameters)
        if str(complete) not in seen:
            seen.add(str(complete))
            yield complete


def _with_constants(call: Call, fixed: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> Call:
    """Add constants by keyword; arguments in order go by keyword too, lest one slips into the place of a constant."""
    if not fixed or any(p.kind is _ANY_POSITIONAL for p in parameters.values()):
        return Call(call.args, {**call.kwargs, **fixed}, call.names)
    by_keyword = dict(zip(_positional(parameters), call.args, strict=False))
    return Call((), {**by_keyword, **call.kwargs, **fixed}, call.names)


def signature_of(network: nn.Module) -> tuple[inspect.Signature, Mapping[str, Any]]:
    """Return the signature of a network's forward, behind wrappers that pass everything on, and its annotations."""
    while isinstance(inner := getattr(network, "_orig_mod", None) or _wrapped(network), nn.Module):
        network = inner
    if isinstance(network, torch.jit.ScriptModule):
        if not hasattr(network, "forward"):
            raise RedppError(
                f"this TorchScript of {network.original_name} has no method forward",
                "a module with a forward, such as a class of your own that calls it",
                "save a module that calls this one, or the module before it was scripted",
            )
        arguments = network.forward.schema.arguments[1:]  # type: ignore[attr-defined]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        empty = inspect.Parameter.empty
        parameters = [
            inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else empty)
            for a in arguments
        ]
        return inspect.Signature(parameters), {}
    try:
        hints = typing.get_type_hints(network.forward)
    except Exception:  # annotations may name what cannot be imported here
        hints = {}
    return inspect.signature(network.forward), hints


def _wrapped(network: nn.Module) -> Any:
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return network.module if isinstance(network, parallel) else None


def _in_order(count: int, parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any]) -> Iterator[Call]:
    """List the calls with unnamed inputs."""
    places = tuple(map(Place, range(count)))
    positional, several = _positional(parameters), _of_kind(parameters, _ANY_POSITIONAL)
    split = len(positional)
    keyword = [p for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    needed = [p.name for p in sorted(keyword, key=lambda p: p.default is not inspect.Parameter.empty)]
    if count <= split or several:
        rest = [f"{several}.{k}" for k in range(count - split)]
        yield Call(places, {}, (*positional[:count], *rest))
    elif count <= split + len(needed):
        names = (*positional, *needed[: count - split])
        yield Call(places[:split], dict(zip(names[split:], places[split:], strict=True)), names)
    if len(_required(parameters)) <= 1 and positional:
        group = {str(k): place for k, place in enumerate(places)}
        names = tuple(f"{positional[0]}.{k}" for k in range(count))
        for pattern in _patterns(group, hints.get(positional[0])):
            yield Call((pattern,), {}, names)


def _by_name(
    names: Sequence[str],
    constants: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
    hints: Mapping[str, Any],
) -> Iterator[Call]:
    """List the calls with named inputs; ``constants`` are keys beside them."""
    tree = {**_tree(names), **constants}
    positional, several = _positional(parameters), _of_kind(parameters, _ANY_POSITIONAL)
    known = [name for name in tree if name in parameters]
    if len(known) == len(tree) or _of_kind(parameters, _ANY_KEYWORD):
        for style in _CONTAINERS:
            kwargs = {name: _pattern(part, hints.get(name), style) for name, part in tree.items() if name != several}
            rest = tuple(_pattern(part, None, style) for part in tree.get(several or "", {}).values())
            before = [kwargs.pop(name) for name in positional if name in kwargs] if rest else []
            yield Call((*before, *rest), kwargs, tuple(names))
    if not known and positional and len(_required(parameters)) <= 1:
        for pattern in _patterns(tree, hints.get(positional[0])):
            yield Call((pattern,), {}, tuple(names))
    if not known and not constants and (several or len(names) <= len(positional)):
        yield Call(tuple(map(Place, range(len(names)))), {}, tuple(names))


def _positional(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [name for name, p in parameters.items() if p.kind in _POSITIONAL]


def _of_kind(parameters: Mapping[str, inspect.Parameter], kind: Any) -> str | None:
    return next((name for name, p in parameters.items() if p.kind is kind), None)


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    kinds = (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in parameters.items() if p.kind in kinds and p.default is inspect.Parameter.empty]


def _tree(names: Sequence[str]) -> dict[str, Any]:
    """Return the places by name, with a dict for each group of names with one beginning.

    Raises:
        RedppError: a name is the beginning of another one.
    """
    tree: dict[str, Any] = {}
    for index, name in enumerate(names):
        *path, last = name.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {}) if isinstance(at, dict) else at
        if not isinstance(at, dict) or last in at:
            raise RedppError(
                f"--input {name} beside another of that name or of its beginning",
                "names of different inputs",
                "give each input a name of its own",
            )
        at[last] = Place(index)
    return tree


def _patterns(tree: Mapping[str, Any], hint: Any) -> Iterator[Any]:
    """List what a group of inputs may be, as one argument."""
    for style in _CONTAINERS:
        yield _pattern(tree, hint, style)
    if _is_record(hint):
        for style in _CONTAINERS:
            yield _pattern(tree, None, style)


def _pattern(tree: Any, hint: Any, style: str) -> Any:
    """Return a group of inputs as the class of its annotation, or as a container; one input as it is."""
    if not isinstance(tree, Mapping):
        return tree
    if _is_record(hint):
        fields = getattr(hint, "_fields", None) or [item.name for item in dataclasses.fields(hint)]
        hints = _hints(hint)
        numbered = all(name.isdecimal() for name in tree)
        names = fields[: len(tree)] if numbered else list(tree)
        if set(names) <= set(fields):
            parts = dict(zip(names, tree.values(), strict=False))
            return Made(hint, {name: _pattern(part, hints.get(name), style) for name, part in parts.items()})
    values = {name: _pattern(part, None, style) for name, part in tree.items()}
    if style == "list":
        return list(values.values())
    numbered = all(name.isdecimal() for name in values)
    if style == "namespace" and not numbered:
        return Made(SimpleNamespace, values)
    return tuple(values.values()) if style == "tuple" or numbered else values


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"))


def _hints(record: type) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(record)
    except Exception:  # as in `signature_of`
        return {}


def _fill(pattern: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(pattern, Place):
        return tensors[pattern]
    if isinstance(pattern, Made):
        return pattern.make(**{name: _fill(part, tensors) for name, part in pattern.parts.items()})
    if isinstance(pattern, dict):
        return {name: _fill(part, tensors) for name, part in pattern.items()}
    return type(pattern)(_fill(part, tensors) for part in pattern) if type(pattern) in (list, tuple) else pattern


class _Word(str):
    """An input's name in the words for a call."""


def _text(value: Any) -> str:
    if isinstance(value, _Word):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_text(v)}" for k, v in value.items()) + "}"
    if type(value) in (list, tuple):
        inner = ", ".join(map(_text, value))
        return f"[{inner}]" if type(value) is list else f"({inner}{',' if len(value) == 1 else ''})"
    parts = vars(value) if hasattr(value, "__dict__") else getattr(value, "_asdict", dict)()
    if parts:
        return f"{type(value).__name__}({', '.join(f'{k}={_text(v)}' for k, v in parts.items())})"
    return repr(value)
