"""Channel shuffles written as reshape, swap, reshape: found in a graph as one permutation of an axis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redpp_serve.graph.graph import Graph, Node
from redpp_serve.graph.operators import resolve

_COPIES = ("aten.contiguous.default", "aten.clone.default")
_SWAPS = ("aten.transpose.int", "aten.permute.default", "aten.swapaxes.default")
_RESHAPES = ("aten.reshape.default", "aten.flatten.using_ints", "aten.unflatten.int")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shuffle:
    """A permutation of an axis of a value.

    Attributes:
        source: the value's name.
        axis: the axis that is permuted.
        order: (size,) int64; entry j of the result is entry ``order[j]`` of the source.
        inside: names of the calls from the first reshape to the one before the last, whose value is the result.
    """

    source: str
    axis: int
    order: Tensor
    inside: tuple[str, ...]


def find_shuffles(graph: Graph, shapes: Shapes) -> dict[str, Shuffle]:
    """Find all shuffles, by the name of their last call.

    Args:
        graph: the network.
        shapes: every value's shape at batch size 1.
    """
    nodes, users = {node.name: node for node in graph.nodes}, graph.users()
    private = {name for name, readers in users.items() if len(readers) == 1} - set(graph.outputs)
    found = {}
    for last in graph.nodes:
        path = _path_to(last, nodes, private) if last.op in _RESHAPES else []
        shuffle = _shuffle(path, shapes, shapes[last.name]) if path else None
        if shuffle is not None:
            found[last.name] = shuffle
    return found


def _path_to(last: Node, nodes: dict[str, Node], private: set[str]) -> list[Node]:
    """List the calls from ``last``, not included, back to a reshape, if nothing else reads their values."""
    path: list[Node] = []
    node = nodes.get(last.args[0].name)
    while node is not None and node.name in private and node.op in (*_COPIES, *_SWAPS):
        path.append(node)
        node = nodes.get(node.args[0].name)
    return [*path, node] if node is not None and node.name in private and node.op in _RESHAPES else []


def _shuffle(path: list[Node], shapes: Shapes, result: tuple[int, ...]) -> Shuffle | None:
    """Return the shuffle if a reshape splits one axis in two, one call swaps them, and the result is whole again."""
    *between, first = path
    swaps = [node for node in between if node.op in _SWAPS]
    whole, split = shapes.get(first.args[0].name, ()), shapes[first.name]
    axis = next((d for d, sizes in enumerate(zip(whole, split, strict=False)) if sizes[0] != sizes[1]), None)
    if not axis or len(swaps) != 1 or result != whole or len(split) != len(whole) + 1:
        return None
    if (*split[:axis], split[axis] * split[axis + 1], *split[axis + 2 :]) != whole:
        return None
    probe = torch.arange(whole[axis]).view([-1 if d == axis else 1 for d in range(len(whole))]).expand(whole)
    moved = resolve(swaps[0].op)(probe.reshape(split), *swaps[0].args[1:])
    expected = probe.reshape(split).transpose(axis, axis + 1)
    if moved.shape != expected.shape or not torch.equal(moved, expected):
        return None
    order = torch.arange(whole[axis]).view(split[axis], split[axis + 1]).t().reshape(-1)
    return Shuffle(first.args[0].name, axis, order, (first.name, *(node.name for node in between)))
