"""Which channels of a network are coupled: the sets that pruning works on, found by union-find over its operators.

Channels are coupled where operators make them meet: a residual addition joins the outputs of all its writers, a
squeeze-excite gate joins trunk and gate, a concatenation puts sets side by side, a grouped convolution ties a group.
One channel of a set is everything that computes or scales it (rows of each producer's weight, entries of biases and
norms, filters of depthwise convolutions) and everything that reads it (columns of each reader's weight); all of that
is kept or taken out together. A set is open if every operator that its channels pass has a rule, else it is closed
for a reason.
"""

from __future__ import annotations

import fnmatch
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redpp_serve.channels.labels import Labels
from redpp_serve.channels.narrowing import Kept, narrow
from redpp_serve.channels.rules import RULES
from redpp_serve.channels.walk import Walk
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import find_layers


@dataclass(frozen=True)
class Part:
    """A tensor that holds something of each channel.

    Attributes:
        tensor: its name.
        dim: the dimension with the channels.
        positions: (channels, m) int64, the entries of each channel; m is 1, or the size of a group or head.
    """

    tensor: str
    dim: int
    positions: Tensor


@dataclass(frozen=True)
class Reader:
    """A call that sums over the channels: entries of its weight multiply the same entries of its input.

    Attributes:
        node: the call.
        tensor: its weight.
        dim: the dimension of the weight that is summed over.
        value: its input.
        axis: the axis of the input that is summed over.
        positions: (channels, m) int64, the entries of each channel; m is 1, H * W behind a flatten, or the size of a
            group or head. The other entries may belong to other sets.
    """

    node: str
    tensor: str
    dim: int
    value: str
    axis: int
    positions: Tensor


@dataclass(frozen=True)
class ChannelSet:
    """A set of coupled channels.

    Attributes:
        name: the layer name of its first producer.
        channels: how many channels it has.
        producers: layer names in order of execution.
        parts: the tensors that hold something of each channel.
        readers: the calls that sum over the channels.
        closed: the reason why these channels must stay, empty for an open set.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    parts: tuple[Part, ...]
    readers: tuple[Reader, ...]
    closed: str = ""


@dataclass(frozen=True)
class Coupling:
    """The channel sets of a graph, and where their channels lie in every value and stored tensor.

    Attributes:
        graph: the network.
        sets: all channel sets in order of execution.
        closed_layers: for each convolution or Linear whose output channels stay, the reason.
    """

    graph: Graph
    sets: tuple[ChannelSet, ...]
    closed_layers: dict[str, str]
    _axes: dict[str, dict[int, Tensor]]
    _roots: dict[str, Tensor]  # by set, the representatives of its channels
    _walk: Walk

    @property
    def open(self) -> tuple[ChannelSet, ...]:
        """The sets that may be narrowed, in order of execution."""
        return tuple(c for c in self.sets if not c.closed)

    def with_tensors(self, tensors: dict[str, Tensor]) -> Coupling:
        """Return the same coupling over other values of the same tensors."""
        return replace(self, graph=self.graph.with_tensors(tensors))

    def narrow(self, channels: Mapping[str, Tensor]) -> Graph:
        """Return the graph with only some channels; readers lose the columns of the others, uncompensated.

        Args:
            channels: by a set's name, the channels that stay, (k,) int64 ascending; other sets stay whole.
        """
        return narrow(self.graph, self._walk, self.kept(channels))

    def kept(self, channels: Mapping[str, Tensor]) -> Kept:
        """Return the positions of values and tensors that stay with these channels, see `narrow`."""
        highest = max((int(roots.max()) for axes in self._axes.values() for roots in axes.values()), default=0)
        stays = torch.ones(highest + 1, dtype=torch.bool)
        for name, stay in channels.items():
            stays[self._roots[name]] = False
            stays[self._roots[name][stay]] = True

        @functools.cache
        def positions(name: str) -> dict[int, Tensor]:
            found = {axis: stays[roots] for axis, roots in self._axes.get(name, {}).items()}
            return {axis: stay.nonzero().view(-1) for axis, stay in found.items() if not bool(stay.all())}

        return positions

    def entries(self, value: str, axis: int) -> dict[str, int]:
        """Return how many entries of a value along an axis each channel has, by the name of its open set."""
        roots = self._axes.get(value, {}).get(axis)
        if roots is None:
            return {}
        found = {c.name: int(torch.isin(roots, self._roots[c.name]).sum()) // c.channels for c in self.open}
        return {name: count for name, count in found.items() if count}


def couple(graph: Graph, exclude: Sequence[str] = ()) -> Coupling:
    """Find all sets of coupled channels.

    Args:
        graph: a captured network.
        exclude: shell patterns of layer names that must not change.
    """
    walk = Walk(graph, RULES).run()
    found = _channel_sets(walk)
    sets = tuple(_excluded(channel_set, exclude) for channel_set, _ in found)
    roots = {channel_set.name: roots for channel_set, roots in found}
    coupling = Coupling(graph, sets, {}, walk.axes(), roots, walk)
    sets = _tried(coupling)
    return replace(coupling, sets=sets, closed_layers=_closed_layers(walk, sets))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a shell pattern names the layer."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def unmatched(graph: Graph, patterns: Sequence[str]) -> list[str]:
    """Return a line for each pattern that names no layer."""
    names = [layer.name for layer in find_layers(graph)]
    return [f"--exclude {p} names no layer" for p in patterns if not fnmatch.filter(names, p)]


class _Entries:
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
        self._slots = dict(zip(roots.tolist(), zip([0, *ends[:-1]], ends, strict=True), strict=True)) if ends else {}
        self._every = every[:, 1:].contiguous().numpy()

    def signature(self, root: int) -> bytes:
        """Return bytes that are equal for channels with equally many entries in each slot."""
        start, end = self._slots[root]
        return self._every[start:end].tobytes()

    def of(self, channels: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """List the slots of channels of one signature, with their positions (channels, entries) int64 ascending."""
        start, end = self._slots[channels[0]]
        wanted = torch.tensor(channels)
        for slot, count in self._every[start:end].tolist():
            roots, starts, order = self._sorted[slot]
            first = starts[torch.searchsorted(roots, wanted)]
            yield slot, order[first[:, None] + torch.arange(count)]


def _channel_sets(walk: Walk) -> list[tuple[ChannelSet, Tensor]]:
    """Find the sets, excluded ones and those that cannot run among them, each with its channels' representatives.

    Channels that share a producer, and have as many entries in each tensor, are one set.
    """
    (closed, tied), alone = walk.labels.reasons(), walk.alone()
    makers = _makers(walk)
    leaders = _leaders(makers, len(walk.produced))
    rows = [*(use.labels for use in walk.uses), *(read.labels for read in walk.reads)]
    entries = _Entries([walk.labels.find(row) for row in rows])
    members: dict[tuple[int, bytes, bool, bool], list[int]] = {}
    for root, produced in makers.items():
        key = (leaders[produced[0]], entries.signature(root), root in closed, root in alone)
        members.setdefault(key, []).append(root)
    found, taken = [], Counter[str]()
    for roots in members.values():
        layers = [walk.produced[k].layer for k in sorted({k for root in roots for k in makers[root]})]
        taken[layers[0]] += 1
        name = layers[0] if taken[layers[0]] == 1 else f"{layers[0]}[{taken[layers[0]]}]"
        parts, readers = _parts_and_readers(walk, entries.of(roots))
        reason = closed.get(roots[0], "")  # all of them are closed, or none is
        if not reason and len(roots) < 2:
            reason = tied.get(roots[0], "has a single channel")
        elif not reason and roots[0] in alone:
            reason = tied.get(roots[0], f"is all that {alone[roots[0]]} consists of")
        elif not reason and not parts:
            reason = "its weights are read along the same channels"
        elif not reason and not readers:
            reason = "is not read by a layer"
        producers = tuple(dict.fromkeys(layers))
        found.append((ChannelSet(name, len(roots), producers, parts, readers, reason), torch.tensor(roots)))
    return found


def _makers(walk: Walk) -> dict[int, list[int]]:
    """Map each channel's representative to the calls that create it, as positions in ``walk.produced``."""
    makers: dict[int, list[int]] = {}
    for k, produced in enumerate(walk.produced):
        for root in dict.fromkeys(walk.labels.find(produced.labels).tolist()):
            if root != Labels.NONE:
                makers.setdefault(root, []).append(k)
    return makers


def _leaders(makers: dict[int, list[int]], count: int) -> list[int]:
    """Map each of ``count`` calls to one that is the same for all that share channels, through others if need be."""
    labels = Labels()
    calls = labels.fresh(count)
    pairs = [(several[0], k) for several in makers.values() for k in several[1:]]
    if pairs:
        first, other = torch.tensor(pairs).T
        labels.union(calls[first], calls[other])
    return labels.find(calls).tolist()


def _parts_and_readers(
    walk: Walk, entries: Iterator[tuple[int, Tensor]]
) -> tuple[tuple[Part, ...], tuple[Reader, ...]]:
    read_tensors = {(read.tensor, read.dim) for read in walk.reads}
    parts, readers = [], []
    for slot, positions in entries:
        if slot < len(walk.uses):
            use = walk.uses[slot]
            if (use.tensor, use.dim) not in read_tensors:
                parts.append(Part(use.tensor, use.dim, positions))
        else:
            read = walk.reads[slot - len(walk.uses)]
            readers.append(Reader(read.node, read.tensor, read.dim, read.value, read.axis, positions))
    return tuple(parts), tuple(readers)


def _excluded(found: ChannelSet, patterns: Sequence[str]) -> ChannelSet:
    if found.closed or not patterns:
        return found
    tensors = [*(part.tensor for part in found.parts), *(reader.tensor for reader in found.readers)]
    names = [tensor.removesuffix(".weight") for tensor in tensors]
    hit = next((name for name in names if matches(name, patterns)), None)
    if hit is None:
        return found
    return replace(found, closed="excluded" if hit in found.producers else f"{hit}, which goes with it, is excluded")


def _tried(coupling: Coupling) -> tuple[ChannelSet, ...]:
    """Return the sets, closed where a graph without their last channel could not run."""
    every = {c.name: torch.arange(c.channels - 1) for c in coupling.open}
    if not every or not _fails(coupling, every):
        return coupling.sets
    failed = {name: _fails(coupling, {name: stay}) for name, stay in every.items()}
    if not any(failed.values()):
        failed = dict.fromkeys(every, "narrowing every channel set at once fails")
    return tuple(
        replace(c, closed=f"the narrowed network would not run: {failed[c.name]}") if failed.get(c.name) else c
        for c in coupling.sets
    )


def _fails(coupling: Coupling, channels: Mapping[str, Tensor]) -> str:
    """Say why the narrowed graph cannot run, on shapes alone, at another batch size than the walk's; '' if it can."""
    graph, shapes = coupling.graph, coupling._walk.shapes
    try:
        with torch.device("meta"):
            inputs = [torch.empty(3, *i.shape, dtype=getattr(torch, i.dtype)) for i in graph.inputs]
        after = Program(coupling.narrow(channels)).to("meta")(*inputs)
    except Exception as error:
        return str(error).split("\n")[0] or type(error).__name__
    same = all(
        tuple(x.shape[1:]) == shapes.get(name, x.shape)[1:] for name, x in zip(graph.outputs, after, strict=True)
    )
    return "" if same else "its outputs change shape"


def _closed_layers(walk: Walk, sets: Sequence[ChannelSet]) -> dict[str, str]:
    reasons = dict(walk.refused)
    opened = {layer for c in sets if not c.closed for layer in c.producers}
    for found in sets:
        for layer in found.producers:
            if found.closed and layer not in opened:
                reasons.setdefault(layer, found.closed)
    return reasons
