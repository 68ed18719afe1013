"""A strict reader of the safetensors format, so that an archive serves where only torch is installed.

Layout (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, the data.
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_safetensors(data: bytes) -> dict[str, Tensor]:
    """All tensors by name.

    Raises:
        ValueError: a header out of bounds, an unknown dtype, or data ranges that overlap, leave gaps or do not
            match their shapes.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("a weights header longer than the file")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = memoryview(bytearray(data[8 + length :]))
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        start, stop = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if not all(type(size) is int and 0 <= size < 1 << 40 for size in (start, stop, *shape)):
            raise ValueError(f"tensor {name[:60]!r} has a shape or data range of other than sizes")
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name[:60]!r} has a data range that does not fit its shape or neighbours")
        end = stop
        if stop > len(body):
            raise ValueError(f"tensor {name[:60]!r} ends past the end of the file")
        empty = stop == start
        tensors[name] = torch.empty(shape, dtype=dtype) if empty else _view(body[start:stop], dtype, shape)
    if end != len(body):
        raise ValueError("bytes behind the last tensor")
    return tensors


def _view(buffer: memoryview, dtype: torch.dtype, shape: list[int]) -> Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8).clone().view(dtype).view(shape)
