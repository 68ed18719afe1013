"""Whether a graph computes what its network computes, for each input of a batch by itself; and where it does not.

Servers batch the requests of strangers, so the answer to one input must not depend on the others either.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from redpp_serve.capture.any_size import other_sizes, shapes_in_words
from redpp_serve.capture.flat import FlatNetwork
from redpp_serve.capture.inputs import sample
from redpp_serve.capture.outputs import are_close
from redpp_serve.capture.refusals import defined_at, not_capturable, raised_at, reason
from redpp_serve.capture.trail import Passed, copies, trail
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, Node
from redpp_serve.graph.sizes import is_varying

MIXED = "the result for one input depends on the others in its batch"
_MANY = 9  # inputs, more than a server's batch has by default
_MOST_NUMBERS = 1 << 21  # that so many inputs may hold to be tried
_ANY_BATCH = "a network that takes any batch size"


def check_agreement(graph: Graph, network: FlatNetwork, places: Mapping[str, str] | None = None) -> None:
    """Compare graph and network on random inputs at batch sizes 2, 1, 3 and 9, and at other sizes where these vary.

    A batch of 9 is left out where the inputs are large.

    Args:
        graph: the graph.
        network: the network.
        places: the `refusals.place` of the graph's calls by their names.

    Raises:
        RedppError: another result, a failure at one of the batch sizes, or outputs that mix the inputs of a batch.
    """
    program, inputs = Program(graph), graph.inputs
    batches = [2, 1, 3, *([_MANY] if _MANY * sum(math.prod(i.shape) for i in inputs) <= _MOST_NUMBERS else [])]
    cases = [*((batch, inputs) for batch in batches), *((1, specs) for specs in other_sizes(inputs))]
    for batch, specs in cases:
        where = f"at batch size {batch}" + (f" and inputs of {shapes_in_words(specs)}" if is_varying(inputs) else "")
        x = sample(specs, batch, torch.Generator().manual_seed(batch))
        for t in x:  # unlike the others, so that a largest value of the batch is not the largest of each
            t[0] = t[0] / 2 if t.is_floating_point() else t[0] // 2 if t.dtype is torch.uint8 else t[0]
        search = _Search(graph, network, x, places or {})
        ends = sorted({0, batch - 1})
        with torch.no_grad():
            try:
                got = program(*copies(x))
                alone = [program(*(t[k : k + 1].clone() for t in x)) for k in ends]
                expected = network(*x)
            except Exception as error:  # the user's forward may raise anything
                at = "" if raised_at(error) else search.failing()
                raise not_capturable(f"{where} it fails: {reason(error)}{at}", _ANY_BATCH) from error
        if len(got) != len(expected) or not all(map(_agree, got, expected)):
            raise not_capturable(
                f"{where} the captured graph gives another result than the network{search.changing()}",
                "a forward that is a pure function of its inputs",
                "keep no state and no random numbers in forward, and let nothing in it depend on the size of the batch",
            )
        named = zip(graph.output_names, graph.outputs, got, strict=True)
        if odd := [(name, value, y) for name, value, y in named if not y.dim() or len(y) != batch]:
            name, value, y = odd[0]
            raise not_capturable(
                f"{where} it has an output of shape {tuple(y.shape)} ({name}){search.place(value)}",
                f"{_ANY_BATCH}, with outputs of shape (N, ...)",
                "return a result for each input, and leave out what describes the whole batch, such as a loss",
            )
        for k, one in zip(ends, alone, strict=True):
            if not all(_agree(y[k : k + 1], mine) for y, mine in zip(got, one, strict=True)):
                raise not_capturable(
                    f"{MIXED}{search.mixing(k)}",
                    "outputs that are each computed from their own input",
                    "reduce over the dimensions behind the batch alone, as x.mean((1, 2, 3), keepdim=True) does",
                )


@dataclass(frozen=True)
class _Search:
    """Finds which call of a graph, or which module of a network, is to blame for what went wrong with some inputs."""

    graph: Graph
    network: FlatNetwork
    inputs: tuple[Tensor, ...]
    places: Mapping[str, str]

    def place(self, name: str) -> str:
        """Say where a value is computed; where nothing tells, its arguments, and in the end the network itself."""
        nodes = {node.name: node for node in self.graph.nodes}
        names = [name]
        for each in names:  # grows on the way
            if found := self.places.get(each):
                return found
            names += [ref for ref in (nodes[each].refs() if each in nodes else ()) if ref not in names]
        return defined_at("", self.network.network)

    def failing(self) -> str:
        """Name the call of the graph that raises, and its place; nothing where none does."""
        done: list[str] = []
        with contextlib.suppress(Exception):
            Program(self.graph).tell(lambda name, value: done.append(name), *copies(self.inputs))
        left = [node for node in self.graph.nodes if node.name not in done]
        return f" (operator {left[0].op}){self.place(left[0].name)}" if left else ""

    def mixing(self, row: int) -> str:
        """Name the call through which one input of the batch reaches another, and its place."""
        whole, alone = self._values(slice(None)), self._values(slice(row, row + 1))
        clear = {*self.graph.tensors, *(spec.name for spec in self.graph.inputs)}  # what is computed input by input
        fixed = set(self.graph.tensors)
        for node in self.graph.nodes:
            many, one = whole.get(node.name), alone.get(node.name)
            if isinstance(many, int) or fixed.issuperset(node.refs()):
                fixed.add(node.name)
                clear.add(node.name)
            elif _has_rows(many, len(self.inputs[0])) and _has_rows(one, 1):
                if not _agree(many[row : row + 1], one):
                    return self._origin(node, clear)
                clear.add(node.name)
        return self.place(self.graph.outputs[0])

    def _values(self, rows: slice) -> dict[str, Any]:
        found: dict[str, Any] = {}
        Program(self.graph).tell(found.__setitem__, *(x[rows].clone() for x in self.inputs))
        return found

    def _origin(self, node: Node, clear: set[str]) -> str:
        """Name the first call on the way from what is computed input by input to a call that is not."""
        nodes, names = {each.name: each for each in self.graph.nodes}, [node.name]
        for name in names:  # grows on the way
            names += [ref for ref in nodes[name].refs() if ref not in clear and ref not in names]
        first = next(each for each in self.graph.nodes if each.name in names)
        return f", through operator {first.op}{self.place(first.name)}"

    def changing(self) -> str:
        """Name the innermost module that gives another result for the same inputs, once more or in another batch."""
        first = self._trail(self.inputs)
        doubled = [torch.cat([x, x]) for x in self.inputs]
        for others in (self.inputs, doubled, [x[:2] for x in self.inputs], [x[:1] for x in self.inputs]):
            for one, other in zip(first, self._trail(others), strict=False):
                if one.module is not other.module:
                    break  # it went another way, which the module that decided tells when it is left
                if _alike(one.given, other.given) and not _alike(one.made, other.made):
                    return one.where()
        return defined_at("", self.network.network)

    def _trail(self, inputs: Sequence[Tensor]) -> list[Passed]:
        return trail(self.network.network, lambda: self.network(*copies(inputs)))


def _has_rows(value: Any, count: int) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == count


def _alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether tensors agree in the first rows, as many as both have."""
    pairs = [
        (x, y) if x.dim() == 0 or y.dim() == 0 else (x[: len(y)], y[: len(x)])
        for x, y in zip(some, others, strict=False)
    ]
    return len(some) == len(others) and all(_agree(x, y) for x, y in pairs)


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    """Compare shape, dtype, and values up to 1e-4 of the largest one or the dtype's own rounding."""
    if mine.shape != theirs.shape or mine.dtype is not theirs.dtype:
        return False
    relative = max(1e-4, 16 * torch.finfo(mine.dtype).eps) if mine.is_floating_point() else 0.0
    return are_close(mine, theirs, relative)
