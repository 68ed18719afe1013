"""Rules of operators that treat every entry by itself: what meets in one is one channel. And what no rule knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.graph import Node, Ref
from ..runtime.ops import resolve
from .walk import Walk

Rule = Callable[[Walk, Node], Any]


def unknown(walk: Walk, node: Node) -> Any:
    """An operator without a rule closes whatever channels it reads."""
    for name in node.refs():
        for labels in tensors_in(walk.value(Ref(name))):
            walk.labels.close(labels, f"is read by {node.op.split('.')[1]} ({node.name}), whose coupling is not known")
    return walk.opaque(node)


def tensors_in(value: Any) -> list[Tensor]:
    """All labels in an argument, through lists."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def same(walk: Walk, node: Node) -> Any:
    """The result's entries are those of the first argument."""
    return walk.value(node.args[0])


def made(walk: Walk, node: Node) -> Any:
    """A tensor of constants; arguments give its size or type alone."""
    return walk.opaque(node)


def number(walk: Walk, node: Node) -> Any:
    """Sizes and arithmetic on them, at batch size 1."""
    args = [list(a.shape) if isinstance(a, Tensor) else a for a in (walk.value(a) for a in node.args)]
    if node.op == "aten.sym_size.int":
        return args[0][args[1]]
    return resolve(node.op)(*args)


def getitem(walk: Walk, node: Node) -> Any:
    """One of several results."""
    value = walk.value(node.args[0])
    return walk.opaque(node) if value is None else value[node.args[1]]


def elementwise(walk: Walk, node: Node) -> Any:
    """Entries that meet belong to one channel."""
    operands = tensors_in([walk.value(a) for a in node.args])
    result = operands[0]
    for other in operands[1:]:
        result = join(walk, result, other, node)
    return result


def join(walk: Walk, a: Tensor, b: Tensor, node: Node) -> Tensor:
    """Join the labels of two broadcast operands and return those of the result."""
    dims = max(a.dim(), b.dim())
    a, b = (t[(None,) * (dims - t.dim())] for t in (a, b))
    shape = torch.broadcast_shapes(a.shape, b.shape)
    moves_a, moves_b = walk.varying(a), walk.varying(b)
    if not moves_a and not moves_b and walk.labels.NONE in (int(t.reshape(-1)[0]) if t.numel() else 0 for t in (a, b)):
        return (b if a.numel() and int(a.reshape(-1)[0]) == walk.labels.NONE else a).expand(shape)
    over_a, over_b = ([d for d in moves if t.shape[d] == 1] for moves, t in ((moves_a, b), (moves_b, a)))
    if over_a and over_b:
        for labels in (a, b):
            walk.labels.close(labels, f"is broadcast over other channels ({node.name})")
        return walk.none(*shape)
    if over_a or over_b:
        one, many = (b, a) if over_a else (a, b)
        walk.join_later(one, many, node.name)
        return many.expand(shape)
    walk.labels.union(a, b, f"meets values that are no channels ({node.name})")
    return (a if len(moves_a) >= len(moves_b) else b).expand(shape)
