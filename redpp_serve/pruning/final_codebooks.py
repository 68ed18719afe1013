"""Final codebooks: each layer is hashed as coarsely as an error budget of the outputs allows.

This comes after merging and distillation. Sixteen values a layer (4-bit indices) are tried first; a layer that alone
moves the outputs too far gets more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import Layer, mac_count
from redpp_serve.options import HashTarget
from redpp_serve.pruning.density import build_grid
from redpp_serve.pruning.hashing import Hashed, fit_codebook, hash_weight, quantise
from redpp_serve.pruning.judge import squared_error
from redpp_serve.pruning.piecewise import Piecewise, chunk_size

LEVELS = (16, 32, 64, 128, 256)
METHOD = "kmeans"  # the lowest error of the three at a given number of values
_MOST_IMAGES = 40
_PROBE_MACS = 2e11  # limit on the cost of all measurements together
_ROUNDS = 6


@dataclass(frozen=True)
class Codebooks:
    """The result of hashing with an error budget.

    Attributes:
        graph: the hashed network.
        hashed: each layer's hashed weight and codebook.
        added: the squared relative error that hashing adds to the outputs.
    """

    graph: Graph
    hashed: dict[str, Hashed]
    added: float


def hash_within(
    graph: Graph,
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    budget: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    probe_macs: float = _PROBE_MACS,
) -> Codebooks:
    """Hash every layer with the fewest bits that keep the relative output error of hashing within ``budget``.

    Args:
        graph: the network.
        layers: those of its layers to hash, with `METHOD`.
        inputs: (images, ...) for each network input; a big network uses the first few.
        budget: relative error of the outputs, hashed against not hashed. Where even the finest of `LEVELS` exceed it,
            they are used.
        progress: called with layers done and in all.
        probe_macs: limit on the multiply-accumulates of all measurements together.
    """
    few = min(_MOST_IMAGES, max(5, int(probe_macs // max(1, len(layers) * mac_count(graph)))))
    inputs = tuple(x[:few] for x in inputs)
    run = Piecewise(graph, inputs, chunk_size(graph, len(inputs[0])))
    expected = list(run.outputs())
    place = {node.name: k for k, node in enumerate(graph.nodes)}
    books = {layer.name: _Levels(graph.tensors[layer.weight]) for layer in layers}
    alone: dict[str, float] = {}
    for done, layer in enumerate(sorted(layers, key=lambda x: place[x.node.name])):
        run.use(graph)
        run.advance(place[layer.node.name])
        run.use(graph.with_tensors({layer.weight: books[layer.name].coarsest()}))
        alone[layer.name] = squared_error(zip(expected, run.outputs(), strict=True))
        progress(done + 1, len(layers))
    allowed = budget
    for left in reversed(range(_ROUNDS)):
        levels = _choose(books, alone, allowed)
        hashed = {name: books[name].hashed(level) for name, level in levels.items()}
        result = graph.with_tensors({layer.weight: hashed[layer.name].weight for layer in layers})
        whole = Piecewise(result, inputs, chunk_size(graph, len(inputs[0])))
        added = squared_error(zip(expected, whole.outputs(), strict=True))
        if math.sqrt(added) <= budget or all(level == LEVELS[-1] for level in levels.values()):
            break
        allowed = allowed * 0.9 * budget / math.sqrt(added) if left > 1 else 0.0  # last, the finest there are
    return Codebooks(result, hashed, added)


class _Levels:
    """One layer's codebooks of different sizes, made when asked for."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.grid = weight, build_grid(weight)
        self._errors: dict[int, float] = {}
        self._hashed: dict[int, Hashed] = {}

    def coarsest(self) -> Tensor:
        """Return the weight with the fewest values."""
        return quantise(self.weight, self.grid, fit_codebook(self.grid, METHOD, HashTarget(values=LEVELS[0])))

    def hashed(self, values: int) -> Hashed:
        """Return the weight hashed to a number of values."""
        if values not in self._hashed:
            self._hashed[values] = hash_weight(self.weight, METHOD, HashTarget(values=values))
        return self._hashed[values]

    def error(self, values: int) -> float:
        """Return the squared relative error of the weight hashed to a number of values."""
        if values not in self._errors:
            self._errors[values] = fit_codebook(self.grid, METHOD, HashTarget(values=values)).error ** 2
        return self._errors[values]


def _choose(books: dict[str, _Levels], alone: dict[str, float], budget: float) -> dict[str, int]:
    """Choose a number of values for each layer.

    Starting from the coarsest codebooks, each step refines the one that takes the most error off for its bytes. A
    layer's share of the outputs' squared error is assumed to be in proportion to that of its weights.
    """

    def error(name: str, level: int) -> float:
        coarse = books[name].error(LEVELS[0])
        return alone[name] * books[name].error(LEVELS[level]) / coarse if coarse else 0.0

    at = dict.fromkeys(books, 0)
    while sum(error(name, level) for name, level in at.items()) > budget * budget:
        gains = {
            name: (error(name, k) - error(name, k + 1)) / books[name].weight.numel()
            for name, k in at.items()
            if k + 1 < len(LEVELS)
        }
        if not gains:
            break
        at[max(gains, key=lambda name: gains[name])] += 1
    return {name: LEVELS[k] for name, k in at.items()}
