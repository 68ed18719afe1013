"""Large files and zip archives that somebody else made: read only once what they claim has proved harmless.

Format: the ZIP application note (APPNOTE.TXT) of PKWARE, sections 4.3.12 to 4.3.16.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.files import open_regular

MAX_ENTRIES = 200_000  # torch writes one for each tensor
MAX_TABLE = 32 << 20  # bytes of the table of contents
BOMB_RATIO, BOMB_SLACK = 8, 16 << 20  # torch stores tensors uncompressed; only TorchScript's sources deflate
CHUNK = 1 << 20  # bytes
MEMORY_ERRORS = (ValueError, OverflowError, MemoryError)  # what damaged lengths lead to
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, *MEMORY_ERRORS)
SAVED = "an archive as torch.save writes it"
_ENTRY = b"PK\x03\x04"
_END, _END64 = b"PK\x05\x06", b"PK\x06\x06"  # where the table's size stands: at byte 12 in 4 bytes, at byte 40 in 8
_TAIL = 1 << 17  # bytes at the end of a file that hold both


def open_zip(path: Path, expected: str = SAVED, *, any_ratio: bool = False) -> zipfile.ZipFile:
    """Open a zip once its table of contents has proved harmless, before any entry is read.

    Args:
        path: the file.
        expected: what the file should have been, for the refusal.
        any_ratio: entries may be compressed as far as it goes, if this machine's memory holds all of them.

    Raises:
        RedppError: names that repeat or lead out of the archive, encryption, or declared sizes far beyond the file's.
        zipfile.BadZipFile: the table is damaged.
        OSError: no regular file.
    """
    _check_table(path, expected)
    archive = zipfile.ZipFile(path)
    size, declared = path.stat().st_size, sum(info.file_size for info in archive.infolist())
    found = next(_offences(archive.infolist()), "")
    if not found and any_ratio:
        check_memory(path, declared)
    elif not found and declared > BOMB_RATIO * size + BOMB_SLACK:
        found = f"has {size} bytes and declares {declared} bytes once unpacked (a zip bomb)"
    if found:
        raise hostile(archive, f"{path} {found}", expected)
    return archive


def check_arrays(path: Path, *, any_ratio: bool = False) -> None:
    """Refuse an .npy or .npz file that NumPy would read for ever, or whose arrays are far larger than the file.

    Args:
        path: the file.
        any_ratio: see `open_zip`.

    Raises:
        RedppError: see `open_zip` and `check_claims`.
        OSError, zipfile.BadZipFile: no regular file, or a damaged one.
    """
    check_claims(path)
    with open_regular(path) as file:
        zipped = file.read(len(_ENTRY)) == _ENTRY
    if zipped:
        open_zip(path, "a file that numpy.savez wrote", any_ratio=any_ratio).close()


def read_small(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """Return an entry that is read whole.

    Raises:
        KeyError: there is no such entry.
        ValueError: it declares more than ``most`` bytes.
    """
    info = archive.getinfo(name)
    if info.file_size > most:
        raise ValueError(f"{name} has more than {most} bytes")
    return read_entry(archive, info)


def read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read one entry and check it against its checksum, if it has one.

    `torch.serialization.set_crc32_options(False)` writes zero for every checksum, which zipfile would refuse.
    """
    if info.CRC == 0 and hasattr(info, "CRC"):
        del info.CRC
    return archive.read(info)


def damaged_entry(path: Path, expected: str = SAVED) -> str | None:
    """Compare every entry with its checksum; return the name of the first that differs, None where all agree.

    Raises:
        RedppError: see `open_zip`.
    """
    name = "its table of contents"
    try:
        with open_zip(path, expected) as archive:
            for info in archive.infolist():
                name = info.filename
                with archive.open(info) as entry:
                    # no checksum: torch.serialization.set_crc32_options(False)
                    while info.CRC and entry.read(CHUNK):
                        pass
    except ZIP_ERRORS:
        return name
    return None


def check_claims(path: Path) -> None:
    """Refuse a file whose size is a claim.

    Raises:
        RedppError: most of the file is a hole, or it is larger than this machine's memory.
    """
    found = path.stat()
    if 0 < found.st_blocks * 512 * BOMB_RATIO + BOMB_SLACK < found.st_size:
        what = f"{path} claims {found.st_size} bytes, of which the disk holds {found.st_blocks * 512}"
        raise RedppError(what, "a whole file", "do not use this file; fetch it from its author")
    check_memory(path, found.st_size)


def check_memory(path: Path, size: int) -> None:
    """Refuse weights of so many bytes where this machine's memory is smaller.

    Raises:
        RedppError: it is.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        what = f"{path} stands for {size / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f} GiB of memory"
        raise RedppError(what, "weights that fit into memory", "use a larger machine or a smaller network")


def hostile(archive: zipfile.ZipFile, found: str, expected: str = SAVED) -> RedppError:
    """Close an archive, and return the refusal of it."""
    archive.close()
    return RedppError(found, expected, "do not use this file; fetch it from its author")


def _offences(infos: list[zipfile.ZipInfo]) -> Iterator[str]:
    """Yield what no entry of an archive that a program wrote in good faith does."""
    if len(infos) > MAX_ENTRIES:
        yield f"holds {len(infos)} entries"
    seen: set[str] = set()
    for info in infos:
        name = info.filename
        parts = re.split(r"[/\\]", name)
        if ".." in parts or parts[0] == "" or re.match(r"[A-Za-z]:", name):
            yield f"holds an entry that leads out of the archive: {name[:80]!r}"
        if name in seen:
            yield f"holds two entries named {name[:80]!r}"
        if info.flag_bits & 1:
            yield f"holds an encrypted entry: {name[:80]!r}"
        seen.add(name)


def _check_table(path: Path, expected: str) -> None:
    """Refuse a table of contents that would take long to read, before zipfile reads it."""
    with open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        tail = file.read(_TAIL)
    for magic, form, offset in ((_END, "<L", 12), (_END64, "<Q", 40)):
        place = tail.rfind(magic) + offset
        if place >= offset and place + struct.calcsize(form) <= len(tail):
            (size,) = struct.unpack_from(form, tail, place)
            if MAX_TABLE < size != 0xFFFFFFFF:  # which stands for a look at the other record
                raise RedppError(
                    f"{path} has a table of contents of {size} bytes", expected, "do not use this file; fetch it again"
                )


def varint(data: bytes, start: int) -> tuple[int, int] | None:
    """Return a number as Protocol Buffers write it, and the place behind it; None where it has no end in ten bytes."""
    number = 0
    for k, byte in enumerate(data[start : start + 10]):
        number |= (byte & 0x7F) << (7 * k)
        if byte < 0x80:
            return number, start + k + 1
    return None
