"""How many channels of each channel set to keep: least error for each operation, or second, that is saved.

The error curves of `selection` say how the error of a channel set grows as it loses channels; a few measurements of the
whole network, one channel set narrowed at a time, say how much of it reaches the outputs. Squared errors of several sets
add up. From the whole network on, each step takes channels where they add the least error for what they save, so
every prefix of the steps is a point of the frontier of error against cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redpp_serve.channels.coupling import ChannelSet, Coupling
from redpp_serve.graph.layers import find_layers, mac_count
from redpp_serve.pruning.fit import quick_fit
from redpp_serve.pruning.observation import Observed
from redpp_serve.pruning.piecewise import Piecewise, chunk_size
from redpp_serve.pruning.selection import Selection
from redpp_serve.pruning.verification import squared_error

Shapes = Mapping[str, tuple[int, ...]]  # of layers' weights by layer name
Cost = Callable[[Shapes], float]  # a sum over the layers named, up to a constant

SHARES = (0.75, 0.5, 0.25)  # of a channel set's channels, at which the network is measured
LEAST_SHARE = 0.125  # of its channels that a channel set keeps, unless the outputs hardly need it
_HARDLY = 1e-6  # squared relative error of the outputs at the least of SHARES
_PROBE_MACS = 2e12  # what all measurements together may cost
_FEWEST_PROBES = 4
_NO_CURVE = 1e-7  # added to predicted errors: what is measured where nothing is predicted


@dataclass(frozen=True)
class Point:
    """One network of the frontier: the width of each channel set that may change, its cost, and its error relative to the
    outputs, predicted and, where the network was built, measured on held-out inputs.
    """

    widths: Mapping[str, int]
    cost: float
    predicted: float
    measured: float | None = None


@dataclass(frozen=True)
class Plan:
    """Points from the whole network to the narrowest; ``left`` names the sets that stay, with the reason."""

    points: tuple[Point, ...]
    left: Mapping[str, str]

    def within(self, cost: float) -> int:
        """Index of the first point of at most that cost; the last one if there is none."""
        return next((k for k, point in enumerate(self.points) if point.cost <= cost), len(self.points) - 1)


class ShapeModel:
    """The shapes of all layers' weights as functions of the sets' widths."""

    def __init__(self, coupling: Coupling) -> None:
        layers = find_layers(coupling.graph)
        self.full = {layer.name: layer.shape for layer in layers}
        self._positions = {layer.name: layer.positions for layer in layers}
        named = {layer.weight: layer.name for layer in layers}
        self.channels = {channel_set.name: channel_set.channels for channel_set in coupling.open}
        self._entries: dict[str, list[tuple[str, int, int]]] = {name: [] for name in self.full}
        self.touched: dict[str, set[str]] = {}
        for channel_set in coupling.open:
            places = {(x.tensor, x.dim): x.positions.shape[1] for x in (*channel_set.parts, *channel_set.readers)}
            for (tensor, dim), entries in places.items():
                if tensor in named:
                    self._entries[named[tensor]].append((channel_set.name, dim, entries))
            self.touched[channel_set.name] = {named[tensor] for tensor, _ in places if tensor in named}

    def shape(self, layer: str, widths: Mapping[str, int]) -> tuple[int, ...]:
        """One layer's shape; sets that ``widths`` does not name are whole."""
        shape = list(self.full[layer])
        for channel_set, dim, entries in self._entries[layer]:
            shape[dim] -= entries * (self.channels[channel_set] - widths.get(channel_set, self.channels[channel_set]))
        return tuple(shape)

    def shapes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        return {layer: self.shape(layer, widths) for layer in self.full}

    def macs(self, shapes: Shapes) -> int:
        """Multiply-accumulates of the layers named, for one input."""
        return sum(self._positions[name] * math.prod(shape) for name, shape in shapes.items())


def unit(channel_set: ChannelSet, round_to: int) -> int:
    """The step of a channel set's widths, in channels, such that its layers' widths are multiples of ``round_to``."""
    entries = max(part.positions.shape[1] for part in channel_set.parts)
    return round_to // math.gcd(round_to, entries)


def uniform(sets: Sequence[ChannelSet], share: float, round_to: int) -> dict[str, int]:
    """The same share of every channel set, rounded up."""
    widths = {}
    for channel_set in sets:
        step = unit(channel_set, round_to)
        widths[channel_set.name] = min(
            channel_set.channels, -(-max(1, round(share * channel_set.channels)) // step) * step
        )
    return widths


def measure_errors(
    observed: Observed,
    selections: Mapping[str, Selection],
    inputs: Sequence[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Narrow one channel set at a time, with a quick fit, and measure what reaches the outputs.

    Args:
        observed: from inputs other than these.
        inputs: (images, ...) for each network input; a big network uses the first few.

    Returns:
        for each open channel set (channels + 1,) float64: the squared relative error of the outputs at each width, measured
        at `SHARES` and between them in the form of the channel set's error curve; falling, and 0 at full width.
    """
    coupling = observed.coupling
    graph, sets = coupling.graph, coupling.open
    probes = max(len(sets) * len(SHARES) * mac_count(graph), 1)
    inputs = [x[: max(_FEWEST_PROBES, int(_PROBE_MACS // probes))] for x in inputs]
    run = Piecewise(graph, inputs, chunk_size(graph, len(inputs[0])))
    expected = list(run.outputs())
    first = _first_nodes(coupling)
    found = {}
    for done, channel_set in enumerate(sorted(sets, key=lambda c: first[c.name])):
        run.use(graph)
        run.advance(first[channel_set.name])
        errors = {}
        for width in sorted({max(1, round(share * channel_set.channels)) for share in SHARES} - {channel_set.channels}):
            run.use(quick_fit(observed, {channel_set.name: selections[channel_set.name].kept(width)}))
            errors[width] = squared_error(zip(expected, run.outputs()))
        found[channel_set.name] = scaled_curve(selections[channel_set.name].curve, errors)
        progress(done + 1, len(sets))
    return found


def scaled_curve(curve: Tensor, measured: Mapping[int, float]) -> Tensor:
    """An error curve (channels + 1,) scaled to the errors measured at some widths: the logarithm of the factor is
    linear between them and constant outside.
    """
    at = sorted(measured)
    channels = len(curve) - 1
    curve = curve + _NO_CURVE
    factors = torch.tensor([max(measured[k], 1e-300) / float(curve[k]) for k in at], dtype=torch.float64).log()
    widths = torch.arange(channels + 1, dtype=torch.float64)
    logs = torch.full_like(widths, float(factors[0]))
    for k, (low, high) in enumerate(zip(at, at[1:])):
        share = ((widths - low) / (high - low)).clamp(0, 1)
        logs = torch.where(widths > low, factors[k] + share * (factors[k + 1] - factors[k]), logs)
    errors = curve * logs.exp()
    errors[channels] = 0.0
    return errors.flip(0).cummax(0).values.flip(0)


def plan_widths(
    coupling: Coupling,
    errors: Mapping[str, Tensor],
    round_to: int,
    cost: Cost | None = None,
    shapes: ShapeModel | None = None,
) -> Plan:
    """Steps from the whole network to the narrowest, each the one that adds the least squared error for what it saves.

    Args:
        coupling: the sets.
        errors: for each open channel set the squared relative error at each width, from `measure_errors`.
        round_to: widths of layers are multiples of this; a channel set of less than two such steps stays.
        cost: a sum over the layers in the shapes given, up to a constant; by default multiply-accumulates.
    """
    shapes = shapes or ShapeModel(coupling)
    cost = cost or shapes.macs
    left, choices = {}, {}
    for channel_set in coupling.open:
        step = unit(channel_set, round_to)
        if channel_set.channels < 2 * step:
            left[channel_set.name] = f"{channel_set.channels} channels are fewer than two steps of {step}"
            continue
        quarter = float(errors[channel_set.name][max(1, round(min(SHARES) * channel_set.channels))])
        least = 1 if quarter < _HARDLY else math.ceil(LEAST_SHARE * channel_set.channels)
        lowest = -(-least // step) * step
        choices[channel_set.name] = [
            k for k in range((channel_set.channels - 1) // step * step, 0, -step) if k >= lowest
        ]
    widths = {name: shapes.channels[name] for name in choices}
    best: dict[str, tuple[float, int]] = {}
    points = [Point(dict(widths), cost(shapes.shapes(widths)), 0.0)]
    stale = set(choices)
    while True:
        for name in stale:
            best[name] = _best_step(name, choices[name], errors[name], widths, shapes, cost)
        name = min(best, key=lambda n: (best[n][0], n), default=None)
        if name is None or math.isinf(best[name][0]):
            return Plan(tuple(points), left)
        widths[name] = best[name][1]
        choices[name] = [k for k in choices[name] if k < widths[name]]
        total = sum(float(errors[n][k]) for n, k in widths.items())
        points.append(Point(dict(widths), cost(shapes.shapes(widths)), math.sqrt(total)))
        stale = {n for n in choices if shapes.touched[n] & shapes.touched[name]}


def _best_step(
    name: str, choices: Sequence[int], errors: Tensor, widths: Mapping[str, int], shapes: ShapeModel, cost: Cost
) -> tuple[float, int]:
    """Error added for each unit of cost saved, and the width that makes it least; infinite where nothing is saved."""
    layers = shapes.touched[name]
    now = cost({layer: shapes.shape(layer, widths) for layer in layers})
    best = (math.inf, widths[name])
    for width in choices:
        then = cost({layer: shapes.shape(layer, {**widths, name: width}) for layer in layers})
        if then < now:
            best = min(best, (float(errors[width] - errors[widths[name]]) / (now - then), width))
    return best


def search_error(
    plan: Plan, measure: Callable[[Point], float], limit: float, rounds: int = 6
) -> tuple[int, dict[int, float]]:
    """The cheapest point whose measured error stays within ``limit``, by bisection.

    Args:
        measure: builds a point's network and measures its relative error on held-out inputs.
        limit: of the relative error.
        rounds: how many networks to build at most.

    Returns:
        index of the point (0, the whole network, if none is within), and the errors measured by index.
    """
    measured: dict[int, float] = {}
    low, high = 0, len(plan.points)
    guess = next((k for k, point in enumerate(plan.points) if point.predicted > limit), len(plan.points)) - 1
    while len(measured) < rounds and high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        measured[guess] = measure(plan.points[guess])
        if measured[guess] <= limit:
            low = guess
        else:
            high = guess
        guess = _next_guess(plan, measured, limit, low, high)
    return low, measured


def _next_guess(plan: Plan, measured: Mapping[int, float], limit: float, low: int, high: int) -> int:
    """Where the limit lies if the predicted errors are off by a factor, as they were for the last network built."""
    last = next(reversed(measured))
    factor = measured[last] / max(plan.points[last].predicted, 1e-300)
    guess = next((k for k, point in enumerate(plan.points) if point.predicted * factor > limit), len(plan.points)) - 1
    return guess if low < guess < high else (low + high) // 2


def with_measured(plan: Plan, measured: Mapping[int, float]) -> Plan:
    """The plan with the errors of networks that were built."""
    points = [replace(point, measured=measured.get(k)) for k, point in enumerate(plan.points)]
    return replace(plan, points=tuple(points))


def _first_nodes(coupling: Coupling) -> dict[str, int]:
    """For each open channel set the position of the first node that its narrowing changes."""
    first: dict[str, int] = {}
    used: dict[str, int] = {}
    for k, node in enumerate(coupling.graph.nodes):
        for name in node.refs():
            used.setdefault(name, k)
    for channel_set in coupling.open:
        first[channel_set.name] = min(used[x.tensor] for x in (*channel_set.parts, *channel_set.readers))
    return first
