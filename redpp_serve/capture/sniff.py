"""The kind of a file, told from its bytes alone: the extension is never read and nothing is unpickled.

Formats: the ZIP application note (APPNOTE.TXT), ``pickletools`` of the standard library, the layouts that
``torch.save``, ``torch.jit.save`` and ``torch.export.save`` write, and the safetensors header.
"""

from __future__ import annotations

import codecs
import io
import pickletools
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import IO

from redpp_serve.archives import MEMORY_ERRORS, ZIP_ERRORS, hostile, open_zip, read_entry
from redpp_serve.capture.foreign_files import Foreign, identify, identify_zip
from redpp_serve.capture.pickles import MAX_BYTES, PickleScan, operations, read_head, scan_operations
from redpp_serve.errors import RedppError, printable

HEAD_BYTES = 4096
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a torch.save file from before torch 1.6
ARCHIVE_MAGICS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c")
EXPECTED = (
    "a state_dict (.pt, .pth or .safetensors), a pickled module, TorchScript, a .pt2 exported program or an ONNX model"
)


class FileKind(Enum):
    """A kind of file; the value is its name for people."""

    STATE_DICT = "torch.save state_dict"
    LEGACY_STATE_DICT = "torch.save state_dict in the format before torch 1.6"
    SAFETENSORS = "safetensors state_dict"
    INDEX = "index of weights in several files"
    MODULE = "pickled module"
    OBJECTS = "pickle that names code beside tensors"
    TORCHSCRIPT = "TorchScript program"
    EXPORTED = ".pt2 exported program"
    PLAIN_PICKLE = "pickle that torch.save did not write"
    FOREIGN = "file of another program"
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
    FileKind.FOREIGN: _RESAVE,
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


def sniff(path: Path) -> FileKind:
    """Tell the kind of the file at ``path``.

    Raises:
        RedppError: no such file, not readable, not a regular file, or a hostile zip (see `open_zip`).
    """
    try:
        if path.is_dir():
            return FileKind.FOREIGN if identify(path) else FileKind.DIRECTORY
        if not path.is_file():
            state = "is not a regular file" if path.exists() else "does not exist"
            raise RedppError(f"{path} {state}", EXPECTED, "check the path")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        do = "check its name and its permissions"
        raise RedppError(f"{path} cannot be read: {error.strerror}", EXPECTED, do) from error
    if head[8:9] == b"{" and head[5:8] == bytes(3):  # asked first: a header of 640 bytes starts like a pickle
        return FileKind.SAFETENSORS
    if head.startswith(ZIP_MAGIC):
        return _sniff_zip(path)
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        return _sniff_pickle(path)
    return FileKind.FOREIGN if head and identify(path) else _sniff_head(head)


def refusal(path: Path, kind: FileKind) -> RedppError:
    """Make the error for a file that is not `FileKind.loadable`: what it is and what to do about it."""
    if kind is FileKind.FOREIGN and (found := _foreign(path)):
        return RedppError(f"{path} is a file of another program: {found.what}", EXPECTED, found.do)
    article = "an" if kind in (FileKind.HTML, FileKind.EMPTY) else "a"
    do = _DO[kind]
    if kind is FileKind.DIRECTORY:
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth", ".bin", ".pt2"))
        do += f": it holds {shorten(inside)}" if inside else ""
    return RedppError(f"{path} is {article} {kind.value}", EXPECTED, do)


def scan(path: Path) -> PickleScan:
    """List the globals of every pickle that loading a torch.save file or plain pickle would run, and run none.

    Raises:
        RedppError: see `open_zip` and `pickles.scan_operations`.
        ValueError: the bytes are not a whole pickle.
    """
    found = path.stat()
    return _scan(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=16)
def _scan(path: Path, *_: int) -> PickleScan:
    """Scan a file once, as long as nobody writes to it: a large pickle takes seconds."""
    if is_zip(path):
        with open_zip(path) as archive:
            entries = [info for info in archive.infolist() if _inner(info.filename) == "data.pkl"]
            if sum(info.file_size for info in entries) > MAX_BYTES:
                raise hostile(archive, f"{path} holds a pickle of more than {MAX_BYTES >> 20} MiB beside its tensors")
            return scan_operations(op for info in entries for op in operations(read_entry(archive, info)))
    with path.open("rb") as file:
        head = read_head(file)
    # magic number, protocol version, machine's sizes, the object itself, names of the storages that follow
    legacy = _first_object(io.BytesIO(head)) == LEGACY_MAGIC
    return scan_operations(operations(head, 5 if legacy else 1))


def is_zip(path: Path) -> bool:
    """Return whether torch reads the file as a zip: it looks at the first bytes, zipfile at the last ones."""
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def shorten(names: Iterable[str], limit: int = 5) -> str:
    """List the first ``limit`` names, and say how many more there are."""
    names = [printable(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name if len(name) <= 80 else name[:77] + "..." for name in names[:limit]) + more


def first_line(error: BaseException) -> str:
    """Return an exception's class and the first line of its text."""
    return printable(f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:200]}")


def _foreign(path: Path) -> Foreign | None:
    if path.is_file() and is_zip(path):
        with open_zip(path) as archive:
            return identify_zip(archive.namelist())
    return identify(path)


def _inner(name: str) -> str:
    """Return an entry's name below the top folder that every torch archive has."""
    return name.partition("/")[2]


def _sniff_zip(path: Path) -> FileKind:
    try:
        with open_zip(path) as archive:
            whole = archive.namelist()
        names = {_inner(name) for name in whole}
        if "constants.pkl" in names or any(name.startswith("code/") for name in names):
            return FileKind.TORCHSCRIPT
        if "archive_format" in names or "serialized_exported_program.json" in names:
            return FileKind.EXPORTED
        if "data.pkl" in names:
            return _pickle_kind(scan(path), FileKind.STATE_DICT)
        return FileKind.FOREIGN if identify_zip(whole) else FileKind.OTHER_ZIP
    except ZIP_ERRORS:
        return FileKind.TRUNCATED


def _sniff_pickle(path: Path) -> FileKind:
    try:
        with path.open("rb") as file:
            if _first_object(file) != LEGACY_MAGIC:
                return FileKind.FOREIGN if identify(path) else FileKind.PLAIN_PICKLE
        return _pickle_kind(scan(path), FileKind.LEGACY_STATE_DICT)
    except MEMORY_ERRORS:
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
        return FileKind.INDEX if start.startswith(b"{") and b'"weight_map"' in head else FileKind.TEXT
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
