"""Taking channels out of a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.graph import Graph
from .channels import InnerChannels


def keep_channels(graph: Graph, inner: InnerChannels, kept: Tensor, consumer_weights: dict[str, Tensor]) -> Graph:
    """The graph with only the ``kept`` (k,) int64 channels of ``inner``, in that order.

    ``consumer_weights`` gives each consumer's new weight by tensor name, already k channels wide.
    """
    bias = graph.node(inner.producer.node.name).args[2:3]  # reconstruction may have given the producer one meanwhile
    names = {*inner.per_channel, *(ref.name for ref in bias if ref)}
    changed = {name: graph.tensors[name][kept] for name in sorted(names)}
    nodes = {}
    for layer in inner.depthwise:
        args = list(layer.node.args)
        args[6] = len(kept)
        nodes[layer.node.name] = replace(layer.node, args=tuple(args))
    return graph.with_tensors({**changed, **consumer_weights}).with_nodes(nodes)


def columns_of(weight: Tensor, channels: int) -> Tensor:
    """A consumer's weight as (n_out, channels, columns * kh * kw): what it does with each input channel."""
    return weight.reshape(weight.shape[0], channels, -1)


def round_up(width: int, step: int, limit: int) -> int:
    """The next multiple of ``step`` that is at least 1, but at most ``limit``."""
    return min(limit, -(-max(width, 1) // step) * step)


def first_equal(tensors: Sequence[Tensor]) -> Tensor:
    """For each channel (dimension 0 of every tensor) the first one with the same values in all tensors, (channels,) int64.

    Compared by digest, so that a wide layer takes no memory beyond its weights.
    """
    seen: dict[bytes, int] = {}
    rows = [t.detach().reshape(len(t), -1) for t in tensors]
    first = []
    for channel in range(len(rows[0])):
        digest = hashlib.sha256()
        for row in rows:
            digest.update((row[channel] + 0.0).view(torch.uint8).numpy().tobytes())  # + 0.0 makes -0.0 equal to 0.0
        first.append(seen.setdefault(digest.digest(), channel))
    return torch.tensor(first)
