"""One walk over a graph in order of execution: every value gets labels that say which channel each entry belongs to.

A value's labels have the value's shape at batch size 1; along axes where they do not change they are an expanded
view, so they take little memory. Operators that only move entries are run on the labels themselves; the others have
rules (`rules.py`). Labels that meet in an elementwise operator are joined.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.graph import Graph, Node, Ref, map_refs
from ..runtime.ops import resolve
from ..runtime.program import value_shapes
from .labels import Labels

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
        self.shapes = value_shapes(graph)
        self.values: dict[str, Any] = {spec.name: self.none(1, *spec.shape) for spec in graph.inputs}
        self.uses: list[Use] = []
        self.reads: list[Read] = []
        self.produced: list[Produced] = []
        self.refused: dict[str, str] = {}  # layers that take no part, with reasons
        self.permutes = _permuting_chains(graph, self.shapes)  # last node of a chain to its first node's input and axis
        self._inside = {name for chain in self.permutes.values() for name in chain.inside}
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._later: list[tuple[Tensor, int, str]] = []
        self._roles = _weight_roles(graph)

    def run(self) -> Walk:
        """Walk the whole graph."""
        from .rules import RULES, unknown

        for node in self.graph.nodes:
            self.values[node.name] = RULES.get(node.op, unknown)(self, node)
        for name in self.graph.outputs:
            self.labels.close(self.values[name], "is an output of the network")
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
        found = []
        axes = [d for d in range(labels.dim()) if labels.shape[d] > 1 and labels.stride(d) != 0]
        if axes:
            roots = self.labels.find(_squeezed(labels))
            found = [d for d in axes if bool((roots != roots.narrow(d, 0, 1)).any())]
        return found

    def along(self, labels: Tensor, axis: int) -> Tensor:
        """The labels along one axis, at index 0 of all others, (size,)."""
        axis %= labels.dim()
        for d in reversed(range(labels.dim())):
            if d != axis:
                labels = labels.select(d, 0)
        return labels.contiguous()

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
        if tensor is None:
            return True
        if not isinstance(tensor, Ref) or tensor.name not in self.graph.tensors or tensor.name not in self._roles:
            return False
        key = (tensor.name, dim)
        if key in self._rows:
            self.labels.union(self._rows[key], labels)
        else:
            self._rows[key] = labels
            self.uses.append(Use(tensor.name, dim, labels))
        return True

    def rows(self, tensor: Ref, dim: int, count: int) -> Tensor:
        """Labels for the channels that a weight creates along ``dim``: new ones, or its earlier ones if it is shared."""
        return self._rows.get((tensor.name, dim)) if (tensor.name, dim) in self._rows else self.labels.fresh(count)

    def tie_later(self, labels: Tensor, dim: int, reason: str) -> None:
        """Join the labels along a dimension at the end, unless rules that come later make them one anyway."""
        self._later.append((labels, dim, reason))

    def has_role(self, tensor: Any) -> bool:
        """Whether an argument is a stored tensor that is only ever used as a layer's own."""
        return isinstance(tensor, Ref) and tensor.name in self._roles

    # The end of the walk

    def _finish(self) -> None:
        """Tie what was put off, and make every value a product: along each axis alone its channels come and go."""
        for labels, dim, reason in self._later:
            self.labels.tie(labels, dim, reason)
        for _ in range(8):
            loose = False
            for name, labels in self.values.items():
                if not isinstance(labels, Tensor) or name in self._inside:
                    continue
                axes = self.varying(labels)
                if len(axes) > 1:
                    loose = True
                    free = max(axes, key=lambda d: labels.shape[d])
                    for d in axes:
                        if d != free:
                            self.labels.tie(labels, d, f"its channels are laid out over several dimensions ({name})")
            if not loose:
                return

    def axes(self) -> dict[str, dict[int, Tensor]]:
        """For each value and stored tensor the axes along which channels lie, with their representatives (size,)."""
        found: dict[str, dict[int, Tensor]] = {}
        for name, labels in self.values.items():
            if isinstance(labels, Tensor) and name not in self._inside:
                for axis in self.varying(labels):
                    found.setdefault(name, {})[axis] = self.labels.find(self.along(labels, axis))
        for (tensor, dim), labels in self._rows.items():
            found.setdefault(tensor, {})[dim] = self.labels.find(labels)
        return found


def _squeezed(labels: Tensor) -> Tensor:
    for d in range(labels.dim()):
        if labels.stride(d) == 0 and labels.shape[d] > 1:
            labels = labels.narrow(d, 0, 1)
    return labels


# Positions of the arguments that are a layer's own tensors, by operator.
_OWN = {
    **dict.fromkeys(
        ("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.conv1d.padding", "aten.conv2d.padding",
         "aten.conv_transpose2d.input", "aten.linear.default", "aten.prelu.default"), (1, 2)),
    "aten.batch_norm.default": (1, 2, 3, 4), "aten.instance_norm.default": (1, 2, 3, 4),
    "aten.group_norm.default": (2, 3), "aten.layer_norm.default": (2, 3), "aten.rms_norm.default": (2,),
}  # fmt: skip


def _weight_roles(graph: Graph) -> set[str]:
    """Stored tensors that every reader uses as its own weight, bias or statistic, at the same place."""
    places: dict[str, set[int | None]] = {}
    for node in graph.nodes:
        own = {node.args[k].name: k for k in _OWN.get(node.op, ()) if k < len(node.args) and isinstance(node.args[k], Ref)}
        for name, times in Counter(node.refs()).items():
            places.setdefault(name, set()).add(own.get(name) if times == 1 else None)
    return {name for name in graph.tensors if len(places.get(name, {None})) == 1 and None not in places[name]}


@dataclass(frozen=True)
class Chain:
    """Reshape, swap, reshape back: a permutation of one axis. ``order`` (size,): entry j comes from ``order[j]``."""

    source: str
    axis: int
    order: Tensor
    inside: tuple[str, ...]


_COPIES = ("aten.contiguous.default", "aten.clone.default")
_SWAPS = ("aten.transpose.int", "aten.permute.default", "aten.swapaxes.default")


def _permuting_chains(graph: Graph, shapes: dict[str, tuple[int, ...]]) -> dict[str, Chain]:
    """Channel shuffles written as view, transpose, view, by the name of their last node."""
    nodes, users, found = {n.name: n for n in graph.nodes}, graph.users(), {}
    shapes = {**{i.name: (1, *i.shape) for i in graph.inputs}, **shapes}
    for last in graph.nodes:
        if last.op != "aten.reshape.default":
            continue
        path, node = [], nodes.get(last.args[0].name)
        while node and node.op in (*_COPIES, *_SWAPS) and len(users[node.name]) == 1 and node.name not in graph.outputs:
            path.append(node)
            node = nodes.get(node.args[0].name)
        swaps = [n for n in path if n.op in _SWAPS]
        if not node or node.op != "aten.reshape.default" or len(swaps) != 1 or len(users[node.name]) != 1:
            continue
        source, split, whole = node.args[0].name, shapes[node.name], shapes.get(node.args[0].name, ())
        axis = next((d for d in range(len(whole)) if whole[d] != split[d]), None)
        if shapes[last.name] != whole or len(split) != len(whole) + 1 or not axis or node.name in graph.outputs:
            continue
        if (*split[:axis], split[axis] * split[axis + 1], *split[axis + 2:]) != whole:
            continue
        probe = torch.arange(whole[axis]).view([-1 if d == axis else 1 for d in range(len(whole))]).expand(whole)
        moved = resolve(swaps[0].op)(probe.reshape(split), *swaps[0].args[1:])
        expected = probe.reshape(split).transpose(axis, axis + 1)
        if moved.shape == expected.shape and torch.equal(moved, expected):
            order = torch.arange(whole[axis]).view(split[axis], split[axis + 1]).t().reshape(-1)
            found[last.name] = Chain(source, axis, order, (node.name, *(n.name for n in path)))
    return found
