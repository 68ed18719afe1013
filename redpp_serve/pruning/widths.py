"""How many channels of each channel set to keep: least error for each operation, or second, that is saved.

The error curves of `selection` say how the error of a channel set grows as it loses channels. A few measurements of
the whole network, with one set narrowed at a time, say how much of it reaches the outputs. Squared errors of several
sets add up. Starting from the whole network, each step takes channels where they add the least error for what they
save, so every prefix of the steps is a point of the frontier of error against cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from redpp_serve.channels.coupling import ChannelSet, Coupling, Part, Reader
from redpp_serve.graph.layers import find_layers, find_products, mac_count, value_and_tensor_shapes, weighted_axes
from redpp_serve.pruning.fit import quick_fit
from redpp_serve.pruning.judge import squared_error
from redpp_serve.pruning.observation import Observed, Selection
from redpp_serve.pruning.piecewise import Piecewise, chunk_size

Shapes = Mapping[str, tuple[int, ...]]  # the shapes of layers' weights by layer name
Cost = Callable[[Shapes], float]  # a sum over the layers named, up to a constant

SHARES = (0.75, 0.5, 0.25)  # shares of a set's channels at which the network is measured
LEAST_SHARE = 0.125  # the share of its channels that a set keeps, unless the outputs hardly need it
_HARDLY = 1e-6  # squared relative error of the outputs at the least of SHARES
_PROBE_MACS = 3e11  # limit on the cost of all measurements together
_FEWEST_PROBES, _MOST_PROBES = 5, 40
_NO_CURVE = 1e-7  # noise floor added to predicted errors, which may be zero where the measured one is not
_SEARCH_ROUNDS = 6


@dataclass(frozen=True)
class PathPoint:
    """One network on the way from the whole one to the narrowest.

    Attributes:
        widths: the number of channels of each set that may change.
        cost: in the unit of the path.
        predicted: predicted output error, relative.
    """

    widths: Mapping[str, int]
    cost: float
    predicted: float


@dataclass(frozen=True)
class NarrowingPath:
    """Networks from the whole one to the narrowest; ``left`` names the sets that stay whole, with the reason."""

    points: tuple[PathPoint, ...]
    left: Mapping[str, str]

    def within(self, cost: float) -> int:
        """Return the index of the first point of at most that cost; the last one if there is none."""
        return next((k for k, point in enumerate(self.points) if point.cost <= cost), len(self.points) - 1)

    def last_below(self, error: float, factor: float = 1.0) -> int:
        """Return the index of the last point before the predicted error, times a factor, exceeds ``error``."""
        beyond = (k for k, point in enumerate(self.points) if point.predicted * factor > error)
        return next(beyond, len(self.points)) - 1


class ShapeModel:
    """The shapes of all layers' weights as functions of the channel sets' widths; those of products too.

    The shape of a product has the axes whose sizes it multiplies; its name is that of the call and a number. A layer
    that mixes positions, and so costs less where channels leave, counts its cost as a product.

    Attributes:
        full: shapes of the whole network's weights and products by name.
        channels: number of channels of each open set.
        touched: names of the layers and products that each open set shapes.
    """

    def __init__(self, coupling: Coupling) -> None:
        layers = find_layers(coupling.graph)
        self.full: dict[str, tuple[int, ...]] = {layer.name: layer.shape for layer in layers}
        named = {layer.weight: layer.name for layer in layers}
        self.channels = {channel_set.name: channel_set.channels for channel_set in coupling.open}
        self._positions = {layer.name: layer.positions for layer in layers}
        self._entries: dict[str, list[tuple[str, int, int]]] = {name: [] for name in self.full}
        self.touched: dict[str, set[str]] = {}
        for channel_set in coupling.open:
            places = {(x.tensor, x.dim): x.positions.shape[1] for x in _places(channel_set)}
            for (tensor, dim), entries in places.items():
                if tensor in named:
                    self._entries[named[tensor]].append((channel_set.name, dim, entries))
            self.touched[channel_set.name] = {named[tensor] for tensor, _ in places if tensor in named}
        sizes = value_and_tensor_shapes(coupling.graph)
        for product in find_products(coupling.graph):
            for k, term in enumerate(product.terms):
                self._add(coupling, sizes, f"{product.node.name}#{k}", term)
        for layer in layers:
            for call in layer.calls if layer.macs and not layer.is_recurrent else ():
                axes = weighted_axes(call.node, sizes)
                if any(coupling.entries(value, axis) for value, axis in axes[: -len(layer.shape)]):
                    self._positions[layer.name] -= call.positions
                    self._add(coupling, sizes, f"{call.node.name}#", axes)

    def _add(self, coupling: Coupling, sizes: Shapes, name: str, term: Sequence[tuple[str, int]]) -> None:
        """Add what costs the product of the sizes of these axes."""
        self.full[name] = tuple(sizes[value][axis] for value, axis in term)
        self._positions[name], self._entries[name] = 1, []
        for dim, (value, axis) in enumerate(term):
            for channel_set, entries in coupling.entries(value, axis).items():
                self._entries[name].append((channel_set, dim, entries))
                self.touched[channel_set].add(name)

    def shape(self, layer: str, widths: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of one layer or product; sets that ``widths`` does not name are whole."""
        shape = list(self.full[layer])
        for name, dim, entries in self._entries[layer]:
            shape[dim] -= entries * (self.channels[name] - widths.get(name, self.channels[name]))
        return tuple(shape)

    def shapes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all layers and products by name."""
        return {layer: self.shape(layer, widths) for layer in self.full}

    def touched_macs(self) -> int:
        """Return the multiply-accumulates of the whole network's layers and products that some open set shapes."""
        touched = set[str]().union(*self.touched.values())
        return self.macs({name: shape for name, shape in self.full.items() if name in touched})

    def macs(self, shapes: Shapes) -> int:
        """Return the multiply-accumulates of the layers and products named, for one input."""
        return sum(self._positions[name] * math.prod(shape) for name, shape in shapes.items())


def _places(channel_set: ChannelSet) -> list[Part | Reader]:
    return [*channel_set.parts, *channel_set.readers]


def unit(channel_set: ChannelSet, round_to: int) -> int:
    """Return the step of a set's widths, in channels, that makes its layers' widths multiples of ``round_to``."""
    entries = max(part.positions.shape[1] for part in channel_set.parts)
    return round_to // math.gcd(round_to, entries)


def uniform(sets: Sequence[ChannelSet], share: float, round_to: int) -> dict[str, int]:
    """Return widths that keep the same share of every set, rounded up."""
    widths = {}
    for channel_set in sets:
        step = unit(channel_set, round_to)
        widths[channel_set.name] = min(channel_set.channels, _up(max(1, round(share * channel_set.channels)), step))
    return widths


def _up(width: int, step: int) -> int:
    return -(-width // step) * step


def measure_errors(
    observed: Observed,
    selections: Mapping[str, Selection],
    inputs: Sequence[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
    probe_macs: float = _PROBE_MACS,
) -> dict[str, Tensor]:
    """Narrow one set at a time, with a quick fit, and measure what reaches the outputs.

    Args:
        observed: statistics from inputs other than these.
        selections: the order in which each set gives up its channels.
        inputs: (images, ...) for each network input; a big network uses the first few.
        progress: called with sets done and in all.
        probe_macs: limit on the multiply-accumulates of all measurements together.

    Returns:
        The squared relative error of the outputs at each width, (channels + 1,) float64 for each open set: measured
        at `SHARES`, and between them in the form of the set's error curve; falling, and 0 at full width.
    """
    coupling = observed.coupling
    graph, sets = coupling.graph, coupling.open
    probes = max(len(sets) * len(SHARES) * mac_count(graph), 1)
    inputs = [x[: min(_MOST_PROBES, max(_FEWEST_PROBES, int(probe_macs // probes)))] for x in inputs]
    run = Piecewise(graph, inputs, chunk_size(graph, len(inputs[0])))
    expected = list(run.outputs())
    first = _first_nodes(coupling)
    found = {}
    for done, channel_set in enumerate(sorted(sets, key=lambda c: first[c.name])):
        run.use(graph)
        run.advance(first[channel_set.name])
        selection, errors = selections[channel_set.name], {}
        for width in sorted({max(1, round(share * channel_set.channels)) for share in SHARES} - {channel_set.channels}):
            run.use(quick_fit(observed, {channel_set.name: selection.kept(width)}))
            errors[width] = squared_error(zip(expected, run.outputs(), strict=True))
        found[channel_set.name] = scaled_curve(selection.curve, errors)
        progress(done + 1, len(sets))
    return found


def _first_nodes(coupling: Coupling) -> dict[str, int]:
    """Return for each open set the position of the first node that its narrowing changes."""
    used: dict[str, int] = {}
    for k, node in enumerate(coupling.graph.nodes):
        for name in node.refs():
            used.setdefault(name, k)
    return {c.name: min(used[x.tensor] for x in _places(c)) for c in coupling.open}


def scaled_curve(curve: Tensor, measured: Mapping[int, float]) -> Tensor:
    """Scale an error curve (channels + 1,) to the errors measured at some widths.

    The logarithm of the factor is linear between these widths and constant outside.
    """
    at = sorted(measured)
    channels = len(curve) - 1
    curve = curve + _NO_CURVE
    factors = torch.tensor([max(measured[k], 1e-300) / float(curve[k]) for k in at], dtype=torch.float64).log()
    widths = torch.arange(channels + 1, dtype=torch.float64)
    logs = torch.full_like(widths, float(factors[0]))
    for k, (low, high) in enumerate(itertools.pairwise(at)):
        share = ((widths - low) / (high - low)).clamp(0, 1)
        logs = torch.where(widths > low, factors[k] + share * (factors[k + 1] - factors[k]), logs)
    errors = curve * logs.exp()
    errors[channels] = 0.0
    return errors.flip(0).cummax(0).values.flip(0)


def narrowing_path(
    coupling: Coupling,
    errors: Mapping[str, Tensor],
    round_to: int,
    cost: Cost | None = None,
    shapes: ShapeModel | None = None,
) -> NarrowingPath:
    """Walk from the whole network to the narrowest; each step adds the least squared error for what it saves.

    Args:
        coupling: the network and its channel sets.
        errors: the squared relative error at each width for each open set, from `measure_errors`.
        round_to: widths of layers are multiples of this; a set of less than two such steps stays.
        cost: a sum over the layers in the shapes given, up to a constant; by default multiply-accumulates.
        shapes: the model of the coupling's shapes, if there is one already.
    """
    shapes = shapes or ShapeModel(coupling)
    cost = cost or shapes.macs
    left: dict[str, str] = {}
    choices: dict[str, list[int]] = {}
    for channel_set in coupling.open:
        step = unit(channel_set, round_to)
        if channel_set.channels < 2 * step:
            left[channel_set.name] = f"{channel_set.channels} channels are fewer than two steps of {step}"
            continue
        quarter = float(errors[channel_set.name][max(1, round(min(SHARES) * channel_set.channels))])
        lowest = _up(1 if quarter < _HARDLY else math.ceil(LEAST_SHARE * channel_set.channels), step)
        choices[channel_set.name] = list(range((channel_set.channels - 1) // step * step, lowest - 1, -step))
    widths = {name: shapes.channels[name] for name in choices}
    best: dict[str, tuple[float, int]] = {}
    points = [PathPoint(dict(widths), cost(shapes.shapes(widths)), 0.0)]
    stale = set(choices)
    while True:
        for name in stale:
            best[name] = _best_step(name, choices[name], errors[name], widths, shapes, cost)
        name = min(best, key=lambda n: (best[n][0], n), default="")
        if not name or math.isinf(best[name][0]):
            return NarrowingPath(tuple(points), left)
        widths[name] = best[name][1]
        choices[name] = [k for k in choices[name] if k < widths[name]]
        total = sum(float(errors[n][k]) for n, k in widths.items())
        points.append(PathPoint(dict(widths), cost(shapes.shapes(widths)), math.sqrt(total)))
        stale = {n for n in choices if shapes.touched[n] & shapes.touched[name]}


def _best_step(
    name: str, choices: Sequence[int], errors: Tensor, widths: Mapping[str, int], shapes: ShapeModel, cost: Cost
) -> tuple[float, int]:
    """Return the least error added for each unit of cost saved, and its width; infinite where nothing is saved."""
    layers = shapes.touched[name]
    now = cost({layer: shapes.shape(layer, widths) for layer in layers})
    best = (math.inf, widths[name])
    for width in choices:
        then = cost({layer: shapes.shape(layer, {**widths, name: width}) for layer in layers})
        if then < now:
            best = min(best, (float(errors[width] - errors[widths[name]]) / (now - then), width))
    return best


def search_error(
    path: NarrowingPath, measure: Callable[[PathPoint], float], limit: float, rounds: int = _SEARCH_ROUNDS
) -> int:
    """Find the cheapest point whose measured error stays within a limit, by bisection.

    Args:
        path: networks of rising error.
        measure: builds a point's network and measures its relative error on held-out inputs.
        limit: the largest relative error.
        rounds: how many networks to build at most.

    Returns:
        The index of the point; 0, the whole network, if none is within the limit.
    """
    low, high = 0, len(path.points)
    guess = path.last_below(limit)
    for _ in range(rounds):
        if high - low <= 1:
            break
        guess = min(max(guess, low + 1), high - 1)
        point = path.points[guess]
        error = measure(point)
        low, high = (guess, high) if error <= limit else (low, guess)
        # The predicted errors may be off by the factor that they were off by just now.
        guess = path.last_below(limit, error / max(point.predicted, 1e-300))
        if not low < guess < high:
            guess = (low + high) // 2
    return low
