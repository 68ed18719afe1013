"""The calls of an exported program as nodes of a graph, operator by operator.

An operator has a place in a graph under the name of its functional form, in the form that `one_form` gives it. What
depends on stored tensors alone needs no place: it is computed here, as spectral norm is, and stored.
"""

from __future__ import annotations

import operator
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from redpp_serve.capture.aliasing import is_in_place
from redpp_serve.capture.one_form import FIRST_RESULT, FORMS, Call, one_form
from redpp_serve.capture.refusals import not_capturable, place, shape_by_value, without_place
from redpp_serve.graph.graph import Node, Ref
from redpp_serve.graph.operators import ALLOWED
from redpp_serve.graph.tensor_file import DTYPES

_IGNORED = ("_assert", "sym_constrain", "_check")
_IDENTITY = ("aten.alias.default", "aten.detach.default", "aten.lift_fresh.default")
# A view of a tensor in channels-last layout is not always possible, and a server lays tensors out as it likes.
_RENAMED = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
    "aten.view_as.default": "aten.reshape_as.default",
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
    "aten.new_empty.default": "aten.new_zeros.default",
    "aten.__and__.Tensor": "aten.bitwise_and.Tensor",
    "aten.__or__.Tensor": "aten.bitwise_or.Tensor",
    "aten.__xor__.Tensor": "aten.bitwise_xor.Tensor",
    "aten.__lshift__.Scalar": "aten.bitwise_left_shift.Tensor_Scalar",
    "aten.__lshift__.Tensor": "aten.bitwise_left_shift.Tensor",
    "aten.__rshift__.Scalar": "aten.bitwise_right_shift.Tensor_Scalar",
    "aten.__rshift__.Tensor": "aten.bitwise_right_shift.Tensor",
    "aten.__and__.Scalar": "aten.bitwise_and.Scalar",
    "aten.__or__.Scalar": "aten.bitwise_or.Scalar",
    "aten.__xor__.Scalar": "aten.bitwise_xor.Scalar",
    "aten._neg_view.default": "aten.neg.default",
    "aten.inverse.default": "aten.linalg_inv.default",
    "aten.det.default": "aten.linalg_det.default",
    "aten._unsafe_index.Tensor": "aten.index.Tensor",
    "aten.clip.default": "aten.clamp.default",
    "aten.clip.Tensor": "aten.clamp.Tensor",
    "aten.swapdims.default": "aten.transpose.int",
    "aten.swapaxes.default": "aten.transpose.int",
}
_PLACEMENT = ("device", "pin_memory", "layout")  # the server decides
_SERVERS = (torch.device, torch.layout)
_CONSTANTS = (fx.Node, type(None), bool, int, float, str, torch.dtype, torch.memory_format, *_SERVERS)


def nodes_of(
    exported: ExportedProgram, names: dict[str, str], taken: set[str], tensors: dict[str, Tensor], buffers: set[str]
) -> list[Node]:
    """Convert the program's calls.

    Args:
        exported: the program.
        names: the graph's names of the values so far, by fx node; gains those of the calls.
        taken: names that values of the graph already have.
        tensors: the stored tensors; gains the values of operators without a place that depend on those alone.
        buffers: names of the stored tensors that are no parameters; gains those computed from buffers alone.

    Raises:
        RedppError: an operator without a place in an artifact, by name, module and line.
    """
    nodes: list[Node] = []
    constants = _Constants(exported, tensors, names)
    for fx_node in exported.graph.nodes:
        if fx_node.op != "call_function" or any(part in str(fx_node.target) for part in _IGNORED):
            continue
        if _is_identity(fx_node):
            names[fx_node.name] = names[fx_node.args[0].name]
            continue
        if constants.must_store(fx_node):
            value = constants.value(fx_node)
            if _is_storable(value):
                name = names[fx_node.name] = _free(fx_node.name, taken)
                tensors[name] = value.contiguous()
                if constants.comes_from(fx_node) <= buffers:
                    buffers.add(name)
            elif isinstance(value, (bool, int, float)):  # what a trace keeps as a tensor and reads as a number
                _put_in(fx_node, value)
            continue
        if constants.has_shape_by_value(fx_node):
            raise shape_by_value(str(fx_node.target), place(fx_node))
        made = _nodes(fx_node, names)
        if isinstance(made, Ref):
            names[fx_node.name] = made.name
            continue
        *before, last = made
        nodes += [*before, last := replace(last, name=_free(last.name, taken))]
        if is_in_place(fx_node.target):  # a reader of the changed value under its old name must see the new one
            old = names[fx_node.args[0].name]
            names.update({k: last.name for k, v in names.items() if v == old})
        names[fx_node.name] = last.name
    return nodes


def _put_in(fx_node: fx.Node, value: float) -> None:
    """Put a number in the place of a call in all calls that read it."""
    for user in list(fx_node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: value if n is fx_node else n)


def _free(name: str, taken: set[str]) -> str:
    """Return the name, lengthened until it is free, and take it."""
    while name in taken:
        name += "_value"
    taken.add(name)
    return name


class _Constants:
    """Values that depend on stored tensors alone, computed when they are wanted.

    Args:
        exported: the program.
        tensors: the stored tensors by their names in the graph.
        names: the graph's name of each stored tensor, by the name of its fx node.
    """

    def __init__(self, exported: ExportedProgram, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
        self._nodes = constant_nodes(exported)
        self._names = {n: names[n.name] for n in self._nodes if n.name in names}  # a number has no name
        self._values: dict[fx.Node, Any] = {n: tensors[name] for n, name in self._names.items()}
        self._inner: set[fx.Node] = set()  # several results at once, and complex numbers

    def must_store(self, node: fx.Node) -> bool:
        """Return whether the call is one of an operator without a place, or of one that reads its results."""
        if node not in self._nodes or not node.all_input_nodes:
            return False
        stored = not has_place(node) or bool(self._inner & set(node.all_input_nodes))
        if stored and not _is_storable(node.meta.get("val")):
            self._inner.add(node)
        return stored

    def has_shape_by_value(self, node: fx.Node) -> bool:
        """Return whether the shape of a call's result depends on values that the inputs have, as that of x[mask]."""
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            return False
        if _op_name(node.target) != "aten.index.Tensor":
            return node not in self._nodes
        masks = [i for i in node.args[1] if isinstance(i, fx.Node) and i.meta["val"].dtype in (torch.bool, torch.uint8)]  # type: ignore[union-attr]
        return not self._nodes.issuperset(masks)

    def comes_from(self, node: fx.Node) -> set[str]:
        """Return the names of the stored tensors that a constant node depends on."""
        if node in self._names:
            return {self._names[node]}
        return {name for source in node.all_input_nodes for name in self.comes_from(source)}

    @torch.no_grad()
    def value(self, node: fx.Node) -> Any:
        """Compute a constant node's value on the CPU."""
        if node not in self._values:
            target: Any = node.target
            filled: Any = fx.map_arg((node.args, dict(node.kwargs)), self.value)
            args, kwargs = filled
            if is_in_place(node.target):
                args = (args[0].clone(), *args[1:])
            self._values[node] = target(*args, **kwargs)
        return self._values[node]


def _is_storable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in DTYPES.values()


def constant_nodes(exported: ExportedProgram) -> set[fx.Node]:
    """Find the stored tensors and the calls that depend on those alone."""
    inputs = set(exported.graph_signature.user_inputs)
    constant: set[fx.Node] = set()
    for node in exported.graph.nodes:
        stored = node.op == "placeholder" and node.name not in inputs
        if stored or (node.op == "call_function" and all(source in constant for source in node.all_input_nodes)):
            constant.add(node)
    return constant


def has_place(node: fx.Node) -> bool:
    """Return whether a call has a place in an artifact, or vanishes on the way there."""
    if node.op != "call_function" or any(part in str(node.target) for part in _IGNORED):
        return True
    name = _op_name(node.target)
    return name in ALLOWED or name in FORMS or _is_identity(node)


def is_random(node: fx.Node) -> bool:
    """Return whether a call draws random numbers; dropout and rrelu do in training alone."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = _arguments(node)
    if "dropout_p" in given:
        return bool(given["dropout_p"])
    return bool(given.get("dropout", True)) and bool(given.get("train", given.get("training", True)))


def _nodes(fx_node: fx.Node, names: dict[str, str]) -> tuple[Node, ...] | Ref:
    """Convert one call to a node, and at most one more before it; return the value itself where it changes nothing."""
    made = _converted(fx_node, names)
    if not isinstance(made, Ref) and any(node.op not in ALLOWED for node in made):
        raise without_place(str(fx_node.target), place(fx_node))
    return made


def _converted(fx_node: fx.Node, names: dict[str, str]) -> tuple[Node, ...] | Ref:
    op = _op_name(fx_node.target)
    _check_constants(fx_node)
    if op == "aten.squeeze.default":
        _check_squeeze(fx_node)
    if op in FORMS:
        values = {names[source.name]: source.meta.get("val") for source in fx_node.all_input_nodes}
        given = {key: _constant(value, names) for key, value in _arguments(fx_node).items()}
        return one_form(Call(fx_node.name, op, given, values, _reads_first_only(fx_node)))
    if op not in ALLOWED:
        return (Node(fx_node.name, op, ()),)
    args = tuple(_constant(a, names) for a in fx_node.args)
    dropped = _PLACEMENT if op != "aten.zeros.default" else (*_PLACEMENT, "memory_format")
    kwargs = {k: _constant(v, names) for k, v in fx_node.kwargs.items() if k not in dropped}
    return (Node(fx_node.name, op, args, kwargs),)


def _check_constants(node: fx.Node) -> None:
    """Refuse complex numbers and other arguments that a graph cannot write down."""
    odd = [type(value).__name__ for value in tree_leaves((node.args, node.kwargs)) if not isinstance(value, _CONSTANTS)]
    if odd:
        raise not_capturable(
            f"operator {node.target}{place(node)} takes a constant of type {odd[0]}",
            "real numbers, texts, dtypes",
            "write torch.complex(real, imaginary) for x + 1j * y",
        )


def _check_squeeze(node: fx.Node) -> None:
    """Refuse to drop all dimensions of size 1 where one of them is the batch, which has size 1 at times."""
    (source,) = node.all_input_nodes
    if any(not isinstance(size, int) for size in source.meta["val"].shape):
        raise not_capturable(
            f"squeeze(){place(node)} drops the batch dimension too when the batch has one input",
            "squeeze(dim), which drops the dimensions that it names",
            "name them, for example x.squeeze(-1).squeeze(-1) or x.flatten(1)",
        )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return a call's arguments by their names in the operator's schema, with its defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in schema}
    return {**given, **dict(zip(given, node.args, strict=False)), **node.kwargs}


def _op_name(target: Any) -> str:
    """Return an operator's name in a graph, which is that of its functional form for one that works in place."""
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return f"py.{name}"
    name = re.sub(r"_(\.\w+)$", r"\1", str(target)) if is_in_place(target) else str(target)
    return _RENAMED.get(name, name)


def _is_identity(node: fx.Node) -> bool:
    name = _op_name(node.target)
    if name == "py.getitem" and isinstance(node.args[0], fx.Node):
        return _op_name(node.args[0].target) in FIRST_RESULT and _reads_first_only(node.args[0])
    return name in _IDENTITY or ("dropout" in name and not is_random(node))


def _reads_first_only(node: fx.Node) -> bool:
    """Return whether nothing but the first of several results is read; exports list the others without a reader."""
    return all(_op_name(user.target) == "py.getitem" and (user.args[1] == 0 or not user.users) for user in node.users)


def _constant(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, fx.Node):
        return Ref(names[value.name])
    if isinstance(value, (list, tuple)):
        return [_constant(v, names) for v in value]
    return None if isinstance(value, _SERVERS) else value
