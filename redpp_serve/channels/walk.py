"""One walk over a graph in order of execution: every value gets labels that say which channel each entry belongs to.

A value's labels have the value's shape at batch size 1; along axes where they do not change they are an expanded
view, so they take little memory. Operators that only move entries are run on the labels themselves; the others have
rules (`rules.py`). Labels that meet in an elementwise operator are joined.

Labels of channels: integers in a union-find, with the reasons why some of them must stay.

Whether the entries of channels that have several keep their order where entries of an axis are taken or moved.

Channel shuffles written as reshape, swap, reshape: found in a graph as one permutation of an axis.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.graph.executor import value_shapes
from redpp_serve.graph.graph import Graph, Node, Ref, map_refs
from redpp_serve.graph.operators import resolve


class Labels:
    """A union-find over labels, worked on in whole arrays. Label 0 marks what is no channel: it never joins others."""

    NONE = 0

    def __init__(self) -> None:
        self._parent = np.zeros(1024, np.int64)  # grows by doubling
        self._count = 1
        self._notes: list[tuple[np.ndarray, str, bool]] = []  # labels, reason, whether it closes them

    def fresh(self, count: int) -> Tensor:
        """``count`` new labels, each alone, (count,) int64."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros(max(count, len(self._parent)), np.int64)])
        self._parent[start : self._count] = np.arange(start, self._count)
        return torch.arange(start, self._count)

    def find(self, labels: Tensor) -> Tensor:
        """The representative of each label, in the same shape; repetitions stay views."""
        return torch.from_numpy(np.asarray(self._find(once(labels).numpy()))).expand(labels.shape)

    def _find(self, labels: np.ndarray) -> np.ndarray:
        roots = self._parent[labels]
        while True:
            higher = self._parent[roots]
            if np.array_equal(higher, roots):
                break
            roots = higher
        return roots

    def union(self, a: Tensor, b: Tensor, reason: str = "meets values that are no channels") -> None:
        """Join the labels pairwise (broadcast). A label that meets NONE is closed instead, with the reason."""
        x, y = (t.numpy() for t in _pairs(a, b))
        for one, other in ((x, y), (y, x)):
            alone = one[(other == self.NONE) & (one != self.NONE)]
            if len(alone):
                self._notes.append((alone, reason, True))
        both = (x != self.NONE) & (y != self.NONE)
        x, y = x[both], y[both]
        met = np.concatenate([x, y])
        while len(x):
            x, y = self._find(x), self._find(y)
            apart = x != y
            x, y = x[apart], y[apart]
            np.minimum.at(self._parent, np.maximum(x, y), np.minimum(x, y))
        self._parent[met] = self._find(met)

    def tie(self, labels: Tensor, dim: int, reason: str) -> None:
        """Join all labels along a dimension; the reason is kept for those whose channel set has nothing else left."""
        labels = once(labels)
        if labels.shape[dim] < 2:
            return
        roots = self.find(labels)
        moved = (roots != roots.narrow(dim, 0, 1)).any(dim).unsqueeze(dim).expand(labels.shape)
        if bool(moved.any()):
            self._notes.append((np.unique(roots[moved].numpy()), reason, False))
            self.union(labels, labels.narrow(dim, 0, 1), reason)

    def close(self, labels: Tensor, reason: str) -> None:
        """These channels must stay."""
        found = np.unique(self._find(once(labels).numpy()))
        found = found[found != self.NONE]
        if len(found):
            self._notes.append((found, reason, True))

    def reasons(self) -> tuple[dict[int, str], dict[int, str]]:
        """By representative: why it must stay, and why it was tied to others; the first reason that was given."""
        closed: dict[int, str] = {}
        tied: dict[int, str] = {}
        for labels, reason, closes in self._notes:
            for root in np.unique(self._find(labels)).tolist():
                (closed if closes else tied).setdefault(root, reason)
        return closed, tied


def once(labels: Tensor) -> Tensor:
    """Without the repetitions of expanded dimensions, which become 1 long."""
    for dim, step in enumerate(labels.stride()):
        if step == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct pairs of labels that meet when two arrays are broadcast together, without equal ones."""
    a, b = torch.broadcast_tensors(a, b)
    for dim in range(a.dim()):
        if a.stride(dim) == 0 and b.stride(dim) == 0 and a.shape[dim] > 1:
            a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
    a, b = a.reshape(-1), b.reshape(-1)
    differ = a != b
    a, b = a[differ], b[differ]
    if not len(a):
        return a, b
    both = torch.unique((a << 32) + b)
    return both >> 32, both & 0xFFFFFFFF


def misaligned(row: Tensor, taken: Tensor) -> Tensor:
    """Channels whose entries ``taken`` treats unlike those of other channels of the same size.

    Channels are merged entry by entry, the first with the first, so each must stand in the same order everywhere.

    Args:
        row: (size,) int64, whose entry each position of an axis is.
        taken: (n,) int64, the positions that go on, in their new order.

    Returns:
        Representatives (k,) int64.
    """
    by_root = torch.argsort(row, stable=True)
    roots, inverse, counts = torch.unique(row, return_inverse=True, return_counts=True)
    if len(roots) in (1, len(row)):
        return row[:0]
    rank = torch.empty_like(row)
    rank[by_root] = torch.arange(len(row)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    sequences: dict[int, list[int]] = {}
    for root, position in zip(inverse[taken].tolist(), rank[taken].tolist()):
        sequences.setdefault(root, []).append(position)
    patterns: dict[int, set[tuple[int, ...]]] = {}
    for root, sequence in sequences.items():
        patterns.setdefault(int(counts[root]), set()).add(tuple(sequence))
    mixed = torch.tensor([size for size, found in patterns.items() if len(found) > 1 and size > 1], dtype=torch.int64)
    return roots[torch.isin(counts, mixed)]


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


_MOST_ENTRIES = 1 << 21  # of a parameter that takes part in elementwise operators; a larger one carries no channels


@dataclass(frozen=True)
class Use:
    """A dimension of a tensor whose entries belong to the channels with these labels (size,)."""

    tensor: str
    dim: int
    labels: Tensor


@dataclass(frozen=True)
class Read:
    """A call that sums over the channels: dimension ``dim`` of its weight meets axis ``axis`` of ``value``."""

    node: str
    tensor: str
    dim: int
    value: str
    axis: int
    labels: Tensor


@dataclass(frozen=True)
class Produced:
    """The output channels that a call creates: its layer name and their labels."""

    layer: str
    node: str
    labels: Tensor


class Walk:
    """State of the walk, filled by `rules.RULES`; `finish` settles what only the whole graph decides."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.labels = Labels()
        self.shapes = {**{spec.name: (1, *spec.shape) for spec in graph.inputs}, **value_shapes(graph)}
        self.values: dict[str, Any] = {spec.name: self.none(1, *spec.shape) for spec in graph.inputs}
        self.uses: list[Use] = []
        self.reads: list[Read] = []
        self.produced: list[Produced] = []
        self.refused: dict[str, str] = {}  # layers that take no part, with reasons
        self.shuffles = find_shuffles(graph, self.shapes)
        self._inside = {name for shuffle in self.shuffles.values() for name in shuffle.inside}
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._later: list[tuple[Tensor, int, str]] = []
        self._joins: list[tuple[Tensor, Tensor, str]] = []
        self._takes: list[tuple[Tensor, int, Tensor, str]] = []
        self._roles = _weight_roles(graph)
        self._nodes = {node.name: node for node in graph.nodes}
        self._constants: dict[str, Tensor | None] = dict(graph.tensors)

    def run(self) -> Walk:
        """Walk the whole graph."""
        from redpp_serve.channels.rules import RULES
        from redpp_serve.channels.rules_layout import unknown

        for node in self.graph.nodes:
            self.values[node.name] = RULES.get(node.op, unknown)(self, node)
        for name in self.graph.outputs:
            self.labels.close(self._named(name), "is an output of the network")
        self._finish()
        return self

    # What rules use

    def none(self, *shape: int) -> Tensor:
        """Labels of a value without channels."""
        return torch.zeros((), dtype=torch.int64).expand(shape)

    def opaque(self, node: Node) -> Any:
        """The value of a node without channels; None where it is no single tensor."""
        return self.none(*self.shapes[node.name]) if node.name in self.shapes else None

    def value(self, argument: Any) -> Any:
        """An argument with labels, numbers and lists in the place of `Ref`s."""
        return map_refs(argument, self._named)

    def _named(self, name: str) -> Any:
        if name not in self.values:  # a stored tensor: each entry may turn out to be a channel's
            tensor = self.graph.tensors[name]
            plain = not tensor.is_floating_point() or tensor.dim() == 0 or tensor.numel() > _MOST_ENTRIES
            if plain or name in self._roles:
                self.values[name] = self.none(*tensor.shape)
            else:
                self.values[name] = self.labels.fresh(tensor.numel()).view(tensor.shape)
        return self.values[name]

    def varying(self, labels: Tensor) -> list[int]:
        """The axes along which the channel changes."""
        roots = self.labels.find(once(labels))
        return [d for d in range(roots.dim()) if roots.shape[d] > 1 and bool((roots != roots.narrow(d, 0, 1)).any())]

    def along(self, labels: Tensor, axis: int) -> Tensor:
        """The labels along one axis, at index 0 of all others, (size,)."""
        axis %= labels.dim()
        return labels[tuple(slice(None) if d == axis else 0 for d in range(labels.dim()))].contiguous()

    def flat_over(self, labels: Tensor, axis: int) -> bool:
        """Whether the channel changes along no other axis than this one."""
        return set(self.varying(labels)) <= {axis % labels.dim()}

    def spread(self, along: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
        """Labels (size,) along one axis of a value of that shape."""
        view = [1] * len(shape)
        view[axis] = len(along)
        return along.view(view).expand(shape)

    def use(self, tensor: Ref | None, dim: int, labels: Tensor) -> bool:
        """Bind a dimension of a stored tensor to these labels; False where the argument is no stored tensor."""
        if tensor is None or not self.is_own(tensor):
            return tensor is None
        key = (tensor.name, dim)
        if key in self._rows:
            self.labels.union(self._rows[key], labels)
        else:
            self._rows[key] = labels
            self.uses.append(Use(tensor.name, dim, labels))
        return True

    def rows(self, tensor: Ref, dim: int, count: int) -> Tensor:
        """Labels for the channels that a weight creates along ``dim``: new ones, or its earlier ones if shared."""
        key = (tensor.name, dim)
        return self._rows[key] if key in self._rows else self.labels.fresh(count)

    def tie_later(self, labels: Tensor, dim: int, reason: str) -> None:
        """Join the labels along a dimension at the end, unless rules that come later make them one anyway."""
        self._later.append((labels, dim, reason))

    def take(self, labels: Tensor, axis: int, positions: Tensor, node: str) -> None:
        """Note that a call takes these positions (n,) of an axis, in this order."""
        self._takes.append((labels, axis, positions, node))

    def join_later(self, one: Tensor, many: Tensor, node: str) -> None:
        """Join ``one`` with ``many``, which it is broadcast over: at the end, when it shows which channels of ``many``
        go by themselves (the heads of an attention, say, while ``one`` is the same for each head).
        """
        self._joins.append((one, many, node))

    def is_own(self, tensor: Any) -> bool:
        """Whether an argument is absent, or a stored tensor that is only ever used as a layer's own."""
        return tensor is None or (isinstance(tensor, Ref) and tensor.name in self._roles)

    def constant(self, name: str) -> Tensor | None:
        """The value of a stored tensor, or of a call that only stored tensors lead to; None for other values."""
        if name not in self._constants:
            node = self._nodes.get(name)
            known = {ref: self.constant(ref) for ref in node.refs()} if node else {}
            value = None
            if node and all(t is not None for t in known.values()):
                kwargs = {key: map_refs(argument, known.get) for key, argument in node.kwargs.items()}
                value = resolve(node.op)(*map_refs(node.args, known.get), **kwargs)
            self._constants[name] = value if isinstance(value, Tensor) else None
        return self._constants[name]

    # The end of the walk

    def _finish(self) -> None:
        """Tie what was put off, and make every value a product: along one axis alone its channels come and go."""
        for labels, dim, reason in self._later:
            self.labels.tie(labels, dim, reason)
        for one, many, node in self._joins:
            self._join(one, many, node)
        for name, labels in self._tracked():
            axes = self.varying(labels)
            for d in axes:
                if d != max(axes, key=lambda d: labels.shape[d]):
                    self.labels.tie(labels, d, f"its channels are laid out over several dimensions ({name})")
        for labels, axis, positions, node in self._takes:
            moved = misaligned(self.labels.find(self.along(labels, axis)), positions)
            self.labels.close(moved, f"is taken apart or reordered inside ({node})")
        for name, labels in self._tracked():
            if name in self.graph.tensors:
                self.uses += [Use(name, dim, along) for dim, along in self._own_axes(labels).items()]

    def _join(self, one: Tensor, many: Tensor, node: str) -> None:
        moves = self.varying(many)
        over = [d for d in moves if one.shape[d] == 1]
        if over == moves:  # whichever channels of many go, all of one stays
            self.labels.close(one, f"is broadcast over other channels ({node})")
            return
        for d in over:
            self.labels.tie(many, d, f"is multiplied or added along other channels ({node})")
        self.labels.union(one, many, f"meets values that are no channels ({node})")

    def _tracked(self) -> list[tuple[str, Tensor]]:
        """Values and stored tensors with labels for each entry."""
        return [(k, v) for k, v in self.values.items() if isinstance(v, Tensor) and k not in self._inside]

    def alone(self) -> dict[int, str]:
        """Channels that some value consists of, by representative, with the value's name: it would be left empty."""
        found: dict[int, str] = {}
        for name, labels in self._tracked():
            if labels.numel() and not self.varying(labels):
                found.setdefault(int(self.labels.find(labels.reshape(-1)[:1])), name)
        found.pop(Labels.NONE, None)
        return found

    def axes(self) -> dict[str, dict[int, Tensor]]:
        """For each value and stored tensor the axes along which channels lie, with their representatives (size,)."""
        found = {name: self._own_axes(labels) for name, labels in self._tracked()}
        for (tensor, dim), labels in self._rows.items():
            found.setdefault(tensor, {})[dim] = self.labels.find(labels)
        return {name: axes for name, axes in found.items() if axes}

    def _own_axes(self, labels: Tensor) -> dict[int, Tensor]:
        return {d: self.labels.find(self.along(labels, d)) for d in self.varying(labels)}


# Positions of the arguments that are a layer's own tensors, by operator.
OWN = {
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
            "aten.linear.default",
        ),
        (1, 2),
    ),
    "aten.batch_norm.default": (1, 2, 3, 4),
    "aten.instance_norm.default": (1, 2, 3, 4),
    "aten.prelu.default": (1,),
    "aten.group_norm.default": (2, 3),
    "aten.layer_norm.default": (2, 3),
    "aten.rms_norm.default": (2,),
}


def _weight_roles(graph: Graph) -> set[str]:
    """Stored tensors that every reader uses as its own weight, bias or statistic, at the same place."""
    places: dict[str, set[int | None]] = {name: {None} for name in graph.outputs}
    for node in graph.nodes:
        given = ((k, node.args[k]) for k in OWN.get(node.op, ()) if k < len(node.args))
        own = {argument.name: k for k, argument in given if isinstance(argument, Ref)}
        for name, times in Counter(node.refs()).items():
            places.setdefault(name, set()).add(own.get(name) if times == 1 else None)
    return {name for name in graph.tensors if len(places.get(name, {None})) == 1 and None not in places[name]}
