"""The choice of widths: how wide each channel set stays, the fitted network, and the frontier around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.coupling import Coupling
from redpp_serve.channels.narrowing import Kept
from redpp_serve.errors import GateFailed
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import mac_count
from redpp_serve.options import Options
from redpp_serve.pruning.effort import Effort
from redpp_serve.pruning.fit import Fitting, Reconstruction, quick_fit, reconstruct, then
from redpp_serve.pruning.latency import layer_model, paired_latency
from redpp_serve.pruning.observation import observe, select
from redpp_serve.pruning.repair import repair_batch_norm
from redpp_serve.pruning.verification import Reference
from redpp_serve.pruning.widths import (
    NarrowingPath,
    PathPoint,
    ShapeModel,
    measure_errors,
    narrowing_path,
    search_error,
    uniform,
)

FIT_IMAGES = 160  # more inputs hardly change a least-squares fit, and each costs time
_FIT_SHARE = 0.9  # share of the error budget for narrowing; the rest is for the final codebooks
_LATENCY_ROUNDS = 3
_SLACK = 0.005  # a latency is met when the measured ratio is within this of the target
_TOO_CLOSE = 0.02  # of all multiply-accumulates: nearer to the chosen network the frontier shows no other


@dataclass(frozen=True)
class Narrowed:
    """A narrowed and fitted network.

    Attributes:
        graph: the network.
        kept: maps a value's name to the positions that it still has of the original's.
        widths: the number of channels of each set.
        records: what fitting did to each narrowed set.
        seconds: time that it took.
    """

    graph: Graph
    kept: Kept
    widths: Mapping[str, int]
    records: list[Reconstruction]
    seconds: float


@dataclass(frozen=True)
class FrontierPoint:
    """A network that could be had.

    Attributes:
        graph: the network.
        macs: multiply-accumulates for one input.
        error: relative output error on held-out inputs.
        predicted: the error that was predicted, where it was.
        chosen: whether this is the result of the run.
        macs_ratio: ``macs`` as a share of the original's.
        latency_ratio: measured latency as a share of the original's.
        latency_low: lower end of its 95 % interval.
        latency_high: upper end of its 95 % interval.
    """

    graph: Graph
    macs: int
    error: float
    predicted: float | None
    chosen: bool
    macs_ratio: float
    latency_ratio: float = 1.0
    latency_low: float | None = None
    latency_high: float | None = None

    @property
    def flag(self) -> str:
        """The option that gives this network."""
        return f"--target macs={self.macs_ratio + 5e-4:.3f}"

    def to_json(self) -> dict[str, Any]:
        """Return the report's figures."""
        names = ("macs", "macs_ratio", "error", "latency_ratio", "latency_low", "latency_high", "chosen", "flag")
        return {**{name: getattr(self, name) for name in names}, "predicted_error": self.predicted}


@dataclass(frozen=True)
class WidthChoice:
    """What was chosen, why, and what else could have been.

    Attributes:
        narrowed: the chosen network; None where the whole one stays.
        reason: why, in words.
        left: the sets that are too small to narrow, with the reason.
        points: the frontier, the most expensive network first.
        cut_short: whether the time budget ended the search.
    """

    narrowed: Narrowed | None = None
    reason: str = ""
    left: Mapping[str, str] = field(default_factory=dict)
    points: tuple[FrontierPoint, ...] = ()
    cut_short: bool = False


class Narrower:
    """Builds narrowed networks of one coupling from synthetic inputs.

    Args:
        reference: the original network, whose outputs are the target, on held-out inputs.
        coupling: the network to narrow, and its channel sets.
        merged: what ``coupling.graph`` still has of the original's values, where exact merging took some.
        inputs: (images, ...) for each network input, on the device to compute on; the first `FIT_IMAGES` are fitted to.
        progress: called with steps done and in all.
        frozen: weights that stay as they are.
    """

    def __init__(
        self,
        reference: Reference,
        coupling: Coupling,
        merged: Kept,
        inputs: tuple[Tensor, ...],
        progress: Callable[[int, int], None] = lambda done, total: None,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.reference, self.coupling, self.progress = reference, coupling, progress
        self.inputs = tuple(x[:FIT_IMAGES] for x in inputs)
        self._fitting = Fitting(reference.original, coupling, self.inputs, merged, frozen)
        self.observed = observe(coupling, self.inputs, progress)
        self.selections = select(self.observed)
        self._last: Narrowed | None = None

    def set_errors(self) -> dict[str, Tensor]:
        """Return the squared relative output error of each open set at each width; see `measure_errors`."""
        held_out = [x.to(self.inputs[0].device) for x in self.reference.inputs]
        return measure_errors(self.observed, self.selections, held_out, self.progress)

    def kept(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the channels that stay at these widths, for the sets that lose some."""
        full = {channel_set.name: channel_set.channels for channel_set in self.coupling.open}
        return {name: self.selections[name].kept(width) for name, width in widths.items() if width < full[name]}

    def build(self, widths: Mapping[str, int]) -> Narrowed:
        """Narrow, fit the readers, repair the norms; the last network is kept for the next call."""
        if self._last is None or self._last.widths != dict(widths):
            start, kept = time.monotonic(), self.kept(widths)
            places = then(self._fitting.merged, self.coupling.kept(kept))
            graph, records = reconstruct(self._fitting, kept, quick_fit(self.observed, kept), self.progress)
            graph = repair_batch_norm(graph, self.reference.original, self.inputs, places)
            self._last = Narrowed(graph, places, dict(widths), records, time.monotonic() - start)
        return self._last

    def error(self, widths: Mapping[str, int]) -> float:
        """Return the relative output error on held-out inputs of the network with these widths."""
        return self.reference.error(self.build(widths).graph)


def choose(
    narrower: Narrower, options: Options, effort: Effort, deadline: float, frontier_deadline: float
) -> WidthChoice:
    """Pick widths as the options ask, build that network, and measure the frontier.

    Args:
        narrower: builds the networks.
        options: the user's options.
        effort: how much work to spend on latencies and on the frontier.
        deadline: time.monotonic() at which the search for widths ends.
        frontier_deadline: time.monotonic() at which the frontier ends.

    Raises:
        GateFailed: a target that no network on the path reaches.
    """
    coupling, errors = narrower.coupling, narrower.set_errors()
    shapes, cost = ShapeModel(coupling), None
    if options.target_latency is not None:
        cost = layer_model(coupling.graph, options.device, effort.latency_seconds).predict
    path = narrowing_path(coupling, errors, options.round_to, cost, shapes)
    whole = path.points[0].widths
    cut_short = False
    if options.keep is not None:
        widths = uniform([c for c in coupling.open if c.name in whole], options.keep, options.round_to)
        why = f"{options.keep:.0%} of each channel set"
    elif options.target_macs is not None:
        macs = mac_count(narrower.reference.original)
        point = path.points[path.within(options.target_macs * macs)]
        _require("macs", point.cost / macs, options.target_macs, 0.0)
        widths, why = dict(point.widths), f"--target macs={options.target_macs:g}"
    elif options.target_latency is not None:
        widths = _for_latency(path, narrower, options.target_latency, options.device, effort)
        why = f"--target latency={options.target_latency:g}"
    else:
        limit = options.error_budget or 0.0
        tried: list[PathPoint] = []

        def measure(point: PathPoint) -> float:
            nonlocal cut_short
            tried.append(point)
            cut_short = cut_short or time.monotonic() > deadline
            return math.inf if cut_short else narrower.error(point.widths)

        index = search_error(path, measure, _FIT_SHARE * limit)
        if index == 0:
            why = f"no narrower network stays within the error budget of {limit:g}"
            return WidthChoice(None, why, path.left, cut_short=cut_short)
        widths, why = dict(path.points[index].widths), f"error budget {limit:g}, {len(tried)} networks built"
    if all(width == whole.get(name, width) for name, width in widths.items()):
        return WidthChoice(None, f"{why}: nothing is narrowed", path.left, cut_short=cut_short)
    chosen = narrower.build(widths)
    points = _frontier(path, narrower, chosen, effort.frontier_points, frontier_deadline)
    return WidthChoice(chosen, why, path.left, points, cut_short)


def _require(what: str, reached: float, wanted: float, slack: float) -> None:
    if reached > wanted + slack:
        raise GateFailed(
            f"--target {what}={wanted:g} cannot be reached: the narrowest network still has {reached:.3f} of it",
            f"a share of at least {reached:.3f}",
            f"raise the target, e.g. --target {what}={reached + 0.005:.2f}, "
            "or give it more to take: a smaller --round-to, fewer --exclude (see inspect --channels)",
        )


def _for_latency(path: NarrowingPath, narrower: Narrower, wanted: float, device: str, effort: Effort) -> dict[str, int]:
    """Find widths whose network measurably takes the wanted share of the original's time; the model only guesses."""

    def measured(index: int) -> float:
        narrow = narrower.coupling.narrow(narrower.kept(path.points[index].widths))
        return paired_latency([narrower.reference.original, narrow], 1, device, effort.latency_seconds / 2)[1].ratio

    low, high = 0, len(path.points) - 1
    guess = path.within(wanted * path.points[0].cost)
    for _ in range(_LATENCY_ROUNDS):
        if measured(guess) <= wanted + _SLACK:
            high = guess
        else:
            low = guess
        if high - low <= 1:
            break
        guess = (low + high) // 2
    _require("latency", measured(high), wanted, 0.02)
    return dict(path.points[high].widths)


def _frontier(
    path: NarrowingPath, narrower: Narrower, chosen: Narrowed, count: int, deadline: float
) -> tuple[FrontierPoint, ...]:
    """Pick points over the whole range; their networks are fitted as the chosen one was, while the time lasts."""
    reference, shapes = narrower.reference, ShapeModel(narrower.coupling)
    macs = mac_count(reference.original)
    costs = [shapes.macs(shapes.shapes(point.widths)) for point in path.points]
    wanted = torch.linspace(costs[0], costs[-1], count).tolist()
    picked = sorted({min(range(len(costs)), key=lambda k: abs(costs[k] - at)) for at in wanted})
    own = shapes.macs(shapes.shapes(chosen.widths))
    found = []
    for index in picked:
        point, cost = path.points[index], costs[index]
        if point.widths == chosen.widths or (index and abs(cost - own) < _TOO_CLOSE * macs):
            continue
        if not index:
            graph, error = reference.original, 0.0
        elif time.monotonic() + chosen.seconds < deadline:
            graph = narrower.build(point.widths).graph
            error = reference.error(graph)
        else:
            continue
        found.append(FrontierPoint(graph, cost, error, point.predicted, False, cost / macs))
    known = next((point.predicted for point in path.points if point.widths == chosen.widths), None)
    found.append(FrontierPoint(chosen.graph, own, reference.error(chosen.graph), known, True, own / macs))
    return tuple(sorted(found, key=lambda point: -point.macs))


def frontier_record(
    points: Sequence[FrontierPoint], original: Graph, device: str, machine: str, seconds: float
) -> dict[str, Any]:
    """Return the frontier for the report, its networks' latencies measured in turns against the original's."""
    if not points:
        return {}
    narrow = [point.graph for point in points if point.graph is not original]
    times = iter(paired_latency([original, *narrow], 1, device, seconds)[1:])

    def timed(point: FrontierPoint) -> FrontierPoint:
        if point.graph is original:
            return point
        t = next(times)
        return replace(point, latency_ratio=t.ratio, latency_low=t.low, latency_high=t.high)

    return {
        "latency_on": f"{machine}, {torch.get_num_threads()} threads, batch 1, the server's runtime",
        "points": [timed(point).to_json() for point in points],
    }
