"""Exact output merging: channels that compute the same become one, and their readers' columns are summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..graph.channels import InnerChannels
from ..graph.rewrite import columns_of, first_equal, keep_channels, round_up
from ..runtime.graph import Graph


@dataclass(frozen=True)
class Merged:
    """What merging did to one set of inner channels; ``rows`` (kept,) are the channels that stayed, in order."""

    layer: str
    channels: int
    rows: torch.Tensor

    @property
    def kept(self) -> int:
        return len(self.rows)


def merge_exact(graph: Graph, inner: InnerChannels, round_to: int) -> tuple[Graph, Merged]:
    """Merge the channels of ``inner`` that are equal in every per-channel tensor.

    Channels whose readers ignore them (all columns zero) go as well. The width is kept at a multiple of
    ``round_to`` by leaving some duplicates in place. Exact up to re-association of the readers' sums.
    """
    n = inner.channels
    first = first_equal([graph.tensors[name] for name in inner.per_channel])
    ignored = torch.ones(n, dtype=torch.bool)
    for layer, _ in inner.consumers:
        ignored &= (columns_of(graph.tensors[layer.weight], n) == 0).all(2).all(0)
    stays = (first == torch.arange(n)) & ~_all_of_group(ignored, first)
    missing = round_up(int(stays.sum()), round_to, n) - int(stays.sum())
    extra = (~stays).nonzero().view(-1)[:missing]
    stays[extra] = True
    first[extra] = extra
    kept = stays.nonzero().view(-1)
    if len(kept) == n:
        return graph, Merged(inner.producer.name, n, kept)
    position = torch.full((n,), -1, dtype=torch.int64)
    position[kept] = torch.arange(len(kept))
    target = position[first]  # -1: ignored by all readers
    used = target >= 0
    weights = {}
    for layer, _ in inner.consumers:
        old = graph.tensors[layer.weight]
        columns = columns_of(old, n)[:, used]
        summed = torch.zeros(old.shape[0], len(kept), columns.shape[2], dtype=torch.float64)
        summed.index_add_(1, target[used], columns.double())
        weights[layer.weight] = summed.to(old.dtype).reshape(old.shape[0], -1, *old.shape[2:])
    return keep_channels(graph, inner, kept, weights), Merged(inner.producer.name, n, kept)


def _all_of_group(flags: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """For each channel, whether ``flags`` holds for every channel that is equal to it."""
    n = len(flags)
    held = torch.ones(n, dtype=torch.int64).scatter_reduce(0, first, flags.long(), "amin")
    return held[first].bool()
