"""Final codebooks: after merging and distillation the weights are hashed again, each layer as coarsely as an error
budget of the outputs allows.

Sixteen values a layer (4-bit indices) are tried first; where one layer alone moves the outputs too far it keeps more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.layers import Layer, mac_count
from ..runtime.graph import Graph
from .hashing import Hashed, Target, hash_weight
from .piecewise import Piecewise, chunk_size

LEVELS = (16, 32, 64, 128, 256)
METHOD = "kmeans"  # the lowest error of the three at a given number of values
_PROBE_MACS = 2e12  # what all measurements together may cost
_ROUNDS = 3


@dataclass(frozen=True)
class Codebooks:
    """The hashed network, each layer's codebook, and the squared relative error that hashing adds to the outputs."""

    graph: Graph
    hashed: dict[str, Hashed]
    added: float


def hash_within(
    graph: Graph,
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    budget: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Codebooks:
    """Hash every layer with the fewest bits that keep the relative output error of hashing within ``budget``.

    Args:
        graph: the network; its layers' weights are hashed with `METHOD`.
        inputs: (images, ...) for each network input, on the CPU; a big network uses the first few.
        budget: relative error of the outputs, hashed against not hashed. Where even `LEVELS` at their finest exceed it,
            they are what is used.
    """
    if not layers:
        return Codebooks(graph, {}, 0.0)
    few = max(2, int(_PROBE_MACS // max(1, len(layers) * mac_count(graph))))
    run = Piecewise(graph, [x[:few] for x in inputs], chunk_size(graph, min(few, len(inputs[0]))))
    expected = list(run.outputs())
    place = {node.name: k for k, node in enumerate(graph.nodes)}
    hashed = {(layer.name, LEVELS[0]): _hash(graph, layer, LEVELS[0]) for layer in layers}
    alone: dict[str, float] = {}
    for done, layer in enumerate(sorted(layers, key=lambda x: place[x.node.name])):
        run.use(graph)
        run.advance(place[layer.node.name])
        run.use(graph.with_tensors({layer.weight: hashed[layer.name, LEVELS[0]].weight}))
        alone[layer.name] = _added(expected, run)
        progress(done + 1, len(layers))
    allowed = budget
    for _ in range(_ROUNDS):
        levels = _levels(graph, layers, hashed, alone, allowed)
        chosen = {layer.name: hashed[layer.name, levels[layer.name]] for layer in layers}
        result = graph.with_tensors({layer.weight: chosen[layer.name].weight for layer in layers})
        whole = Piecewise(result, [x[:few] for x in inputs], chunk_size(graph, min(few, len(inputs[0]))))
        added = _added(expected, whole)
        if math.sqrt(added) <= budget or all(level == LEVELS[-1] for level in levels.values()):
            break
        allowed *= 0.9 * budget / math.sqrt(added)
    return Codebooks(result, chosen, added)


def _levels(
    graph: Graph, layers: Sequence[Layer], hashed: dict[tuple[str, int], Hashed], alone: dict[str, float], budget: float
) -> dict[str, int]:
    """For each layer a number of values: from the coarsest on, the step that saves the most error for its bytes."""

    def error(layer: Layer, level: int) -> float:
        if (layer.name, level) not in hashed:
            hashed[layer.name, level] = _hash(graph, layer, level)
        coarse = hashed[layer.name, LEVELS[0]].codebook.error
        return alone[layer.name] * (hashed[layer.name, level].codebook.error / coarse) ** 2 if coarse else 0.0

    at = dict.fromkeys((layer.name for layer in layers), 0)
    while sum(error(x, LEVELS[at[x.name]]) for x in layers) > budget * budget:
        steps = [x for x in layers if at[x.name] + 1 < len(LEVELS)]
        if not steps:
            break

        def gain(layer: Layer) -> float:
            now, then = (error(layer, LEVELS[at[layer.name] + k]) for k in (0, 1))
            return (now - then) / graph.tensors[layer.weight].numel()

        at[max(steps, key=gain).name] += 1
    return {name: LEVELS[k] for name, k in at.items()}


def _hash(graph: Graph, layer: Layer, values: int) -> Hashed:
    return hash_weight(graph.tensors[layer.weight], METHOD, Target(values=values))


def _added(expected: Sequence[tuple[Tensor, ...]], run: Piecewise) -> float:
    lost = norm = 0.0
    with torch.no_grad():
        for left, right in zip(expected, run.outputs()):
            for x, y in zip(left, right):
                lost += float((x.double() - y.double()).square().sum())
                norm += float(x.double().square().sum())
    return lost / max(norm, 1e-300)
