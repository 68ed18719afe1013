"""Running a network piece by piece over a set of inputs, so that a pass that stops at every layer runs each once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph

_CHUNK_VALUES = 2**24  # of the widest point, run at once
_KEPT_VALUES = 2**27  # of the values that later nodes need, over all inputs; where they are more, nodes run again


class Piecewise:
    """A place in a network, between two nodes, and the values that nodes behind it need.

    Positions are indices into ``graph.nodes``. The graph may be exchanged for one with other tensors behind the place
    (`use`), as a layer-by-layer fit does.

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
        self._chunks = [dict(zip(names, part)) for part in zip(*(x.split(chunk) for x in inputs))]

    def use(self, graph: Graph) -> None:
        """Go on with a graph of the same nodes; those before the place must be as they were, or be gone for want of
        readers (a narrowed shuffle no longer asks for the batch's size).
        """
        self._graph = graph
        self._place = sum(node.name in self._done for node in graph.nodes)

    def advance(self, position: int) -> None:
        """Move up to before the node at ``position``, unless the values to keep there were too many."""
        live = self._live(position)
        if position <= self._place or self._images * sum(self._sizes.get(name, 0) for name in live) > _KEPT_VALUES:
            return
        self._chunks = [dict(zip(live, values)) for values in self._run(live, position)]
        self._place, self._done = position, frozenset(node.name for node in self._graph.nodes[:position])

    def values(self, wanted: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        """The values of that name, chunk by chunk; each is an input, a tensor, or a node's, at or behind the place."""
        last = max((k for k, node in enumerate(self._graph.nodes) if node.name in set(wanted)), default=-1)
        yield from self._run(wanted, max(last + 1, self._place))

    def outputs(self) -> Iterator[tuple[Tensor, ...]]:
        """The network's outputs, chunk by chunk."""
        yield from self._run(self._graph.outputs, len(self._graph.nodes))

    def _live(self, position: int) -> list[str]:
        """Inputs and nodes before ``position`` that nodes behind it, or the outputs, need; tensors first, then sizes and
        lists, since a program computes where its first input lies.
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
    """How many of the images to run at once: up to 32, at most a quarter, fewer for networks with wide values."""
    widest = max((math.prod(shape) for shape in value_shapes(graph).values()), default=1)
    return max(1, min(32, images // 4, _CHUNK_VALUES // max(widest, 1)))
