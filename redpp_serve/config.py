"""``redpp.yaml``: the options of commands from a file, read as the words of a command line, and its JSON schema.

Both come from the records that define the options. The file is only composed to nodes: nothing in it is constructed,
and every refusal names its line.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from redpp_serve.errors import RedppError, printable
from redpp_serve.files import read_bounded
from redpp_serve.options import ConfigOptions, Json, Range, RangeOr, RecordedOptions, SystemdOptions, flag_of

NAME = "redpp.yaml"
_LEFT_OUT = (ConfigOptions, RecordedOptions, SystemdOptions, Json)  # they belong to one call of a command
_MOST_BYTES = 1 << 16
_LARGEST = 2.0**53  # a limit beyond it is none
_SHOWN = 60  # characters of what was found
_WORDS = {"true": True, "True": True, "false": False, "False": False}
_NULLS = ("", "~", "null", "Null", "NULL")

Sections = Mapping[str, Sequence[type]]
"""The option records of each command that a file may hold a section for."""


@dataclass(frozen=True)
class Setting:
    """An option that a file gives.

    Attributes:
        name: of its field.
        words: the same on a command line.
    """

    name: str
    words: tuple[str, ...]


def keys(records: Sequence[type]) -> dict[str, Field[Any]]:
    """Return the options that a section may hold, by key: the flag without its dashes."""
    found = (item for record in records if record not in _LEFT_OUT for item in fields(record))
    return {flag_of(item).removeprefix("--"): item for item in found if " " not in flag_of(item)}


def read(path: Path, sections: Sections) -> dict[str, list[Setting]]:
    """Return what a file gives each command.

    Raises:
        RedppError: it cannot be read, or something in it is no option or not of its kind; names file, line and key.
    """
    root = _compose(path)
    if root is None:
        return {}
    found = {}
    for name, node, where in _entries(root, str(path), "", "a section for a command, such as serve"):
        if name not in sections:
            raise _unknown(where, f"{printable(name)!r} is no command that takes options from a file", name, sections)
        known = keys(sections[name])
        entries = _entries(node, str(path), name, "options by their flags, such as workers: 2")
        found[name] = [_setting(key, value, where, known) for key, value, where in entries]
    return found


def merge(command: str, settings: Sequence[Setting], words: Sequence[str], given: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line with a file's options, where its own words do not give them.

    Args:
        command: its name, of one or two words.
        settings: the file's.
        words: those of the command line, which begin with the command's name.
        given: the options in them.
    """
    own = len(command.split())
    added = [word for setting in settings if setting.name not in given for word in setting.words]
    return [*words[:own], *added, *words[own:]]


def as_commands(settings: Mapping[str, Sequence[Setting]]) -> list[str]:
    """Return the command line that each section stands for."""
    return [
        shlex.join(["redpp-serve", *name.split(), *(word for each in some for word in each.words)])
        for name, some in settings.items()
    ]


def _compose(path: Path) -> Any:
    try:
        import yaml  # noqa: PLC0415 - only who has such a file needs it
    except ImportError as error:
        raise RedppError(
            f"{path} needs PyYAML, which is not installed", "it, to read the file", "pip install 'redpp-serve[serve]'"
        ) from error
    do = f"correct it, or give the options as flags; redpp-serve config {path} checks it"
    try:
        return yaml.compose(read_bounded(path, _MOST_BYTES).decode(), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RedppError(f"{path}{line}: {printable(error.problem or error.context)}", "YAML", do) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else printable(error)[:200]
        raise RedppError(f"{path} is no YAML: {problem}", "YAML in UTF-8", do) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RedppError(f"{path} cannot be read: {why}", "a file with options", "check --config") from error


def _entries(node: Any, path: str, section: str, expected: str) -> Iterator[tuple[str, Any, str]]:
    """Yield key, value, and file, line and section of each entry of a mapping; nothing where there is none.

    Raises:
        RedppError: it is something else, or a key is no text or comes twice.
    """

    def where(at: Any) -> str:
        return f"{printable(path)}, line {at.start_mark.line + 1}: " + (f"{section}: " if section else "")

    if _is_null(node):
        return
    if node.id != "mapping":
        raise RedppError(f"{where(node)}{_shown(node)}", expected, "indent them below the name of their command")
    seen: dict[str, int] = {}
    for key, value in node.value:
        if key.id != "scalar":
            raise RedppError(f"{where(key)}{_shown(key)} as a key", expected, "write the option's name")
        if key.value in seen:
            raise RedppError(
                f"{where(key)}{printable(key.value)!r} comes twice, first in line {seen[key.value]}",
                "every key once",
                "leave one of them out",
            )
        seen[key.value] = key.start_mark.line + 1
        yield key.value, value, where(key)


def _is_null(node: Any) -> bool:
    return bool(node.id == "scalar" and node.style is None and node.value in _NULLS)


def _is_tagged(node: Any) -> bool:
    """Tell whether a node has a tag that YAML itself does not give."""
    return not re.fullmatch(r"tag:yaml\.org,2002:\w+", node.tag)


def _setting(key: str, node: Any, where: str, known: Mapping[str, Field[Any]]) -> Setting:
    if key not in known:
        raise _unknown(where, f"{printable(key)!r} is no option that a file may hold", key, known)
    item = known[key]
    values = node.value if node.id == "sequence" and item.default == () else [node]
    words = [_word(item, value, f"{where}{key}") for value in values]
    return Setting(item.name, tuple(word for word in words if word is not None))


def _word(item: Field[Any], node: Any, where: str) -> str | None:
    """Return an option as the command line has it; None for a switch that stays off."""
    flag, takes, bare = flag_of(item), item.metadata["takes"], item.metadata["bare"]
    plain = node.id == "scalar" and node.style is None
    if node.id != "scalar" or _is_tagged(node) or _is_null(node):
        raise _wrong(where, node, item)
    if item.default is False or (bare is not None and plain and node.value in _WORDS):
        if not plain or node.value not in _WORDS:
            raise _wrong(where, node, item)
        on = flag if bare is None else f"{flag}={bare}"  # bare, it would take a positional for its value
        return on if _WORDS[node.value] else None
    word = isinstance(takes, RangeOr) and node.value == takes.word
    if isinstance(takes, Range) and not plain and not word:
        raise _wrong(where, node, item)
    try:
        _check(takes, node.value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise _wrong(where, node, item, "" if isinstance(takes, Range | tuple) else str(error)) from error
    return f"{flag}={node.value}"


def _check(takes: Any, text: str) -> None:
    """Read a text as the command line would.

    Raises:
        argparse.ArgumentTypeError, ValueError: the option does not take it.
    """
    if isinstance(takes, tuple):
        if text not in takes:
            raise ValueError(text)
    elif takes is not None:
        read: Callable[[str], Any] = takes.parse if isinstance(takes, Range) else takes
        read(text)


def _wrong(where: str, node: Any, item: Field[Any], why: str = "") -> RedppError:
    takes, several = item.metadata["takes"], item.default == ()
    if item.default is False:
        expected = "true or false"
    elif isinstance(takes, tuple):
        expected = " or ".join(takes)
    else:
        expected = str(takes) if isinstance(takes, Range) else "a text"
        expected += f", or true for {item.metadata['bare']}" if item.metadata["bare"] is not None else ""
        expected += ", or a list of them" if several else ""
    found = f"{where}: {why}" if why else f"{where} is {_shown(node)}"
    quote = "; a text with commas in [...] needs quotes" if several else ""
    return RedppError(found, expected, f"see {flag_of(item)} in the command's --help{quote}")


def _unknown(where: str, found: str, name: str, known: Mapping[str, Any]) -> RedppError:
    near = difflib.get_close_matches(name, known, 3) or difflib.get_close_matches(name.replace("_", "-"), known, 3)
    do = f"write {' or '.join(near)}" if near else "see the command's --help"
    return RedppError(f"{where}{found}", f"one of {', '.join(known)}", do)


def _shown(node: Any) -> str:
    if node.id != "scalar":
        return {"sequence": "a list", "mapping": "a mapping"}[node.id]
    if _is_null(node):
        return "without a value"
    if _is_tagged(node):
        return f"of the tag {printable(node.tag)}"
    text = printable(node.value)
    shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
    return shown if node.style is None else f"the text {shown} in quotes"


def schema(sections: Sections) -> dict[str, Any]:
    """Return the JSON schema by which editors complete and check a file."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": NAME,
        "description": "Options of redpp-serve's commands, by the names of their flags. Flags win over the file.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: {
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": {key: _described(item) for key, item in keys(records).items()},
            }
            for name, records in sections.items()
        },
    }


def _described(item: Field[Any]) -> dict[str, Any]:
    kind = _kind(item)
    if item.default == ():
        kind = {"anyOf": [kind, {"type": "array", "items": kind}]}
    if item.metadata["bare"] is not None:
        kind = {"anyOf": [{"type": "boolean"}, kind]}
    return {"description": item.metadata["help"].format(default=item.default), **kind}


def _kind(item: Field[Any]) -> dict[str, Any]:
    takes = item.metadata["takes"]
    if item.default is False:
        return {"type": "boolean"}
    if isinstance(takes, tuple):
        return {"enum": list(takes)}
    if not isinstance(takes, Range):
        return {"type": "string"}
    numbers: dict[str, Any] = {"type": "integer" if takes.whole else "number"}
    numbers["exclusiveMinimum" if takes.above else "minimum"] = takes.low
    if takes.high < _LARGEST:
        numbers["maximum"] = takes.high
    return {"anyOf": [numbers, {"enum": [takes.word]}]} if isinstance(takes, RangeOr) else numbers
