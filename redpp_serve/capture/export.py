"""From a module or exported program to a `Graph`, by ``torch.export`` with a dynamic batch.

A graph must compute what the network computes, for each input of a batch by itself. In-place operators become their
functional form, unless one writes into memory that is read under another name: then torch makes the program
functional first. The graph is compared with the network before anyone sees it.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from redpp_serve.capture.inputs import sample
from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.operators import ALLOWED
from redpp_serve.graph.passes import BATCH_NORM, fold_constants
from redpp_serve.graph.tensor_file import DTYPES

_IGNORED = ("_assert", "sym_constrain", "_check")
_IDENTITY = ("aten.alias.default", "aten.detach.default", "aten.lift_fresh.default")
_DROPOUT = (
    "aten.dropout.default",
    "aten.feature_dropout.default",
    "aten.alpha_dropout.default",
    "aten.feature_alpha_dropout.default",
)
# A view of a tensor in channels-last layout is not always possible, and a server lays tensors out as it likes.
_RENAMED = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
    "aten.view_as.default": "aten.reshape_as.default",
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.__and__.Tensor": "aten.bitwise_and.Tensor",
    "aten.__or__.Tensor": "aten.bitwise_or.Tensor",
}
_FUNCTIONAL_NORM = "aten._native_batch_norm_legit_no_training.default"
_PLACEMENT = ("device", "pin_memory", "layout")  # the server decides


def capture(source: nn.Module | ExportedProgram, inputs: Sequence[InputSpec], messages: list[str]) -> Graph:
    """Capture a network as a graph and check that the graph computes what the network computes.

    Args:
        source: an eager module, a TorchScript module, or an exported program.
        inputs: one entry an input, shapes without batch.
        messages: gains a line for each thing the user should know, such as that train mode was switched off.

    Raises:
        RedppError: the inputs do not fit, the network cannot be exported, an operator has no place in an
            artifact, or the captured graph disagrees with the network.
    """
    example = sample(inputs, 2, torch.Generator().manual_seed(0))
    module: nn.Module
    if isinstance(source, ExportedProgram):
        _refuse_fixed_batch(source)
        exported, module = source, source.module()
    else:
        module = source
        if any(m.training for m in module.modules()):
            messages.append(
                "the network was in train mode; switched to eval mode (dropout off, batch norm by statistics)"
            )
            module.eval()
        exported = _export(module, example)
    graph = fold_constants(to_graph(exported, inputs))
    check_agreement(graph, module, inputs)
    return graph


def _export(module: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    try:
        with torch.no_grad():
            module(*example)
    except Exception as error:
        shapes = ", ".join(f"{'x'.join(map(str, x.shape[1:]))}:{str(x.dtype).removeprefix('torch.')}" for x in example)
        raise RedppError(
            f"the network rejects a batch of inputs of shape {shapes}: {_reason(error)}",
            "the shape of one input without its batch dimension, one --input for each argument of forward",
            "pass the shape the network was trained on, e.g. --input 3x224x224",
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if isinstance(module, torch.jit.ScriptModule):
                from torch._export.converter import TS2EPConverter  # noqa: PLC0415 - a private module of torch

                return TS2EPConverter(module, example).convert()
            dynamic = ShapesCollection()
            for x in example:
                dynamic[x] = {0: Dim.DYNAMIC}
            try:
                return torch.export.export(module, example, dynamic_shapes=dynamic)  # type: ignore[arg-type]
            except Exception:
                return torch.export.export(module, tuple(x.clone() for x in example))  # the first try left marks
        except Exception as error:
            raise RedppError(
                f"torch.export cannot capture the network: {_reason(error)}",
                "a forward without data-dependent control flow, tensors in and tensors out",
                "rewrite the part of forward that the message names, or export it yourself and pass the .pt2 file",
            ) from error


def to_graph(exported: ExportedProgram, inputs: Sequence[InputSpec]) -> Graph:
    """Convert an exported program to a graph, in which no operator changes its arguments."""
    if writes_to_views(exported):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = exported.run_decompositions({})  # makes it functional; no operator is in the table
    signature = exported.graph_signature
    if signature.buffers_to_mutate or getattr(signature, "parameters_to_mutate", None):
        raise _not_capturable(
            "its forward changes a buffer or parameter, as batch norm does in train mode",
            "a network in eval mode, a forward that keeps no state",
        )
    tensors, names = _stored_tensors(exported)
    specs = _input_specs(exported, inputs, taken=set(tensors))
    names.update(zip(signature.user_inputs, (spec.name for spec in specs), strict=True))
    nodes = _nodes(exported, names, {*tensors, *(spec.name for spec in specs)})
    outputs = []
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            continue  # a network may write into its input; nobody reads that
        if not isinstance(spec.arg, TensorArgument):
            raise _not_capturable("an output is not a tensor", "tensor outputs")
        outputs.append(names[spec.arg.name])
    parameters = {str(spec.target) for spec in signature.input_specs if spec.kind is InputKind.PARAMETER}
    buffers = frozenset(tensors.keys() - parameters)
    return Graph(tuple(specs), tensors, tuple(nodes), tuple(outputs), buffers).pruned_of_unused()


def _refuse_fixed_batch(exported: ExportedProgram) -> None:
    values = _placeholders(exported)
    for name in exported.graph_signature.user_inputs:
        value = values.get(name)
        if isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], int):
            raise RedppError(
                f"the program was exported for batches of {value.shape[0]} only (input {name})",
                "a program that takes any batch size",
                "export it again with torch.export.export(..., dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))",
            )


def _placeholders(exported: ExportedProgram) -> dict[Any, Any]:
    return {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}


def _stored_tensors(exported: ExportedProgram) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return parameters, buffers and constants by name, and the names by placeholder."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    stores = (exported.state_dict, exported.constants)
    for entry in exported.graph_signature.input_specs:
        if entry.kind is InputKind.USER_INPUT:
            continue
        tensor = next((s[entry.target] for s in stores if entry.target in s), None)
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
            kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise _not_capturable(f"{entry.target} is of type {kind}", "tensors of real numbers, integers or booleans")
        tensors[str(entry.target)] = tensor.detach().cpu()
        names[entry.arg.name] = str(entry.target)
    return tensors, names


def _input_specs(exported: ExportedProgram, inputs: Sequence[InputSpec], taken: set[str]) -> list[InputSpec]:
    """Return the inputs under the names of forward's arguments, if the program was exported for such inputs."""
    values = _placeholders(exported)
    entries = [e for e in exported.graph_signature.input_specs if e.kind is InputKind.USER_INPUT]
    if len(entries) != len(inputs) or not all(isinstance(e.arg, TensorArgument) for e in entries):
        arguments = ", ".join(str(e.arg.name) for e in entries)
        raise _not_capturable(
            f"forward takes {arguments}; {len(inputs)} --input given", "one --input for each, all tensors"
        )
    specs = []
    for entry, spec in zip(entries, inputs, strict=True):
        value, name = values[entry.arg.name], entry.arg.name
        fits = len(value.shape) == 1 + len(spec.shape) and all(
            not isinstance(size, int) or size == mine for size, mine in zip(value.shape[1:], spec.shape, strict=True)
        )
        if not fits or value.dtype is not getattr(torch, spec.dtype):
            shape = "x".join(str(size) for size in value.shape[1:])
            raise RedppError(
                f"input {name} was exported as {shape}:{str(value.dtype).removeprefix('torch.')}, without its batch",
                "the --input that the program was exported for",
                f"pass --input {shape}",
            )
        while name in taken:
            name += "_input"
        taken.add(name)
        specs.append(replace(spec, name=name))
    return specs


def _nodes(exported: ExportedProgram, names: dict[str, str], taken: set[str]) -> list[Node]:
    """Convert the program's calls.

    Args:
        exported: the program.
        names: the graph's names of the values so far, by fx node; gains those of the calls.
        taken: names that values of the graph already have.
    """
    nodes = []
    for fx in exported.graph.nodes:
        if fx.op != "call_function" or any(part in str(fx.target) for part in _IGNORED):
            continue
        op = _op_name(fx.target)
        if _is_identity(op, fx):
            names[fx.name] = names[fx.args[0].name]
            continue
        node = _call(op, fx, names)
        while node.name in taken:
            node = replace(node, name=f"{node.name}_value")
        taken.add(node.name)
        if is_in_place(fx.target):  # a reader of the changed value under its old name must see the new one
            old = node.args[0].name
            names.update({k: node.name for k, v in names.items() if v == old})
        names[fx.name] = node.name
        nodes.append(node)
    return nodes


def _call(op: str, fx: torch.fx.Node, names: dict[str, str]) -> Node:
    if op not in ALLOWED and op != _FUNCTIONAL_NORM:
        raise _not_capturable(
            f"operator {fx.target} has no place in an artifact", "operators of the allow-list (graph/operators.py)"
        )
    args = tuple(_constant(a, names) for a in fx.args)
    dropped = _PLACEMENT if op != "aten.zeros.default" else (*_PLACEMENT, "memory_format")
    kwargs = {k: _constant(v, names) for k, v in fx.kwargs.items() if k not in dropped}
    if op == _FUNCTIONAL_NORM:
        op, args = BATCH_NORM, (*args[:5], False, *args[5:], True)
    return Node(fx.name, op, args, kwargs)


def _op_name(target: Any) -> str:
    """Return an operator's name in a graph, which is that of its functional form for one that works in place."""
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return f"py.{name}"
    name = re.sub(r"_(\.\w+)$", r"\1", str(target)) if is_in_place(target) else str(target)
    return _RENAMED.get(name, name)


def _is_identity(op: str, fx: torch.fx.Node) -> bool:
    if op == "py.getitem":  # batch norm returns its output and two statistics that nobody reads
        return isinstance(fx.args[0], torch.fx.Node) and str(fx.args[0].target) == _FUNCTIONAL_NORM
    return op in _IDENTITY or (op in _DROPOUT and fx.args[2] is False)


def _constant(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, torch.fx.Node):
        return Ref(names[value.name])
    if isinstance(value, (list, tuple)):
        return [_constant(v, names) for v in value]
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.memory_format)):
        return value
    raise _not_capturable(f"an operator takes a constant of type {type(value).__name__}", "numbers, texts, dtypes")


def is_in_place(target: Any) -> bool:
    """Return whether calling ``target`` changes its first argument, as ``aten.relu_.default`` does."""
    if not isinstance(target, OpOverload) or not target._schema.arguments:
        return False
    alias = target._schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def writes_to_views(exported: ExportedProgram) -> bool:
    """Return whether an in-place operator changes a stored tensor, or memory that is later read as another view.

    For all other programs, giving the in-place operator's result the old value's name keeps the meaning.
    """
    nodes = list(exported.graph.nodes)
    order = {node: k for k, node in enumerate(nodes)}
    stored = {spec.arg.name for spec in exported.graph_signature.input_specs}
    stored -= set(exported.graph_signature.user_inputs)
    memory: dict[torch.fx.Node, torch.fx.Node] = {}  # the node that made the memory a node's value lies in
    value: dict[torch.fx.Node, torch.fx.Node] = {}  # the same for nodes that are one whole value, not a part of it
    for node in nodes:
        first = node.args[0] if node.args and isinstance(node.args[0], torch.fx.Node) else node
        memory[node] = memory[first] if first is not node and _may_alias(node.target) else node
        value[node] = value[first] if first is not node and _keeps_all(node.target) else node
    for write in nodes:
        if not is_in_place(write.target):
            continue
        changed = write.args[0]
        if memory[changed].name in stored:
            return True
        for node in nodes[: order[write]]:
            shares = memory[node] is memory[changed] and value[node] is not value[changed]
            if shares and any(order[user] > order[write] for user in node.users):
                return True
    return False


def _keeps_all(target: Any) -> bool:
    """Return whether the result is all of the first argument's memory and is captured under the same name."""
    return is_in_place(target) or _is_dropout(target) or str(target) in ("aten.detach.default", "aten.alias.default")


def _is_dropout(target: Any) -> bool:
    """Return whether a call returns its argument in eval mode although its schema does not say so."""
    return isinstance(target, OpOverload) and "dropout" in target._schema.name


def _may_alias(target: Any) -> bool:
    """Return whether the result may lie in the first argument's memory: views, in-place operators, items of a list."""
    if not isinstance(target, OpOverload):
        return getattr(target, "__name__", "") == "getitem"
    return _is_dropout(target) or any(result.alias_info is not None for result in target._schema.returns)


def check_agreement(graph: Graph, module: nn.Module, inputs: Sequence[InputSpec]) -> None:
    """Compare graph and network on random inputs at batch sizes 2, 1 and 3.

    Servers batch the requests of strangers, so the answer to one input must not depend on the others either.

    Raises:
        RedppError: another result, a failure at one of the batch sizes, or outputs that mix the inputs of a batch.
    """
    program = Program(graph)
    for batch in (2, 1, 3):
        x = sample(inputs, batch, torch.Generator().manual_seed(batch))
        with torch.no_grad():
            try:
                got = program(*(t.clone() for t in x))  # a forward may write into its input
                alone = program(*(t[-1:].clone() for t in x))
                expected = [t for t in torch.utils._pytree.tree_leaves(module(*x)) if isinstance(t, Tensor)]
            except Exception as error:  # the user's forward may raise anything
                raise _not_capturable(
                    f"at batch size {batch} it fails: {_reason(error)}", "a network that takes any batch size"
                ) from error
        if len(got) != len(expected) or not all(map(_agree, got, expected)):
            raise _not_capturable(
                f"at batch size {batch} the captured graph gives another result than the network",
                "a forward that is a pure function of its inputs",
            )
        if odd := [tuple(y.shape) for y in got if not y.dim() or len(y) != batch]:
            raise _not_capturable(
                f"at batch size {batch} it has an output of shape {odd[0]}",
                "a network that takes any batch size, with outputs of shape (N, ...)",
            )
        if not all(_agree(y[-1:], one) for y, one in zip(got, alone, strict=True)):
            raise _not_capturable(
                "the result for one input depends on the others in its batch",
                "outputs that are each computed from their own input",
            )


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    """Compare shape, dtype, and values up to 1e-4 of the largest one or the dtype's own rounding."""
    if mine.shape != theirs.shape or mine.dtype is not theirs.dtype:
        return False
    relative = max(1e-4, 16 * torch.finfo(mine.dtype).eps) if mine.is_floating_point() else 0.0
    mine, theirs = mine.double(), theirs.double()
    finite = theirs[theirs.isfinite()]
    tolerance = relative * float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(mine, theirs, rtol=0.0, atol=tolerance, equal_nan=True)


def _not_capturable(found: str, expected: str) -> RedppError:
    return RedppError(
        f"the network cannot be captured: {found}",
        expected,
        "change forward accordingly, or package a part of the network that fits",
    )


def _reason(error: BaseException) -> str:
    """Return the first line of an exception's text."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
