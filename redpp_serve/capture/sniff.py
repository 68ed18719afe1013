"""The kind of a file, told from its bytes alone: the extension is never read and nothing is unpickled.

Formats: the ZIP application note (APPNOTE.TXT), ``pickletools`` of the standard library, the layouts that
``torch.save``, ``torch.jit.save`` and ``torch.export.save`` write, and the safetensors header.
"""

from __future__ import annotations

import codecs
import pickletools
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO

from redpp_serve.errors import RedppError

HEAD_BYTES = 4096
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a torch.save file from before torch 1.6
BOMB_RATIO, BOMB_SLACK = 8, 16 << 20  # torch stores tensors uncompressed; only TorchScript's sources deflate
MODULE_STATE = {"_parameters", "_modules"}  # keys of every nn.Module's __dict__
ARCHIVE_MAGICS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c")
PICKLE_ERRORS = (ValueError, OverflowError, MemoryError)  # what damaged lengths in a pickle lead to
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, *PICKLE_ERRORS)
EXPECTED = "a state_dict (.pt, .pth or .safetensors), a pickled module, TorchScript or a .pt2 exported program"


class FileKind(Enum):
    """A kind of file; the value is its name for people."""

    STATE_DICT = "torch.save state_dict"
    LEGACY_STATE_DICT = "torch.save state_dict in the format before torch 1.6"
    SAFETENSORS = "safetensors state_dict"
    MODULE = "pickled module"
    OBJECTS = "pickle that names code beside tensors"
    TORCHSCRIPT = "TorchScript program"
    EXPORTED = ".pt2 exported program"
    PLAIN_PICKLE = "pickle that torch.save did not write"
    ONNX = "ONNX model"
    HTML = "HTML or XML page"
    LFS_POINTER = "Git LFS pointer"
    EMPTY = "empty file"
    DIRECTORY = "directory"
    TRUNCATED = "truncated or damaged file"
    OTHER_ZIP = "zip archive without a network"
    ARCHIVE = "compressed or tar archive"
    TEXT = "text file"
    UNKNOWN = "file of an unknown format"

    @property
    def loadable(self) -> bool:
        """Whether `load_file` reads this kind, with or without trust."""
        return self not in _DO

    @property
    def runs_code(self) -> bool:
        """Whether loading this kind runs code that the file chooses."""
        return self in _RUNS_CODE


_RUNS_CODE = {FileKind.MODULE, FileKind.OBJECTS, FileKind.TORCHSCRIPT, FileKind.EXPORTED}

_RESAVE = "write the weights with torch.save(model.state_dict(), 'model.pt') or with safetensors"
_DO: dict[FileKind, str] = {
    FileKind.PLAIN_PICKLE: _RESAVE,
    FileKind.ONNX: "give the PyTorch weights that the ONNX file was exported from",
    FileKind.HTML: "the download saved a login or error page in place of the weights: fetch the file again",
    FileKind.LFS_POINTER: "run `git lfs pull` in the repository that holds it, then try again",
    FileKind.EMPTY: "fetch or save the file again: it holds no bytes",
    FileKind.DIRECTORY: "give the path of the weights file inside it",
    FileKind.TRUNCATED: "fetch or save the file again and compare its size with the source's",
    FileKind.OTHER_ZIP: "give the weights file itself; if it is packed in this archive, extract it first",
    FileKind.ARCHIVE: "extract it and give the weights file inside",
    FileKind.TEXT: "give the file that holds the weights, not a description of it",
    FileKind.UNKNOWN: _RESAVE,
}


@dataclass(frozen=True)
class PickleScan:
    """What a pickle names.

    Attributes:
        globals: names as ``module.name`` in order of first use.
        has_module_state: whether the keys of a module's ``__dict__`` are among its strings.
    """

    globals: tuple[str, ...]
    has_module_state: bool

    @property
    def unsafe(self) -> tuple[str, ...]:
        """Globals that no state_dict needs."""
        return tuple(name for name in self.globals if not _SAFE_GLOBAL.fullmatch(name))


# Names that torch.load(weights_only=True) accepts, roughly. They only tell kinds apart: torch enforces its own list.
_SAFE_GLOBAL = re.compile(
    r"collections\.(OrderedDict|Counter)|builtins\.(set|bytearray|complex)|_codecs\.encode"
    r"|torch\.(cuda\.)?(sparse\.)?\w+(Storage|Tensor)|torch\.(Size|Tensor|device|storage\.\w+Storage)"
    r"|torch\.((q?u?int|bits|b?float|complex)\d\w*|bool|per_\w+_(affine|symmetric)\w*)"
    r"|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.serialization\._get_layout"
)


def sniff(path: Path) -> FileKind:
    """Tell the kind of the file at ``path``.

    Raises:
        RedppError: no such file, not readable, not a regular file, or a hostile zip (see `open_zip`).
    """
    if path.is_dir():
        return FileKind.DIRECTORY
    if not path.is_file():
        state = "is not a regular file" if path.exists() else "does not exist"
        raise RedppError(f"{path} {state}", EXPECTED, "check the path")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise RedppError(f"{path} cannot be read: {error.strerror}", EXPECTED, "check its permissions") from error
    if head[8:9] == b"{" and head[5:8] == bytes(3):  # asked first: a header of 640 bytes starts like a pickle
        return FileKind.SAFETENSORS
    if head.startswith(ZIP_MAGIC):
        return _sniff_zip(path)
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return _sniff_pickle(path)
    return _sniff_head(head)


def refusal(path: Path, kind: FileKind) -> RedppError:
    """Make the error for a file that is not `FileKind.loadable`: what it is and what to do about it."""
    article = "an" if kind in (FileKind.ONNX, FileKind.HTML, FileKind.EMPTY) else "a"
    do = _DO[kind]
    if kind is FileKind.DIRECTORY:
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".bin", ".pt2"))
        do += f": it holds {shorten(inside)}" if inside else ""
    return RedppError(f"{path} is {article} {kind.value}", EXPECTED, do)


def scan(path: Path) -> PickleScan:
    """List the globals of every pickle that loading a torch.save file or plain pickle would run, and run none.

    Raises:
        RedppError: see `open_zip`.
        ValueError: the bytes are not a whole pickle.
    """
    if is_zip(path):
        with open_zip(path) as archive:
            pickles = [read_entry(archive, info) for info in archive.infolist() if _inner(info.filename) == "data.pkl"]
        return _scan(op for data in pickles for op in pickletools.genops(data))
    with path.open("rb") as file:
        legacy = _first_object(file) == LEGACY_MAGIC
        file.seek(0)
        # magic number, protocol version, machine's sizes, the object itself, names of the storages that follow
        return _scan(op for _ in range(5 if legacy else 1) for op in pickletools.genops(file))


def is_zip(path: Path) -> bool:
    """Return whether torch reads the file as a zip: it looks at the first bytes, zipfile at the last ones."""
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip once its table of contents has proved harmless, before any entry is read.

    Raises:
        RedppError: names that repeat or lead out of the archive, encryption, or declared sizes far beyond the file's.
        zipfile.BadZipFile: the table is damaged.
    """
    archive = zipfile.ZipFile(path)
    seen: set[str] = set()
    for info in archive.infolist():
        parts = re.split(r"[/\\]", info.filename)
        if ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", info.filename):
            raise _hostile(archive, f"{path} holds an entry that leads out of the archive: {info.filename[:80]!r}")
        if info.filename in seen:
            raise _hostile(archive, f"{path} holds two entries named {info.filename[:80]!r}")
        if info.flag_bits & 1:
            raise _hostile(archive, f"{path} holds an encrypted entry: {info.filename[:80]!r}")
        seen.add(info.filename)
    size, declared = path.stat().st_size, sum(info.file_size for info in archive.infolist())
    if declared > BOMB_RATIO * size + BOMB_SLACK:
        raise _hostile(archive, f"{path} has {size} bytes and declares {declared} bytes once unpacked (a zip bomb)")
    return archive


def read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read one entry and check it against its checksum, if it has one.

    `torch.serialization.set_crc32_options(False)` writes zero for every checksum, which zipfile would refuse.
    """
    if info.CRC == 0 and hasattr(info, "CRC"):
        del info.CRC
    return archive.read(info)


def shorten(names: Iterable[str], limit: int = 5) -> str:
    """List the first ``limit`` names, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name if len(name) <= 80 else name[:77] + "..." for name in names[:limit]) + more


def first_line(error: BaseException) -> str:
    """Return an exception's class and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:200]}"


def _hostile(archive: zipfile.ZipFile, found: str) -> RedppError:
    archive.close()
    return RedppError(found, "an archive as torch.save writes it", "do not use this file; fetch it from its author")


def _inner(name: str) -> str:
    """Return an entry's name below the top folder that every torch archive has."""
    return name.partition("/")[2]


def _sniff_zip(path: Path) -> FileKind:
    try:
        with open_zip(path) as archive:
            names = {_inner(name) for name in archive.namelist()}
        if "constants.pkl" in names or any(name.startswith("code/") for name in names):
            return FileKind.TORCHSCRIPT
        if "archive_format" in names or "serialized_exported_program.json" in names:
            return FileKind.EXPORTED
        return _pickle_kind(scan(path), FileKind.STATE_DICT) if "data.pkl" in names else FileKind.OTHER_ZIP
    except ZIP_ERRORS:
        return FileKind.TRUNCATED


def _sniff_pickle(path: Path) -> FileKind:
    try:
        with path.open("rb") as file:
            if _first_object(file) != LEGACY_MAGIC:
                return FileKind.PLAIN_PICKLE
        return _pickle_kind(scan(path), FileKind.LEGACY_STATE_DICT)
    except PICKLE_ERRORS:
        return FileKind.TRUNCATED


def _pickle_kind(found: PickleScan, state_dict: FileKind) -> FileKind:
    if not found.unsafe:
        return state_dict
    return FileKind.MODULE if found.has_module_state else FileKind.OBJECTS


def _sniff_head(head: bytes) -> FileKind:
    if not head:
        return FileKind.EMPTY
    start = head[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return FileKind.HTML
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return FileKind.LFS_POINTER
    if _is_text(head):
        return FileKind.TEXT
    if head[8:9] == b"{":  # after a header length beyond all reason
        return FileKind.SAFETENSORS
    if head.startswith(ARCHIVE_MAGICS) or head[257:262] == b"ustar":
        return FileKind.ARCHIVE
    # ModelProto: field 1 (ir_version) as a small varint, then the tag of another of its fields
    if len(head) > 2 and head[0] == 0x08 and 1 <= head[1] <= 32 and head[2] in b"\x12\x1a\x22\x28\x32\x3a\x42":
        return FileKind.ONNX
    return FileKind.UNKNOWN


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # a character cut by the head's end is ignored
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char.isspace() for char in text)


def _first_object(file: IO[bytes]) -> object:
    """Return what the first opcode with content pushes: the value, if the first pickle is one number."""
    return next(arg for op, arg, _ in pickletools.genops(file) if op.name not in ("PROTO", "FRAME"))


def _scan(ops: Iterable[tuple[pickletools.OpcodeInfo, object, int | None]]) -> PickleScan:
    """Follow strings through stack and memo far enough to name STACK_GLOBAL's operands; others are '(computed)'."""
    found: dict[str, None] = {}
    state: set[str] = set()
    memo: dict[object, str | None] = {}
    top: deque[str | None] = deque([None, None], maxlen=2)
    for op, arg, _ in ops:
        if op.name in ("GLOBAL", "INST"):
            found[str(arg).replace(" ", ".", 1)] = None
        elif op.name == "STACK_GLOBAL":
            found[".".join(part if part is not None else "(computed)" for part in top)] = None
        elif op.name.startswith("EXT"):
            found[f"copyreg extension {arg}"] = None
        if op.name == "STOP":
            memo = {}
        elif op.name == "MEMOIZE":
            memo[len(memo)] = top[-1]
        elif op.name.endswith("PUT"):
            memo[arg] = top[-1]
        elif op.name.endswith("GET"):
            top.append(memo.get(arg))
        elif op.name.endswith(("UNICODE", "UNICODE8", "STRING")):
            top.append(str(arg))
            state |= {str(arg)} & MODULE_STATE
        elif op.stack_after:
            top.append(None)
        elif op.stack_before:  # pops only: what lies on top now was not followed
            top.extend((None, None))
    named = tuple(name.replace("__builtin__.", "builtins.", 1) for name in found)
    return PickleScan(named, state == MODULE_STATE)
