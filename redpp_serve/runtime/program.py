"""Running a graph: one executor for the offline passes and for the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from .graph import Graph, map_refs
from .ops import resolve

TensorType = tuple[tuple[int, ...], torch.dtype]


class Program(nn.Module):
    """A graph as a module: tensors (N, ...) in, a tuple of the values named by ``wanted`` out.

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
        self._names = {index: name for name, index in slot.items()}
        last = {name: k for k, node in enumerate(steps) for name in node.refs()}
        self._literals: list[Any] = []  # constants among the arguments; they have slots behind those of all values
        self._steps = []
        for k, node in enumerate(steps):
            dead = [slot[r] for r in set(node.refs()) if last[r] == k and r not in self.wanted and r not in graph.tensors]
            fn = resolve(node.op)
            kwargs = {key: map_refs(v, lambda name: _Slot(slot[name])) for key, v in node.kwargs.items()}
            if _makes_tensor(fn):
                kwargs["device"] = _Slot(len(slot))
            get = self._getter(map_refs(node.args, lambda name: _Slot(slot[name])), len(slot) + 1)
            self._steps.append((fn, get, _keywords(kwargs), slot[node.name], dead))
        self._returns = [slot[name] for name in self.wanted]
        self._device = len(slot)  # the slot of the inputs' device
        self._start: list[Any] | None = None  # the list of values before a run: tensors and literals

    def _apply(self, *args: Any, **kwargs: Any) -> Program:
        self._start = None  # its tensors are about to move
        return super()._apply(*args, **kwargs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._run(inputs, None)

    def types(self, *inputs: Tensor) -> dict[str, TensorType]:
        """Shape and dtype of every tensor that a run makes, by its name; each is freed after its last use."""
        types: dict[int, TensorType] = {}
        self._run(inputs, types)
        return {self._names[out]: found for out, found in types.items()}

    def shapes(self, *inputs: Tensor) -> dict[str, tuple[int, ...]]:
        """As `types`, the shapes alone."""
        return {name: shape for name, (shape, _) in self.types(*inputs).items()}

    def _run(self, inputs: Sequence[Tensor], types: dict[int, TensorType] | None) -> tuple[Tensor, ...]:
        if self._start is None:
            self._start = [None] * (self._device + 1) + self._literals
            for index, buffer in self._constants:
                self._start[index] = self._buffers[buffer]
        values = self._start.copy()
        values[: len(inputs)] = inputs
        values[self._device] = inputs[0].device
        for fn, get, keywords, out, dead in self._steps:
            values[out] = fn(*get(values), **keywords(values)) if keywords else fn(*get(values))
            if types is not None and isinstance(values[out], Tensor):
                types[out] = tuple(values[out].shape), values[out].dtype
            for index in dead:
                values[index] = None
        return tuple(values[index] for index in self._returns)

    def _getter(self, args: tuple[Any, ...], first_literal: int) -> Callable[[list[Any]], Sequence[Any]]:
        """What reads a call's arguments from the list of values; in C where no argument is a list with values in it."""
        if any(_holds_slots(a) for a in args):
            return lambda values: [_fill(a, values) for a in args]
        slots: list[int] = []
        for arg in args:
            if type(arg) is not _Slot:
                self._literals.append(arg)
                arg = first_literal + len(self._literals) - 1
            slots.append(int(arg))
        return itemgetter(*slots) if len(slots) > 1 else itemgetter(slice(slots[0], slots[0] + 1) if slots else slice(0))


def value_shapes(graph: Graph, device: str = "meta", batch: int = 1) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor-valued node at a batch size.

    Args:
        device: ``meta`` finds them without computing. Another runs the network once on zeros: for a server, where the
            meta device's registrations would cost each worker a second and 100 MB.
    """
    return {name: shape for name, (shape, _) in value_types(graph, device, batch).items()}


def value_types(graph: Graph, device: str = "meta", batch: int = 1) -> dict[str, TensorType]:
    """As `value_shapes`, with the dtypes."""
    read = {name for node in graph.nodes for name in node.refs()}
    program = Program(graph, wanted=[node.name for node in graph.nodes if node.name not in read]).to(device)
    inputs = (torch.zeros(batch, *i.shape, dtype=getattr(torch, i.dtype), device=device) for i in graph.inputs)
    with torch.no_grad():
        return program.types(*inputs)


class _Slot(int):
    """A position in the list of values; a type of its own, so that it differs from a constant integer."""


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
