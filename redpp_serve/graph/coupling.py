"""Which channels of a network are coupled: the classes that pruning works on, found by union-find over its operators.

Channels are coupled where operators make them meet: a residual add joins the outputs of all its writers, a
squeeze-excite gate joins trunk and gate, a concatenation puts classes side by side, a grouped convolution ties a group.
A class is open where every operator that its channels pass has a rule; what closes one is kept as a reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..runtime.graph import Graph
from ..runtime.program import Program
from .classes import ChannelClass, Part, Reader
from .layers import find_layers
from .narrowing import narrow
from .walk import Walk


@dataclass(frozen=True)
class Coupling:
    """The classes of a graph, and where their channels lie in every value and stored tensor.

    ``closed_layers`` says for each convolution or Linear whose output channels stay why they do.
    """

    graph: Graph
    classes: tuple[ChannelClass, ...]
    closed_layers: dict[str, str]
    _axes: dict[str, dict[int, Tensor]]
    _roots: dict[str, Tensor]  # by class, the representatives of its channels
    _walk: Walk

    @property
    def open(self) -> tuple[ChannelClass, ...]:
        """The classes that may be narrowed, in order of execution."""
        return tuple(c for c in self.classes if not c.closed)

    def narrow(self, kept: Mapping[str, Tensor]) -> Graph:
        """The graph with only the kept channels, (k,) ascending int64 by class name; classes not named stay whole.

        Readers lose the columns of the channels that went; nothing makes up for them.
        """
        return narrow(self.graph, self._walk, self.kept_positions(kept))

    def kept_positions(self, kept: Mapping[str, Tensor]) -> Callable[[str], dict[int, Tensor]]:
        """For a value's or tensor's name the positions that stay along each axis that loses some, ascending."""
        gone = [self._roots[name][_complement(stay, len(self._roots[name]))] for name, stay in kept.items()]
        removed = torch.cat(gone) if gone else torch.empty(0, dtype=torch.int64)

        def positions(name: str) -> dict[int, Tensor]:
            found = {}
            for axis, roots in self._axes.get(name, {}).items():
                stays = ~torch.isin(roots, removed)
                if not bool(stays.all()):
                    found[axis] = stays.nonzero().view(-1)
            return found

        return positions


def couple(graph: Graph, exclude: Sequence[str] = ()) -> Coupling:
    """Find all classes of coupled channels.

    Args:
        graph: a captured network.
        exclude: shell patterns of layer names that must not change.
    """
    walk = Walk(graph).run()
    axes = walk.axes()
    closed, tied = walk.labels.reasons()
    classes, roots = _build(walk, closed, tied)
    classes = [_excluded(graph, c, exclude) for c in classes]
    coupling = Coupling(graph, tuple(classes), {}, axes, roots, walk)
    classes = _tried(coupling)
    return replace(coupling, classes=classes, closed_layers=_closed_layers(walk, classes, closed))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a shell pattern names the layer."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def unmatched(graph: Graph, patterns: Sequence[str]) -> list[str]:
    """A line for each pattern that names no layer."""
    names = [layer.name for layer in find_layers(graph)]
    return [f"--exclude {p} names no layer" for p in patterns if not fnmatch.filter(names, p)]


def _complement(kept: Tensor, count: int) -> Tensor:
    gone = torch.ones(count, dtype=torch.bool)
    gone[kept] = False
    return gone


def _positions(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Where each label stands, ascending."""
    order = np.argsort(labels, kind="stable")
    values, starts = np.unique(labels[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:])))


def _build(walk: Walk, closed: dict[int, str], tied: dict[int, str]) -> tuple[list[ChannelClass], dict[str, Tensor]]:
    """Channels that share a producer, and have as many entries in each tensor, are one class."""
    find = walk.labels.find
    produced = [(p, find(p.labels).numpy()) for p in walk.produced]
    group_of: dict[int, int] = {}  # root -> a producer that its component is known by
    leader = list(range(len(produced)))

    def lead(k: int) -> int:
        while leader[k] != k:
            k = leader[k]
        return k

    for k, (_, labels) in enumerate(produced):
        for root in np.unique(labels).tolist():
            if root in group_of:
                first, second = sorted((lead(group_of[root]), lead(k)))
                leader[second] = first
            group_of.setdefault(root, k)
    uses = [(use, _positions(find(use.labels).numpy())) for use in walk.uses]
    reads = [(read, _positions(find(read.labels).numpy())) for read in walk.reads]
    places: dict[int, list[tuple[int, int]]] = {}
    for slot, (_, where) in enumerate((*uses, *reads)):
        for root, found in where.items():
            places.setdefault(root, []).append((slot, len(found)))
    members: dict[tuple, list[int]] = {}
    order: dict[int, None] = {}
    for _, labels in produced:
        order.update(dict.fromkeys(labels.tolist()))
    order.pop(0, None)
    for root in order:
        key = (lead(group_of[root]), tuple(places.get(root, ())), root in closed)
        members.setdefault(key, []).append(root)
    read_tensors = {(r.tensor, r.dim) for r, _ in reads}
    classes, roots, taken = [], {}, {}
    for (group, slots, _), channels in members.items():
        name = produced[group][0].layer
        taken[name] = taken.get(name, 0) + 1
        name = name if taken[name] == 1 else f"{name}[{taken[name]}]"
        parts, readers = [], []
        for slot, _count in slots:
            source, where = (*uses, *reads)[slot]
            positions = torch.from_numpy(np.stack([where[root] for root in channels]))
            if slot >= len(uses):
                readers.append(Reader(source.node, source.tensor, source.dim, source.value, source.axis, positions))
            elif (source.tensor, source.dim) not in read_tensors:
                parts.append(Part(source.tensor, source.dim, positions))
        makers = dict.fromkeys(p.layer for p, labels in produced if np.isin(channels, labels).any())
        reason = next((closed[r] for r in channels if r in closed), "")
        if not reason and len(channels) < 2:
            reason = tied.get(channels[0], "has a single channel")
        if not reason and not readers:
            reason = "is not read by a layer"
        roots[name] = torch.tensor(channels)
        classes.append(ChannelClass(name, len(channels), tuple(makers), tuple(parts), tuple(readers), reason))
    return classes, roots


def _excluded(graph: Graph, found: ChannelClass, patterns: Sequence[str]) -> ChannelClass:
    if found.closed or not patterns:
        return found
    names = [t.removesuffix(".weight") for t in (*(p.tensor for p in found.parts), *(r.tensor for r in found.readers))]
    hit = next((name for name in names if matches(name, patterns)), None)
    if hit is None:
        return found
    return replace(found, closed="excluded" if hit in found.producers else f"{hit}, which goes with it, is excluded")


def _tried(coupling: Coupling) -> tuple[ChannelClass, ...]:
    """The classes, closed where a graph without their last channel could not run."""
    every = {c.name: torch.arange(c.channels - 1) for c in coupling.open}
    if not every or not _fails(coupling, every):
        return coupling.classes
    failed = {name: _fails(coupling, {name: kept}) for name, kept in every.items()}
    if not any(failed.values()):
        failed = dict.fromkeys(every, "narrowing every class at once fails")
    return tuple(replace(c, closed=f"the narrowed network would not run: {failed[c.name]}") if failed.get(c.name) else c
                 for c in coupling.classes)  # fmt: skip


def _fails(coupling: Coupling, kept: Mapping[str, Tensor]) -> str:
    """Why the narrowed graph cannot run, on shapes alone, at another batch size than the walk's; '' if it can."""
    try:
        with torch.device("meta"):
            inputs = [torch.empty(3, *i.shape, dtype=getattr(torch, i.dtype)) for i in coupling.graph.inputs]
        before, after = (Program(g).to("meta")(*inputs) for g in (coupling.graph, coupling.narrow(kept)))
        return "" if [x.shape for x in before] == [x.shape for x in after] else "its outputs change shape"
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return str(error).split("\n")[0] or type(error).__name__


def _closed_layers(walk: Walk, classes: Sequence[ChannelClass], closed: dict[int, str]) -> dict[str, str]:
    reasons = dict(walk.refused)
    opened = {layer for c in classes if not c.closed for layer in c.producers}
    for found in classes:
        for layer in found.producers:
            if found.closed and layer not in opened:
                reasons.setdefault(layer, found.closed)
    return reasons
