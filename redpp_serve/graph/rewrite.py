"""Taking channels out of a graph."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..runtime.graph import Graph
from .channels import InnerChannels


def keep_channels(graph: Graph, inner: InnerChannels, kept: Tensor, consumer_weights: dict[str, Tensor]) -> Graph:
    """The graph with only the ``kept`` (k,) int64 channels of ``inner``, in that order.

    ``consumer_weights`` gives each consumer's new weight by tensor name, already k channels wide.
    """
    changed = {name: graph.tensors[name][kept].clone() for name in inner.per_channel}
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


def concatenate_rows(tensors: list[Tensor]) -> Tensor:
    """Per-channel tensors side by side, (channels, everything), for comparing channels with each other."""
    return torch.cat([t.reshape(t.shape[0], -1).double() for t in tensors], 1)
