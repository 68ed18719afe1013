"""Taking channels out of a graph: tensors are sliced, and the sizes that calls name are rewritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.rules_layers import groups_at
from redpp_serve.channels.rules_layout import shuffled
from redpp_serve.channels.walk import CONVOLUTIONS, Walk
from redpp_serve.graph.graph import Graph, Node, Ref

Kept = Callable[[str], dict[int, Tensor]]
"""Maps the name of a value or tensor to the positions that stay, (k,) int64 ascending, by each axis that loses some."""

_Rewrite = Callable[[Walk, Node, Kept], Node]


def narrow(graph: Graph, walk: Walk, kept: Kept) -> Graph:
    """Return the graph with only the kept positions of each tensor and value.

    Raises:
        ValueError: a call names a size in a way that cannot be rewritten.
    """
    tensors = {}
    for name, tensor in graph.tensors.items():
        for axis, positions in kept(name).items():
            tensor = tensor.index_select(axis, positions)  # noqa: PLW2901 - axis by axis
        tensors[name] = tensor
    nodes = []
    for node in graph.nodes:
        order = _order(walk, node) if kept(node.name) else None
        if order is not None:
            source, axis, entries = order
            name = f"{node.name}.order"
            tensors[name] = _reordered(entries, axis, kept(source.name), kept(node.name))
            nodes.append(Node(node.name, "aten.index_select.default", (source, axis, Ref(name))))
        else:
            rewrite = _REWRITES.get(node.op)
            nodes.append(rewrite(walk, node, kept) if rewrite else node)
    return replace(graph, tensors=tensors, nodes=tuple(nodes)).pruned_of_unused()


def _order(walk: Walk, node: Node) -> tuple[Ref, int, Tensor] | None:
    """Return source, axis and, for each entry, where it comes from, if a call reorders the entries of an axis."""
    shuffle = walk.shuffles.get(node.name)
    if shuffle:
        return Ref(shuffle.source), shuffle.axis, shuffle.order
    if node.op == "aten.channel_shuffle.default":
        return node.args[0], 1, shuffled(_shape(node.name, walk)[1], node.args[1])
    if node.op == "aten.index_select.default":
        order = walk.constant(node.args[2].name)
        return None if order is None else (node.args[0], node.args[1] % len(_shape(node.name, walk)), order)
    return None


def _reordered(entries: Tensor, axis: int, source: dict[int, Tensor], result: dict[int, Tensor]) -> Tensor:
    """Return, for each entry that stays, (k,) int64, its place among the source's entries that stay."""
    if axis not in result:
        return entries
    rank = torch.zeros(int(max(entries.max(), source[axis].max())) + 1, dtype=torch.int64)
    rank[source[axis]] = torch.arange(len(source[axis]))
    return rank[entries[result[axis]]]


def _shape(name: str, walk: Walk) -> tuple[int, ...]:
    return tuple(walk.values[name].shape)


def _sizes(walk: Walk, node: Node, kept: Kept) -> Node:
    """Rewrite the sizes that a reshape or expand lists for its result."""
    sizes, changed = list(node.args[1]), kept(node.name)
    for axis, positions in changed.items():
        if isinstance(sizes[axis], Ref):
            if any(size == -1 for size in sizes):
                raise ValueError(f"{node.name} computes two of its sizes")
            sizes[axis] = -1
        elif sizes[axis] != -1:
            sizes[axis] = len(positions)
    return node.with_arguments({1: sizes}) if changed else node


def _unflatten(walk: Walk, node: Node, kept: Kept) -> Node:
    start, sizes = node.args[1] % len(_shape(node.args[0].name, walk)), list(node.args[2])
    for axis, positions in kept(node.name).items():
        if start <= axis < start + len(sizes) and sizes[axis - start] != -1:
            sizes[axis - start] = len(positions)
    return node.with_arguments({2: sizes})


def _slice(walk: Walk, node: Node, kept: Kept) -> Node:
    shape = _shape(node.args[0].name, walk)
    axis = (node.argument(1) or 0) % len(shape)
    positions = kept(node.args[0].name).get(axis)
    if positions is None:
        return node
    start, end = node.argument(2), node.argument(3)
    bounds = (
        _bound(0 if start is None else start, shape[axis]),
        _bound(shape[axis] if end is None else end, shape[axis]),
    )
    return Node(node.name, node.op, (node.args[0], axis, *(_below(positions, bound) for bound in bounds)))


def _narrow(walk: Walk, node: Node, kept: Kept) -> Node:
    shape = _shape(node.args[0].name, walk)
    axis = node.args[1] % len(shape)
    positions = kept(node.args[0].name).get(axis)
    if positions is None:
        return node
    start = _bound(node.args[2], shape[axis])
    before, through = _below(positions, start), _below(positions, start + node.args[3])
    return node.with_arguments({2: before, 3: through - before})


def _bound(value: Any, size: int) -> int:
    if not isinstance(value, int):
        raise ValueError("a slice computes its bounds")
    return min(max(value + size if value < 0 else value, 0), size)


def _below(positions: Tensor, bound: int) -> int:
    return int((positions < bound).sum())


def _split(walk: Walk, node: Node, kept: Kept) -> Node:
    axis = node.argument(2, 0) % len(_shape(node.args[0].name, walk))
    positions = kept(node.args[0].name).get(axis)
    if positions is None:
        return node
    ends = torch.tensor([piece.shape[axis] for piece in walk.values[node.name]]).cumsum(0).tolist()
    below = [_below(positions, end) for end in ends]
    sizes = [high - low for low, high in zip([0, *below[:-1]], below, strict=True)]
    return Node(node.name, "aten.split_with_sizes.default", (node.args[0], sizes, axis))


def _grouped(groups_at: Callable[[Node], int]) -> _Rewrite:
    """Make the rewrite of calls with a number of groups, each of which keeps its size or goes."""

    def rewrite(walk: Walk, node: Node, kept: Kept) -> Node:
        at, positions = groups_at(node), kept(node.args[0].name).get(1)
        groups = node.argument(at, 1)
        if groups == 1 or positions is None:
            return node
        return node.with_arguments({at: len(positions) // (_shape(node.args[0].name, walk)[1] // groups)})

    return rewrite


def _pad(walk: Walk, node: Node, kept: Kept) -> Node:
    source = _shape(node.args[0].name, walk)
    amounts, changed = list(node.args[1]), kept(node.name)
    for k in range(len(amounts) // 2):
        axis, (front, back) = len(source) - 1 - k, amounts[2 * k : 2 * k + 2]
        if axis in changed and (front or back):
            amounts[2 * k] = _below(changed[axis], front)
            amounts[2 * k + 1] = int((changed[axis] >= front + source[axis]).sum())
    return node.with_arguments({1: amounts})


_SPLITS = ("aten.split.Tensor", "aten.split.sizes", "aten.split_with_sizes.default", "aten.chunk.default")
_REWRITES: dict[str, _Rewrite] = {
    "aten.reshape.default": _sizes,
    "aten.expand.default": _sizes,
    "aten.unflatten.int": _unflatten,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.group_norm.default": _grouped(lambda node: 1),
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys(CONVOLUTIONS, _grouped(groups_at)),
}
