"""In-place operators: which ones they are, and whether a program writes into memory that it reads by another name.

A graph has no operator that changes its arguments. Giving the changed value's name to the result is enough where one
name alone reads that memory; any other program is made functional by torch first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram


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
