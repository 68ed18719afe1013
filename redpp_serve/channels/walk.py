"""One walk over a graph in order of execution: every value gets labels that say which channel each entry belongs to.

A value's labels have the value's shape at batch size 1. Operators that only move entries are run on the labels
themselves; the others have rules (`rules.py`). Labels that meet in an elementwise operator are joined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.labels import Labels, misaligned, once
from redpp_serve.channels.shuffles import find_shuffles
from redpp_serve.graph.executor import value_shapes
from redpp_serve.graph.graph import Graph, Node, Ref, map_refs
from redpp_serve.graph.layers import EMBEDDING
from redpp_serve.graph.operators import resolve

_MOST_ENTRIES = 1 << 21  # of a parameter that takes part in elementwise operators; a larger one carries no channels

CONVOLUTIONS = (
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.conv1d.padding",
    "aten.conv2d.padding",
    "aten.conv3d.padding",
    "aten.conv_transpose1d.default",
    "aten.conv_transpose2d.input",
    "aten.conv_transpose3d.input",
    "aten.convolution.default",
)
OWN = {  # by operator, the positions of the arguments that are a layer's own tensors
    **dict.fromkeys((*CONVOLUTIONS, "aten.linear.default"), (1, 2)),
    EMBEDDING: (0,),
    "aten.batch_norm.default": (1, 2, 3, 4),
    "aten.instance_norm.default": (1, 2, 3, 4),
    "aten.prelu.default": (1,),
    "aten.group_norm.default": (2, 3),
    "aten.layer_norm.default": (2, 3),
    "aten.rms_norm.default": (2,),
}


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
    """The output channels (n_out,) that a layer's call creates."""

    layer: str
    labels: Tensor


class Walk:
    """The state of a walk, filled by rules.

    Args:
        graph: the network.
        rules: how channels pass through each operator, by its name; an operator without a rule closes what it reads.

    Attributes:
        labels: which labels are one channel, and why some must stay.
        shapes: the shape of every value at batch size 1.
        values: the labels of every value; numbers and lists for values that are no tensors.
        uses: dimensions of stored tensors that hold something of each channel.
        reads: calls that sum over channels.
        produced: calls that create channels, in order of execution.
        refused: layers whose output channels stay, with the reason.
        shuffles: channel shuffles by the name of their last call.
    """

    def __init__(self, graph: Graph, rules: Mapping[str, Rule]) -> None:
        self.graph = graph
        self.labels = Labels()
        self.shapes = {**{spec.name: (1, *spec.shape) for spec in graph.inputs}, **value_shapes(graph)}
        self.values: dict[str, Any] = {spec.name: self.none(1, *spec.shape) for spec in graph.inputs}
        self.uses: list[Use] = []
        self.reads: list[Read] = []
        self.produced: list[Produced] = []
        self.refused: dict[str, str] = {}
        self.shuffles = find_shuffles(graph, self.shapes)
        self._rules = rules
        self._inside = {name for shuffle in self.shuffles.values() for name in shuffle.inside}
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._later: list[tuple[Tensor, int, str]] = []
        self._joins: list[tuple[Tensor, Tensor, str]] = []
        self._takes: list[tuple[Tensor, int, Tensor, str]] = []
        self._roles = _weight_roles(graph)
        self._nodes = {node.name: node for node in graph.nodes}
        self._constants: dict[str, Tensor | None] = dict(graph.tensors)

    def run(self) -> Walk:
        """Walk the whole graph, then settle what only the whole graph decides."""
        for node in self.graph.nodes:
            self.values[node.name] = self._rules.get(node.op, unknown)(self, node)
        for name in self.graph.outputs:
            self.labels.close(self._named(name), "is an output of the network")
        self._finish()
        return self

    def none(self, *shape: int) -> Tensor:
        """Make the labels of a value without channels."""
        return torch.zeros((), dtype=torch.int64).expand(shape)

    def opaque(self, node: Node) -> Any:
        """Make the labels of a node without channels; None where its value is no single tensor."""
        return self.none(*self.shapes[node.name]) if node.name in self.shapes else None

    def value(self, argument: Any) -> Any:
        """Return an argument with labels, numbers and lists in the place of `Ref`s."""
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
        """List the axes along which the channel changes."""
        roots = self.labels.find(once(labels))
        return [d for d in range(roots.dim()) if roots.shape[d] > 1 and bool((roots != roots.narrow(d, 0, 1)).any())]

    def along(self, labels: Tensor, axis: int) -> Tensor:
        """Return the labels (size,) along one axis, at index 0 of all others."""
        axis %= labels.dim()
        return labels[tuple(slice(None) if d == axis else 0 for d in range(labels.dim()))].contiguous()

    def flat_over(self, labels: Tensor, axis: int) -> bool:
        """Return whether the channel changes along no other axis than this one."""
        return set(self.varying(labels)) <= {axis % labels.dim()}

    def spread(self, along: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
        """Expand labels (size,) along one axis to a value of that shape."""
        view = [1] * len(shape)
        view[axis] = len(along)
        return along.view(view).expand(shape)

    def use(self, tensor: Ref | None, dim: int, labels: Tensor) -> bool:
        """Bind a dimension of a stored tensor to these labels; return False if the argument is no stored tensor."""
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
        """Return labels for the channels that a weight creates along ``dim``: its earlier ones if it is shared."""
        key = (tensor.name, dim)
        return self._rows[key] if key in self._rows else self.labels.fresh(count)

    def tie_later(self, labels: Tensor, dim: int, reason: str) -> None:
        """Join the labels along a dimension at the end, unless later rules make them one anyway."""
        self._later.append((labels, dim, reason))

    def take(self, labels: Tensor, axis: int, positions: Tensor, node: str) -> None:
        """Note that a call takes these positions (n,) of an axis, in this order."""
        self._takes.append((labels, axis, positions, node))

    def join_later(self, one: Tensor, many: Tensor, node: str) -> None:
        """Join ``one`` with ``many``, over which it is broadcast, at the end of the walk.

        Only then is it known which channels of ``many`` go by themselves: the heads of an attention, for instance,
        while ``one`` is the same for each head.
        """
        self._joins.append((one, many, node))

    def is_own(self, tensor: Any) -> bool:
        """Return whether an argument is absent, or a stored tensor that is only ever used as a layer's own."""
        return tensor is None or (isinstance(tensor, Ref) and tensor.name in self._roles)

    def constant(self, name: str) -> Tensor | None:
        """Return the value of a stored tensor or of a call that depends on those alone; None for other values."""
        if name not in self._constants:
            node = self._nodes.get(name)
            known = {ref: self.constant(ref) for ref in node.refs()} if node else {}
            value = None
            if node and all(t is not None for t in known.values()):
                kwargs = {key: map_refs(argument, known.get) for key, argument in node.kwargs.items()}
                value = resolve(node.op)(*map_refs(node.args, known.get), **kwargs)
            self._constants[name] = value if isinstance(value, Tensor) else None
        return self._constants[name]

    def _finish(self) -> None:
        """Tie what was put off, and leave each value one axis along which its channels come and go."""
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
            if not labels.numel():  # as of the part that a window of the input's own size leaves over
                continue
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
        """List values and stored tensors with labels for each entry."""
        return [(k, v) for k, v in self.values.items() if isinstance(v, Tensor) and k not in self._inside]

    def alone(self) -> dict[int, str]:
        """Map channels that some value wholly consists of, and would be empty without, to that value's name."""
        found: dict[int, str] = {}
        for name, labels in self._tracked():
            if labels.numel() and not self.varying(labels):
                found.setdefault(int(self.labels.find(labels.reshape(-1)[:1])), name)
        found.pop(Labels.NONE, None)
        return found

    def axes(self) -> dict[str, dict[int, Tensor]]:
        """Map each value and stored tensor to the axes with channels, and those to representatives (size,)."""
        found = {name: self._own_axes(labels) for name, labels in self._tracked()}
        for (tensor, dim), labels in self._rows.items():
            found.setdefault(tensor, {})[dim] = self.labels.find(labels)
        return {name: axes for name, axes in found.items() if axes}

    def _own_axes(self, labels: Tensor) -> dict[int, Tensor]:
        return {d: self.labels.find(self.along(labels, d)) for d in self.varying(labels)}


Rule = Callable[[Walk, Node], Any]


def unknown(walk: Walk, node: Node) -> Any:
    """Close whatever channels an operator without a rule reads."""
    for name in node.refs():
        for labels in tensors_in(walk.value(Ref(name))):
            walk.labels.close(labels, f"is read by {op_name(node)} ({node.name}), whose coupling is not known")
    return walk.opaque(node)


def tensors_in(value: Any) -> list[Tensor]:
    """List all labels in an argument, through lists."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def op_name(node: Node) -> str:
    """Return an operator's name without family and overload, for people."""
    return node.op.split(".")[1]


def join(walk: Walk, a: Tensor, b: Tensor, node: Node) -> Tensor:
    """Join the labels of two broadcast operands and return those of the result."""
    dims = max(a.dim(), b.dim())
    a, b = (t[(None,) * (dims - t.dim())] for t in (a, b))
    shape: tuple[int, ...] = torch.broadcast_shapes(a.shape, b.shape)
    moves_a, moves_b = walk.varying(a), walk.varying(b)
    first_a, first_b = (int(t.reshape(-1)[0]) if t.numel() else Labels.NONE for t in (a, b))
    if not moves_a and not moves_b and Labels.NONE in (first_a, first_b):
        return (b if a.numel() and first_a == Labels.NONE else a).expand(shape)
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


def _weight_roles(graph: Graph) -> set[str]:
    """Find the stored tensors that every reader uses as its own weight, bias or statistic, at the same place."""
    places: dict[str, set[int | None]] = {name: {None} for name in graph.outputs}
    for node in graph.nodes:
        given = ((k, node.args[k]) for k in OWN.get(node.op, ()) if k < len(node.args))
        own = {argument.name: k for k, argument in given if isinstance(argument, Ref)}
        for name, times in Counter(node.refs()).items():
            places.setdefault(name, set()).add(own.get(name) if times == 1 else None)
    return {name for name in graph.tensors if len(places.get(name, {None})) == 1 and None not in places[name]}
