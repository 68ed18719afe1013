"""Running a graph: one executor for the offline passes and for the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from redpp_serve.graph.graph import Graph, map_refs, once_per_graph
from redpp_serve.graph.operators import resolve

TensorType = tuple[tuple[int, ...], torch.dtype]


class Program(nn.Module):
    """A graph as a module: tensors (N, ...) in, a tuple of the values named by ``wanted`` out.

    ``operators`` are the names of those that it calls, in order.

    Args:
        graph: what to run; its tensors become buffers, so ``.to(device)`` works.
        wanted: names of the values to return; by default the graph's outputs. Nothing after the last one
            runs, and each intermediate value is freed after its last use.
    """

    def __init__(self, graph: Graph, wanted: Sequence[str] | None = None) -> None:
        super().__init__()
        self.inputs = graph.inputs
        self.wanted = tuple(graph.outputs if wanted is None else wanted)
        live = _needed(graph, self.wanted)
        slot: dict[str, int] = {}
        for value in (*(i.name for i in graph.inputs), *graph.tensors):
            slot[value] = len(slot)
        self._constants: list[tuple[int, str]] = []
        for k, (name, tensor) in enumerate(graph.tensors.items()):
            if name in live:
                self.register_buffer(f"t{k}", tensor, persistent=False)
                self._constants.append((slot[name], f"t{k}"))
        steps = [node for node in graph.nodes if node.name in live]
        for node in steps:
            slot[node.name] = len(slot)
        self.operators = tuple(node.op for node in steps)
        self._names = {index: name for name, index in slot.items()}
        last = {name: k for k, node in enumerate(steps) for name in node.refs()}
        self._literals: list[Any] = []  # constants among the arguments; they have slots behind those of all values
        self._device = len(slot)  # the slot of the inputs' device
        self._steps, self._calls = [], []
        for k, node in enumerate(steps):
            dead = [
                slot[r] for r in set(node.refs()) if last[r] == k and r not in self.wanted and r not in graph.tensors
            ]
            fn = resolve(node.op)
            args = map_refs(node.args, lambda name: _Slot(slot[name]))
            kwargs = {key: map_refs(v, lambda name: _Slot(slot[name])) for key, v in node.kwargs.items()}
            if _makes_tensor(fn):
                kwargs["device"] = _Slot(self._device)
            self._steps.append((fn, args, kwargs, slot[node.name], dead))
            self._calls.append((_direct(fn), self._getter(args), _keywords(kwargs), slot[node.name], dead))
        self._returns = [slot[name] for name in self.wanted]
        self._start: list[Any] | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> Program:
        self._start = None  # its tensors are about to move
        return super()._apply(*args, **kwargs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return self._step_by_step(inputs)
        if self._start is None:
            self._start = self._values()
        values = self._start.copy()
        values[: len(inputs)] = inputs
        values[self._device] = inputs[0].device
        for fn, get, keywords, out, dead in self._calls:
            values[out] = fn(*get(values), **keywords(values)) if keywords else fn(*get(values))
            for index in dead:
                values[index] = None
        return tuple(values[index] for index in self._returns)

    def types(self, *inputs: Tensor) -> dict[str, TensorType]:
        """Shape and dtype of every tensor that a run makes, by its name; each is freed after its last use."""
        types: dict[int, TensorType] = {}
        self._step_by_step(inputs, types)
        return {self._names[out]: found for out, found in types.items()}

    def shapes(self, *inputs: Tensor) -> dict[str, tuple[int, ...]]:
        """As `types`, the shapes alone."""
        return {name: shape for name, (shape, _) in self.types(*inputs).items()}

    def _step_by_step(self, inputs: Sequence[Tensor], types: dict[int, TensorType] | None = None) -> tuple[Tensor, ...]:
        """As `forward`, in Python that torch.compile can trace; notes what is made in ``types``."""
        values = self._values()
        values[: len(inputs)] = inputs
        values[self._device] = inputs[0].device
        for fn, args, kwargs, out, dead in self._steps:
            values[out] = fn(*[_fill(a, values) for a in args], **{k: _fill(v, values) for k, v in kwargs.items()})
            if types is not None and isinstance(values[out], Tensor):
                types[out] = tuple(values[out].shape), values[out].dtype
            for index in dead:
                values[index] = None
        return tuple(values[index] for index in self._returns)

    def _values(self) -> list[Any]:
        """The list of values before a run: tensors and literals."""
        values = [None] * (self._device + 1) + self._literals
        for index, buffer in self._constants:
            values[index] = self._buffers[buffer]
        return values

    def _getter(self, args: tuple[Any, ...]) -> Callable[[list[Any]], Sequence[Any]]:
        """What reads a call's arguments from the list of values; in C where no argument is a list with values in it."""
        if any(_holds_slots(a) for a in args):
            return lambda values: [_fill(a, values) for a in args]
        slots: list[int] = []
        for arg in args:
            if type(arg) is not _Slot:
                self._literals.append(arg)
                arg = self._device + len(self._literals)
            slots.append(int(arg))
        return (
            itemgetter(*slots) if len(slots) > 1 else itemgetter(slice(slots[0], slots[0] + 1) if slots else slice(0))
        )


def value_shapes(graph: Graph, device: str = "meta", batch: int = 1) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor-valued node at a batch size.

    Args:
        device: ``meta`` finds them without computing. Another runs the network once on zeros: for a server, where the
            meta device's registrations would cost each worker a second and 100 MB.
    """
    return {name: shape for name, (shape, _) in value_types(graph, device, batch).items()}


def value_types(graph: Graph, device: str = "meta", batch: int = 1) -> dict[str, TensorType]:
    """Find shape and dtype of every tensor-valued node, see `value_shapes`."""
    return dict(_value_types(graph, device, batch))


@once_per_graph
def _value_types(graph: Graph, device: str, batch: int) -> dict[str, TensorType]:
    read = {name for node in graph.nodes for name in node.refs()}
    program = Program(graph, wanted=[node.name for node in graph.nodes if node.name not in read]).to(device)
    inputs = (torch.zeros(batch, *i.shape, dtype=getattr(torch, i.dtype), device=device) for i in graph.inputs)
    with torch.no_grad():
        return program.types(*inputs)


class _Slot(int):
    """A position in the list of values; a type of its own, so that it differs from a constant integer."""


def _direct(fn: Any) -> Any:
    """An operator of torch without the Python function around it, which costs small networks 2 % of their time."""
    return fn._op if isinstance(fn, OpOverload) else fn


def _makes_tensor(fn: Any) -> bool:
    """Whether an operator makes a tensor from none, and so must be told on which device."""
    names = [argument.name for argument in fn._schema.arguments] if isinstance(fn, OpOverload) else []
    return "device" in names and not {"self", "input"} & set(names)


def _keywords(kwargs: dict[str, Any]) -> Callable[[list[Any]], dict[str, Any]] | None:
    """What gives a call's keyword arguments for the list of values; None where there are none."""
    if any(type(v) is _Slot or _holds_slots(v) for v in kwargs.values()):
        return lambda values: {key: _fill(v, values) for key, v in kwargs.items()}
    return (lambda values: kwargs) if kwargs else None


def _holds_slots(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(type(v) is _Slot or _holds_slots(v) for v in value)


def _fill(value: Any, values: list[Any]) -> Any:
    kind = type(value)
    if kind is _Slot:
        return values[value]
    if kind is list or kind is tuple:
        return [_fill(v, values) for v in value]
    return value


def _needed(graph: Graph, wanted: Sequence[str]) -> set[str]:
    live = set(wanted)
    for node in reversed(graph.nodes):
        if node.name in live:
            live.update(node.refs())
    return live
