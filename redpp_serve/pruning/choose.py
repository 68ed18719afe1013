"""The lossy part of a run: how wide each channel set stays, the narrowed and fitted network, and the frontier around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.coupling import Coupling
from redpp_serve.channels.narrowing import Kept
from redpp_serve.errors import GateFailed
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import mac_count
from redpp_serve.options import Options
from redpp_serve.pruning.fit import Fitting, Reconstruction, quick_fit, reconstruct, then
from redpp_serve.pruning.latency import Latency, layer_model, paired_latency
from redpp_serve.pruning.observation import observe
from redpp_serve.pruning.repair import repair_batch_norm
from redpp_serve.pruning.selection import select
from redpp_serve.pruning.verification import compare_outputs
from redpp_serve.pruning.widths import Plan, Point, ShapeModel, measure_errors, plan_widths, search_error, uniform

FIT_IMAGES = 160  # of the inputs: more of them hardly change a least-squares fit, which costs time for each
_FIT_SHARE = 0.9  # of the error budget, for narrowing; the rest is for the final codebooks
_FRONTIER_POINTS = 8
_LATENCY_SECONDS = 8.0  # for each measurement of a set of networks
_LATENCY_ROUNDS = 3
_SLACK = 0.005  # a latency is met when the measured ratio is within this of the target

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Narrowed:
    """A narrowed and fitted network; ``places`` maps a value's name to what it still has of the original's."""

    graph: Graph
    places: Kept
    widths: Mapping[str, int]
    records: list[Reconstruction]
    seconds: float = 0.0


@dataclass(frozen=True)
class FrontierPoint:
    """A network that could be had, ``macs`` for one input, errors relative on held-out inputs, and its flag."""

    macs: int
    error: float | None
    predicted: float | None
    graph: Graph
    chosen: bool
    flag: str


@dataclass
class Choice:
    """What was chosen, why, and what else could have been."""

    narrowed: Narrowed | None
    reason: str
    left: Mapping[str, str] = field(default_factory=dict)
    points: list[FrontierPoint] = field(default_factory=list)
    cut_short: bool = False


class Narrower:
    """Builds narrowed networks of one coupling from synthetic inputs.

    Args:
        original: the network whose outputs are the target.
        coupling: the network to narrow, and its sets.
        merged: what ``coupling.graph`` still has of the original's values, where exact merging took some.
        inputs, held_out: (images, ...) for each network input, to fit to (the first `FIT_IMAGES`) and to measure on.
        frozen: weights that stay as they are.
    """

    def __init__(
        self,
        original: Graph,
        coupling: Coupling,
        merged: Kept,
        inputs: tuple[Tensor, ...],
        held_out: tuple[Tensor, ...],
        progress: Progress,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.original, self.coupling, self.merged, self.frozen = original, coupling, merged, frozen
        self.inputs, self.held_out, self.progress = tuple(x[:FIT_IMAGES] for x in inputs), held_out, progress
        self.observed = observe(coupling, self.inputs, progress)
        self.selections = select(self.observed)
        self._built: dict[tuple[tuple[str, int], ...], Narrowed] = {}

    def kept(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        full = {channel_set.name: channel_set.channels for channel_set in self.coupling.open}
        return {name: self.selections[name].kept(width) for name, width in widths.items() if width < full[name]}

    def build(self, widths: Mapping[str, int]) -> Narrowed:
        """Narrow, fit the readers, repair the norms."""
        key = tuple(sorted(widths.items()))
        if key not in self._built:
            start, kept = time.monotonic(), self.kept(widths)
            places = then(self.merged, self.coupling.kept(kept))
            fitting = Fitting(self.original, self.coupling, self.inputs, self.merged, self.frozen)
            graph, records = reconstruct(fitting, kept, quick_fit(self.observed, kept), self.progress)
            graph = repair_batch_norm(graph, self.original, self.inputs, places)
            self._built = {
                key: Narrowed(graph, places, dict(widths), records, time.monotonic() - start)
            }  # one at a time
        return self._built[key]

    def error(self, widths: Mapping[str, int]) -> float:
        """The relative output error on held-out inputs of the network with these widths."""
        return compare_outputs(self.original, self.build(widths).graph, self.held_out).error


def choose(narrower: Narrower, options: Options, deadline: float, frontier_deadline: float) -> Choice:
    """Pick widths as the options ask, build that network, and measure the frontier.

    The search ends at ``deadline``, the frontier at ``frontier_deadline``, both time.monotonic().

    Raises:
        GateFailed: a target that no network of the plan reaches.
    """
    coupling, original = narrower.coupling, narrower.original
    errors = measure_errors(narrower.observed, narrower.selections, narrower.held_out, narrower.progress)
    shapes = ShapeModel(coupling)
    timed = options.target_latency is not None
    cost = layer_model(coupling.graph, options.device, _LATENCY_SECONDS).predict if timed else None
    plan = plan_widths(coupling, errors, options.round_to, cost, shapes)
    full, macs = plan.points[0].widths, mac_count(original)
    choice = Choice(None, "", plan.left)
    if options.keep is not None:
        widths = uniform([c for c in coupling.open if c.name in full], options.keep, options.round_to)
        why = f"{options.keep:.0%} of each channel set"
    elif options.target_macs is not None:
        index = plan.within(options.target_macs * macs)
        widths, why = plan.points[index].widths, f"--target macs={options.target_macs:g}"
        _require("macs", plan.points[index].cost / macs, options.target_macs, 0.0)
    elif options.target_latency is not None:
        widths = _for_latency(plan, narrower, options)
        why = f"--target latency={options.target_latency:g}"
    else:
        limit = options.error_budget
        assert limit is not None
        built = 0

        def measure(point: Point) -> float:
            nonlocal built
            built += 1
            if time.monotonic() > deadline:
                choice.cut_short = True
                return float("inf")
            return narrower.error(point.widths)

        index, _ = search_error(plan, measure, _FIT_SHARE * limit)
        if index == 0:
            choice.reason = f"no narrower network stays within the error budget of {limit:g}"
            return choice
        widths, why = plan.points[index].widths, f"error budget {limit:g}, {built} networks built"
    if all(width == full.get(name, width) for name, width in widths.items()):
        choice.reason = f"{why}: nothing is narrowed"
        return choice
    choice.narrowed, choice.reason = narrower.build(widths), why
    choice.points = _frontier(plan, narrower, choice.narrowed, shapes, frontier_deadline)
    return choice


def _require(what: str, reached: float, wanted: float, slack: float) -> None:
    if reached > wanted + slack:
        raise GateFailed(
            f"--target {what}={wanted:g} cannot be reached: the narrowest network still has {reached:.3f} of it",
            f"a share of at least {reached:.3f}",
            f"raise the target, e.g. --target {what}={reached + 0.005:.2f}, "
            "or give it more to take: a smaller --round-to, fewer --exclude (see inspect --channels)",
        )


def _for_latency(plan: Plan, narrower: Narrower, options: Options) -> Mapping[str, int]:
    """Widths whose network is measured to take the wanted share of the original's time; the model only guesses."""
    wanted, low, high = options.target_latency, 0, len(plan.points) - 1
    assert wanted is not None

    def measured(index: int) -> float:
        narrow = narrower.coupling.narrow(narrower.kept(plan.points[index].widths))
        return paired_latency([narrower.original, narrow], 1, options.device, _LATENCY_SECONDS / 2)[1].ratio

    guess = plan.within(wanted * plan.points[0].cost)
    for _ in range(_LATENCY_ROUNDS):
        if measured(guess) <= wanted + _SLACK:
            high = guess
        else:
            low = guess
        if high - low <= 1:
            break
        guess = (low + high) // 2
    _require("latency", measured(high), wanted, 0.02)
    return plan.points[high].widths


def _frontier(
    plan: Plan, narrower: Narrower, chosen: Narrowed, shapes: ShapeModel, deadline: float
) -> list[FrontierPoint]:
    """Points over the whole range; their networks are fitted as the chosen one was, while the time lasts."""
    macs = mac_count(narrower.original)
    costs = [shapes.macs(shapes.shapes(point.widths)) for point in plan.points]
    wanted = torch.linspace(costs[0], costs[-1], _FRONTIER_POINTS).tolist()
    picked = sorted({min(range(len(costs)), key=lambda k: abs(costs[k] - at)) for at in wanted})
    own = shapes.macs(shapes.shapes(chosen.widths))
    found = []
    for index in picked:
        widths = plan.points[index].widths
        if widths == chosen.widths or (index and abs(costs[index] - own) < 0.02 * macs):
            continue
        if not index:
            graph, error = narrower.original, 0.0
        elif time.monotonic() + chosen.seconds < deadline:
            graph, error = narrower.build(widths).graph, narrower.error(widths)
        else:
            continue
        share = costs[index] / macs
        found.append(
            FrontierPoint(
                costs[index], error, plan.points[index].predicted, graph, False, f"--target macs={share + 5e-4:.3f}"
            )
        )
    error = compare_outputs(narrower.original, chosen.graph, narrower.held_out).error
    known = next((p.predicted for p in plan.points if p.widths == chosen.widths), None)
    found.append(FrontierPoint(own, error, known, chosen.graph, True, f"--target macs={own / macs + 5e-4:.3f}"))
    return sorted(found, key=lambda point: -point.macs)


def frontier_record(points: Sequence[FrontierPoint], original: Graph, device: str, machine: str) -> dict[str, Any]:
    """The frontier for the report, its networks' latencies measured in turns against the original's."""
    if not points:
        return {}
    narrow = [p.graph for p in points if p.graph is not original]
    times = iter(paired_latency([original, *narrow], 1, device, 2 * _LATENCY_SECONDS)[1:])
    measured: list[Latency | None] = [None if p.graph is original else next(times) for p in points]
    whole = mac_count(original)
    return {
        "latency_on": f"{machine}, {torch.get_num_threads()} threads, batch 1, the server's runtime",
        "points": [
            {
                "macs": p.macs,
                "macs_ratio": p.macs / whole,
                "error": p.error,
                "predicted_error": p.predicted,
                "latency_ratio": t.ratio if t else 1.0,
                "latency_low": t and t.low,
                "latency_high": t and t.high,
                "chosen": p.chosen,
                "flag": p.flag,
            }
            for p, t in zip(points, measured)
        ],
    }
