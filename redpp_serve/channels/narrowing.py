"""Taking channels out of a graph: tensors are sliced, and the numbers in calls that name sizes are written anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.rules_layers import conv_groups
from redpp_serve.channels.rules_layout import shuffled
from redpp_serve.channels.walk import Walk
from redpp_serve.graph.graph import Graph, Node, Ref

Kept = Callable[[str], dict[int, Tensor]]  # a value's or tensor's name to the positions that stay, by axis


def narrow(graph: Graph, walk: Walk, kept: Kept) -> Graph:
    """The graph with only the kept positions of each tensor and value.

    Raises:
        ValueError: a call names a size in a way that cannot be rewritten.
    """
    tensors = {}
    for name, tensor in graph.tensors.items():
        for axis, positions in kept(name).items():
            tensor = tensor.index_select(axis, positions)
        tensors[name] = tensor
    nodes = []
    for node in graph.nodes:
        order = _order(walk, node) if kept(node.name) else None
        if order is not None:
            source, axis, entries = order
            tensors[f"{node.name}.order"] = _reordered(entries, axis, kept(source.name), kept(node.name))
            node = Node(node.name, "aten.index_select.default", (source, axis, Ref(f"{node.name}.order")))
        elif node.op in _REWRITES:
            node = _REWRITES[node.op](walk, node, kept)
        nodes.append(node)
    return replace(graph, tensors=tensors, nodes=tuple(nodes)).pruned_of_unused()


def _order(walk: Walk, node: Node) -> tuple[Ref, int, Tensor] | None:
    """For a call that puts the entries of an axis in another order: its source, the axis, and where each comes from."""
    shuffle = walk.shuffles.get(node.name)
    if shuffle:
        return Ref(shuffle.source), shuffle.axis, shuffle.order
    if node.op == "aten.channel_shuffle.default":
        return node.args[0], 1, shuffled(_shape(node.name, walk)[1], node.args[1])
    if node.op == "aten.index_select.default":
        return node.args[0], node.args[1] % len(_shape(node.name, walk)), walk.constant(node.args[2].name)
    return None


def _reordered(entries: Tensor, axis: int, source: dict[int, Tensor], result: dict[int, Tensor]) -> Tensor:
    """The order of what is left, (k,) int64: where each entry that stays lies among those of the source that stay."""
    if axis not in result:
        return entries
    rank = torch.zeros(int(max(entries.max(), source[axis].max())) + 1, dtype=torch.int64)
    rank[source[axis]] = torch.arange(len(source[axis]))
    return rank[entries[result[axis]]]


def _shape(name: str, walk: Walk) -> tuple[int, ...]:
    return tuple(walk.values[name].shape)


def _sizes(at: int) -> Callable[[Walk, Node, Kept], Node]:
    """Calls that list the sizes of their result (reshape, expand)."""

    def rewrite(walk: Walk, node: Node, kept: Kept) -> Node:
        sizes, changed = list(node.args[at]), kept(node.name)
        for axis, positions in changed.items():
            axis += len(sizes) - len(_shape(node.name, walk))
            if isinstance(sizes[axis], Ref):
                if any(size == -1 for size in sizes):
                    raise ValueError(f"{node.name} computes two of its sizes")
                sizes[axis] = -1
            elif sizes[axis] != -1:
                sizes[axis] = len(positions)
        return _with(node, {at: sizes}) if changed else node

    return rewrite


def _unflatten(walk: Walk, node: Node, kept: Kept) -> Node:
    start, sizes = node.args[1] % len(_shape(node.args[0].name, walk)), list(node.args[2])
    for axis, positions in kept(node.name).items():
        if start <= axis < start + len(sizes) and sizes[axis - start] != -1:
            sizes[axis - start] = len(positions)
    return _with(node, {2: sizes})


def _slice(walk: Walk, node: Node, kept: Kept) -> Node:
    args = [*node.args, *[None] * 5][:5]
    axis, size = (args[1] or 0) % len(_shape(node.args[0].name, walk)), _shape(node.args[0].name, walk)[(args[1] or 0)]
    positions = kept(node.args[0].name).get(axis)
    if positions is None:
        return node
    bounds = [_bound(0 if args[2] is None else args[2], size), _bound(size if args[3] is None else args[3], size)]
    start, end = (int((positions < bound).sum()) for bound in bounds)
    return Node(node.name, node.op, (node.args[0], axis, start, end))


def _bound(value: Any, size: int) -> int:
    if not isinstance(value, int):
        raise ValueError("a slice computes its bounds")
    return min(max(value + size if value < 0 else value, 0), size)


def _narrow(walk: Walk, node: Node, kept: Kept) -> Node:
    shape = _shape(node.args[0].name, walk)
    axis, start, length = node.args[1] % len(shape), node.args[2], node.args[3]
    positions = kept(node.args[0].name).get(axis)
    if positions is None:
        return node
    start = _bound(start, shape[axis])
    before, through = (int((positions < bound).sum()) for bound in (start, start + length))
    return _with(node, {2: before, 3: through - before})


def _split(walk: Walk, node: Node, kept: Kept) -> Node:
    axis = (node.args[2] if len(node.args) > 2 else 0) % len(_shape(node.args[0].name, walk))
    positions = kept(node.args[0].name).get(axis)
    if positions is None:
        return node
    ends = torch.tensor([piece.shape[axis] for piece in walk.values[node.name]]).cumsum(0)
    below = [int((positions < end).sum()) for end in ends]
    sizes = [high - low for low, high in zip([0, *below], below)]
    return Node(node.name, "aten.split_with_sizes.default", (node.args[0], sizes, axis))


def _conv(walk: Walk, node: Node, kept: Kept) -> Node:
    groups, positions = conv_groups(node), kept(node.args[0].name).get(1)
    if groups == 1 or positions is None:
        return node
    at = 8 if node.op == "aten.convolution.default" else 6
    return _with(node, {at: len(positions) // (_shape(node.args[0].name, walk)[1] // groups)})


def _group_norm(walk: Walk, node: Node, kept: Kept) -> Node:
    positions = kept(node.args[0].name).get(1)
    if positions is None:
        return node
    return _with(node, {1: len(positions) // (_shape(node.args[0].name, walk)[1] // node.args[1])})


def _pad(walk: Walk, node: Node, kept: Kept) -> Node:
    source = _shape(node.args[0].name, walk)
    amounts, changed = list(node.args[1]), kept(node.name)
    for k in range(len(amounts) // 2):
        axis, (front, back) = len(source) - 1 - k, amounts[2 * k : 2 * k + 2]
        if axis in changed and (front or back):
            amounts[2 * k] = int((changed[axis] < front).sum())
            amounts[2 * k + 1] = int((changed[axis] >= front + source[axis]).sum())
    return _with(node, {1: amounts})


def _with(node: Node, changed: dict[int, Any]) -> Node:
    return replace(node, args=tuple(changed.get(k, argument) for k, argument in enumerate(node.args)))


_REWRITES: dict[str, Callable[[Walk, Node, Kept], Node]] = {
    "aten.reshape.default": _sizes(1),
    "aten.expand.default": _sizes(1),
    "aten.unflatten.int": _unflatten,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.group_norm.default": _group_norm,
    **dict.fromkeys(
        ("aten.split.Tensor", "aten.split.sizes", "aten.split_with_sizes.default", "aten.chunk.default"), _split
    ),
    **dict.fromkeys(
        (
            "aten.conv1d.default",
            "aten.conv2d.default",
            "aten.conv3d.default",
            "aten.conv1d.padding",
            "aten.conv2d.padding",
            "aten.conv_transpose1d.default",
            "aten.conv_transpose2d.input",
            "aten.convolution.default",
        ),
        _conv,
    ),
}
