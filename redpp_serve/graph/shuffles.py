"""Channel shuffles written as reshape, swap, reshape: found in a graph as one permutation of an axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.graph import Graph, Node
from ..runtime.ops import resolve


@dataclass(frozen=True)
class Shuffle:
    """A permutation of axis ``axis`` of ``source``: entry j of its result is entry ``order[j]`` (size,).

    ``inside`` names the calls between the first reshape, included, and the last, which is the result.
    """

    source: str
    axis: int
    order: Tensor
    inside: tuple[str, ...]


_COPIES = ("aten.contiguous.default", "aten.clone.default")
_SWAPS = ("aten.transpose.int", "aten.permute.default", "aten.swapaxes.default")
_RESHAPES = ("aten.reshape.default", "aten.flatten.using_ints", "aten.unflatten.int")


def find_shuffles(graph: Graph, shapes: dict[str, tuple[int, ...]]) -> dict[str, Shuffle]:
    """By the name of their last call. ``shapes`` gives every value's shape at batch size 1."""
    nodes, users = {n.name: n for n in graph.nodes}, graph.users()
    found = {}
    for last in graph.nodes:
        if last.op in _RESHAPES:
            shuffle = _ending_in(last, nodes, users, set(graph.outputs), shapes)
            if shuffle is not None:
                found[last.name] = shuffle
    return found


def _ending_in(
    last: Node,
    nodes: dict[str, Node],
    users: dict[str, list[Node]],
    outputs: set[str],
    shapes: dict[str, tuple[int, ...]],
) -> Shuffle | None:
    path, node = [], nodes.get(last.args[0].name)
    while node and node.op in (*_COPIES, *_SWAPS) and len(users[node.name]) == 1 and node.name not in outputs:
        path.append(node)
        node = nodes.get(node.args[0].name)
    swaps = [n for n in path if n.op in _SWAPS]
    if not node or node.op not in _RESHAPES or len(swaps) != 1 or len(users[node.name]) != 1 or node.name in outputs:
        return None
    source, split, whole = node.args[0].name, shapes[node.name], shapes.get(node.args[0].name, ())
    axis = next((d for d in range(len(whole)) if whole[d] != split[d]), None)
    if not axis or shapes[last.name] != whole or len(split) != len(whole) + 1:
        return None
    if (*split[:axis], split[axis] * split[axis + 1], *split[axis + 2 :]) != whole:
        return None
    probe = torch.arange(whole[axis]).view([-1 if d == axis else 1 for d in range(len(whole))]).expand(whole)
    moved = resolve(swaps[0].op)(probe.reshape(split), *swaps[0].args[1:])
    expected = probe.reshape(split).transpose(axis, axis + 1)
    if moved.shape != expected.shape or not torch.equal(moved, expected):
        return None
    order = torch.arange(whole[axis]).view(split[axis], split[axis + 1]).t().reshape(-1)
    return Shuffle(source, axis, order, (node.name, *(n.name for n in path)))
