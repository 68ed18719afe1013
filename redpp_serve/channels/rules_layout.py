"""Rules of operators that move entries or treat each by itself.

An operator that only moves entries does the same to the labels. Entries that meet in an elementwise operator belong
to one channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.walk import Rule, Walk, join, op_name, tensors_in, unknown
from redpp_serve.graph.graph import Node, Ref
from redpp_serve.graph.operators import resolve


def same(walk: Walk, node: Node) -> Any:
    """Pass on the first argument's labels."""
    return walk.value(node.args[0])


def made(walk: Walk, node: Node) -> Any:
    """Make a tensor of constants, whose arguments give its size or type alone."""
    return walk.opaque(node)


def number(walk: Walk, node: Node) -> Any:
    """Compute sizes and arithmetic on them, at batch size 1."""
    args: list[Any] = [list(a.shape) if isinstance(a, Tensor) else a for a in (walk.value(a) for a in node.args)]
    if node.op == "aten.sym_size.int":
        sizes, axis = args
        return sizes[axis]
    return resolve(node.op)(*args)


def getitem(walk: Walk, node: Node) -> Any:
    """Take one of several results."""
    value = walk.value(node.args[0])
    return walk.opaque(node) if value is None else value[node.args[1]]


def elementwise(walk: Walk, node: Node) -> Any:
    """Join the entries that meet."""
    result, *others = tensors_in([walk.value(a) for a in node.args])
    for other in others:
        result = join(walk, result, other, node)
    return result


def move(walk: Walk, node: Node) -> Any:
    """Run the operator on the labels."""
    return resolve(node.op)(*(walk.value(a) for a in node.args))


def reshape(walk: Walk, node: Node) -> Any:
    """Reshape the labels; at the end of a channel shuffle take those of its start, in another order."""
    shuffle = walk.shuffles.get(node.name)
    if shuffle is None:
        return move(walk, node)
    return _ordered(walk, node, walk.value(Ref(shuffle.source)), shuffle.axis, shuffle.order)


def reshape_as(walk: Walk, node: Node) -> Any:
    """Reshape to the sizes of the second argument, whose channels must therefore be those of the first."""
    labels, model = (walk.value(a) for a in node.args[:2])
    return join(walk, labels.reshape(model.shape), model, node)


def cat(walk: Walk, node: Node) -> Any:
    """Put labels side by side, a single copy of what all of them repeat."""
    parts, axis, shape = walk.value(node.args[0]), node.argument(1, 0), walk.shapes[node.name]
    parts = [p for p in parts if p.dim() == len(shape)]  # the old form of an empty tensor has one dimension
    for d in range(len(shape)):
        if d != axis % len(shape) and all(p.stride(d) == 0 or p.shape[d] == 1 for p in parts):
            parts = [p.narrow(d, 0, 1) for p in parts]
    return torch.cat(parts, axis).expand(shape)


def pick(axis_at: int, default: int) -> Rule:
    """Make the rule for taking entries of one axis by number: all channels along it stay or go together."""

    def rule(walk: Walk, node: Node) -> Any:
        labels, axis = walk.value(node.args[0]), node.argument(axis_at, default)
        walk.tie_later(labels, axis % labels.dim(), f"is taken apart by {op_name(node)} ({node.name})")
        return move(walk, node)

    return rule


def part(axis_at: int) -> Rule:
    """Make the rule for taking runs of entries of one axis (slice, split); steps tie all channels."""

    def rule(walk: Walk, node: Node) -> Any:
        args = [walk.value(a) for a in node.args]
        axis = (args[axis_at] if len(args) > axis_at else 0) % args[0].dim()
        if node.op == "aten.slice.Tensor" and len(args) > 4 and args[4] != 1:
            walk.tie_later(args[0], axis, f"is read in steps ({node.name})")
        rest = [0 if k == axis_at else a for k, a in enumerate(args[1:], 1)]
        taken = resolve(node.op)(torch.arange(args[0].shape[axis]), *rest)
        for positions in [taken] if isinstance(taken, Tensor) else taken:
            walk.take(args[0], axis, positions, node.name)
        return resolve(node.op)(*args)

    return rule


def whole(dims_at: int) -> Rule:
    """Make the rule for moving entries along axes (roll, flip): the channels there are tied."""

    def rule(walk: Walk, node: Node) -> Any:
        labels, reason = walk.value(node.args[0]), f"is moved among channels by {op_name(node)} ({node.name})"
        for axis in node.argument(dims_at) or range(labels.dim()):
            walk.labels.tie(labels, axis % labels.dim(), reason)
        return labels

    return rule


def index(walk: Walk, node: Node) -> Any:
    """Index by fixed positions, and tie the channels along the indexed axes."""
    labels = walk.value(node.args[0])
    indices = [None if i is None else walk.constant(i.name) for i in node.args[1]]
    for axis, (given, fixed) in enumerate(zip(node.args[1], indices, strict=True)):
        if given is not None and (fixed is None or fixed.dtype == torch.bool):
            return unknown(walk, node)
        if given is not None:
            walk.labels.tie(labels, axis, f"is indexed ({node.name})")
    return resolve(node.op)(labels, indices)


def index_select(walk: Walk, node: Node) -> Any:
    """Take entries of one axis in a fixed order."""
    order = walk.constant(node.args[2].name)
    return unknown(walk, node) if order is None else _ordered(walk, node, walk.value(node.args[0]), node.args[1], order)


def channel_shuffle(walk: Walk, node: Node) -> Any:
    """Take the channels in the order of reading them group by group, one of each."""
    labels = walk.value(node.args[0])
    return _ordered(walk, node, labels, 1, shuffled(labels.shape[1], node.args[1]))


def _ordered(walk: Walk, node: Node, labels: Tensor, axis: int, order: Tensor) -> Tensor:
    walk.take(labels, axis, order, node.name)
    return labels.index_select(axis, order)


def shuffled(size: int, groups: int) -> Tensor:
    """Return where each output channel of a channel shuffle comes from, (size,) int64."""
    return torch.arange(size).view(groups, -1).t().reshape(-1)


def pad(walk: Walk, node: Node) -> Any:
    """Put constants around the entries; beside channels they are channels too, which can go with what they meet."""
    labels, amounts = walk.value(node.args[0]), walk.value(node.args[1])
    moves = walk.varying(labels)
    padded = [labels.dim() - 1 - k for k in range(len(amounts) // 2) if amounts[2 * k] or amounts[2 * k + 1]]
    beside = [d for d in padded if d in moves]
    mode = node.argument(2, "constant") if node.op == "aten.pad.default" else "constant"
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
