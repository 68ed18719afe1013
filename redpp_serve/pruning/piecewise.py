"""Run a network piece by piece over a set of inputs, so that a pass which stops at every layer runs each layer once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph

_CHUNK_VALUES = 2**24  # numbers at the widest point that are computed at once
_KEPT_VALUES = 2**27  # numbers that are kept for later nodes, over all inputs; where they are more, nodes run again


class Piecewise:
    """A place in a network, between two nodes, with the values that nodes behind it need.

    Positions are indices into ``graph.nodes``. A layer-by-layer fit may exchange the graph for one with other tensors
    behind the place (`use`). Where only some images are asked for, the others stay where they are and catch up later.

    Args:
        graph: the network.
        inputs: (images, ...) for each network input, on the device to compute on.
        chunk: images run at once; see `chunk_size`.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Tensor], chunk: int) -> None:
        self._graph = graph
        self._sizes = {name: math.prod(shape) for name, shape in value_shapes(graph).items()}
        self.images, self.device = len(inputs[0]), inputs[0].device
        names = [spec.name for spec in graph.inputs]
        parts = zip(*(torch.split(x, chunk) for x in inputs), strict=True)
        self._chunks = [_Chunk(len(part[0]), 0, frozenset(), dict(zip(names, part, strict=True))) for part in parts]

    def use(self, graph: Graph) -> None:
        """Go on with a graph of the same nodes.

        Those before the place must be as they were, or be gone because nothing reads them any more (a narrowed shuffle
        no longer asks for the batch size).
        """
        self._graph = graph
        for chunk in self._chunks:
            chunk.place = sum(node.name in chunk.done for node in graph.nodes)

    def advance(self, position: int, images: int | None = None) -> None:
        """Move the place to before the node at ``position``, unless too many values would have to be kept there.

        Args:
            position: where to.
            images: how many of the images move, at least; all by default.
        """
        live = self._live(position)
        chunks = [chunk for chunk in self._first(images) if chunk.place < position]
        size = sum(self._sizes.get(name, 0) for name in live)
        if not chunks or size * sum(chunk.images for chunk in chunks) > _KEPT_VALUES:
            return
        done = frozenset(node.name for node in self._graph.nodes[:position])
        for chunk, values in zip(chunks, self._run(chunks, live, position), strict=True):
            chunk.place, chunk.done, chunk.values = position, done, dict(zip(live, values, strict=True))

    def values(self, wanted: Sequence[str], images: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """Yield values by name, chunk by chunk; each is an input, a tensor, or of a node at or behind the place."""
        last = max((k for k, node in enumerate(self._graph.nodes) if node.name in set(wanted)), default=-1)
        yield from self._run(self._first(images), wanted, last + 1)

    def outputs(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the network's outputs, chunk by chunk."""
        yield from self._run(self._chunks, self._graph.outputs, len(self._graph.nodes))

    def _first(self, images: int | None) -> list[_Chunk]:
        """Return as many chunks as the first ``images`` need."""
        starts = itertools.accumulate((chunk.images for chunk in self._chunks), initial=0)
        wanted = self.images if images is None else images
        return [chunk for chunk, start in zip(self._chunks, starts, strict=False) if start < wanted]

    def _live(self, position: int) -> list[str]:
        """Name the inputs and nodes before ``position`` that nodes behind it, or the outputs, need.

        Tensors come first, then sizes and lists: a program computes on the device of its first input.
        """
        needed = set(self._graph.outputs).union(*(node.refs() for node in self._graph.nodes[position:]))
        made = [spec.name for spec in self._graph.inputs] + [node.name for node in self._graph.nodes[:position]]
        tensors = {spec.name for spec in self._graph.inputs} | set(self._sizes)
        return sorted((name for name in made if name in needed), key=lambda name: name not in tensors)

    @torch.no_grad()
    def _run(self, chunks: Sequence[_Chunk], wanted: Sequence[str], position: int) -> Iterator[tuple[Tensor, ...]]:
        programs: dict[int, Program] = {}
        for chunk in chunks:
            if chunk.place not in programs:
                known = next(iter(self._graph.inputs))
                start = tuple(replace(known, name=name, shape=()) for name in chunk.values)
                nodes = self._graph.nodes[chunk.place : max(position, chunk.place)]
                piece = replace(self._graph, inputs=start, nodes=nodes)
                programs[chunk.place] = Program(piece, wanted).to(self.device)
            yield programs[chunk.place](*chunk.values.values())


@dataclass
class _Chunk:
    """Some images on their way.

    Attributes:
        images: how many.
        place: position of the node that they are before.
        done: names of the nodes that they have passed.
        values: what the nodes behind need, by name.
    """

    images: int
    place: int
    done: frozenset[str]
    values: dict[str, Tensor]


def chunk_size(graph: Graph, images: int) -> int:
    """Return how many images to run at once: up to 32, at most a quarter of them, fewer where values are wide."""
    widest = max((math.prod(shape) for shape in value_shapes(graph).values()), default=1)
    return max(1, min(32, images // 4, _CHUNK_VALUES // max(widest, 1)))
