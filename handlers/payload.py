"""Turn one request's body into tensors. Every refusal concerns that request alone, never its batch.

Accepted: ``.npy`` bytes, ``.npz`` bytes (several inputs, by name), JSON (nested lists, or an object with the key
``inputs`` or ``instances``, with files in Base64 among them), image files where the artifact declares a preprocessing,
and forms with one file for each input. A leading dimension counts items.
"""

from __future__ import annotations

import base64
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.graph.graph import InputSpec
from redpp_serve.graph.ranges import outside
from redpp_serve.graph.sizes import disagreement, fits, in_words, largest, nearest
from redpp_serve.handlers.image_files import NAMES, ImageRefused, is_image
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.handlers.wire import INSTANCES_KEY

NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
BASE64_KEY = "b64"
_ZIP_END, _ZIP_TABLE_BYTES = b"PK\x05\x06", 1024  # for each entry, of which names take the most
_NPY_HEADER_BYTES = 16384
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class BadRequest(ValueError):
    """A request cannot be served; the message says in one sentence what was found and what was expected."""


@dataclass(frozen=True)
class Parsed:
    """What a body holds.

    Attributes:
        tensors: (N, ...) for each input.
        one: it holds one item, without a leading dimension or with one of 1, so that its answer has none either.
        listed: it lists ``instances``, and its answer lists ``predictions``.
    """

    tensors: tuple[Tensor, ...]
    one: bool
    listed: bool = False


@dataclass(frozen=True)
class Reader:
    """Reads what stands for one input, or for several items of it.

    Attributes:
        spec: the input.
        preprocess: how images become it; None refuses images.
    """

    spec: InputSpec
    preprocess: Preprocess | None = None

    def value(self, value: Any) -> Tensor:
        """Read nested lists, or ``{"b64": ...}``: a file in Base64."""
        if not isinstance(value, dict):
            return _from_lists(value, self)
        if set(value) != {BASE64_KEY} or not isinstance(value[BASE64_KEY], str):
            raise BadRequest(f'input {self.spec.name!r} as an object, expected lists or {{"{BASE64_KEY}": "..."}}')
        return self.file(from_base64(value[BASE64_KEY]))

    def file(self, data: bytes | bytearray) -> Tensor:
        """Read a file: .npy, an image or JSON."""
        if data.startswith(NPY):
            return _read_npy(data, self)
        if is_image(data):
            return read_image(bytes(data), self.spec, self.preprocess)
        try:
            return self.value(json.loads(bytes(data)))
        except (ValueError, RecursionError) as error:
            if isinstance(error, BadRequest):
                raise
            raise BadRequest(
                f"input {self.spec.name!r} as {len(data)} bytes of no known kind, expected .npy, JSON or an image"
            ) from None

    def array(self, array: np.ndarray[Any, Any], pixels: bool) -> Tensor:
        """Check an array, ``(*shape)`` or with a leading dimension, whose bytes are pixels where ``pixels`` says so."""
        _check_shape(array.shape, self.spec)
        return _checked(_normalised(array, self) if pixels else array, self.spec)


def parse(item: Mapping[str, Any], inputs: Sequence[InputSpec], preprocess: Preprocess | None) -> tuple[Tensor, ...]:
    """Return one tensor for each input, without batch dimension.

    Args:
        item: one request, as TorchServe hands it over.
        inputs: what the network takes.
        preprocess: how images become its input; None refuses images.

    Raises:
        BadRequest: the body is empty, of no known kind, does not fit the inputs, or holds several items.
    """
    parsed = parse_items(item, inputs, preprocess)
    if len(parsed.tensors[0]) != 1:
        raise BadRequest(f"{len(parsed.tensors[0])} items, expected one")
    return tuple(x[0] for x in parsed.tensors)


def parse_items(item: Mapping[str, Any], inputs: Sequence[InputSpec], preprocess: Preprocess | None) -> Parsed:
    """Return the tensors of all items in a body, (N, ...) for each input.

    Raises:
        BadRequest: the body is empty, of no known kind, or does not fit the inputs.
    """
    readers = [Reader(spec, preprocess) for spec in inputs]
    if len(item) > 1 and len(inputs) > 1:
        return parsed_rows(_from_form(item, readers), inputs)
    body = next(iter(item.values())) if len(item) == 1 else item.get("body", item.get("data"))
    if isinstance(body, (dict, list)):
        return _from_document(body, readers)
    if isinstance(body, str):
        body = body.encode()
    if not isinstance(body, (bytes, bytearray)) or not body:
        raise BadRequest(
            f"an empty body or a form of several fields, expected the input itself as .npy, .npz, JSON or an image "
            f"({NAMES}) with Content-Type application/octet-stream or application/json, or a form with one file for "
            "each input"
        )
    if body.startswith(ZIP):
        return parsed_rows(_read_npz(body, readers), inputs)
    if body.startswith(NPY):
        return parsed_rows((_only(readers, "a .npy array").file(body),), inputs)
    if is_image(body):
        return parsed_rows((_only(readers, "an image").file(body),), inputs)
    return _from_document(read_json(body), readers)


def read_json(body: bytes | bytearray) -> Any:
    """Return the document that a body holds.

    Raises:
        BadRequest: it is no JSON.
    """
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise BadRequest(
            f"{len(body)} bytes of no known kind, expected .npy, .npz, JSON or an image ({NAMES}) "
            "(binary formats with Content-Type application/octet-stream)"
        ) from None


def from_base64(text: str) -> bytes:
    """Return the bytes that a text holds in Base64.

    Raises:
        BadRequest: it is no Base64, or empty.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:  # also for what is not ASCII
        data = b""
    if not data:
        raise BadRequest("a text that is no Base64, expected a file in Base64 without line breaks")
    return data


def parsed_rows(tensors: Sequence[Tensor], inputs: Sequence[InputSpec]) -> Parsed:
    """Give every input a leading dimension, as long in each.

    Raises:
        BadRequest: inputs of different numbers of items, or whose sizes disagree.
    """
    one = all(x.dim() == len(spec.shape) for x, spec in zip(tensors, inputs, strict=True))
    rows = [x if x.dim() > len(spec.shape) else x[None] for x, spec in zip(tensors, inputs, strict=True)]
    if len({len(x) for x in rows}) > 1:
        raise BadRequest(f"inputs of {' and '.join(str(len(x)) for x in rows)} items, expected as many in each")
    if wrong := disagreement(inputs, [x.shape[1:] for x in rows]):
        raise BadRequest(f"inputs with {wrong}, expected the same")
    return Parsed(tuple(rows), one)


def _from_form(item: Mapping[str, Any], readers: Sequence[Reader]) -> tuple[Tensor, ...]:
    _check_names(item, readers, "a form")
    fields = [item[reader.spec.name] for reader in readers]
    return tuple(
        reader.file(field.encode() if isinstance(field, str) else field)
        for reader, field in zip(readers, fields, strict=True)
    )


def _only(readers: Sequence[Reader], found: str) -> Reader:
    if len(readers) != 1:
        names = ", ".join(reader.spec.name for reader in readers)
        raise BadRequest(
            f"{found} for a network with {len(readers)} inputs, expected .npz, JSON or a form with {names}"
        )
    return readers[0]


def read_image(data: bytes, spec: InputSpec, preprocess: Preprocess | None) -> Tensor:
    """Return an image as the network's input, of the nearest size that it takes.

    Raises:
        BadRequest: no preprocessing is declared, or it is no image that can be read.
    """
    if preprocess is None:
        raise BadRequest("an image, but this model declares no preprocessing, expected .npy, .npz or JSON")
    try:
        return _checked(preprocess.image(data, partial(nearest, spec) if spec.varying else None).numpy(), spec)
    except ImageRefused as error:
        raise BadRequest(str(error)) from error


def _read_npy(data: bytes | bytearray, reader: Reader) -> Tensor:
    """Check the header against the input before any memory is set aside for what it claims."""
    spec, stream = reader.spec, io.BytesIO(bytes(data[:_NPY_HEADER_BYTES]))
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
    return reader.array(array.reshape(shape, order="F" if fortran else "C"), dtype.kind in "iu")


def _read_npz(data: bytes | bytearray, readers: Sequence[Reader]) -> tuple[Tensor, ...]:
    _check_table(data, len(readers))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(readers) == 1 and len(entries) == 1:
                (info,) = entries.values()  # a single array is the only input, whatever its name
                entries = {readers[0].spec.name: info}
            _check_names(entries, readers, "an .npz")
            # Several items fit that are stored as they are; compressed ones no more than one item may take.
            return tuple(_read_npy(_unpack(archive, entries[r.spec.name], r.spec, len(data)), r) for r in readers)
    except BadRequest:
        raise
    except Exception as error:  # zipfile and its decompressors raise many types on damaged files
        raise BadRequest("a zip file that cannot be read, expected the .npz of numpy.savez") from error


def _check_table(data: bytes | bytearray, count: int) -> None:
    """Refuse a zip of far more entries than inputs before zipfile reads its table, which takes seconds."""
    end = data.rfind(_ZIP_END)
    size = int.from_bytes(data[end + 12 : end + 16], "little")  # bytes of the table
    if end >= 0 and size > _ZIP_TABLE_BYTES * (1 + count):
        raise BadRequest(f"an .npz whose list of entries has {size} bytes, expected {count} entries")


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, spec: InputSpec, packed: int) -> bytes:
    # 16 bytes: the widest dtype; stops decompression bombs
    limit = max(packed, math.prod(largest(spec)) * 16 + _NPY_HEADER_BYTES)
    with archive.open(info) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BadRequest(f"input {spec.name!r} with more than {limit} bytes, expected {_expected(spec)}")
    return data


def _from_document(document: Any, readers: Sequence[Reader]) -> Parsed:
    if isinstance(document, dict) and INSTANCES_KEY in document:
        return _from_instances(document[INSTANCES_KEY], readers)
    if isinstance(document, dict) and set(document) != {BASE64_KEY}:
        if "inputs" not in document:
            raise BadRequest(
                f'a JSON object with keys {_some(document)}, expected the key "inputs" or "{INSTANCES_KEY}"'
            )
        document = document["inputs"]
    return parsed_rows(_from_item(document, readers), [reader.spec for reader in readers])


def _from_instances(items: Any, readers: Sequence[Reader]) -> Parsed:
    """Read a list of items, each as `_from_item` takes it."""
    if not isinstance(items, list) or not items:
        raise BadRequest(f'"{INSTANCES_KEY}" that list nothing, expected a list of one or more items')
    inputs = [reader.spec for reader in readers]
    parsed = [parsed_rows(_from_item(item, readers), inputs) for item in items]
    columns = list(zip(*(one.tensors for one in parsed), strict=True))
    if not all(one.one for one in parsed) or any(len({x.shape for x in column}) > 1 for column in columns):
        raise BadRequest(f'"{INSTANCES_KEY}" of different shapes, expected items of one shape, each without others')
    return Parsed(tuple(torch.cat(column) for column in columns), one=False, listed=True)


def _from_item(document: Any, readers: Sequence[Reader]) -> tuple[Tensor, ...]:
    if isinstance(document, dict) and (len(readers) > 1 or set(document) != {BASE64_KEY}):
        _check_names(document, readers, "JSON inputs")
        values = [document[reader.spec.name] for reader in readers]
    elif len(readers) == 1:
        values = [document]
    elif isinstance(document, list) and len(document) == len(readers):
        values = document
    else:
        raise BadRequest(f"JSON that is not one entry for each input, expected {len(readers)} entries")
    return tuple(reader.value(value) for reader, value in zip(readers, values, strict=True))


def _from_lists(value: Any, reader: Reader) -> Tensor:
    """Check nested lists before numpy sees them: it turns strings among numbers into one huge array of strings."""
    spec = reader.spec
    shape, level = [], value
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
    _check_shape(shape, spec)
    flat = [value]
    for size in shape:
        if any(type(row) is not list or len(row) != size for row in flat):
            raise BadRequest(f"input {spec.name!r} with rows of unequal length, expected {_expected(spec)}")
        flat = list(chain.from_iterable(flat))
    kinds = set(map(type, flat))
    if not kinds <= {int, float, bool}:
        names = _some(sorted(kind.__name__ for kind in kinds - {int, float, bool}))
        raise BadRequest(f"input {spec.name!r} with entries of type {names}, expected numbers")
    try:
        array = np.array(flat, dtype="float64" if float in kinds else "int64" if int in kinds else "bool")
    except OverflowError:
        raise BadRequest(f"input {spec.name!r} with a number out of range, expected {spec.dtype}") from None
    # JSON tells no bytes from floats: whole numbers beyond those that a normalised image may hold are pixels.
    return reader.array(array.reshape(shape), array.dtype.kind == "i" and int(array.max(initial=0)) > 1)


def _normalised(array: np.ndarray[Any, Any], reader: Reader) -> np.ndarray[Any, Any]:
    """Normalise pixels of 8 bits for a network of floats as an image's would be; other arrays stay as they are.

    Raises:
        BadRequest: they are no bytes, or nothing says how they are normalised.
    """
    spec, preprocess = reader.spec, reader.preprocess
    if not getattr(torch, spec.dtype).is_floating_point or (preprocess is not None and preprocess.keeps_bytes):
        return array
    if preprocess is None:
        if array.dtype == np.uint8 and len(spec.shape) > 1:
            raise BadRequest(
                f"input {spec.name!r} as bytes, but this model declares no preprocessing, expected {spec.dtype} as the "
                "network was trained on"
            )
        return array
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= 255:
        raise BadRequest(
            f"input {spec.name!r} of whole numbers, {array.min()} to {array.max()}, expected pixels of 0 to 255, or "
            f"{spec.dtype} normalised as {preprocess.in_words()}"
        )
    return preprocess.values(array.astype(np.uint8))


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
    tensor = torch.from_numpy(converted).to(dtype)
    if tensor.dim() > len(spec.shape) and len(tensor) == 1:
        tensor = tensor[0]
    if wrong := outside(spec, tensor):
        raise BadRequest(f"input {spec.name!r} with {wrong}")
    if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        raise BadRequest(f"input {spec.name!r} with NaN, infinity or values beyond {spec.dtype}, expected finite ones")
    return tensor


def _check_shape(shape: Sequence[int], spec: InputSpec) -> None:
    if not fits(spec, shape) and not (len(shape) > 0 and shape[0] > 0 and fits(spec, shape[1:])):
        shown = str(tuple(shape)) if len(shape) <= 8 else f"{len(shape)} dimensions"
        several = f"(N, {', '.join(map(str, spec.shape))})" if spec.shape else "(N,)"
        expected = in_words(spec) if spec.varying else f"{spec.shape}, or {several} for N of them"
        raise BadRequest(f"input {spec.name!r} of shape {shown}, expected {expected}")


def _expected(spec: InputSpec) -> str:
    return in_words(spec) if spec.varying else f"shape {spec.shape}"


def _check_names(found: Mapping[str, Any], readers: Sequence[Reader], kind: str) -> None:
    names = [reader.spec.name for reader in readers]
    if set(found) != set(names):
        raise BadRequest(f"{kind} with {_some(found)}, expected {', '.join(names)}")


def _some(names: Any) -> str:
    listed = [str(name)[:40] for name in names]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "") if listed else "nothing"
