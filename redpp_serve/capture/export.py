"""From a module or exported program to a `Graph`, by ``torch.export`` with a dynamic batch."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from ..errors import RedppError
from ..runtime.graph import Graph, InputSpec, Node, Ref, map_refs
from ..runtime.ops import ALLOWED
from ..runtime.program import Program
from .inputs import sample

_IGNORED = ("_assert", "sym_constrain", "_check")
_IDENTITY_IN_EVAL = {"aten.dropout.default", "aten.feature_dropout.default", "aten.alias.default", "aten.detach.default",
                     "aten.detach_.default", "aten.dropout_.default"}  # fmt: skip


def capture(source: nn.Module | ExportedProgram, inputs: Sequence[InputSpec], messages: list[str]) -> Graph:
    """Capture a network as a graph and check that the graph computes what the network computes.

    Args:
        source: an eager module, a TorchScript module, or an exported program.
        inputs: one entry an input, shapes without batch.
        messages: gains a line for each thing the user should know (train mode switched off, ...).

    Raises:
        RedppError: the inputs do not fit, the network cannot be exported, an operator has no place in an
            artifact, or the captured graph disagrees with the network.
    """
    generator = torch.Generator().manual_seed(0)
    example = sample(inputs, 2, generator)
    if isinstance(source, ExportedProgram):
        exported, module = source, source.module()
    else:
        module = source
        if source.training or any(m.training for m in source.modules()):
            messages.append("the network was in train mode; switched to eval mode (dropout off, batch norm by statistics)")
            source.eval()
        exported = _export(source, example)
    graph = to_graph(exported, inputs)
    _check(graph, module, inputs)
    return graph


def _export(module: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    try:
        with torch.no_grad():
            module(*example)
    except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
        shapes = ", ".join(f"{'x'.join(map(str, x.shape[1:]))}:{str(x.dtype).removeprefix('torch.')}" for x in example)
        raise RedppError(
            f"the network rejects a batch of inputs of shape {shapes}: {_first_line(error)}",
            "the shape of one input without its batch dimension, one --input for each argument of forward",
            "pass the shape the network was trained on, e.g. --input 3x224x224",
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(module, torch.jit.ScriptModule):
            from torch._export.converter import TS2EPConverter

            return TS2EPConverter(module, example).convert()
        shapes = tuple({0: Dim.DYNAMIC} for _ in example)
        try:
            return torch.export.export(module, example, dynamic_shapes=shapes)
        except Exception:  # noqa: BLE001 - a forward that fixes its batch; the check at other batch sizes decides
            try:
                return torch.export.export(module, example)
            except Exception as error:  # noqa: BLE001
                raise RedppError(
                    f"torch.export cannot capture the network: {_first_line(error)}",
                    "a forward without data-dependent control flow, tensors in and tensors out",
                    "rewrite the part of forward that the message names, or export it yourself and pass the .pt2 file",
                ) from error


def to_graph(exported: ExportedProgram, inputs: Sequence[InputSpec]) -> Graph:
    """The graph of an exported program; in-place operators become their functional form."""
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise _not_capturable("it changes a buffer or an input in forward", "a forward without side effects")
    tensors: dict[str, Tensor] = {}
    names: dict[str, str | Any] = {}
    specs: list[InputSpec] = []
    for entry in signature.input_specs:
        if entry.kind is InputKind.USER_INPUT:
            if entry.arg.__class__.__name__ != "TensorArgument" or len(specs) == len(inputs):
                raise _not_capturable(f"its argument {entry.arg.name!r} got no --input", "one --input for each tensor argument")
            names[entry.arg.name] = entry.arg.name
            specs.append(replace(inputs[len(specs)], name=entry.arg.name))
        else:
            stores = (exported.state_dict, exported.constants)
            tensor = next(s[entry.target] for s in stores if entry.target in s)
            tensors[entry.target] = tensor.detach().cpu()
            names[entry.arg.name] = entry.target
    nodes: list[Node] = []
    taken = {*tensors, *(s.name for s in specs)}
    for fx in exported.graph.nodes:
        if fx.op != "call_function" or any(part in str(fx.target) for part in _IGNORED):
            continue
        op, in_place = _op_name(fx.target)
        args = tuple(_constant(a, names) for a in fx.args)
        kwargs = {k: _constant(v, names) for k, v in fx.kwargs.items() if k not in ("device", "pin_memory", "layout")}
        if op in _IDENTITY_IN_EVAL:
            names[fx.name] = args[0].name
            continue
        if op not in ALLOWED:
            raise _not_capturable(f"operator {op} has no place in an artifact", "operators of the allow-list (runtime/ops.py)")
        name = fx.name if fx.name not in taken else f"{fx.name}_value"
        taken.add(name)
        if in_place:  # whoever reads the changed value under its old name must see the new one
            old = args[0].name
            names.update({k: name for k, v in names.items() if v == old})
        names[fx.name] = name
        nodes.append(Node(name, op, args, kwargs))
    outputs = []
    for spec in signature.output_specs:
        if spec.arg.__class__.__name__ != "TensorArgument":
            raise _not_capturable("an output is not a tensor", "tensor outputs")
        outputs.append(names[spec.arg.name])
    return Graph(tuple(specs), tensors, tuple(nodes), tuple(outputs)).pruned_of_unused()


def _check(graph: Graph, module: nn.Module, inputs: Sequence[InputSpec]) -> None:
    """The graph must agree with the network at batch sizes 1, 2 and 3, or it is not served."""
    program = Program(graph)
    for batch in (2, 1, 3):
        x = sample(inputs, batch, torch.Generator().manual_seed(batch))
        with torch.no_grad():
            try:
                got = program(*x)
                expected = [t for t in torch.utils._pytree.tree_leaves(module(*x)) if isinstance(t, Tensor)]
            except RuntimeError as error:
                raise _not_capturable(f"at batch size {batch} it fails: {_first_line(error)}",
                                      "a network that takes any batch size") from error
        for mine, theirs in zip(got, expected):
            scale = float(theirs.double().abs().max()) or 1.0
            if mine.shape != theirs.shape or float((mine.double() - theirs.double()).abs().max()) > 1e-4 * scale:
                raise _not_capturable(f"at batch size {batch} the captured graph gives another result than the network",
                                      "a forward that is a pure function of its inputs")


def _op_name(target: Any) -> tuple[str, bool]:
    if getattr(operator, getattr(target, "__name__", ""), None) is target:
        return f"py.{target.__name__}", False
    name = str(target)
    match = re.fullmatch(r"aten\.(\w+?[a-z0-9])_\.(\w+)", name)
    if match and f"aten.{match[1]}.{match[2]}" in ALLOWED:
        return f"aten.{match[1]}.{match[2]}", True
    return name, False


def _constant(value: Any, names: dict[str, Any]) -> Any:
    if isinstance(value, torch.fx.Node):
        return Ref(names[value.name])
    if isinstance(value, (list, tuple)):
        return [_constant(v, names) for v in value]
    return value


def _not_capturable(found: str, expected: str) -> RedppError:
    return RedppError(f"the network cannot be captured: {found}", expected,
                      "change forward accordingly, or package a part of the network that fits")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
