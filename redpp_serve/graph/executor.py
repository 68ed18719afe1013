"""Running a graph: one executor for the offline passes and for the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from redpp_serve.graph.graph import Graph, map_refs, once_per_graph
from redpp_serve.graph.operators import FUSED_CONV2D, FUSED_LINEAR, INT8_VALUES, INT8_WEIGHT, LEVELS, resolve
from redpp_serve.graph.ranges import blank

TensorType = tuple[tuple[int, ...], torch.dtype]


class Program(nn.Module):
    """A graph as a module: tensors (N, ...) in, a tuple of values out.

    A run works on one list: inputs, stored tensors and the results of calls, then the inputs' device, then the
    constants among the calls' arguments. A `_Slot` is a position in it.

    Args:
        graph: what to run; its tensors become buffers, so ``.to(device)`` works.
        wanted: names of the values to return; by default the graph's outputs. Nothing after the last one runs, and
            each intermediate value is freed after its last use.

    Attributes:
        inputs: the graph's inputs.
        wanted: names of the values that a run returns.
        operators: names of the operators that a run calls, in order.
    """

    def __init__(self, graph: Graph, wanted: Sequence[str] | None = None) -> None:
        super().__init__()
        self.inputs = graph.inputs
        self.wanted = tuple(graph.outputs if wanted is None else wanted)
        live = graph.needed_for(self.wanted)
        nodes = [node for node in graph.nodes if node.name in live]
        self.operators = tuple(node.op for node in nodes)
        self._names = [*(spec.name for spec in graph.inputs), *graph.tensors, *(node.name for node in nodes)]
        slots = {name: k for k, name in enumerate(self._names)}
        self._device, self._literals = len(slots), list[Any]()
        self._constants: list[tuple[int, str]] = []
        for k, (name, tensor) in enumerate(graph.tensors.items()):
            if name in live:
                self.register_buffer(f"t{k}", tensor, persistent=False)
                self._constants.append((slots[name], f"t{k}"))
        last = {name: k for k, node in enumerate(nodes) for name in node.refs()}
        kept = {*self.wanted, *graph.tensors}
        self._steps, self._calls = [], []  # the same calls for `_step_by_step` and for `forward`
        for k, node in enumerate(nodes):
            dead = [slots[name] for name in set(node.refs()) - kept if last[name] == k]
            fn = resolve(node.op)
            args = map_refs(node.args, lambda name: _Slot(slots[name]))
            kwargs = {key: map_refs(value, lambda name: _Slot(slots[name])) for key, value in node.kwargs.items()}
            if makes_tensor(fn):
                kwargs["device"] = _Slot(self._device)
            self._steps.append((fn, args, kwargs, slots[node.name], dead))
            self._calls.append((_direct(fn), self._getter(args), _keywords(kwargs), slots[node.name], dead))
        self._returns = [slots[name] for name in self.wanted]
        self._start: list[Any] | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> Program:
        self._start = None  # its tensors are about to move
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on inputs (N, ...), each on the device of the buffers."""
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

    def types(self, *inputs: Tensor) -> dict[str, TensorType | int]:
        """Return shape and dtype of every tensor that a call makes, and every size, by name.

        The graph runs, but for its convolutions and Linears in float32, which give zeros of the right shape; they too
        where something refuses the zeros, such as an inverse.
        """
        types: dict[str, TensorType | int] = {}

        def note(name: str, value: Any) -> None:
            if isinstance(value, Tensor):
                types[name] = tuple(value.shape), value.dtype
            elif isinstance(value, (int, torch.SymInt)):  # the latter in `symbolic`
                types[name] = cast(int, value)

        try:
            self._step_by_step(inputs, note, _in_shape)
        except RuntimeError:
            types.clear()
            self._step_by_step(inputs, note)
        return types

    def tell(self, note: Callable[[str, Any], None], *inputs: Tensor) -> None:
        """Run the graph; hand the result of every call to ``note``, with the name of its node."""
        self._step_by_step(inputs, note)

    def seconds(self, *inputs: Tensor) -> dict[str, float]:
        """Run the graph; return the seconds of every call, by the name of its node."""
        seconds: dict[str, float] = {}
        last = time.perf_counter()

        def note(name: str, value: Any) -> None:
            nonlocal last
            if isinstance(value, Tensor) and value.is_cuda:
                torch.cuda.synchronize(value.device)
            now = time.perf_counter()
            seconds[name], last = now - last, now

        self._step_by_step(inputs, note)
        return seconds

    def _step_by_step(
        self,
        inputs: Sequence[Tensor],
        note: Callable[[str, Any], None] | None = None,
        call: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Do what `forward` does, in Python that torch.compile can trace; hand each result to ``note`` by its name.

        ``call`` takes an operator and its arguments, and calls it.
        """
        values = self._values()
        values[: len(inputs)] = inputs
        values[self._device] = inputs[0].device
        for fn, args, kwargs, out, dead in self._steps:
            run = fn if call is None else partial(call, fn)
            values[out] = run(*[_fill(a, values) for a in args], **{k: _fill(v, values) for k, v in kwargs.items()})
            if note is not None:
                note(self._names[out], values[out])
            for index in dead:
                values[index] = None
        return tuple(values[index] for index in self._returns)

    def _values(self) -> list[Any]:
        """Make the list of values as it is before a run: tensors and literals."""
        values = [None] * (self._device + 1) + self._literals
        for index, buffer in self._constants:
            values[index] = self._buffers[buffer]
        return values

    def _getter(self, args: tuple[Any, ...]) -> Callable[[list[Any]], Sequence[Any]]:
        """Make the function that takes a call's arguments from the values; in C if no argument is a list of values."""
        if any(_holds_slots(a) for a in args):
            return lambda values: [_fill(a, values) for a in args]
        slots: list[int] = []
        for arg in args:
            if type(arg) is _Slot:
                slots.append(int(arg))
            else:
                self._literals.append(arg)
                slots.append(self._device + len(self._literals))
        return (
            itemgetter(*slots) if len(slots) > 1 else itemgetter(slice(slots[0], slots[0] + 1) if slots else slice(0))
        )


def value_shapes(graph: Graph, device: str = "meta", batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Find the shape of every tensor-valued node at a batch size.

    Args:
        graph: the network.
        device: ``meta`` finds the shapes without computing. Any other runs the network once on zeros, which suits a
            server: the meta device's registrations would cost each worker a second and 100 MB.
        batch: how many inputs.
    """
    return {name: shape for name, (shape, _) in value_types(graph, device, batch).items()}


def value_types(graph: Graph, device: str = "meta", batch: int = 1) -> dict[str, TensorType]:
    """Find shape and dtype of every tensor-valued node, see `value_shapes`."""
    return {name: found for name, found in _values(graph, device, batch).items() if not isinstance(found, int)}


def value_sizes(graph: Graph, device: str = "meta", batch: int = 1) -> dict[str, int]:
    """Find the number that each node with a whole number gives, such as a size of an input, see `value_shapes`."""
    return {name: found for name, found in _values(graph, device, batch).items() if isinstance(found, int)}


def output_types(graph: Graph, device: str = "meta", batch: int = 1) -> dict[str, TensorType]:
    """Find shape and dtype of every output by its public name, see `value_shapes`; one may be an input, or stored."""
    types = value_types(graph, device, batch)
    types |= {spec.name: ((batch, *spec.shape), getattr(torch, spec.dtype)) for spec in graph.inputs}
    types |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in graph.tensors.items()}
    return {name: types[value] for name, value in zip(graph.output_names, graph.outputs, strict=True)}


@once_per_graph
def _values(graph: Graph, device: str, batch: int) -> dict[str, TensorType | int]:
    read = {name for node in graph.nodes for name in node.refs()}
    program = Program(graph, wanted=[node.name for node in graph.nodes if node.name not in read]).to(device)
    with torch.no_grad():
        try:
            return program.types(*(blank(spec, batch, device) for spec in graph.inputs))
        except NotImplementedError:  # an operator that has no shapes without values, such as an inverse spectrum
            by_value = (torch.Tag.dynamic_output_shape in getattr(resolve(n.op), "tags", ()) for n in graph.nodes)
            if device != "meta" or any(by_value):
                raise
    found: dict[str, TensorType | int] = _values(graph, "cpu", batch)
    return found


_CONVOLUTIONS = {resolve(f"aten.conv{d}d.default"): resolve(f"aten.conv{d}d.default") for d in (1, 2, 3)}
_CONVOLUTIONS[resolve(FUSED_CONV2D)] = resolve("aten.conv2d.default")
_FUSED = frozenset(map(resolve, (FUSED_CONV2D, FUSED_LINEAR)))
_LINEARS = frozenset(map(resolve, (FUSED_LINEAR, "aten.linear.default")))
_INT8_VALUES, _INT8_WEIGHT = resolve(INT8_VALUES), resolve(INT8_WEIGHT)


def _in_shape(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operator; a convolution or Linear in float32, or what rounds to eight bits, gives zeros of its shape.

    Of a convolution one channel is computed, so that torch itself says what strides, padding and dilation make of the
    positions. Whatever torch might refuse is left to torch.
    """
    if fn is _INT8_VALUES and type(args[0]) is Tensor and args[0].dtype == torch.float32 and 0 <= args[2] < LEVELS:
        return args[0].new_zeros(()).expand(args[0].shape)
    if fn is _INT8_WEIGHT and args[0].dtype == torch.int8 and args[1].shape == args[0].shape[:1]:
        return args[1].new_zeros(()).expand(args[0].shape)
    if kwargs or not (fn in _CONVOLUTIONS or fn in _LINEARS):
        return fn(*args, **kwargs)
    x, weight, bias, *window = (args[0], *args[2:-1]) if fn in _FUSED else (*args, None)[: max(3, len(args))]
    given = [t for t in (x, weight, bias) if t is not None]
    known = all(type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and not t.is_meta for t in given)
    if not known or not x.numel() or not weight.numel() or (bias is not None and bias.shape != weight.shape[:1]):
        return fn(*args)
    if fn in _LINEARS:
        fits = weight.dim() == 2 and x.shape[-1:] == weight.shape[1:]
        return x.new_zeros(*x.shape[:-1], len(weight)) if fits else fn(*args)
    *window, groups = window if len(window) == 4 else (*window, 1)
    if x.dim() != weight.dim() or x.shape[1] != weight.shape[1] * groups or len(weight) % groups:
        return fn(*args)
    one = _CONVOLUTIONS[fn](x[:1, :1], weight[:1, :1], None, *window)
    return x.new_zeros(len(x), len(weight), *one.shape[2:])


class _Slot(int):
    """A position in the list of values; a type of its own, so that it differs from a constant integer."""


def _direct(fn: Any) -> Any:
    """Return torch's operator without the Python function around it, which costs small networks 2 % of their time."""
    return fn._op if isinstance(fn, OpOverload) else fn


def makes_tensor(fn: Any) -> bool:
    """Return whether an operator makes a tensor from none, and so must be told on which device."""
    names = [argument.name for argument in fn._schema.arguments] if isinstance(fn, OpOverload) else []
    return "device" in names and not {"self", "input"} & set(names)


def _keywords(kwargs: dict[str, Any]) -> Callable[[list[Any]], dict[str, Any]] | None:
    """Make the function that takes a call's keyword arguments from the values; None for a call without any."""
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
