"""Read an ONNX file of unknown origin as plain data: what it holds is counted and bounded first, and nothing runs.

The format is that of onnx.proto (IR versions 3 to 13) and of docs/ExternalData.md. Neither onnx's checker nor its shape
inference sees the file: they are C++ and trust it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from redpp_serve.archives import BOMB_RATIO
from redpp_serve.capture.sniff import first_line, shorten
from redpp_serve.errors import RedppError

MOST_BYTES = 2 << 30  # protobuf's own limit
MOST_NODES = 200_000
OPSETS = range(7, 27)
ML = "ai.onnx.ml"
# NumPy's types by ONNX's number (TensorProto.DataType); of the others torch has none, or cannot compute in them.
TYPES = {
    number: np.dtype(name)
    for name, number in {
        **{"float32": 1, "float64": 11, "float16": 10, "bool": 9},
        **{"uint8": 2, "int8": 3, "int16": 5, "int32": 6, "int64": 7},
    }.items()
}
_DOMAINS = ("", "ai.onnx", ML)
_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")
_QUANTIZED_INTEGER = ("ConvInteger", "MatMulInteger")
_EXPECTED = "an ONNX model of a feed-forward network: operators of the standard, opset 7 to 26, weights of numbers"

Array = np.ndarray[Any, Any]


class Text:
    """Stands for a value of text, such as the names of classes; what is computed from it is left out."""


@dataclass(frozen=True)
class OnnxNode:
    """One call of an operator.

    Attributes:
        op: its name; operators of ai.onnx.ml carry the domain.
        name: what the exporter called it, possibly nothing.
        inputs: names of values, empty where an optional one is left out.
        outputs: likewise.
        attributes: numbers, texts, arrays, and lists of them.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def scope(self) -> str:
        """The layer that exporters put into the name: of /layer1/layer1.0/conv1/Conv it is layer1.0.conv1."""
        scope = ""
        for part in [part for part in self.name.split("/") if part][:-1]:
            scope = part if scope and part.startswith(f"{scope}.") else f"{scope}.{part}" if scope else part
        return scope

    def replaced(self, op: str, inputs: Iterable[str], outputs: Iterable[str]) -> OnnxNode:
        """Return another call, without attributes, under this one's name."""
        return OnnxNode(op, self.name, tuple(inputs), tuple(outputs), {})


@dataclass(frozen=True)
class OnnxInput:
    """An input of the model.

    Attributes:
        name: as the file says.
        shape: sizes of all dimensions, None for those that vary; None where the file says nothing.
        dtype: NumPy's name of its type.
    """

    name: str
    shape: tuple[int | None, ...] | None
    dtype: str


@dataclass(frozen=True)
class OnnxFile:
    """The model in a file, its nodes in an order of execution.

    Attributes:
        opset: the version of the operators.
        inputs: without those that have a stored value.
        outputs: names.
        constants: stored values by name.
        nodes: the calls.
    """

    opset: int
    inputs: tuple[OnnxInput, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Array | Text]
    nodes: tuple[OnnxNode, ...]


def refused(path: Path, found: str, do: str = "export the network again, or give its PyTorch weights") -> RedppError:
    """Make the refusal of an ONNX file."""
    return RedppError(f"{path} is an ONNX model {found}", _EXPECTED, do)


def shown(name: str) -> str:
    """Return a name of the file, fit to print."""
    return "".join(c if c.isprintable() else "?" for c in name)[:80]


def read_onnx_file(path: Path) -> OnnxFile:
    """Read a model and the weights that it keeps in other files of its folder.

    Raises:
        RedppError: onnx is not installed; the bytes are damaged; or the model holds what a feed-forward network of
            standard operators does not need: control flow, functions, other domains, quantised or sparse weights.
    """
    try:
        import onnx  # noqa: PLC0415
    except ImportError as error:
        raise RedppError(f"{path} is an ONNX model, and onnx is not installed", "onnx", "pip install onnx") from error
    if path.stat().st_size >= MOST_BYTES:
        raise refused(path, f"of {path.stat().st_size} bytes; protobuf reads fewer than {MOST_BYTES}")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's implementations raise different types
        raise refused(path, f"that cannot be read: {first_line(error)}", "fetch or save the file again") from error
    opset = _check(path, proto)
    reader = _Tensors(path)
    graph = proto.graph
    constants = {tensor.name: reader.read(tensor) for tensor in graph.initializer}
    nodes = tuple(OnnxNode(*_call(path, node, reader)) for node in graph.node)
    inputs = tuple(_input(path, value) for value in graph.input if value.name not in constants)
    outputs = tuple(value.name for value in graph.output)
    if not inputs or not outputs:
        raise refused(path, f"with {len(inputs)} inputs and {len(outputs)} outputs")
    _check_order(path, nodes, {*constants, *(value.name for value in inputs)}, outputs)
    return OnnxFile(opset, inputs, outputs, constants, nodes)


def _check(path: Path, proto: Any) -> int:
    """Return the version of the operators, once the model is known to hold nothing but a graph of them."""
    graph, versions = proto.graph, {entry.domain: entry.version for entry in proto.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 0))
    if len(graph.node) > MOST_NODES:
        raise refused(path, f"with {len(graph.node)} calls, more than {MOST_NODES}")
    if opset not in OPSETS:
        do = f"export it with an opset from {OPSETS[0]} to {OPSETS[-1]}"
        raise refused(path, f"of opset {opset}" if versions else "that names no opset", do)
    foreign = {node.domain for node in graph.node if node.domain not in _DOMAINS}
    if foreign:
        calls = (f"{node.domain}.{node.op_type}" for node in graph.node if node.domain in foreign)
        do = "export it without custom operators, and do not optimize it for one engine before"
        raise refused(path, f"with operators of other domains: {shorten(map(shown, dict.fromkeys(calls)))}", do)
    ops = {node.op_type for node in graph.node}
    if proto.functions or proto.training_info:
        raise refused(path, "with functions of its own or training information", "export it inlined, for inference")
    if found := sorted(ops.intersection(_CONTROL_FLOW)):
        raise refused(path, f"with control flow: {', '.join(found)}", "export a network without loops and branches")
    if found := sorted(ops.intersection((*_QUANTIZED, *_QUANTIZED_INTEGER))):
        raise refused(path, f"that is quantized: {', '.join(found)}", "give the model from before it was quantized")
    if graph.sparse_initializer:
        raise refused(path, "with sparse weights", "store its weights densely")
    return int(opset)


def _check_order(path: Path, nodes: Sequence[OnnxNode], known: set[str], outputs: Sequence[str]) -> None:
    """Refuse values that are read before they are made, as in a circle, and values that are made twice."""
    known = {*known, ""}
    for node in nodes:
        if missing := [name for name in node.inputs if name not in known]:
            raise refused(path, f"whose {shown(node.op)} reads {shown(missing[0])!r} before anything makes it")
        made = [name for name in node.outputs if name]
        if repeated := [name for name in made if name in known]:
            raise refused(path, f"that makes {shown(repeated[0])!r} twice")
        known.update(made)
    if absent := [name for name in outputs if name not in known]:
        raise refused(path, f"without anything that makes its output {shown(absent[0])!r}")


def _input(path: Path, value: Any) -> OnnxInput:
    if value.type.WhichOneof("value") != "tensor_type":
        raise refused(path, f"whose input {shown(value.name)!r} is no tensor")
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return OnnxInput(value.name, None, _numpy_name(path, kind.elem_type))
    sizes = [d.dim_value if d.WhichOneof("value") == "dim_value" and d.dim_value > 0 else None for d in kind.shape.dim]
    return OnnxInput(value.name, tuple(sizes), _numpy_name(path, kind.elem_type))


def _numpy_name(path: Path, kind: int) -> str:
    dtype = TYPES.get(kind)
    if dtype is None:
        raise refused(path, f"with values of type {_type_name(kind)}")
    return dtype.name


def _type_name(kind: int) -> str:
    import onnx  # noqa: PLC0415

    return onnx.TensorProto.DataType.Name(kind) if kind in onnx.TensorProto.DataType.values() else str(kind)


def _call(path: Path, node: Any, reader: _Tensors) -> Iterator[Any]:
    op = f"{ML}.{node.op_type}" if node.domain == ML else node.op_type
    return iter((op, node.name, tuple(node.input), tuple(node.output), dict(_attributes(path, node, reader))))


def _attributes(path: Path, node: Any, reader: _Tensors) -> Iterator[tuple[str, Any]]:
    for attribute in node.attribute:
        kind = attribute.DESCRIPTOR.enum_types_by_name["AttributeType"].values_by_number.get(attribute.type)
        kind_name = kind.name if kind else "?"
        readers: dict[str, Callable[[Any], Any]] = {
            "FLOAT": lambda a: a.f,
            "INT": lambda a: a.i,
            "STRING": lambda a: a.s.decode("utf-8", "replace"),
            "TENSOR": lambda a: reader.read(a.t),
            "FLOATS": lambda a: list(a.floats),
            "INTS": lambda a: list(a.ints),
            "STRINGS": lambda a: [s.decode("utf-8", "replace") for s in a.strings],
        }
        if kind_name not in readers:
            raise refused(path, f"whose {shown(node.op_type)} has an attribute of type {kind_name}")
        yield attribute.name, readers[kind_name](attribute)


class _Tensors:
    """Reads stored tensors, inside the file or beside it, each no larger than what is stored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[Path, int] = {}
        self.taken = 0

    def read(self, tensor: Any) -> Array | Text:
        """Return one tensor as a read-only or own array."""
        name = shown(tensor.name)
        if _type_name(tensor.data_type) == "STRING":
            return Text()
        dtype = TYPES.get(tensor.data_type)
        if dtype is None:
            raise refused(self.path, f"whose tensor {name!r} is of type {_type_name(tensor.data_type)}")
        shape = tuple(tensor.dims)
        if any(size < 0 for size in shape) or len(shape) > 16:
            raise refused(self.path, f"whose tensor {name!r} has the shape {shape[:16]}")
        count = math.prod(shape)
        if tensor.data_location == tensor.EXTERNAL:
            data: Any = self._external(tensor, count * dtype.itemsize)
        elif tensor.HasField("raw_data"):
            data = tensor.raw_data
        else:
            return self._typed(tensor, dtype, shape, count)
        if len(data) != count * dtype.itemsize:
            raise self._short(name, shape, len(data), count * dtype.itemsize)
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(shape)

    def _typed(self, tensor: Any, dtype: np.dtype[Any], shape: tuple[int, ...], count: int) -> Array:
        stored = {"float32": tensor.float_data, "float64": tensor.double_data, "int64": tensor.int64_data}
        values = stored.get(dtype.name, tensor.int32_data)
        if len(values) != count:
            raise self._short(shown(tensor.name), shape, len(values) * dtype.itemsize, count * dtype.itemsize)
        if dtype.name == "float16":  # their bits, each in an integer
            return np.array(values, np.uint16).view(np.float16).reshape(shape)
        return np.array(values).astype(dtype).reshape(shape)

    def _external(self, tensor: Any, size: int) -> bytes:
        """Read weights from a file in the model's folder; links and paths that leave it are refused."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location, name = entries.get("location", ""), shown(tensor.name)
        parts = Path(location).parts
        file = self.path.parent.joinpath(*parts) if parts else self.path.parent
        steps = itertools.accumulate(parts, lambda folder, part: folder / part, initial=self.path.parent)
        leaves = not parts or Path(location).is_absolute() or ".." in parts or "\\" in location or "\0" in location
        if leaves or any(step.is_symlink() for step in list(steps)[1:]):
            raise refused(self.path, f"whose tensor {name!r} lies outside its folder, in {shown(location)!r}")
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", size))
            if not file.is_file() or min(offset, length) < 0 or offset + length > file.stat().st_size:
                raise ValueError("there are not so many bytes")
            if length != size:
                raise ValueError(f"{length} bytes for a tensor of {size}")
            self.files[file], self.taken = file.stat().st_size, self.taken + size
            if self.taken > BOMB_RATIO * sum(self.files.values()):
                raise ValueError("its tensors share bytes far too often")
            with file.open("rb") as stream:
                stream.seek(offset)
                return stream.read(size)
        except (OSError, ValueError) as error:
            do = "put the file that holds its weights beside it, as it was exported"
            raise refused(
                self.path, f"whose tensor {name!r} cannot be read from {shown(location)!r}: {first_line(error)}", do
            ) from error

    def _short(self, name: str, shape: Iterable[int], found: int, expected: int) -> RedppError:
        sizes = "x".join(map(str, shape))
        return refused(self.path, f"whose tensor {name!r} of shape {sizes} has {found} bytes, not {expected}")
