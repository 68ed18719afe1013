"""TorchScript modules, traced, scripted or frozen, as exported programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from redpp_serve.capture.sequences import with_sequences, with_stand_ins
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, Ref
from redpp_serve.graph.layers import LINEAR

_LAYERS, _LIFTED = ("aten.conv", LINEAR), "lifted_tensor_"
READS_NUMBER = "aten._local_scalar_dense"  # the operator of a trace that calculates with sizes
_CHECKS = [
    "prim::Constant",
    "prim::RaiseException",
    "aten::format",
    "prim::TupleConstruct",
    "aten::__getitem__",
    "aten::list",
]


def converted(
    module: torch.jit.ScriptModule, example: tuple[Tensor, ...], axes: Sequence[dict[int, Any]]
) -> ExportedProgram:
    """Convert a module to a program with a dynamic batch, and other sizes those of the example unless they vary.

    Args:
        module: the module, in eval mode.
        example: the inputs (2, ...).
        axes: the dynamic axes of each input, as torch.export takes them.
    """
    from torch._export.converter import TS2EPConverter  # noqa: PLC0415 - a private module of torch

    class Converter(TS2EPConverter):
        def retrace_as_exported_program(self, gm: fx.GraphModule, name_to_constant: dict[str, Any]) -> Any:
            return super().retrace_as_exported_program(with_stand_ins(gm), name_to_constant)

    converter = Converter(module, example)
    _drop_checks(converter.ts_graph)
    exported: ExportedProgram = converter.convert()
    if any(_depends_on_size(node) for node in exported.graph.nodes):  # torch made every size dynamic
        exported = torch.export.export(exported.module(), example, dynamic_shapes=tuple(axes))
    return with_sequences(exported)


def script_of_one_size(why: str) -> RedppError:
    """Make the refusal of a TorchScript whose sizes cannot vary, with what to save instead."""
    return RedppError(
        f"torch does not convert this TorchScript for sizes that vary: {why}",
        "the module itself, or its state_dict, which torch.export takes for every size",
        'save the module before it is traced or scripted, torch.save(model.eval(), "model.pt"), and pass that with '
        "--trust-file; or save model.state_dict() and name the class with --arch FILE.py:NAME",
    )


def with_named_weights(graph: Graph) -> Graph:
    """Name the weights of a frozen module, whose names are lost, by the calls that read them.

    Freezing also makes one tensor of equal ones. Each layer has a bias of its own again, so that it counts as a layer.
    """
    users, tensors, changed = graph.users(), dict(graph.tensors), {}
    for node in graph.nodes:
        renamed = {}
        for at, ending in ((1, "weight"), (2, "bias")) if node.op.startswith(_LAYERS) else ():
            tensor = node.argument(at)
            if not isinstance(tensor, Ref) or not tensor.name.startswith(_LIFTED) or tensor.name not in tensors:
                continue
            if ending == "bias" or len(users[tensor.name]) == 1:
                tensors[f"{node.name}.{ending}"] = graph.tensors[tensor.name]
                renamed[at] = Ref(f"{node.name}.{ending}")
        changed[node.name] = node.with_arguments(renamed)
    return replace(graph.with_nodes(changed), tensors=tensors).pruned_of_unused()


def _drop_checks(graph: Any) -> None:
    """Remove the conditions that do nothing but raise, and the loops that served them.

    Functions of torch check their arguments so in a script, with loops over sizes that torch does not convert.
    """
    for condition in graph.findAllNodes("prim::If"):
        inner = [node.kind() for block in condition.blocks() for node in block.nodes()]
        if condition.outputsSize() == 0 and all(kind in _CHECKS for kind in inner):
            condition.destroy()
    torch._C._jit_pass_dce(graph)  # the comparison that a condition asked for
    for loop in graph.findAllNodes("prim::Loop"):
        inner = [node.kind() for block in loop.blocks() for node in block.nodes()]
        if not any(output.uses() for output in loop.outputs()) and not any(re.search("[^_]_$", kind) for kind in inner):
            loop.destroy()
    torch._C._jit_pass_dce(graph)


def _depends_on_size(node: fx.Node) -> bool:
    """Return whether a value's shape depends on another size than the batch's, or on arithmetic with such sizes."""
    value = node.meta.get("val")
    if node.op == "placeholder" and isinstance(value, Tensor):
        return any(not isinstance(size, int) for size in value.shape[1:])
    return False
