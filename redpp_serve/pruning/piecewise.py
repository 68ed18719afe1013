"""Run a network piece by piece over a set of inputs, so that a pass which stops at every layer runs each layer once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph

_CHUNK_VALUES = 2**24  # numbers at the widest point that are computed at once
_KEPT_VALUES = 2**27  # numbers that are kept for later nodes, over all inputs; where they are more, nodes run again


class Piecewise:
    """A place in a network, between two nodes, with the values that nodes behind it need.

    Positions are indices into ``graph.nodes``. A layer-by-layer fit may exchange the graph for one with other tensors
    behind the place (`use`).

    Args:
        graph: the network.
        inputs: (images, ...) for each network input, on the device to compute on.
        chunk: images run at once; see `chunk_size`.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Tensor], chunk: int) -> None:
        self._graph, self._place, self._done = graph, 0, frozenset[str]()
        self._sizes = {name: math.prod(shape) for name, shape in value_shapes(graph).items()}
        self._images, self.device = len(inputs[0]), inputs[0].device
        names = [spec.name for spec in graph.inputs]
        self._chunks = [
            dict(zip(names, part, strict=True)) for part in zip(*(torch.split(x, chunk) for x in inputs), strict=True)
        ]

    def use(self, graph: Graph) -> None:
        """Go on with a graph of the same nodes.

        Those before the place must be as they were, or be gone because nothing reads them any more (a narrowed shuffle
        no longer asks for the batch size).
        """
        self._graph = graph
        self._place = sum(node.name in self._done for node in graph.nodes)

    def advance(self, position: int) -> None:
        """Move the place to before the node at ``position``, unless too many values would have to be kept there."""
        live = self._live(position)
        if position <= self._place or self._images * sum(self._sizes.get(name, 0) for name in live) > _KEPT_VALUES:
            return
        self._chunks = [dict(zip(live, values, strict=True)) for values in self._run(live, position)]
        self._place, self._done = position, frozenset(node.name for node in self._graph.nodes[:position])

    def values(self, wanted: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        """Yield values by name, chunk by chunk; each is an input, a tensor, or of a node at or behind the place."""
        last = max((k for k, node in enumerate(self._graph.nodes) if node.name in set(wanted)), default=-1)
        yield from self._run(wanted, max(last + 1, self._place))

    def outputs(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the network's outputs, chunk by chunk."""
        yield from self._run(self._graph.outputs, len(self._graph.nodes))

    def _live(self, position: int) -> list[str]:
        """Name the inputs and nodes before ``position`` that nodes behind it, or the outputs, need.

        Tensors come first, then sizes and lists: a program computes on the device of its first input.
        """
        needed = set(self._graph.outputs).union(*(node.refs() for node in self._graph.nodes[position:]))
        made = [spec.name for spec in self._graph.inputs] + [node.name for node in self._graph.nodes[:position]]
        tensors = {spec.name for spec in self._graph.inputs} | set(self._sizes)
        return sorted((name for name in made if name in needed), key=lambda name: name not in tensors)

    @torch.no_grad()
    def _run(self, wanted: Sequence[str], position: int) -> Iterator[tuple[Tensor, ...]]:
        known = {spec.name: spec for spec in self._graph.inputs}
        start = [replace(next(iter(known.values())), name=name, shape=()) for name in self._chunks[0]]
        piece = replace(self._graph, inputs=tuple(start), nodes=self._graph.nodes[self._place : position])
        program = Program(piece, wanted).to(self.device)
        for chunk in self._chunks:
            yield program(*chunk.values())


def chunk_size(graph: Graph, images: int) -> int:
    """Return how many images to run at once: up to 32, at most a quarter of them, fewer where values are wide."""
    widest = max((math.prod(shape) for shape in value_shapes(graph).values()), default=1)
    return max(1, min(32, images // 4, _CHUNK_VALUES // max(widest, 1)))
