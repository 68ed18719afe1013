"""Rules of operators that only move entries: they do the same to the labels.

Rules of operators that treat every entry by itself: what meets in one is one channel. And what no rule knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.walk import Walk
from redpp_serve.graph.graph import Node, Ref
from redpp_serve.graph.operators import resolve

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


def move(walk: Walk, node: Node) -> Any:
    """Run the operator on the labels."""
    return resolve(node.op)(*(walk.value(a) for a in node.args))


def reshape(walk: Walk, node: Node) -> Any:
    """A reshape; at the end of a channel shuffle the channels are those of its start, in another order."""
    shuffle = walk.shuffles.get(node.name)
    if shuffle is None:
        return move(walk, node)
    return _ordered(walk, node, walk.value(Ref(shuffle.source)), shuffle.axis, shuffle.order)


def reshape_as(walk: Walk, node: Node) -> Any:
    """The second argument gives the sizes, so its channels must be those of the first."""
    labels, model = (walk.value(a) for a in node.args[:2])
    return join(walk, labels.reshape(model.shape), model, node)


def cat(walk: Walk, node: Node) -> Any:
    """Side by side; only one copy of what all of them repeat is put together."""
    parts, axis = walk.value(node.args[0]), node.args[1] if len(node.args) > 1 else 0
    shape = walk.shapes[node.name]
    parts = [p for p in parts if p.dim() == len(shape)]  # the old form of an empty tensor has one dimension
    for d in range(len(shape)):
        if d != axis % len(shape) and all(p.stride(d) == 0 or p.shape[d] == 1 for p in parts):
            parts = [p.narrow(d, 0, 1) for p in parts]
    return torch.cat(parts, axis).expand(shape)


def pick(axis_at: int, default: int) -> Rule:
    """Taking entries of one axis by number: along it all channels stay or go together."""

    def rule(walk: Walk, node: Node) -> Any:
        labels = walk.value(node.args[0])
        axis = node.args[axis_at] if len(node.args) > axis_at else default
        walk.tie_later(labels, axis % labels.dim(), f"is taken apart by {node.op.split('.')[1]} ({node.name})")
        return move(walk, node)

    return rule


def part(axis_at: int) -> Rule:
    """Taking runs of entries of one axis (slice, split). In steps they are no runs: all channels are tied."""

    def rule(walk: Walk, node: Node) -> Any:
        args = [walk.value(a) for a in node.args]
        axis = (args[axis_at] if len(args) > axis_at else 0) % args[0].dim()
        if node.op == "aten.slice.Tensor" and len(args) > 4 and args[4] != 1:
            walk.tie_later(args[0], axis, f"is read in steps ({node.name})")
        places = [0 if k == axis_at else a for k, a in enumerate(args[1:], 1)]
        taken = resolve(node.op)(torch.arange(args[0].shape[axis]), *places)
        for positions in [taken] if isinstance(taken, Tensor) else taken:
            walk.take(args[0], axis, positions, node.name)
        return resolve(node.op)(*args)

    return rule


def whole(dims_at: int) -> Rule:
    """Moving entries along an axis (roll, flip): the channels there are tied."""

    def rule(walk: Walk, node: Node) -> Any:
        labels, reason = walk.value(node.args[0]), f"is moved among channels by {node.op.split('.')[1]} ({node.name})"
        for axis in (node.args[dims_at] if len(node.args) > dims_at else None) or range(labels.dim()):
            walk.labels.tie(labels, axis % labels.dim(), reason)
        return labels

    return rule


def index(walk: Walk, node: Node) -> Any:
    """Indexing by fixed positions; along the indexed axes the channels are tied."""
    labels = walk.value(node.args[0])
    indices = [None if i is None else walk.constant(i.name) for i in node.args[1]]
    for axis, (given, fixed) in enumerate(zip(node.args[1], indices)):
        if given is not None and (fixed is None or fixed.dtype == torch.bool):
            return unknown(walk, node)
        if given is not None:
            walk.labels.tie(labels, axis, f"is indexed ({node.name})")
    return resolve(node.op)(labels, indices)


def index_select(walk: Walk, node: Node) -> Any:
    """Entries of one axis in a fixed order."""
    order = walk.constant(node.args[2].name)
    return unknown(walk, node) if order is None else _ordered(walk, node, walk.value(node.args[0]), node.args[1], order)


def channel_shuffle(walk: Walk, node: Node) -> Any:
    """The channels in the order that reading them group by group, one of each, gives."""
    labels = walk.value(node.args[0])
    return _ordered(walk, node, labels, 1, shuffled(labels.shape[1], node.args[1]))


def _ordered(walk: Walk, node: Node, labels: Tensor, axis: int, order: Tensor) -> Tensor:
    walk.take(labels, axis, order, node.name)
    return labels.index_select(axis, order)


def shuffled(size: int, groups: int) -> Tensor:
    """Where each output channel of a channel shuffle comes from, (size,) int64."""
    return torch.arange(size).view(groups, -1).t().reshape(-1)


def pad(walk: Walk, node: Node) -> Any:
    """Constants around the entries: beside channels they are channels too, which can go with what they meet."""
    labels, amounts = walk.value(node.args[0]), walk.value(node.args[1])
    moves = walk.varying(labels)
    padded = [labels.dim() - 1 - k for k in range(len(amounts) // 2) if amounts[2 * k] or amounts[2 * k + 1]]
    beside = [d for d in padded if d in moves]
    mode = node.args[2] if node.op == "aten.pad.default" and len(node.args) > 2 else "constant"
    if beside and (moves != beside or mode != "constant" or min(amounts) < 0):
        return unknown(walk, node)
    for d in padded:
        front, back = amounts[2 * (labels.dim() - 1 - d) :][:2]
        shape = (*labels.shape[:d], labels.shape[d] + front + back, *labels.shape[d + 1 :])
        if d in moves:
            row = torch.cat([walk.labels.fresh(front), walk.along(labels, d), walk.labels.fresh(back)])
            labels = walk.spread(row, d, shape)
        else:
            labels = labels.narrow(d, 0, 1).expand(shape)
    return labels
