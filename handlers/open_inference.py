"""The Open Inference Protocol (version 2 of KServe's) over HTTP: requests to tensors, and outputs to replies.

JSON, and JSON followed by tensors as bytes, as Triton Inference Server speaks them, so that its clients talk to
TorchServe, too. Where it goes beyond Triton: inputs of bytes are pixels that are normalised, and inputs of type BYTES
are image files, where the model declares a preprocessing.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.answers import BINARY, JSON, Answer, Question, Served, best_classes, readable
from redpp_serve.handlers.payload import BadRequest, Reader, from_base64, parsed_rows, read_image, read_json
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.handlers.wire import LENGTH_HEADER

BYTES = "BYTES"
DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "FP32",  # numpy has none, so it travels as float32
}
_DTYPES = {word: name for name, word in DATATYPES.items() if name != "bfloat16"}
_MOST_BYTES = 1 << 30  # of a request that comes compressed
_ELEMENT = struct.Struct("<I")  # the length of one element of type BYTES


@dataclass(frozen=True)
class _Wanted:
    """One output that a request asks for: its place, whether as bytes, and how many classes instead of its values."""

    place: int
    binary: bool
    classes: int = 0


def is_open_inference(document: Any) -> bool:
    """Return whether a JSON document is a request of the protocol: a list of named tensors with their types."""
    inputs = document.get("inputs") if isinstance(document, dict) else None
    return isinstance(inputs, list) and bool(inputs) and all(isinstance(x, dict) and "datatype" in x for x in inputs)


def datatype(spec: InputSpec) -> str:
    """Return the protocol's word for an input's or an output's type."""
    return DATATYPES[spec.dtype]


@dataclass(frozen=True)
class Described:
    """One tensor of the model's metadata; -1 stands for the batch and for sizes that differ between requests."""

    name: str
    datatype: str
    shape: list[int]


def described(spec: InputSpec) -> Described:
    """Describe an input."""
    varying = dict(spec.varying)
    shape = [-1 if axis in varying else size for axis, size in enumerate(spec.shape)] or [1]
    return Described(spec.name, datatype(spec), [-1, *shape])


def described_output(name: str, found: Sequence[Tensor]) -> Described:
    """Describe an output by what the network gave, (1, ...), for inputs of several sizes."""
    sizes = zip(*(y.shape[1:] for y in found), strict=True)
    shape = [some[0] if len(set(some)) == 1 else -1 for some in sizes] or [1]
    return Described(name, DATATYPES[str(found[0].dtype).removeprefix("torch.")], [-1, *shape])


def metadata(served: Served, outputs: Sequence[Described]) -> dict[str, Any]:
    """Return the model's metadata."""
    return {
        "name": served.name,
        "versions": [served.version],
        "platform": "pytorch",
        "inputs": [asdict(described(spec)) for spec in served.inputs],
        "outputs": [asdict(output) for output in outputs],
    }


def unpacked(body: bytes | bytearray, encoding: str) -> bytes | bytearray:
    """Return a body without its compression, ``gzip`` or ``deflate``.

    Raises:
        BadRequest: it cannot be unpacked, or is larger than any request may be.
    """
    if encoding not in ("gzip", "deflate"):
        return body
    packer = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by the first bytes
    try:
        plain = packer.decompress(bytes(body), _MOST_BYTES)
    except zlib.error:
        plain = b""
    if not plain or not packer.eof:
        raise BadRequest(f"a body that is no {encoding}, expected what its Content-Encoding says")
    return plain


def split(body: bytes | bytearray, length: str | None) -> tuple[Any, memoryview]:
    """Return the document of a body, and the bytes of the tensors behind it.

    Args:
        body: the whole body.
        length: the header that says where the document ends; None where the body is the document.

    Raises:
        BadRequest: a wrong length, or no JSON.
    """
    if length is None:
        return read_json(body), memoryview(b"")
    if not length.isdecimal() or not length.isascii() or not 0 < int(length[:20]) <= len(body):
        raise BadRequest(f"{LENGTH_HEADER}: {length[:40]!r} for a body of {len(body)} bytes, expected where JSON ends")
    return read_json(body[: int(length)]), memoryview(body)[int(length) :]


def read(document: Any, tail: memoryview, served: Served, preprocess: Preprocess | None) -> Question:
    """Return what a request of the protocol asks.

    Args:
        document: its JSON.
        tail: the bytes of its tensors, one after the other.
        served: the model.
        preprocess: how images become its input; None refuses images.

    Raises:
        BadRequest: it does not fit the protocol, the model's inputs or its outputs.
    """
    if not is_open_inference(document):
        raise BadRequest('a request without "inputs" of name, shape, datatype and data, expected those')
    given, place = {}, 0
    for tensor in document["inputs"]:
        size = _parameters(tensor).get("binary_data_size")
        if size is not None and not (isinstance(size, int) and 0 <= size <= len(tail) - place):
            raise BadRequest(
                f"binary_data_size {str(size)[:40]} with {len(tail) - place} bytes left, expected its size"
            )
        given[str(tensor.get("name"))] = (tensor, None if size is None else tail[place : place + size])
        place += size or 0
    if place != len(tail) or len(given) != len(document["inputs"]):
        raise BadRequest(
            f"{len(document['inputs'])} inputs of {place} bytes in a request of {len(tail)}, expected as many"
        )
    names = [spec.name for spec in served.inputs]
    if set(given) != set(names):
        found = ", ".join(name[:40] for name in list(given)[:4])
        raise BadRequest(f"inputs {found}, expected {', '.join(names)}")
    tensors = [_tensor(*given[spec.name], Reader(spec, preprocess)) for spec in served.inputs]
    parsed = parsed_rows(tensors, served.inputs)
    return Question(parsed.tensors, _answer(document, served))


def _parameters(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    found = entry.get("parameters") or {}
    if not isinstance(found, dict):
        raise BadRequest("parameters that are no object, expected one")
    if "shared_memory_region" in found:
        raise BadRequest("a tensor in shared memory, expected its data in the request")
    return found


def _tensor(tensor: Mapping[str, Any], data: memoryview | None, reader: Reader) -> Tensor:
    """Return one input, (N, ...)."""
    spec, word, shape = reader.spec, tensor.get("datatype"), tensor.get("shape")
    if not isinstance(shape, list) or not shape or any(type(size) is not int or size < 1 for size in shape):
        raise BadRequest(f"input {spec.name!r} of shape {str(shape)[:60]}, expected positive sizes, first the batch's")
    if data is None and not isinstance(tensor.get("data"), list):
        raise BadRequest(f"input {spec.name!r} without data, expected a list or binary_data_size")
    if word == BYTES:
        files = _files(data, reader) if data is not None else [from_base64(text) for text in _flat(tensor["data"], 64)]
        if len(files) != math.prod(shape):
            raise BadRequest(f"input {spec.name!r} of {len(files)} files, expected {math.prod(shape)} for its shape")
        return torch.stack([read_image(file, spec, reader.preprocess) for file in files])
    if word not in _DTYPES:
        raise BadRequest(f"input {spec.name!r} of datatype {str(word)[:40]!r}, expected {datatype(spec)}")
    if len(shape) != len(spec.shape) + 1 and shape[1:] != [1] * (not spec.shape):
        sizes = ", ".join(map(str, spec.shape)) or "1"
        raise BadRequest(f"input {spec.name!r} of shape {shape}, expected [N, {sizes}]")
    array = _array(tensor, data, np.dtype(_DTYPES[word]), spec)
    rows = array.reshape(shape if spec.shape else shape[:1])
    found = reader.array(rows, rows.dtype.kind in "iu")
    return found if found.dim() > len(spec.shape) else found[None]


def _array(
    tensor: Mapping[str, Any], data: memoryview | None, dtype: np.dtype[Any], spec: InputSpec
) -> np.ndarray[Any, Any]:
    count = math.prod(tensor["shape"])
    if data is not None:
        if len(data) != count * dtype.itemsize:
            raise BadRequest(
                f"input {spec.name!r} of {len(data)} bytes, expected {count * dtype.itemsize} for its shape"
            )
        array = np.frombuffer(data, dtype.newbyteorder("<"))
        return array != 0 if dtype.kind == "b" else array
    flat = _flat(tensor["data"], len(tensor["shape"]))
    if len(flat) != count:
        raise BadRequest(f"input {spec.name!r} of {len(flat)} numbers, expected {count} for its shape")
    kinds = {bool} if dtype.kind == "b" else {int} if dtype.kind in "iu" else {int, float}
    if not set(map(type, flat)) <= kinds:
        raise BadRequest(f"input {spec.name!r} with data that is not {tensor['datatype']}, expected that alone")
    try:
        with np.errstate(over="ignore"):
            return np.array(flat, dtype)
    except OverflowError:
        raise BadRequest(f"input {spec.name!r} with a number out of range, expected {tensor['datatype']}") from None


def _flat(data: Any, depth: int) -> list[Any]:
    """Return the entries of a list, or of lists in it, in row-major order: the protocol takes both."""
    while depth and any(isinstance(entry, list) for entry in data):
        data = [one for entry in data for one in (entry if isinstance(entry, list) else [entry])]
        depth -= 1
    return list(data)


def _files(data: memoryview, reader: Reader) -> list[bytes]:
    """Return the elements of type BYTES: each its length in four bytes, then itself."""
    found, place = [], 0
    while place + _ELEMENT.size <= len(data):
        (size,) = _ELEMENT.unpack_from(data, place)
        place += _ELEMENT.size
        found.append(bytes(data[place : place + size]))
        place += size
    if place != len(data):
        raise BadRequest(f"input {reader.spec.name!r} of elements beyond its end, expected each after its length")
    return found


def _answer(document: Mapping[str, Any], served: Served) -> Callable[[Sequence[Tensor]], Answer]:
    wanted = _wanted(document, served)
    identifier = {} if document.get("id") in (None, "") else {"id": str(document["id"])}

    def answer(outputs: Sequence[Tensor]) -> Answer:
        written = [_output(outputs[one.place], one, served) for one in wanted]
        names = {"model_name": served.name, "model_version": served.version}
        reply = {**identifier, **names, "outputs": [entry for entry, _ in written]}
        head = json.dumps(reply, separators=(",", ":"), allow_nan=False).encode()
        if not any(one.binary for one in wanted):
            return Answer(head, JSON)
        return Answer(b"".join([head, *(data for _, data in written)]), BINARY, {LENGTH_HEADER: str(len(head))})

    return answer


def _wanted(document: Mapping[str, Any], served: Served) -> list[_Wanted]:
    always = _parameters(document).get("binary_data_output") is True
    asked = document.get("outputs") or [{"name": name} for name in served.outputs]
    found = []
    for entry in asked if isinstance(asked, list) else [asked]:
        name = entry.get("name") if isinstance(entry, dict) else None
        if name not in served.outputs:
            raise BadRequest(f"output {str(name)[:40]!r}, expected some of {', '.join(served.outputs)}")
        given = _parameters(entry)
        classes = given.get("classification", 0)
        if type(classes) is not int or classes < 0:
            raise BadRequest(f"classification {str(classes)[:40]}, expected how many classes to name")
        found.append(_Wanted(served.outputs.index(name), given.get("binary_data", always) is True, classes))
    return found


def _output(y: Tensor, wanted: _Wanted, served: Served) -> tuple[dict[str, Any], bytes]:
    """Return one output's entry of the reply, and its bytes behind it."""
    if wanted.classes:
        texts = _classes(y, wanted, served)
        shape, word = [len(y), len(texts) // len(y)], BYTES
        data = b"".join(_ELEMENT.pack(len(text)) + text for text in texts) if wanted.binary else b""
        flat: list[Any] = [] if wanted.binary else [text.decode() for text in texts]
    else:
        y = readable(y)
        shape, word = list(y.shape), DATATYPES[str(y.dtype).removeprefix("torch.")]
        shape = shape if len(shape) > 1 else [*shape, 1]  # as Triton, which has no scalars
        data = y.numpy().tobytes() if wanted.binary else b""
        flat = [] if wanted.binary else y.flatten().tolist()
    entry: dict[str, Any] = {"name": served.outputs[wanted.place], "datatype": word, "shape": shape}
    return (entry | {"parameters": {"binary_data_size": len(data)}} if wanted.binary else entry | {"data": flat}), data


def _classes(y: Tensor, wanted: _Wanted, served: Served) -> list[bytes]:
    """Return the best classes of each row in Triton's form, ``value:index:label``."""
    labels = served.labels if wanted.place == 0 else ()
    rows = best_classes(y, wanted.classes, labels)
    words = [(f"{c['value']:f}", str(c["index"]), *([c["label"]] if "label" in c else [])) for row in rows for c in row]
    return [":".join(some).encode() for some in words]
