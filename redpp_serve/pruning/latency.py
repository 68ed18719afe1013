"""Latency on the device at hand: networks side by side, and a model of it over the widths of the layers.

Everything runs in the engine that would serve the original in fp32, with the threads that are set. Other work on the
machine and its clock rate change all times alike, so networks to compare are measured in turns.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from redpp_serve.engines import OWN
from redpp_serve.graph.executor import value_shapes
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref, map_refs
from redpp_serve.graph.layers import Call, Layer, find_layers, is_convolution
from redpp_serve.graph.passes import is_inference_norm
from redpp_serve.runtime.engine_choice import run_in, serving_engine
from redpp_serve.runtime.timing import random_tensor, rounds

FEWEST_ROUNDS, MOST_ROUNDS = 5, 1000
RESAMPLES = 1000
# Calls between two synchronisations on a GPU: a network waits for the device once, not once for each of its layers.
GPU_CALLS = 10
_EPILOGUES = frozenset(f"aten.{name}.default" for name in ("relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid"))

Run = Callable[..., tuple[Tensor, ...]]
Timer = Callable[[Run, Sequence[Tensor], torch.device], float]  # seconds of one call on a device


@dataclass(frozen=True)
class Latency:
    """Latency of a network, in seconds for one call, and its ratio to the first network measured with it.

    Attributes:
        median: median over the rounds.
        p10: 10th percentile.
        p90: 90th percentile.
        ratio: median of the ratios within the rounds.
        low: lower end of the ratio's 95 % interval.
        high: upper end of the ratio's 95 % interval.
        rounds: number of rounds.
    """

    median: float
    p10: float
    p90: float
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer: ``fixed + slope * (number of weights)``; weights are MACs for each output position.

    Attributes:
        fixed: seconds that do not depend on the weight's shape.
        slope: seconds for each weight.
        shape: shape of the measured weight.
    """

    fixed: float
    slope: float
    shape: tuple[int, ...]

    def at(self, shape: tuple[int, ...]) -> float:
        """Return the seconds with a weight of another shape."""
        return self.fixed + self.slope * math.prod(shape)


@dataclass(frozen=True)
class LatencyModel:
    """Seconds of a network as the sum over its layers and a constant for all else.

    Attributes:
        constant: seconds that belong to no layer.
        layers: the layers' times by name.
        whole: the measured time of the whole network, which `predict` returns for unchanged shapes.
    """

    constant: float
    layers: Mapping[str, LayerTime]
    whole: float

    def predict(self, shapes: Mapping[str, tuple[int, ...]]) -> float:
        """Return the seconds with the layers' weights in these shapes.

        A layer that is not named keeps its own; a name that was not measured, such as a product's, costs the same.
        """
        change = sum(
            self.layers[name].at(shape) - self.layers[name].at(self.layers[name].shape)
            for name, shape in shapes.items()
            if name in self.layers
        )
        return self.whole + change


def paired_latency(
    graphs: Sequence[Graph],
    batch: int = 1,
    device: torch.device | str = "cpu",
    seconds: float = 5.0,
    timer: Timer | None = None,
) -> list[Latency]:
    """Time networks with the same inputs in turns; ratios are to the first.

    A round calls each network twice, in order and then in reverse, so that slow drift cancels. A ratio is the median
    over the rounds, its interval a bootstrap over them. Copies to and from a GPU are not counted.

    Args:
        graphs: at least one; their tensors are not changed.
        batch: number of random inputs in one call.
        device: where the networks run.
        seconds: time for the rounds; at least `FEWEST_ROUNDS` are run, however long they take.
        timer: times one call; by default `time_call`.
    """
    device = torch.device(device)
    inputs = _inputs(graphs[0].inputs, batch, device)
    runs = _runs(graphs, graphs[0], device)
    times = _measure([(run, inputs) for run in runs], device, seconds, timer or time_call)
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(times), (RESAMPLES, len(times)))
    found = []
    for column in times.T:
        ratios = column / times[:, 0]
        low, high = np.quantile(np.median(ratios[picked], axis=1), (0.025, 0.975))
        p10, median, p90 = (float(q) for q in np.quantile(column, (0.1, 0.5, 0.9)))
        found.append(Latency(median, p10, p90, float(np.median(ratios)), float(low), float(high), len(times)))
    return found


def layer_model(
    graph: Graph, device: torch.device | str = "cpu", seconds: float = 10.0, batch: int = 1, timer: Timer | None = None
) -> LatencyModel:
    """Measure each layer together with the operators fused into it, at full and about half of its width.

    Layers of equal geometry are measured once. The rest of the whole network's time is a constant.

    Args:
        graph: the network.
        device: where it runs.
        seconds: time for the measurements; each is repeated at least `FEWEST_ROUNDS` times.
        batch: number of inputs in one call.
        timer: times one call; by default `time_call`.
    """
    device = torch.device(device)
    patches = _patches(graph)
    distinct = {patch.geometry: patch for patch in patches}
    inputs = _inputs(graph.inputs, batch, device)
    parts, examples, sizes = [graph], [inputs], []
    for geometry, patch in distinct.items():
        for outputs, inputs_kept in patch.widths():
            small = patch.narrowed(outputs, inputs_kept)
            parts.append(small)
            examples.append(_inputs(small.inputs, batch * patch.rows, device))
            sizes.append((geometry, small.tensors[patch.layer.weight].numel()))
    runs = _runs(parts, graph, device)
    times = _measure(list(zip(runs, examples, strict=True)), device, seconds, timer or time_call)
    lines, means, typical = {}, dict.fromkeys(distinct, 0.0), np.median(times, axis=0)
    for geometry in distinct:
        columns = [k for k, (key, _) in enumerate(sizes, start=1) if key == geometry]
        lines[geometry] = _line([sizes[k - 1][1] for k in columns], typical[columns])
        means[geometry] = float(times[:, columns[0]].mean())  # the full width comes first
    # A busy machine interrupts whole networks often and single layers seldom, and medians would drop the latter.
    # Means include both, so the layers' share of the time is a ratio of means.
    share = min(1.0, sum(means[patch.geometry] for patch in patches) / float(times[:, 0].mean()))
    found: dict[str, LayerTime] = {}
    for patch in patches:  # several for a weight that several calls share
        name, (fixed, slope) = patch.layer.name, lines[patch.geometry]
        before = found.get(name, LayerTime(0.0, 0.0, patch.layer.shape))
        found[name] = LayerTime(before.fixed + fixed, before.slope + slope, before.shape)
    return _scaled(found, float(typical[0]), share)


def _scaled(layers: Mapping[str, LayerTime], whole: float, share: float) -> LatencyModel:
    """Scale the layers' times so that together they take this share of the whole network's."""
    total = sum(layer.at(layer.shape) for layer in layers.values())
    scale = share * whole / total if total else 1.0
    scaled = {name: LayerTime(scale * layer.fixed, scale * layer.slope, layer.shape) for name, layer in layers.items()}
    return LatencyModel(max(0.0, whole - scale * total), scaled, whole)


def _line(sizes: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Fit fixed and slope, neither negative, with the least sum of squared relative errors."""
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(times, dtype=np.float64)
    a, b = 1 / y, x / y  # fixed * a + slope * b = 1
    determinant = (a @ a) * (b @ b) - (a @ b) ** 2
    if determinant > 1e-9 * (a @ a) * (b @ b):
        fixed = (a.sum() * (b @ b) - b.sum() * (a @ b)) / determinant
        slope = (b.sum() * (a @ a) - a.sum() * (a @ b)) / determinant
        if fixed >= 0 and slope >= 0:
            return float(fixed), float(slope)
        if slope < 0:  # the smaller is not faster: nothing is saved
            return float(a.sum() / (a @ a)), 0.0
    return 0.0, float(b.sum() / (b @ b))


@dataclass(frozen=True)
class _Patch:
    """A call of a layer and the nodes that follow it position by position, cut out of the network.

    Attributes:
        layer: the layer.
        call: the call.
        graph: the patch as a network.
        rows: length of axis 0 for one input of the network: 1, or the number of windows that attention makes.
        geometry: equal for patches that take the same time.
    """

    layer: Layer
    call: Node
    graph: Graph
    rows: int
    geometry: tuple[object, ...]

    def widths(self) -> list[tuple[int, int]]:
        """Return (outputs, inputs) to measure: one number for depthwise layers, all of an image's few colours."""
        n_out, n_in = self.layer.outputs, self.layer.inputs // self.layer.groups
        if self.layer.groups > 1:
            fewer = n_out // self.layer.groups * _half(self.layer.groups)
            return list(dict.fromkeys([(n_out, n_in), (fewer, n_in)]))
        return list(dict.fromkeys(itertools.product((n_out, _half(n_out)), (n_in, _half(n_in) if n_in >= 8 else n_in))))

    def narrowed(self, outputs: int, inputs: int) -> Graph:
        """Keep the first of the patch's output channels, and of the input channels of each group."""
        n_out = self.layer.outputs
        groups = self.layer.groups * outputs // n_out if self.layer.groups > 1 else 1
        tensors = {name: t[:outputs] if t.shape[:1] == (n_out,) else t for name, t in self.graph.tensors.items()}
        sizes = (inputs * groups, outputs // groups) if self.layer.is_transposed else (outputs, inputs)
        tensors[self.layer.weight] = self.graph.tensors[self.layer.weight][: sizes[0], : sizes[1]].contiguous()
        source, *others = self.graph.inputs
        axis = 0 if self.layer.axis == 1 else -1  # of shapes without the batch
        specs = [_resized(source, axis, inputs * groups), *(_resized(other, axis, outputs) for other in others)]
        small = Graph(tuple(specs), tensors, self.graph.nodes, self.graph.outputs)
        if groups == self.layer.groups:
            return small
        return small.with_nodes({self.call.name: self.call.with_arguments({6: groups})})


def _half(width: int) -> int:
    """Return about half, on the multiples of 8 that pruning keeps where the width allows it."""
    return -(-width // 16) * 8 if width >= 16 else -(-width // 2)


def _resized(spec: InputSpec, axis: int, width: int) -> InputSpec:
    shape = list(spec.shape)
    shape[axis] = width
    return replace(spec, shape=tuple(shape))


def _patches(graph: Graph) -> list[_Patch]:
    """Cut out the patches of the layers that can be narrowed; a node belongs to the first one that reaches it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in graph.tensors.items()}
    shapes |= {i.name: (1, *i.shape) for i in graph.inputs} | value_shapes(graph)
    users, taken, found = graph.users(), set[str](), []
    for layer, call in ((one, call) for one in find_layers(graph) for call in one.calls):
        if layer.is_embedding or layer.is_recurrent:
            continue
        nodes, specs = _follow(graph, users, shapes, layer, call, taken)
        taken.update(node.name for node in nodes)
        tensors = {name: graph.tensors[name] for node in nodes for name in node.refs() if name in graph.tensors}
        patch = Graph(tuple(specs), tensors, tuple(_computed(nodes, specs[1:])), (nodes[-1].name,))
        rows = shapes[specs[0].name][0]
        geometry = (
            layer.shape,
            call.window,
            layer.bias is None,
            rows,
            tuple(node.op for node in nodes),
            tuple((spec.shape, spec.dtype) for spec in specs),
        )
        found.append(_Patch(layer, call.node, patch, rows, geometry))
    return found


def _follow(
    graph: Graph,
    users: Mapping[str, list[Node]],
    shapes: Mapping[str, tuple[int, ...]],
    layer: Layer,
    call: Call,
    taken: set[str],
) -> tuple[list[Node], list[InputSpec]]:
    """Follow a layer's output through batch norms, activations and additions, each the only reader of the last."""
    dtype = str(graph.tensors[layer.weight].dtype).removeprefix("torch.")
    source = call.node.args[0].name
    nodes, specs = [call.node], [InputSpec(source, shapes[source][1:], dtype)]
    while len(readers := users.get(nodes[-1].name, [])) == 1 and nodes[-1].name not in graph.outputs:
        node = readers[0]
        if node.op == "aten.add.Tensor" and node.name not in taken and all(isinstance(a, Ref) for a in node.args):
            other = next(ref.name for ref in node.args if ref.name != nodes[-1].name)
            if shapes.get(other) != shapes[node.name] or other in {spec.name for spec in specs}:
                break
            specs.append(InputSpec(other, shapes[other][1:], dtype))
        elif is_inference_norm(node):
            if not is_convolution(call.node) and len(shapes[node.name]) != 2:
                break  # it normalises axis 1, which holds positions
        elif node.op not in _EPILOGUES:
            break
        nodes.append(node)
    return nodes, specs


def _computed(nodes: Sequence[Node], others: Sequence[InputSpec]) -> list[Node]:
    """Let a node make each other summand, as a view of itself: fusion takes no input of the network for a summand."""
    names = {spec.name: f"{spec.name}.summand" for spec in others}
    views = [
        Node(view, "aten.expand.default", (Ref(spec.name), [-1] * (len(spec.shape) + 1)))
        for spec, view in zip(others, names.values(), strict=True)
    ]
    first, *rest = nodes
    renamed = [Node(n.name, n.op, map_refs(n.args, lambda name: Ref(names.get(name, name))), n.kwargs) for n in rest]
    return [first, *views, *renamed]


def _runs(graphs: Sequence[Graph], served: Graph, device: torch.device) -> list[Run]:
    """Build all graphs in the engine that would serve one of them; with the own runtime where it does not take all."""
    engine = serving_engine(served, device)
    try:
        return [run_in(engine, graph, device) for graph in graphs]
    except Exception:  # whatever an engine raises; the own runtime takes every network
        return [run_in(OWN, graph, device) for graph in graphs]


def _measure(
    programs: Sequence[tuple[Run, Sequence[Tensor]]], device: torch.device, seconds: float, timer: Timer
) -> NDArray[np.float64]:
    """Return the seconds of each run with its inputs, (rounds, programs).

    A round of warm-up comes first and counts towards ``seconds``.
    """
    runs = [functools.partial(timer, program, inputs, device) for program, inputs in programs]
    deadline, found = time.perf_counter() + seconds, []
    with torch.inference_mode():
        for row in rounds(runs):
            found.append(row)
            late = time.perf_counter() >= deadline or len(found) > MOST_ROUNDS
            if late and len(found) > FEWEST_ROUNDS:
                break
    return np.array(found[1:])


def time_call(program: Run, inputs: Sequence[Tensor], device: torch.device) -> float:
    """Return the seconds of one call; on a GPU the mean of several between two synchronisations."""
    if device.type != "cuda":
        start = time.perf_counter()
        program(*inputs)
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(GPU_CALLS):
        program(*inputs)
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / GPU_CALLS


def _inputs(specs: Sequence[InputSpec], batch: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [random_tensor((batch, *spec.shape), getattr(torch, spec.dtype), device, generator) for spec in specs]
