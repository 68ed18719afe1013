"""Write an ONNX model of a graph, operator by operator: no export, no tracing, a dynamic batch.

ONNX is the language in which both CPU engines take a network, so the translation is written once. It is meant for the
graphs that are served (folded and fused, `runtime.serving_graph`), but takes stored ones as well. Shapes that depend on
the batch are found by running the graph at batch sizes 1 and 2, and where sizes of the inputs vary, at some of them;
`onnx_sizes` then computes such shapes in the model. What does not depend on the inputs is computed here and stored.
`onnx_builder` holds one rule for each operator.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from redpp_serve.engines.onnx_sizes import SizeExpressions, size_samples
from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import TensorType, value_sizes, value_types
from redpp_serve.graph.graph import Graph, Node, Ref, map_refs
from redpp_serve.graph.operators import INT8_WEIGHT, resolve

if TYPE_CHECKING:
    import onnx

OPSET = 20
Dimension = int | None  # None: depends on the batch, or on a size that varies
WEIGHTS = "weights.bin"  # the file beside a model that holds its large constants
_LARGE, _PAGE = 1 << 16, 4096  # bytes of a constant that goes there; where each begins, so that engines can map it
_SMALLEST = 1.2e-38  # the least normal float32; weights below it make processors crawl


class UntranslatableError(RedppError):
    """A graph that ONNX cannot express, or not by the rules here."""

    def __init__(self, found: str) -> None:
        super().__init__(found, "operators that have a rule in engines/onnx_builder.py", "use another engine or format")


class Writer:
    """Collects the nodes and constants of an ONNX model while the rules run over a graph.

    Args:
        graph: the network.
        weights: the file `WEIGHTS` to write large constants to; without one, the model holds them itself.
        signed: write the levels of eight bits from -128 on.

    Attributes:
        graph: the network.
        node: the node that is being translated.
        signed: as given.
    """

    def __init__(self, graph: Graph, weights: BinaryIO | None = None, signed: bool = False) -> None:
        import onnx  # noqa: PLC0415 - optional

        self.graph, self.signed, self._onnx, self._weights = graph, signed, onnx, weights
        self.node = Node("", "", ())
        self._makers = {node.name: node for node in graph.nodes}
        runs = [(graph, 1), (graph, 2), *((other, 1) for other in size_samples(graph))]
        self._types = [_types(each, batch) for each, batch in runs]
        self._sizes = [value_sizes(each, "cpu", batch) for each, batch in runs]
        self._expressions: SizeExpressions | None = None
        self._names: dict[str, str] = {spec.name: spec.name for spec in graph.inputs}
        self._parts: dict[str, Sequence[str]] = {}  # values that are several tensors
        self._known: dict[str, Any] = dict(graph.tensors)  # what does not depend on the inputs
        self._stored: dict[tuple[Any, ...], str] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._nodes: list[onnx.NodeProto] = []

    def build(self, rules: dict[str, Any]) -> onnx.ModelProto:
        """Translate all nodes by the rules and return the model."""
        for node in self.graph.nodes:
            self.node = node
            if node.op == INT8_WEIGHT or node.name in self._sizes[0] or self._compute(node):
                continue
            if node.op not in rules:
                raise UntranslatableError(f"the operator {node.op} ({node.name})")
            made = rules[node.op](self, *node.args, **node.kwargs)
            if isinstance(made, str):
                self._names[node.name] = made
            else:
                self._parts[node.name] = made
        outputs = list(map(self._output, self.graph.output_names, self.graph.outputs))
        helper = self._onnx.helper
        inputs = [self._value_info(spec.name, spec.name) for spec in self.graph.inputs]
        made_graph = helper.make_graph(self._nodes, "network", inputs, outputs, self._initializers)
        model: onnx.ModelProto = helper.make_model(
            made_graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9
        )
        return model

    def emit(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add an ONNX node and return the name of its (first) output."""
        return self.emit_parts(op, *inputs, outputs=outputs, **attributes)[0]

    def emit_parts(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Add an ONNX node and return the names of its outputs."""
        names = [f"{self.node.name}_{len(self._nodes)}_{k}" for k in range(outputs)]
        given = {key: value for key, value in attributes.items() if value is not None}
        self._nodes.append(self._onnx.helper.make_node(op, list(inputs), names, name=names[0], **given))
        return names

    def tensor(self, value: Any, like: torch.dtype | None = None) -> str:
        """Return the ONNX name of an argument: a reference, or a number as a constant of a dtype."""
        if isinstance(value, Ref):
            if value.name in self._names:
                return self._names[value.name]
            if value.name in self._known:
                made = self.constant(self._known[value.name], value.name)
                self._names[value.name] = made
                return made
            value = self.number(value)
        if isinstance(value, str):
            return value
        return self.constant(torch.tensor(value, dtype=like))

    def maker(self, value: Ref) -> Node | None:
        """Return the node of the graph that makes a value; None for an input or a stored tensor."""
        return self._makers.get(value.name)

    def is_tensor(self, value: Ref) -> bool:
        """Tell whether a reference is a tensor, and not a size."""
        return value.name not in self._sizes[0]

    def is_constant(self, value: Any) -> bool:
        """Tell whether a whole number among the arguments is the same for all inputs."""
        return not isinstance(value, Ref) or value.name in self._known or self._same_size(value.name)

    def weight(self, value: Ref, transposed: bool = False) -> str:
        """Return the ONNX name of a layer's weight; transposed, that of (n_in, n_out). Eight bits stay eight bits."""
        made = self.maker(value)
        permute = (1, 0) if transposed else None
        if made is None or made.op != INT8_WEIGHT:
            known = self.known(value)
            if known is not None:
                return self.constant(known, value.name, permute)
            return self.emit("Transpose", self.tensor(value), perm=permute) if transposed else self.tensor(value)
        levels, scale = (self.graph.tensors[ref.name] for ref in made.args)
        stored = self.constant(levels, made.args[0].name, permute), self.constant(scale, made.args[1].name)
        return self.emit("DequantizeLinear", *stored, axis=int(transposed))

    def parts(self, value: Ref) -> Sequence[str]:
        """Return the ONNX names of a value that is several tensors."""
        return self._parts[value.name]

    def known(self, value: Any) -> Tensor | None:
        """Return the value of an argument that does not depend on the inputs; else None."""
        found = self._known.get(value.name) if isinstance(value, Ref) else None
        return found if isinstance(found, Tensor) else None

    def number(self, value: Any) -> Any:
        """Return a number among the arguments; a size that depends on the inputs has no constant value."""
        if not isinstance(value, Ref):
            return value
        if value.name in self._known:
            return self._known[value.name]
        if not self._same_size(value.name):
            raise UntranslatableError(f"{self.node.op} ({self.node.name}) with a size that depends on {self._whose}")
        return self._sizes[0][value.name]

    def constant(self, tensor: Tensor, name: str = "", permute: Sequence[int] | None = None) -> str:
        """Store a tensor, its axes permuted where asked, and return its name."""
        key = (name, tuple(permute or ())) if name else _content(tensor)
        if key not in self._stored:
            made = f"constant_{len(self._stored)}"
            value = tensor.detach().cpu()
            value = (value.permute(*permute) if permute else value).contiguous()
            if value.is_floating_point() and value.numel() > 1:
                value = hardshrink(value, _SMALLEST)
            self._initializers.append(self._initializer(value, made))
            self._stored[key] = made
        return self._stored[key]

    def _initializer(self, value: Tensor, name: str) -> onnx.TensorProto:
        if self._weights is None or value.nbytes < _LARGE:
            return self._onnx.numpy_helper.from_array(value.numpy(), name)
        self._weights.seek(-self._weights.tell() % _PAGE, os.SEEK_CUR)
        made = self._onnx.TensorProto(name=name, dims=value.shape, data_type=self.onnx_type(value.dtype))
        made.data_location = self._onnx.TensorProto.EXTERNAL
        place = {"location": WEIGHTS, "offset": self._weights.tell(), "length": value.nbytes}
        for key, found in place.items():
            made.external_data.add(key=key, value=str(found))
        self._weights.write(value.numpy().data)
        return made

    def integers(self, values: Iterable[int]) -> str:
        """Store a vector of int64."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def dtype(self, value: Any) -> torch.dtype:
        """Return the dtype of an argument or, by name, of a value."""
        return self._type(value)[0][1]

    def dims(self, value: Any) -> tuple[Dimension, ...]:
        """Return the sizes of an argument or, by name, of a value; None where one depends on the inputs' sizes."""
        shapes = self.shapes(value)
        if len(set(map(len, shapes))) > 1:
            raise UntranslatableError(f"{self.node.op} ({self.node.name}) with a rank that depends on {self._whose}")
        return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))

    def shapes(self, value: Any) -> list[tuple[int, ...]]:
        """Return the shapes of an argument or, by name, of a value, at several batches and sizes of the inputs."""
        return [shape for shape, _ in self._type(value)]

    def rank(self, value: Any) -> int:
        """Return the number of axes of an argument."""
        return len(self.dims(value))

    def axis(self, value: Any, index: Any) -> int:
        """Return an axis counted from the front."""
        return int(self.number(index)) % max(1, self.rank(value))

    def static(self, value: Any, *axes: int) -> list[int]:
        """Return the sizes of some axes, which must not depend on the inputs' sizes."""
        dims = self.dims(value)
        found = [dims[axis] for axis in axes]
        if None in found:
            raise UntranslatableError(f"{self.node.op} ({self.node.name}) over an axis that depends on {self._whose}")
        return [size for size in found if size is not None]

    def shape(self, value: Any = None) -> str:
        """Return the ONNX vector of a value's sizes (by default the node's own), computed where they need be."""
        dims = self.dims(value or self.node.name)
        if None not in dims:
            return self.integers(size for size in dims if size is not None)
        return self.joined([self.size(value or self.node.name, axis) for axis in range(len(dims))])

    def size(self, value: Any, axis: int) -> str:
        """Return the ONNX vector (1,) of one of a value's sizes, computed where it need be."""
        known = self.dims(value)[axis]
        if known is not None:
            return self.integers([known])
        name = value.name if isinstance(value, Ref) else value
        if len(self._types) > 2:
            return self._derived(name, self.shapes(value), axis)
        a, b = (shape[axis] for shape in self.shapes(value))
        slope = b - a
        size = self.emit("Mul", self._batch(), self.integers([slope])) if slope != 1 else self._batch()
        return self.emit("Add", size, self.integers([a - slope])) if a != slope else size

    def whole(self, value: Any) -> str:
        """Return the ONNX vector (1,) of a whole number among the arguments, computed where it need be."""
        if self.is_constant(value) or len(self._types) == 2:
            return self.integers([int(self.number(value))])
        return self._derived(value.name, [(sizes[value.name],) for sizes in self._sizes], 0)

    def wholes(self, values: Sequence[Any]) -> str:
        """Return the ONNX vector of int64 of whole numbers among the arguments, see `whole`."""
        if all(map(self.is_constant, values)):
            return self.integers(int(self.number(value)) for value in values)
        return self.joined(list(map(self.whole, values)))

    def joined(self, vectors: Sequence[str]) -> str:
        """Return an ONNX vector of several."""
        return self.emit("Concat", *vectors, axis=0) if len(vectors) > 1 else vectors[0]

    def _derived(self, name: str, found: Sequence[tuple[int, ...]], axis: int) -> str:
        """Return the ONNX vector (1,) of a size that torch derives, given the sizes ``found`` in each run."""
        self._expressions = self._expressions or SizeExpressions(self)
        inputs = [{spec.name: types[spec.name][0] for spec in self.graph.inputs} for types in self._types]
        return self._expressions.vector(self._expressions.checked(name, found, inputs)[axis])

    @property
    def _whose(self) -> str:
        return "the batch" if len(self._types) == 2 else "the batch, or on a size that varies"

    def reshape(self, x: str, like: str = "") -> str:
        """Give ``x`` the shape of the node's own value, or of a value by name."""
        dims = self.dims(like or self.node.name)
        if dims.count(None) <= 1 and 0 not in dims:
            return self.emit("Reshape", x, self.integers(-1 if size is None else size for size in dims))
        return self.emit("Reshape", x, self.shape(like or None), allowzero=1)

    def cast(self, x: str, found: torch.dtype, wanted: torch.dtype) -> str:
        """Convert ``x`` where its dtype is not the wanted one."""
        return x if found == wanted else self.emit("Cast", x, to=self.onnx_type(wanted))

    def onnx_type(self, dtype: torch.dtype) -> int:
        """Return ONNX's number of a dtype."""
        names = {torch.bool: "BOOL", torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.float16: "FLOAT16"}
        name = names.get(dtype) or str(dtype).removeprefix("torch.").upper()
        return int(getattr(self._onnx.TensorProto, name))

    def _batch(self) -> str:
        """Return the ONNX vector (1,) of the batch size."""
        shape = self.emit("Shape", self.graph.inputs[0].name)
        return self.emit("Slice", shape, self.integers([0]), self.integers([1]))

    def _type(self, value: Any) -> list[TensorType]:
        """Return shape and dtype of a value in each run."""
        name = value.name if isinstance(value, Ref) else value
        if isinstance(self._known.get(name), Tensor):
            known = self._known[name]
            return [(tuple(known.shape), known.dtype)] * len(self._types)
        return [types[name] for types in self._types]

    def _compute(self, node: Node) -> bool:
        """Compute a node that does not depend on the inputs; return whether it is one."""
        if (filling := self._filling(node)) is not None:
            self._known[node.name] = filling
            return True
        names = list(node.refs())
        if any(name not in self._known and not self._same_size(name) for name in names):
            return False
        args, kwargs = (
            map_refs(part, lambda name: self._known.get(name, self._sizes[0].get(name)))
            for part in (node.args, tuple(node.kwargs.values()))
        )
        self._known[node.name] = resolve(node.op)(*args, **dict(zip(node.kwargs, kwargs, strict=True)))
        return True

    def _filling(self, node: Node) -> Tensor | None:
        """Return what a node makes that takes but a dtype or a shape from its tensor, such as ``new_zeros``."""
        value = {"new_zeros": 0, "zeros_like": 0, "new_ones": 1, "ones_like": 1}.get(node.op.split(".")[1])
        dims = self.dims(node.name) if value is not None else (None,)
        if value is None or None in dims:
            return None
        return torch.full([size for size in dims if size is not None], value, dtype=self.dtype(node.name))

    def _same_size(self, name: str) -> bool:
        return name in self._sizes[0] and len({sizes[name] for sizes in self._sizes}) == 1

    def _output(self, made: str, name: str) -> Any:
        self._nodes.append(self._onnx.helper.make_node("Identity", [self.tensor(Ref(name))], [made], name=made))
        return self._value_info(made, name)

    def _value_info(self, made: str, name: str) -> Any:
        dims = [self._name_of(made, axis) if size is None else size for axis, size in enumerate(self.dims(name))]
        return self._onnx.helper.make_tensor_value_info(made, self.onnx_type(self.dtype(name)), dims)

    def _name_of(self, made: str, axis: int) -> str:
        """Return a name for a size of an input or output that depends on the inputs'; equal names are equal sizes."""
        if len(self._types) == 2 or axis == 0:
            return "batch"
        varying = {spec.name: dict(spec.varying) for spec in self.graph.inputs}.get(made, {})
        return varying[axis - 1].symbol if axis - 1 in varying else f"{made}_{axis}"


def node_names(model: onnx.ModelProto, graph: Graph) -> dict[str, str]:
    """Return the name of the graph's node that each node of its ONNX model was made for, by the latter's name."""
    found = {made.name: made.name.rsplit("_", 2)[0] for made in model.graph.node}
    return found | dict(zip(graph.output_names, graph.outputs, strict=True))


def _types(graph: Graph, batch: int) -> dict[str, TensorType]:
    inputs = {spec.name: ((batch, *spec.shape), getattr(torch, spec.dtype)) for spec in graph.inputs}
    return inputs | value_types(graph, "cpu", batch)


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells small constants apart; large ones are stored under their names."""
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.flatten().tolist())
