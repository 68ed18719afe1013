"""Exact output merging: channels that compute the same become one, and their readers' columns are summed.

Channels that do not depend on the input, or that no reader uses, go as well (`constant_channels`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpp_serve.channels.coupling import ChannelSet, Coupling, Part
from redpp_serve.graph.graph import Graph
from redpp_serve.pruning.constant_channels import find_constants
from redpp_serve.pruning.constants import add_constant
from redpp_serve.pruning.widths import unit


@dataclass(frozen=True)
class Merged:
    """The result of exact merging.

    Attributes:
        graph: the network with fewer channels.
        kept: the channels that stayed, (k,) int64 ascending, by channel set where some went.
        removed: number of channels that went.
        constant: how many of these did not depend on the input.
    """

    graph: Graph
    kept: dict[str, Tensor]
    removed: int
    constant: int


def merge_exact(coupling: Coupling, round_to: int) -> Merged:
    """Merge the channels of every open channel set that are equal in all its tensors.

    Channels that all readers ignore (columns of zeros) and those that are constant go as well. Widths of layers stay
    multiples of ``round_to`` because some of these stay. The result is exact up to re-association of the readers' sums.
    """
    constants = find_constants(coupling)
    tensors, kept, removed, constant = {**coupling.graph.tensors, **constants.tensors}, {}, 0, 0
    weights = [coupling.graph.node(node).args[1].name for node in constants.added]
    taken = {name: coupling.graph.tensors[name] - tensors[name] for name in weights}
    for channel_set in coupling.open:
        first, stays = _survivors(channel_set, tensors, taken, round_to)
        if bool(stays.all()):
            continue
        kept[channel_set.name] = stays.nonzero().view(-1)
        removed += channel_set.channels - len(kept[channel_set.name])
        if channel_set.name in constants.channels:
            constant += int((constants.channels[channel_set.name] & ~stays).sum())
        seen = set()
        for reader in channel_set.readers:
            if (reader.tensor, reader.dim) not in seen:  # a weight that two calls share is summed once
                seen.add((reader.tensor, reader.dim))
                tensors[reader.tensor] = _summed(tensors[reader.tensor], reader.dim, reader.positions, first, stays)
    if not kept:
        return Merged(coupling.graph, {}, 0, 0)
    graph, where = coupling.with_tensors(tensors).narrow(kept), coupling.kept(kept)
    for node, gain in constants.added.items():
        rows = next(iter(where(node).values()), None)
        graph = add_constant(graph, node, gain if rows is None else gain[rows])
    return Merged(graph, kept, removed, constant)


def _survivors(
    channel_set: ChannelSet, tensors: dict[str, Tensor], taken: dict[str, Tensor], round_to: int
) -> tuple[Tensor, Tensor]:
    """Find the channel that replaces each, (channels,) int64, and which channels stay, (channels,) bool.

    ``taken`` holds the columns of constants that have become biases: channels that are equal but for these differ.
    """
    parts = channel_set.parts
    first = first_equal([_rows(held, part) for held in (tensors, taken) for part in parts if part.tensor in held])
    ignored = torch.ones(channel_set.channels, dtype=torch.bool)
    for reader in channel_set.readers:
        columns = tensors[reader.tensor].movedim(reader.dim, 0)[reader.positions]
        ignored &= (columns == 0).flatten(1).all(1)
    stays = (first == torch.arange(channel_set.channels)) & ~_all_equal_ones(ignored, first)
    step = unit(channel_set, round_to)
    width = int(stays.sum())
    missing = min(channel_set.channels, -(-max(width, 1) // step) * step) - width
    extra = (~stays).nonzero().view(-1)[:missing]
    stays[extra] = True
    first[extra] = extra
    return first, stays


def _rows(tensors: dict[str, Tensor], part: Part) -> Tensor:
    return tensors[part.tensor].movedim(part.dim, 0)[part.positions].flatten(1)


def _summed(weight: Tensor, dim: int, positions: Tensor, first: Tensor, stays: Tensor) -> Tensor:
    """Add each channel's columns of a weight to those of the channel that replaces it, in float64."""
    moved = weight.movedim(dim, 0).double()
    gone = (~stays).nonzero().view(-1)
    gone = gone[stays[first[gone]]]  # the others are ignored by all readers
    summed = moved.index_add(0, positions[first[gone]].flatten(), moved[positions[gone].flatten()])
    return summed.movedim(0, dim).to(weight.dtype).contiguous()


def first_equal(tensors: Sequence[Tensor]) -> Tensor:
    """Find for each channel the first one with the same values in all tensors, (channels,) int64.

    Channels lie along dimension 0 of every tensor. They are compared by digest, so that a wide layer takes no memory
    beyond its weights.
    """
    seen: dict[bytes, int] = {}
    rows = [(t.detach().cpu().reshape(len(t), -1) + 0.0).contiguous() for t in tensors]  # + 0.0 makes -0.0 equal to 0.0
    first = []
    for channel in range(len(rows[0])):
        digest = hashlib.sha256()
        for row in rows:
            digest.update(row[channel].view(torch.uint8).numpy().tobytes())
        first.append(seen.setdefault(digest.digest(), channel))
    return torch.tensor(first)


def _all_equal_ones(flags: Tensor, first: Tensor) -> Tensor:
    """Tell for each channel whether ``flags`` holds for every channel that is equal to it."""
    held = torch.ones(len(flags), dtype=torch.int64).scatter_reduce(0, first, flags.long(), "amin")
    return held[first].bool()
