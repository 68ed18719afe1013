"""What a pickle names and how much it would build, found by following its operations without running any.

The operations are those of ``pickletools`` in the standard library. A stack machine that keeps sizes and names in
place of objects takes the part of the unpickler, so that a few bytes that would grow to gigabytes are found first.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

from redpp_serve.errors import RedppError

MAX_BYTES = 64 << 20  # of a pickle without its tensors; that of a network of ten thousand tensors has 3 MB
MAX_OPERATIONS = 3_000_000
_MAX_PARTS = 10**7  # objects inside one object, each counted as often as it is reached
_MAX_DEPTH = 300
_MAX_CHOSEN = 10_000  # keys whose hash the file can choose: as many with the same one take three seconds
_HASH_MODULUS = (1 << 61) - 1  # whole numbers below it are their own hash; the hashes of texts nobody can foresee
MODULE_STATE = {"_parameters", "_modules"}  # keys of every nn.Module's __dict__
_COMPUTED = "(computed)"
_HARMLESS_CODECS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")
# Where the keys are among what an operation takes, and what makes keys of all members of its argument.
_KEYS = {"SETITEM": slice(1, None, 2), "SETITEMS": slice(1, None, 2), "DICT": slice(0, None, 2)}
_KEYS |= {"ADDITEMS": slice(1, None), "FROZENSET": slice(None)}
_HASHING = ("builtins.set", "collections.Counter", "collections.OrderedDict")

Operation = tuple[pickletools.OpcodeInfo, object, "int | None"]

# Names that torch.load(weights_only=True) accepts, roughly. They only tell kinds apart: torch enforces its own list.
_SAFE = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(set|bytearray|complex)|_codecs\.encode"
    r"|torch\.(cuda\.)?(sparse\.)?\w+(Storage|Tensor)|torch\.(Size|Tensor|device|storage\.\w+Storage)"
    r"|torch\.((q?u?int|bits|b?float|complex)\d\w*|bool|per_\w+_(affine|symmetric)\w*)"
    r"|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.serialization\._get_layout"
)
# Those among them that a state_dict calls; the others are classes whose call allocates what the file likes.
_CALLED = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(set|complex)|torch\.(Size|device)"
    r"|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_\w+|torch\.serialization\._get_layout"
)


@dataclass(frozen=True)
class PickleScan:
    """What a pickle names.

    Attributes:
        globals: names as ``module.name`` in order of first use, and calls that no state_dict makes.
        has_module_state: whether the keys of a module's ``__dict__`` are among its strings.
    """

    globals: tuple[str, ...]
    has_module_state: bool

    @property
    def unsafe(self) -> tuple[str, ...]:
        """Globals that no state_dict needs."""
        return tuple(name for name in self.globals if not _SAFE.fullmatch(name))


def operations(data: bytes, pickles: int = 1) -> Iterator[Operation]:
    """List the operations of so many pickles that stand one behind the other.

    Raises:
        RedppError: more operations than a network needs.
        ValueError: the bytes are not whole pickles.
    """
    file, count = io.BytesIO(data), 0
    for _ in range(pickles):
        for operation in pickletools.genops(file):
            count += 1
            if count > MAX_OPERATIONS:
                raise _hostile(f"a pickle of more than {MAX_OPERATIONS} operations")
            yield operation


def read_head(file: IO[bytes]) -> bytes:
    """Read the part of a file that its pickles may take up."""
    return file.read(MAX_BYTES)


def scan_operations(found: Iterable[Operation]) -> PickleScan:
    """Follow operations and list what they name.

    Raises:
        RedppError: they build objects far larger or deeper than a network's.
        ValueError: they do not fit together.
    """
    machine = _Machine()
    for operation, argument, _ in found:
        machine.step(operation, argument)
    named = tuple(name.replace("__builtin__.", "builtins.", 1) for name in machine.found)
    return PickleScan(named, machine.state == MODULE_STATE)


class _Item:
    """What is known of an object on the stack: its size, and its value if that is a name, text, number or tuple.

    Of a list also its first member is known, and how many members would be keys whose hash the file can choose, alone
    or as the first of a pair.
    """

    __slots__ = ("chosen", "depth", "first", "name", "parts", "size", "value")

    def __init__(self, parts: tuple[_Item, ...] = (), *, value: object = None, name: str | None = None) -> None:
        self.parts, self.value, self.name = parts, value, name
        self.size, self.depth, self.chosen = 1, 1, 0
        self.first: _Item | None = None
        self.add(parts)

    def add(self, parts: Iterable[_Item]) -> None:
        """Grow by what is put in, as far as objects of a network grow."""
        for part in parts:
            self.size += part.size
            self.depth = max(self.depth, part.depth + 1)
        if self.size > _MAX_PARTS or self.depth > _MAX_DEPTH:
            how = f"{_MAX_DEPTH} levels" if self.depth > _MAX_DEPTH else f"{_MAX_PARTS} parts"
            raise _hostile(f"a pickle whose objects have more than {how}")

    def take(self, members: list[_Item]) -> None:
        """Take in members of a list."""
        self.first = self.first or next(iter(members), None)
        self.chosen += sum(_has_chosen_hash(member.first or member) for member in members)


def _has_chosen_hash(key: _Item) -> bool:
    """Return whether a file can choose the hash of a key, so that a dict compares it with all others of the same."""
    if key.parts:
        return not all(isinstance(part.value, (str, bytes)) and part.value for part in key.parts)
    if isinstance(key.value, int):
        return abs(key.value) >= _HASH_MODULUS
    return not isinstance(key.value, (str, bytes))


class _Machine:
    """The stack and memo of an unpickler."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}
        self.state: set[str] = set()
        self.stack: list[_Item | None] = []  # None is a mark
        self.memo: dict[object, _Item] = {}
        self.chosen = 0  # keys whose hash the file can choose

    def step(self, operation: pickletools.OpcodeInfo, argument: object) -> None:
        """Follow one operation.

        Raises:
            ValueError: the stack or memo lacks what it takes.
        """
        name = operation.name
        if name == "MARK":
            self.stack.append(None)
        elif name == "POP":
            self._pop_any()
        elif name == "DUP":
            self.stack.append(self._top())
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self._top()
        elif name.endswith("PUT"):
            self.memo[argument] = self._top()
        elif name.endswith("GET"):
            if argument not in self.memo:
                raise ValueError(f"memo {argument} is empty")
            self.stack.append(self.memo[argument])
        elif name == "STOP":
            self.stack, self.memo = [], {}
        else:
            self._build(operation, argument)

    def _build(self, operation: pickletools.OpcodeInfo, argument: object) -> None:
        """Follow an operation that takes what `pickletools` says and pushes at most one object."""
        name, before = operation.name, operation.stack_before
        if pickletools.markobject in before:
            inner = self._pop_to_mark()
            taken = [self._pop() for _ in range(before.index(pickletools.markobject))][::-1] + inner
        else:
            taken = [self._pop() for _ in before][::-1]
        if not operation.stack_after:
            return
        if name in _KEYS:
            self._count(sum(map(_has_chosen_hash, taken[_KEYS[name]])))
        if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
            taken[0].add(taken[1:])
            self.stack.append(taken[0])
            if name.startswith("APPEND"):
                taken[0].take(taken[1:])
            elif name.startswith("SETITEM") and taken[0].first:  # a list, whose members it replaces
                self._count(sum(map(_has_chosen_hash, taken[2::2])))
        elif name in ("GLOBAL", "INST"):
            self._name(str(argument).replace(" ", ".", 1), taken)
        elif name == "STACK_GLOBAL":
            self._name(".".join(item.value if isinstance(item.value, str) else _COMPUTED for item in taken), [])
        elif name.startswith("EXT"):
            self._name(f"copyreg extension {argument}", [])
        else:
            if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ") and taken:
                self._called(taken[0], taken[1:])
            text = argument if isinstance(argument, (str, bytes, int)) and not taken else None
            self.state |= {text} & MODULE_STATE if isinstance(text, str) else set()
            self.stack.append(_Item(tuple(taken), value=text))
            if name == "LIST":
                self._top().take(taken)

    def _name(self, name: str, taken: list[_Item]) -> None:
        self.found[name] = None
        self.stack.append(_Item(tuple(taken), name=name.replace("__builtin__.", "builtins.", 1)))

    def _count(self, keys: int) -> None:
        """Count keys whose hash the file can choose: so many of one hash take quadratic time."""
        self.chosen += keys
        if self.chosen > _MAX_CHOSEN:
            raise _hostile(f"a pickle with more than {_MAX_CHOSEN} keys that are neither texts nor small numbers")

    def _called(self, function: _Item, taken: list[_Item]) -> None:
        """Note calls that allocate as much as the file likes, or run as long."""
        name, arguments = function.name or _COMPUTED, taken[0].parts if taken else ()
        if name in _HASHING:
            members = [part.first or part for argument in arguments for part in argument.parts]
            self._count(sum(argument.chosen for argument in arguments) + sum(map(_has_chosen_hash, members)))
        if name == "builtins.bytearray":
            harmless = not any(isinstance(item.value, int) for item in arguments)
        elif name == "_codecs.encode":
            harmless = len(arguments) == 2 and arguments[1].value in _HARMLESS_CODECS
        elif name == "torch._tensor._rebuild_from_type_v2":
            harmless = bool(arguments) and bool(_CALLED.fullmatch(arguments[0].name or ""))
        else:
            harmless = bool(_CALLED.fullmatch(name)) or not _SAFE.fullmatch(name)  # the latter is refused as it is
        if not harmless:
            self.found[f"{name} called with values of the file's choice"] = None

    def _top(self) -> _Item:
        if not self.stack or self.stack[-1] is None:
            raise ValueError("the stack is empty")
        return self.stack[-1]

    def _pop(self) -> _Item:
        item = self._top()
        self.stack.pop()
        return item

    def _pop_any(self) -> None:
        if not self.stack:
            raise ValueError("the stack is empty")
        self.stack.pop()

    def _pop_to_mark(self) -> list[_Item]:
        items: list[_Item] = []
        while self.stack:
            item = self.stack.pop()
            if item is None:
                return items[::-1]
            items.append(item)
        raise ValueError("there is no mark")


def _hostile(found: str) -> RedppError:
    do = "do not use this file; have its author save model.state_dict(), or write it with safetensors"
    return RedppError(f"the file holds {found}", "the pickle of a network's weights", do)
