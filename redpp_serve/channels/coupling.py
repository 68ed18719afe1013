"""Which channels of a network are coupled: the sets that pruning works on, found by union-find over its operators.

Channels are coupled where operators make them meet: a residual add joins the outputs of all its writers, a
squeeze-excite gate joins trunk and gate, a concatenation puts sets side by side, a grouped convolution ties a group.
A channel set is open where every operator that its channels pass has a rule; what closes one is kept as a reason.

Classes of coupled channels: what must be kept or taken out together, and where it lies in a network's tensors.

One channel of a channel set is everything that computes or scales it (rows of each producer's weight, entries of biases
and norms, filters of depthwise convolutions) and everything that reads it (columns of each reader's weight).

Where each channel's entries stand in many tensors, found with whole arrays.
"""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redpp_serve.channels.narrowing import narrow
from redpp_serve.channels.walk import Labels, Walk
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import find_layers


@dataclass(frozen=True)
class Part:
    """A tensor that holds something of each channel: channel c has the entries ``positions[c]`` of dimension ``dim``.

    ``positions`` is (channels, m) int64; m is 1, or the size of a group or head.
    """

    tensor: str
    dim: int
    positions: Tensor


@dataclass(frozen=True)
class Reader:
    """A call that sums over the channels: entries ``positions[c]`` (channels, m) of dimension ``dim`` of its weight
    multiply the same entries of axis ``axis`` of ``value``, its input.

    m is 1, or H * W behind a flatten, or the size of a group or head. Other entries may belong to other sets.
    """

    node: str
    tensor: str
    dim: int
    value: str
    axis: int
    positions: Tensor


@dataclass(frozen=True)
class ChannelSet:
    """One set of coupled channels. ``name`` is its first producer's layer name; ``producers`` are layer names in order of execution.

    ``closed`` is the reason why these channels must stay, empty for an open channel set.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    parts: tuple[Part, ...]
    readers: tuple[Reader, ...]
    closed: str = ""


class Places:
    """An index over arrays of representatives: ``rows[slot]`` (size,) says whose channel each entry is."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._sorted: list[tuple[Tensor, Tensor, Tensor]] = []  # by slot: roots ascending, where each starts, positions
        pairs = []
        for slot, row in enumerate(rows):
            order = torch.argsort(row, stable=True)
            roots, counts = torch.unique_consecutive(row[order], return_counts=True)
            self._sorted.append((roots, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), order))
            pairs.append(torch.stack([roots, torch.full_like(roots, slot), counts], 1))
        every = torch.cat(pairs) if pairs else torch.empty(0, 3, dtype=torch.int64)
        every = every[torch.argsort(every[:, 0], stable=True)]
        roots, counts = torch.unique_consecutive(every[:, 0], return_counts=True)
        ends = counts.cumsum(0).tolist()
        self._slots = dict(zip(roots.tolist(), zip([0, *ends], ends)))
        self._every = every[:, 1:].contiguous().numpy()

    def signature(self, root: int) -> bytes:
        """Equal for channels that have as many entries as each other in each slot."""
        start, end = self._slots[root]
        return self._every[start:end].tobytes()

    def of(self, channels: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The slots of channels of one signature, with their positions (channels, entries) int64 ascending."""
        start, end = self._slots[channels[0]]
        wanted = torch.tensor(channels)
        for slot, count in self._every[start:end].tolist():
            roots, starts, order = self._sorted[slot]
            first = starts[torch.searchsorted(roots, wanted)]
            yield slot, order[first[:, None] + torch.arange(count)]


@dataclass(frozen=True)
class Coupling:
    """The sets of a graph, and where their channels lie in every value and stored tensor.

    ``closed_layers`` says for each convolution or Linear whose output channels stay why they do.
    """

    graph: Graph
    sets: tuple[ChannelSet, ...]
    closed_layers: dict[str, str]
    _axes: dict[str, dict[int, Tensor]]
    _roots: dict[str, Tensor]  # by channel set, the representatives of its channels
    _walk: Walk

    @property
    def open(self) -> tuple[ChannelSet, ...]:
        """The sets that may be narrowed, in order of execution."""
        return tuple(c for c in self.sets if not c.closed)

    def with_tensors(self, tensors: dict[str, Tensor]) -> Coupling:
        """The same coupling over other values of the same tensors."""
        return replace(self, graph=self.graph.with_tensors(tensors))

    def narrow(self, kept: Mapping[str, Tensor]) -> Graph:
        """The graph with only the kept channels, (k,) ascending int64 by its name; sets not named stay whole.

        Readers lose the columns of the channels that went; nothing makes up for them.
        """
        return narrow(self.graph, self._walk, self.kept(kept))

    def kept(self, kept: Mapping[str, Tensor]) -> Callable[[str], dict[int, Tensor]]:
        """For a value's or tensor's name the positions that stay along each axis that loses some, ascending."""
        highest = max((int(roots.max()) for axes in self._axes.values() for roots in axes.values()), default=0)
        stays = torch.ones(highest + 1, dtype=torch.bool)
        for name, stay in kept.items():
            stays[self._roots[name]] = False
            stays[self._roots[name][stay]] = True

        @functools.cache
        def positions(name: str) -> dict[int, Tensor]:
            found = {axis: stays[roots] for axis, roots in self._axes.get(name, {}).items()}
            return {axis: stay.nonzero().view(-1) for axis, stay in found.items() if not bool(stay.all())}

        return positions


def couple(graph: Graph, exclude: Sequence[str] = ()) -> Coupling:
    """Find all sets of coupled channels.

    Args:
        graph: a captured network.
        exclude: shell patterns of layer names that must not change.
    """
    walk = Walk(graph).run()
    sets, roots = _build(walk)
    sets = [_excluded(c, exclude) for c in sets]
    coupling = Coupling(graph, tuple(sets), {}, walk.axes(), roots, walk)
    sets = _tried(coupling)
    return replace(coupling, sets=sets, closed_layers=_closed_layers(walk, sets))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a shell pattern names the layer."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def unmatched(graph: Graph, patterns: Sequence[str]) -> list[str]:
    """A line for each pattern that names no layer."""
    names = [layer.name for layer in find_layers(graph)]
    return [f"--exclude {p} names no layer" for p in patterns if not fnmatch.filter(names, p)]


def _build(walk: Walk) -> tuple[list[ChannelSet], dict[str, Tensor]]:
    """Channels that share a producer, and have as many entries in each tensor, are one channel set."""
    (closed, tied), alone = walk.labels.reasons(), walk.alone()
    produced = [(p, set(walk.labels.find(p.labels).tolist())) for p in walk.produced]
    leaders = _leaders([roots for _, roots in produced])
    group_of = {root: leaders[k] for k, (_, roots) in reversed(list(enumerate(produced))) for root in roots}
    places = Places([walk.labels.find(source.labels) for source in (*walk.uses, *walk.reads)])
    members: dict[tuple, list[int]] = {}
    for p in walk.produced:
        for root in dict.fromkeys(walk.labels.find(p.labels).tolist()):
            if root in group_of and root != Labels.NONE:
                key = (group_of.pop(root), places.signature(root), root in closed, root in alone)
                members.setdefault(key, []).append(root)
    read_tensors = {(read.tensor, read.dim) for read in walk.reads}
    sets, roots, taken = [], {}, Counter()
    for (leader, *_), channels in members.items():
        held, linked = set(channels), (made for k, made in enumerate(produced) if leaders[k] == leader)
        makers = dict.fromkeys(p.layer for p, created in linked if not held.isdisjoint(created))
        layer = next(iter(makers))
        taken[layer] += 1
        name = layer if taken[layer] == 1 else f"{layer}[{taken[layer]}]"
        parts, readers = [], []
        for slot, positions in places.of(channels):
            if slot >= len(walk.uses):
                read = walk.reads[slot - len(walk.uses)]
                readers.append(Reader(read.node, read.tensor, read.dim, read.value, read.axis, positions))
            elif (use := walk.uses[slot]) and (use.tensor, use.dim) not in read_tensors:
                parts.append(Part(use.tensor, use.dim, positions))
        reason = next((closed[r] for r in channels if r in closed), "")
        if not reason and (len(channels) < 2 or channels[0] in alone):
            single = "has a single channel" if len(channels) < 2 else f"is all that {alone[channels[0]]} consists of"
            reason = tied.get(channels[0], single)
        if not reason and not (parts and readers):
            reason = "is not read by a layer" if parts else "its weights are read along the same channels"
        roots[name] = torch.tensor(channels)
        sets.append(ChannelSet(name, len(channels), tuple(makers), tuple(parts), tuple(readers), reason))
    return sets, roots


def _leaders(groups: Sequence[set[int]]) -> list[int]:
    """For each group of roots the first one that it is linked to by common members, through others if need be."""
    leader, first = list(range(len(groups))), {}

    def lead(k: int) -> int:
        while leader[k] != k:
            leader[k] = k = leader[leader[k]]
        return k

    for k, roots in enumerate(groups):
        for root in roots:
            if root != Labels.NONE:
                low, high = sorted((lead(first.setdefault(root, k)), lead(k)))
                leader[high] = low
    return [lead(k) for k in range(len(groups))]


def _excluded(found: ChannelSet, patterns: Sequence[str]) -> ChannelSet:
    if found.closed or not patterns:
        return found
    names = [t.removesuffix(".weight") for t in (*(p.tensor for p in found.parts), *(r.tensor for r in found.readers))]
    hit = next((name for name in names if matches(name, patterns)), None)
    if hit is None:
        return found
    return replace(found, closed="excluded" if hit in found.producers else f"{hit}, which goes with it, is excluded")


def _tried(coupling: Coupling) -> tuple[ChannelSet, ...]:
    """The sets, closed where a graph without their last channel could not run."""
    every = {c.name: torch.arange(c.channels - 1) for c in coupling.open}
    if not every or not _fails(coupling, every):
        return coupling.sets
    failed = {name: _fails(coupling, {name: kept}) for name, kept in every.items()}
    if not any(failed.values()):
        failed = dict.fromkeys(every, "narrowing every channel set at once fails")
    return tuple(
        replace(c, closed=f"the narrowed network would not run: {failed[c.name]}") if failed.get(c.name) else c
        for c in coupling.sets
    )


def _fails(coupling: Coupling, kept: Mapping[str, Tensor]) -> str:
    """Why the narrowed graph cannot run, on shapes alone, at another batch size than the walk's; '' if it can."""
    graph, shapes = coupling.graph, coupling._walk.shapes
    try:
        with torch.device("meta"):
            inputs = [torch.empty(3, *i.shape, dtype=getattr(torch, i.dtype)) for i in graph.inputs]
        after = Program(coupling.narrow(kept)).to("meta")(*inputs)
    except Exception as error:
        return str(error).split("\n")[0] or type(error).__name__
    same = all(tuple(x.shape[1:]) == shapes.get(name, x.shape)[1:] for name, x in zip(graph.outputs, after))
    return "" if same else "its outputs change shape"


def _closed_layers(walk: Walk, sets: Sequence[ChannelSet]) -> dict[str, str]:
    reasons = dict(walk.refused)
    opened = {layer for c in sets if not c.closed for layer in c.producers}
    for found in sets:
        for layer in found.producers:
            if found.closed and layer not in opened:
                reasons.setdefault(layer, found.closed)
    return reasons
