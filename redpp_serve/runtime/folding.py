"""Constant folding: what a graph computes from stored tensors alone is stored instead."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .graph import Graph, map_refs
from .ops import resolve


@torch.no_grad()
def fold_constants(graph: Graph) -> Graph:
    """The graph with such values stored under the names of the calls that gave them, where they are no larger.

    Standardised or normalised weights and concatenated biases become a layer's own weight and bias, so that the layer
    takes part in everything that works on stored weights.
    """
    tensors, nodes = dict(graph.tensors), []
    for node in graph.nodes:
        refs = set(node.refs())
        if refs and refs <= tensors.keys():
            values = [map_refs(part, tensors.get) for part in (node.args, tuple(node.kwargs.values()))]
            value = resolve(node.op)(*values[0], **dict(zip(node.kwargs, values[1])))
            if isinstance(value, Tensor) and value.numel() <= sum(tensors[name].numel() for name in refs):
                tensors[node.name] = value.contiguous()
                continue
        nodes.append(node)
    return replace(graph, tensors=tensors, nodes=tuple(nodes)).pruned_of_unused()
