"""Turn one request's body into tensors. Every refusal concerns that request alone, never its batch.

Accepted: ``.npy`` bytes, ``.npz`` bytes (several inputs, by name), JSON (nested lists, or an object with the key
``inputs``), and PNG or JPEG bytes where the artifact declares a preprocessing.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.preprocess import ImageRefused, Preprocess

NPY, ZIP, PNG, JPEG = b"\x93NUMPY", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_NPY_HEADER_BYTES = 16384
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class BadRequest(ValueError):
    """A request cannot be served; the message says in one sentence what was found and what was expected."""


def parse(item: Mapping[str, Any], inputs: Sequence[InputSpec], preprocess: Preprocess | None) -> tuple[Tensor, ...]:
    """Return one tensor for each input, without batch dimension.

    Args:
        item: one request, as TorchServe hands it over.
        inputs: what the network takes.
        preprocess: how images become its input; None refuses images.

    Raises:
        BadRequest: the body is empty, of no known kind, or does not fit the inputs.
    """
    body = item.get("body", item.get("data"))
    if isinstance(body, (dict, list)):
        return _from_document(body, inputs)
    if isinstance(body, str):
        body = body.encode()
    if not isinstance(body, (bytes, bytearray)) or not body:
        raise BadRequest(
            "an empty body or a form, expected the input itself as .npy, .npz, JSON, PNG or JPEG "
            "with Content-Type application/octet-stream or application/json"
        )
    if body.startswith(NPY):
        return (_read_npy(body, _only(inputs, "a .npy array")),)
    if body.startswith(ZIP):
        return _read_npz(body, inputs)
    if body.startswith((PNG, JPEG)):
        return (_read_image(bytes(body), _only(inputs, "an image"), preprocess),)
    try:
        document = json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise BadRequest(
            f"{len(body)} bytes of no known kind, expected .npy, .npz, JSON, PNG or JPEG "
            "(binary formats with Content-Type application/octet-stream)"
        ) from None
    return _from_document(document, inputs)


def _only(inputs: Sequence[InputSpec], found: str) -> InputSpec:
    if len(inputs) != 1:
        names = ", ".join(i.name for i in inputs)
        raise BadRequest(f"{found} for a network with {len(inputs)} inputs, expected .npz or JSON with {names}")
    return inputs[0]


def _read_image(data: bytes, spec: InputSpec, preprocess: Preprocess | None) -> Tensor:
    if preprocess is None:
        raise BadRequest("an image, but this model declares no preprocessing, expected .npy, .npz or JSON")
    try:
        return _checked(preprocess.image(data).numpy(), spec)
    except ImageRefused as error:
        raise BadRequest(str(error)) from error


def _read_npy(data: bytes | bytearray, spec: InputSpec) -> Tensor:
    """Check the header against the input before any memory is set aside for what it claims."""
    stream = io.BytesIO(bytes(data[:_NPY_HEADER_BYTES]))
    try:
        shape, fortran, dtype = _NPY_HEADERS[np.lib.format.read_magic(stream)](stream)  # type: ignore[no-untyped-call]
    except Exception:  # numpy's header parser lets errors of tokenizer and parser through
        raise BadRequest("a .npy array with an unreadable header, expected numpy.save of a plain array") from None
    if dtype.hasobject or dtype.kind not in "fiub":
        raise BadRequest(f"a .npy array of dtype {dtype}, expected {spec.dtype} or what converts to it")
    _check_shape(shape, spec)
    size, expected = len(data) - stream.tell(), math.prod(shape) * dtype.itemsize
    if size != expected:
        raise BadRequest(f"a .npy array with {size} bytes of data, expected {expected} for its shape {tuple(shape)}")
    array = np.frombuffer(data, dtype, offset=stream.tell())
    return _checked(array.reshape(shape, order="F" if fortran else "C"), spec)


def _read_npz(data: bytes | bytearray, inputs: Sequence[InputSpec]) -> tuple[Tensor, ...]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(inputs) == 1 and len(entries) == 1:
                (info,) = entries.values()  # a single array is the only input, whatever its name
                entries = {inputs[0].name: info}
            _check_names(entries, inputs, "an .npz")
            return tuple(_read_npy(_unpack(archive, entries[i.name], i), i) for i in inputs)
    except BadRequest:
        raise
    except Exception as error:  # zipfile and its decompressors raise many types on damaged files
        raise BadRequest("a zip file that cannot be read, expected the .npz of numpy.savez") from error


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, spec: InputSpec) -> bytes:
    limit = math.prod(spec.shape) * 16 + _NPY_HEADER_BYTES  # 16 bytes: the widest dtype; stops decompression bombs
    with archive.open(info) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BadRequest(f"input {spec.name!r} with more than {limit} bytes, expected shape {spec.shape}")
    return data


def _from_document(document: Any, inputs: Sequence[InputSpec]) -> tuple[Tensor, ...]:
    if isinstance(document, dict):
        if "inputs" not in document:
            raise BadRequest(f'a JSON object with keys {_some(document)}, expected the key "inputs"')
        document = document["inputs"]
    if isinstance(document, dict):
        _check_names(document, inputs, "JSON inputs")
        values = [document[i.name] for i in inputs]
    elif len(inputs) == 1:
        values = [document]
    elif isinstance(document, list) and len(document) == len(inputs):
        values = document
    else:
        raise BadRequest(f"JSON that is not one entry for each input, expected {len(inputs)} entries")
    return tuple(_from_lists(value, spec) for value, spec in zip(values, inputs, strict=True))


def _from_lists(value: Any, spec: InputSpec) -> Tensor:
    """Check nested lists before numpy sees them: it turns strings among numbers into one huge array of strings."""
    shape, level = [], value
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
    _check_shape(shape, spec)
    flat = [value]
    for size in shape:
        if any(type(row) is not list or len(row) != size for row in flat):
            raise BadRequest(f"input {spec.name!r} with rows of unequal length, expected shape {spec.shape}")
        flat = list(chain.from_iterable(flat))
    kinds = set(map(type, flat))
    if not kinds <= {int, float, bool}:
        names = _some(sorted(kind.__name__ for kind in kinds - {int, float, bool}))
        raise BadRequest(f"input {spec.name!r} with entries of type {names}, expected numbers")
    try:
        array = np.array(flat, dtype="float64" if float in kinds else "int64" if int in kinds else "bool")
    except OverflowError:
        raise BadRequest(f"input {spec.name!r} with a number out of range, expected {spec.dtype}") from None
    return _checked(array.reshape(shape), spec)


def _checked(array: np.ndarray[Any, Any], spec: InputSpec) -> Tensor:
    """Check shape and values, convert without loss of kind, and drop a leading batch dimension of 1."""
    _check_shape(array.shape, spec)
    dtype = getattr(torch, spec.dtype)
    allowed = "fiub" if dtype.is_floating_point else "b" if dtype is torch.bool else "iub"
    if array.dtype.kind not in allowed:
        raise BadRequest(f"input {spec.name!r} of dtype {array.dtype}, expected {spec.dtype} or what converts to it")
    if array.dtype.kind in "iu" and not dtype.is_floating_point and array.size:
        limits = torch.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise BadRequest(f"input {spec.name!r} with values out of range, expected {spec.dtype}")
    target = "float32" if spec.dtype == "bfloat16" else spec.dtype
    with np.errstate(over="ignore"):
        converted = np.require(array, target, ["C", "A", "W"])
    tensor = torch.from_numpy(converted).to(dtype).reshape(spec.shape)
    if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        raise BadRequest(f"input {spec.name!r} with NaN, infinity or values beyond {spec.dtype}, expected finite ones")
    return tensor


def _check_shape(shape: Sequence[int], spec: InputSpec) -> None:
    if tuple(shape) not in (spec.shape, (1, *spec.shape)):
        shown = str(tuple(shape)) if len(shape) <= 8 else f"{len(shape)} dimensions"
        raise BadRequest(f"input {spec.name!r} of shape {shown}, expected {spec.shape} or {(1, *spec.shape)}")


def _check_names(found: Mapping[str, Any], inputs: Sequence[InputSpec], kind: str) -> None:
    names = [i.name for i in inputs]
    if set(found) != set(names):
        raise BadRequest(f"{kind} with {_some(found)}, expected {', '.join(names)}")


def _some(names: Any) -> str:
    listed = [str(name)[:40] for name in names]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "") if listed else "nothing"
