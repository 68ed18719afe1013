"""The network as data: a list of operator calls over named tensors.

Every pass of the project maps a `Graph` to a `Graph`; the artifact stores one; the server runs one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

_Result = TypeVar("_Result")


Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Size:
    """A size that differs between requests: ``low``, and every ``step`` from there up to ``high``."""

    symbol: str
    low: int
    high: int
    step: int = 1

    def __str__(self) -> str:
        return f"{self.low}..{self.high}" + (f"/{self.step}" if self.step > 1 else "")


@dataclass(frozen=True)
class InputSpec:
    """One input of a network.

    Ranges are pairs (lowest, highest): one pair for all entries, or several that come again and again over the entries
    in row-major order, such as one for each column of a table. None stand where nothing is known, or nothing limited.

    Attributes:
        name: the argument's name.
        shape: the shape of one input, without the batch dimension; where sizes vary, the one it is pruned and timed at.
        dtype: the name of a torch dtype.
        ranges: the integers that inputs hold; what is made without data is drawn from them.
        limits: the integers that the network can read, such as the rows of an embedding; a server refuses others.
        varying: the axes of the shape whose size differs between requests, and which sizes they take.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    ranges: Ranges = ()
    limits: Ranges = ()
    varying: tuple[tuple[int, Size], ...] = ()

    @property
    def holds_integers(self) -> bool:
        """Whether it holds integers, of which booleans are none."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return not dtype.is_floating_point and dtype is not torch.bool


@dataclass(frozen=True)
class Ref:
    """A reference, by name, to the value of an input, a stored tensor or an earlier node."""

    name: str


@dataclass(frozen=True)
class Node:
    """One call ``op(*args, **kwargs)``; its arguments are `Ref`s, constants, and lists of them."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def refs(self) -> Iterator[str]:
        """List the names of all values that this call reads, in order of appearance."""
        yield from _refs(self.args)
        yield from _refs(tuple(self.kwargs.values()))

    def argument(self, at: int, default: Any = None) -> Any:
        """Return a positional argument, or the default where the call leaves it out."""
        return self.args[at] if len(self.args) > at else default

    def with_arguments(self, changed: dict[int, Any]) -> Node:
        """Return the same call with some positional arguments replaced."""
        return replace(self, args=tuple(changed.get(at, argument) for at, argument in enumerate(self.args)))


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as operator calls over named tensors.

    Treat it as immutable: passes return a new graph (`with_tensors`, `dataclasses.replace`). What is derived from one
    is computed once and lives as long as the graph does, see `once_per_graph`.

    Attributes:
        inputs: what the network takes.
        tensors: parameters and buffers by name.
        nodes: the calls in an order of execution.
        outputs: names of the values that the network returns.
        buffers: names of stored tensors that the network's author did not make parameters; None where that is unknown,
            as in a package of release 0.1.
        output_names: names by which clients know the outputs, unique; ``output_0`` and so on where none are given.
        classes: those of ``output_names`` that its owner says are class scores; None where nobody has said.
    """

    inputs: tuple[InputSpec, ...]
    tensors: dict[str, Tensor]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    buffers: frozenset[str] | None = None
    output_names: tuple[str, ...] = ()
    classes: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not self.output_names:
            object.__setattr__(self, "output_names", numbered_outputs(len(self.outputs)))

    @property
    def names_outputs(self) -> bool:
        """Whether the outputs have names of their own, so that a reply is better read by name than in order."""
        return self.output_names != numbered_outputs(len(self.outputs))

    def node(self, name: str) -> Node:
        """Return the node of that name; raise KeyError if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def users(self) -> dict[str, list[Node]]:
        """Map each value to the nodes that read it, each once per argument that does."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.refs():
                users.setdefault(name, []).append(node)
        return users

    def needed_for(self, wanted: Iterable[str]) -> set[str]:
        """Return the names of the values that the wanted ones depend on, and of those themselves."""
        needed = set(wanted)
        for node in reversed(self.nodes):
            if node.name in needed:
                needed.update(node.refs())
        return needed

    def with_tensors(self, changed: dict[str, Tensor]) -> Graph:
        """Return the same graph with some tensors replaced or added."""
        return replace(self, tensors={**self.tensors, **changed})

    def with_nodes(self, changed: dict[str, Node]) -> Graph:
        """Return the same graph with some nodes replaced by another call under the same name."""
        return replace(self, nodes=tuple(changed.get(node.name, node) for node in self.nodes))

    def renamed(self, names: Mapping[str, str]) -> Graph:
        """Return the same graph with some values under other names; a value whose name is taken so gets a free one."""
        taken = {spec.name for spec in self.inputs} | self.tensors.keys() | {node.name for node in self.nodes}
        new = dict(names)
        for name in taken & set(names.values()) - names.keys():
            new[name] = next(free for k in itertools.count() if (free := f"{name}_{k}") not in taken | {*new.values()})

        def ref(name: str) -> Ref:
            return Ref(new.get(name, name))

        nodes = tuple(
            Node(
                new.get(node.name, node.name),
                node.op,
                map_refs(node.args, ref),
                {key: map_refs(value, ref) for key, value in node.kwargs.items()},
            )
            for node in self.nodes
        )
        inputs = tuple(replace(spec, name=new.get(spec.name, spec.name)) for spec in self.inputs)
        tensors = {new.get(name, name): tensor for name, tensor in self.tensors.items()}
        outputs = tuple(new.get(name, name) for name in self.outputs)
        buffers = None if self.buffers is None else frozenset(new.get(name, name) for name in self.buffers)
        return replace(self, inputs=inputs, tensors=tensors, nodes=nodes, outputs=outputs, buffers=buffers)

    def to(self, dtype: torch.dtype) -> Graph:
        """Return the same graph with its floating-point tensors and inputs in another precision."""
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.tensors.items()}
        inputs = tuple(
            replace(i, dtype=str(dtype).removeprefix("torch.")) if getattr(torch, i.dtype).is_floating_point else i
            for i in self.inputs
        )
        return replace(self, tensors=tensors, inputs=inputs)

    def pruned_of_unused(self) -> Graph:
        """Return the same graph without nodes and tensors that no output depends on."""
        needed = self.needed_for(self.outputs)
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in needed}
        buffers = None if self.buffers is None else self.buffers & tensors.keys()
        nodes = tuple(node for node in self.nodes if node.name in needed)
        return replace(self, nodes=nodes, tensors=tensors, buffers=buffers)


def numbered_outputs(count: int) -> tuple[str, ...]:
    """Return the names of outputs that the network itself names none of."""
    return tuple(f"output_{index}" for index in range(count))


def once_per_graph(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Remember a function's results for each graph, its first argument, and the other arguments."""
    known: WeakKeyDictionary[Graph, dict[Any, _Result]] = WeakKeyDictionary()

    @functools.wraps(function)
    def remembered(graph: Graph, *args: Any) -> _Result:
        results = known.setdefault(graph, {})
        if args not in results:
            results[args] = function(graph, *args)
        return results[args]

    return remembered


def map_refs(value: Any, fn: Callable[[str], Any]) -> Any:
    """Return ``value`` with every `Ref` replaced by ``fn(name)``, through lists and tuples."""
    if isinstance(value, Ref):
        return fn(value.name)
    if isinstance(value, (list, tuple)):
        return type(value)(map_refs(v, fn) for v in value)
    return value


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _refs(item)
