"""Reading a safetensors file whose header has proved harmless: it may claim any length, and any number of names."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import safetensors.torch
from torch import Tensor

from redpp_serve.graph.tensor_file import MAX_HEADER

MAX_NAMES = 200_000
_LENGTH = struct.Struct("<Q")


def read_safetensors(path: Path, *, mapped: bool) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Args:
        path: the file.
        mapped: map it into memory instead of reading it; then it must not change while the tensors are used.

    Raises:
        ValueError: the header and the file do not belong together, or the header is no network's.
        SafetensorError: the header breaks a rule of the format.
    """
    _check_header(path)
    if mapped:
        return safetensors.torch.load_file(path, device="cpu")
    return safetensors.torch.load(path.read_bytes())


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
        if not 2 <= length <= size - _LENGTH.size:
            raise ValueError(f"its header claims {length} bytes of {size}")
        if length > MAX_HEADER:
            raise ValueError(f"its header has {length >> 20} MiB, more than {MAX_HEADER >> 20}")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its header is no JSON") from None
    entries = header.values() if isinstance(header, dict) else ()
    if not entries or len(entries) > MAX_NAMES or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"its header does not list from 1 to {MAX_NAMES} tensors")
    ends = [entry["data_offsets"][1] for entry in entries if _has_offsets(entry)]
    if max(ends, default=0) != size - _LENGTH.size - length:
        raise ValueError(f"its tensors do not end where the file ends, at byte {size}")


def _has_offsets(entry: dict[str, object]) -> bool:
    offsets = entry.get("data_offsets")
    return isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
