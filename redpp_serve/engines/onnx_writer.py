"""Write an ONNX model of a graph, operator by operator: no export, no tracing, a dynamic batch.

ONNX is the language in which both CPU engines take a network, so the translation is written once. It is meant for the
graphs that are served (folded and fused, `runtime.serving_graph`), but takes stored ones as well. Shapes that depend on
the batch are found by running the graph at batch sizes 1 and 2. What does not depend on the inputs is computed here and
stored. `onnx_builder` holds one rule for each operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import TensorType, value_sizes, value_types
from redpp_serve.graph.graph import Graph, Node, Ref, map_refs
from redpp_serve.graph.operators import INT8_WEIGHT, resolve

if TYPE_CHECKING:
    import onnx

OPSET = 20
Dimension = int | None  # None: depends on the batch
_SMALLEST = 1.2e-38  # the least normal float32; weights below it make processors crawl


class UntranslatableError(RedppError):
    """A graph that ONNX cannot express, or not by the rules here."""

    def __init__(self, found: str) -> None:
        super().__init__(found, "operators that have a rule in engines/onnx_builder.py", "use another engine or format")


class Writer:
    """Collects the nodes and constants of an ONNX model while the rules run over a graph.

    Args:
        graph: the network.

    Attributes:
        graph: the network.
        node: the node that is being translated.
    """

    def __init__(self, graph: Graph) -> None:
        import onnx  # noqa: PLC0415 - optional

        self.graph, self._onnx = graph, onnx
        self.node = Node("", "", ())
        self._types = [_types(graph, batch) for batch in (1, 2)]
        self._sizes = [value_sizes(graph, "cpu", batch) for batch in (1, 2)]
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
        outputs = [self._output(k, name) for k, name in enumerate(self.graph.outputs)]
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

    def is_tensor(self, value: Ref) -> bool:
        """Tell whether a reference is a tensor, and not a size."""
        return value.name not in self._sizes[0]

    def weight(self, value: Ref, transposed: bool = False) -> str:
        """Return the ONNX name of a layer's weight; transposed, that of (n_in, n_out). Eight bits stay eight bits."""
        made = self.graph.node(value.name) if value.name not in self.graph.tensors else None
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
        """Return a number among the arguments; a size that depends on the batch has no constant value."""
        if not isinstance(value, Ref):
            return value
        if value.name in self._known:
            return self._known[value.name]
        first, second = (sizes[value.name] for sizes in self._sizes)
        if first != second:
            raise UntranslatableError(f"{self.node.op} ({self.node.name}) with a size that depends on the batch")
        return first

    def constant(self, tensor: Tensor, name: str = "", permute: Sequence[int] | None = None) -> str:
        """Store a tensor, its axes permuted where asked, and return its name."""
        key = (name, tuple(permute or ())) if name else _content(tensor)
        if key not in self._stored:
            made = f"constant_{len(self._stored)}"
            value = tensor.detach().cpu()
            value = (value.permute(*permute) if permute else value).contiguous()
            if value.is_floating_point() and value.numel() > 1:
                value = torch.where(value.abs() < _SMALLEST, torch.zeros_like(value), value)
            self._initializers.append(self._onnx.numpy_helper.from_array(value.numpy(), made))
            self._stored[key] = made
        return self._stored[key]

    def integers(self, values: Iterable[int]) -> str:
        """Store a vector of int64."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64))

    def dtype(self, value: Any) -> torch.dtype:
        """Return the dtype of an argument or, by name, of a value."""
        return self._type(value)[0][1]

    def dims(self, value: Any) -> tuple[Dimension, ...]:
        """Return the sizes of an argument or, by name, of a value; None where one depends on the batch."""
        first, second = self._type(value)
        if len(first[0]) != len(second[0]):
            raise UntranslatableError(f"{self.node.op} ({self.node.name}) with a rank that depends on the batch")
        return tuple(a if a == b else None for a, b in zip(first[0], second[0], strict=True))

    def rank(self, value: Any) -> int:
        """Return the number of axes of an argument."""
        return len(self.dims(value))

    def axis(self, value: Any, index: Any) -> int:
        """Return an axis counted from the front."""
        return int(self.number(index)) % max(1, self.rank(value))

    def static(self, value: Any, *axes: int) -> list[int]:
        """Return the sizes of some axes, which must not depend on the batch."""
        dims = self.dims(value)
        found = [dims[axis] for axis in axes]
        if None in found:
            raise UntranslatableError(f"{self.node.op} ({self.node.name}) over an axis that depends on the batch")
        return [size for size in found if size is not None]

    def shape(self, value: Any = None) -> str:
        """Return the ONNX vector of a value's sizes (by default the node's own), computed where they need be."""
        name = value.name if isinstance(value, Ref) else (value or self.node.name)
        first, second = self._type(name)
        dims = self.dims(name)
        if None not in dims:
            return self.integers(size for size in dims if size is not None)
        sizes = []
        for a, b, known in zip(first[0], second[0], dims, strict=True):
            if known is not None:
                sizes.append(self.integers([known]))
                continue
            slope = b - a
            size = self.emit("Mul", self._batch(), self.integers([slope])) if slope != 1 else self._batch()
            sizes.append(self.emit("Add", size, self.integers([a - slope])) if a != slope else size)
        return self.emit("Concat", *sizes, axis=0) if len(sizes) > 1 else sizes[0]

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

    def _type(self, value: Any) -> tuple[TensorType, TensorType]:
        name = value.name if isinstance(value, Ref) else value
        if isinstance(self._known.get(name), Tensor):
            known = self._known[name]
            return ((tuple(known.shape), known.dtype),) * 2
        return self._types[0][name], self._types[1][name]

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
        return name in self._sizes[0] and self._sizes[0][name] == self._sizes[1][name]

    def _output(self, index: int, name: str) -> Any:
        made = f"output_{index}"
        self._nodes.append(self._onnx.helper.make_node("Identity", [self.tensor(Ref(name))], [made], name=made))
        return self._value_info(made, name)

    def _value_info(self, made: str, name: str) -> Any:
        dims = ["batch" if size is None else size for size in self.dims(name)]
        return self._onnx.helper.make_tensor_value_info(made, self.onnx_type(self.dtype(name)), dims)


def node_names(model: onnx.ModelProto, graph: Graph) -> dict[str, str]:
    """Return the name of the graph's node that each node of its ONNX model was made for, by the latter's name."""
    found = {made.name: made.name.rsplit("_", 2)[0] for made in model.graph.node}
    return found | {f"output_{index}": name for index, name in enumerate(graph.outputs)}


def _types(graph: Graph, batch: int) -> dict[str, TensorType]:
    inputs = {spec.name: ((batch, *spec.shape), getattr(torch, spec.dtype)) for spec in graph.inputs}
    return inputs | value_types(graph, "cpu", batch)


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells small constants apart; large ones are stored under their names."""
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.flatten().tolist())
