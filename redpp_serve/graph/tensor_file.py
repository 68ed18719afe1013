"""The safetensors format, read strictly and written in parts, so that an archive serves where only torch is installed.

A file is 8 bytes little-endian header length, a JSON header, then the tensors' data without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 32 << 20  # bytes; that of a network of ten thousand tensors has 1.3 MB
_LENGTH, _METADATA = 8, "__metadata__"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file: dtype, shape, and its range of bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A file's tensors by name, each read when it is asked for.

    Args:
        data: the file's bytes, or a map of them.

    Attributes:
        entries: name -> where the tensor lies, in the order of the data.
        metadata: the header's texts by name.

    Raises:
        ValueError: a header out of bounds, an unknown dtype, or data ranges that overlap, leave gaps or do not
            match their shapes.
    """

    def __init__(self, data: bytes | mmap.mmap) -> None:
        base = _start(data[:_LENGTH], len(data))
        self.entries, self.metadata = _described(data[_LENGTH:base], base, len(data))
        self._data = data

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        own = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        own.numpy().data[:] = memoryview(self._data)[entry.start : entry.stop]
        return own.view(entry.dtype).view(entry.shape)


def _start(length: bytes, size: int) -> int:
    """Return where the data begins in a file of that many bytes that begins with ``length``."""
    header = int.from_bytes(length, "little")
    if len(length) < _LENGTH or header > size - _LENGTH:
        raise ValueError("a weights header longer than the file")
    if header > MAX_HEADER:
        raise ValueError(f"a weights header of {header >> 20} MiB, more than {MAX_HEADER >> 20}")
    return _LENGTH + header


def _described(text: bytes, base: int, size: int) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Return where a header says that the tensors lie, in the order of the data, and its texts."""
    header = json.loads(text)
    metadata = header.pop(_METADATA, None) or {}
    entries: dict[str, Stored] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        start, stop = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if not all(type(number) is int and 0 <= number < 1 << 40 for number in (start, stop, *shape)):
            raise ValueError(f"tensor {name[:60]!r} has a shape or data range of other than sizes")
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name[:60]!r} has a data range that does not fit its shape or neighbours")
        end = stop
        if base + stop > size:
            raise ValueError(f"tensor {name[:60]!r} ends past the end of the file")
        entries[name] = Stored(dtype, tuple(shape), base + start, base + stop)
    if base + end != size:
        raise ValueError("bytes behind the last tensor")
    return entries, metadata


def read_safetensors(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], str]:
    """Read all tensors by name, and the SHA-256 of what was read; each byte is copied once.

    Args:
        file: where the safetensors file begins.
        size: its bytes.

    Raises:
        ValueError: see `TensorFile`.
    """
    length = file.read(min(_LENGTH, size))
    base = _start(length, size)
    text = file.read(base - _LENGTH)
    digest = hashlib.sha256(length + text)
    tensors = {}
    with ThreadPoolExecutor(1) as beside:  # a digest takes longer than reading what the system has kept
        for name, entry in _described(text, base, size)[0].items():
            own = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
            if file.readinto(own.numpy().data) != len(own):  # type: ignore[attr-defined]
                raise ValueError("a file that ends early")
            beside.submit(digest.update, own.numpy().data)
            tensors[name] = own.view(entry.dtype).view(entry.shape)
    return tensors, digest.hexdigest()


def safetensors_parts(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes]:
    """Yield the bytes of a file of tensors of one dtype, tensor by tensor.

    Args:
        shapes: name -> shape, in the order of the file.
        dtype: the dtype of all of them.
        tensors: the tensors in that order, on the CPU; each is asked for when its bytes are needed.
        metadata: texts for the header.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data is aligned
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors:
        yield tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
