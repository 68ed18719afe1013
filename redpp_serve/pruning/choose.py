"""The choice of widths: how wide each channel set stays, the fitted network, and the frontier around it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.coupling import Coupling
from redpp_serve.channels.narrowing import Kept
from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.files import read_bounded, write_atomically
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import mac_count
from redpp_serve.options import Options
from redpp_serve.pruning.effort import Effort, spent
from redpp_serve.pruning.fit import Fitting, Reconstruction, quick_fit, reconstruct, then
from redpp_serve.pruning.judge import Difference, Reference
from redpp_serve.pruning.latency import layer_model, paired_latency
from redpp_serve.pruning.observation import observe, select, with_moments
from redpp_serve.pruning.repair import repair_batch_norm
from redpp_serve.pruning.widths import (
    NarrowingPath,
    PathPoint,
    ShapeModel,
    measure_errors,
    narrowing_path,
    search_error,
    uniform,
)
from redpp_serve.runtime.engine_choice import serving_engine
from redpp_serve.runtime.moments import Moments, fingerprint

_FIT_SHARE = 0.9  # share of the error budget for narrowing; the rest is for the final codebooks
_LATENCY_ROUNDS = 3
_SLACK = 0.005  # a latency is met when the measured ratio is within this of the target
_CHECKED = 64  # inputs that choose ridges and the order of widths (the judge's), and that repair norms
_FRONTIER_SHARE = 0.1  # of the time budget, for networks that are not chosen
_DENSER = 1.5  # power by which the frontier's points lie denser near the whole network
_TOO_CLOSE = 0.02  # of all multiply-accumulates: nearer to the chosen network the frontier shows no other


@dataclass(frozen=True)
class Narrowed:
    """A narrowed and fitted network.

    Attributes:
        graph: the network.
        kept: maps a value's name to the positions that it still has of the original's.
        widths: the number of channels of each set.
        records: what fitting did to each narrowed set.
        judged: the judge's comparison with the original.
        seconds: time that it took, by `effort.spent`.
    """

    graph: Graph
    kept: Kept
    widths: Mapping[str, int]
    records: list[Reconstruction]
    judged: Difference
    seconds: float

    @property
    def error(self) -> float:
        """The relative output error on the worst family of inputs."""
        return self.judged.error


@dataclass(frozen=True)
class FrontierPoint:
    """A network that could be had.

    Attributes:
        graph: the network.
        macs: multiply-accumulates for one input.
        judged: the judge's comparison with the original; None for the original itself.
        predicted: the error that was predicted, where it was.
        chosen: whether this is the result of the run.
        macs_ratio: ``macs`` as a share of the original's.
        widths: number of channels of each set, for a later run.
        latency_ratio: measured latency as a share of the original's.
        latency_low: lower end of its 95 % interval.
        latency_high: upper end of its 95 % interval.
    """

    graph: Graph
    macs: int
    judged: Difference | None
    predicted: float | None
    chosen: bool
    macs_ratio: float
    widths: Mapping[str, int]
    latency_ratio: float = 1.0
    latency_low: float | None = None
    latency_high: float | None = None

    @property
    def error(self) -> float:
        """The relative output error on the worst family of inputs."""
        return self.judged.error if self.judged else 0.0

    @property
    def agreement(self) -> float | None:
        """The share of inputs with the original's top-1 class, on the worst family; None without classes."""
        return self.judged.agreement if self.judged else None

    def to_json(self, number: int) -> dict[str, Any]:
        """Return the report's figures of the point of that number, with the flag that packages it."""
        names = ("macs", "macs_ratio", "error", "agreement", "latency_ratio", "latency_low", "latency_high", "chosen")
        found = {name: getattr(self, name) for name in names}
        flag = f"--keep-point {number}" if number else ""
        return {**found, "flag": flag, "predicted_error": self.predicted, "widths": dict(self.widths)}


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
    """Builds narrowed networks of one coupling.

    Args:
        reference: the original network, whose outputs are the target, on inputs that nothing is fitted to.
        coupling: the network to narrow, and its channel sets.
        merged: what ``coupling.graph`` still has of the original's values, where exact merging took some.
        inputs: (images, ...) for each network input, on the device to compute on, to fit to.
        progress: called with steps done and in all.
        frozen: weights that stay as they are.
        moments: what a serving original reads; where given, networks follow from these alone.
    """

    def __init__(
        self,
        reference: Reference,
        coupling: Coupling,
        merged: Kept,
        inputs: tuple[Tensor, ...],
        progress: Callable[[int, int], None] = lambda done, total: None,
        frozen: frozenset[str] = frozenset(),
        moments: Moments | None = None,
    ) -> None:
        self.reference, self.coupling, self.progress, self.inputs = reference, coupling, progress, inputs
        self._check = tuple(x[:_CHECKED].to(inputs[0].device) for x in reference.inputs)
        self._fitting = Fitting(reference.original, coupling, inputs, self._check, merged, frozen)
        self.observed = observe(coupling, inputs, progress)
        self._few = tuple(x[:_CHECKED] for x in inputs)
        self._served = moments is not None
        if moments is not None:
            self.observed = with_moments(self.observed, moments, merged)
        self.selections = select(self.observed)
        self._built: dict[tuple[tuple[str, int], ...], Narrowed] = {}

    def set_errors(self) -> dict[str, Tensor]:
        """Return the squared relative output error of each open set at each width; see `measure_errors`."""
        return measure_errors(self.observed, self.selections, self._check, self.progress)

    def kept(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the channels that stay at these widths, for the sets that lose some."""
        full = {channel_set.name: channel_set.channels for channel_set in self.coupling.open}
        return {name: self.selections[name].kept(width) for name, width in widths.items() if width < full[name]}

    def quick(self, widths: Mapping[str, int]) -> Graph:
        """Narrow, with the readers that follow from the moments alone."""
        return quick_fit(self.observed, self.kept(widths))

    def build(self, widths: Mapping[str, int]) -> Narrowed:
        """Narrow, fit the readers layer by layer and repair the norms, each as far as the judge finds it better."""
        key = tuple(sorted(widths.items()))
        if key not in self._built:
            start, kept = spent(), self.kept(widths)
            places = then(self._fitting.merged, self.coupling.kept(kept))
            best = self.quick(widths)
            judged = self.reference.compare(best)
            records = [Reconstruction(n, len(self.selections[n].order), len(k), 0.0) for n, k in kept.items()]
            if not self._served:  # moments of a server are real, and a fit to synthetic inputs would leave them
                fitted, records = reconstruct(self._fitting, kept, best, self.progress)
                for graph in (fitted, repair_batch_norm(fitted, self.reference.original, self._few, places)):
                    found = self.reference.compare(graph)
                    if found.error <= judged.error or judged.error != judged.error:  # not where the fit gave NaN
                        best, judged = graph, found
            self._built[key] = Narrowed(best, places, dict(widths), records, judged, spent() - start)
        return self._built[key]


def choose(
    narrower: Narrower, options: Options, effort: Effort, left: Callable[[], float], widths: Mapping[str, int] | None
) -> WidthChoice:
    """Pick widths as the options ask, build that network, and measure the frontier.

    Args:
        narrower: builds the networks.
        options: the user's options.
        effort: how much work to spend on latencies and on the frontier.
        left: says how many seconds are left for the search and the frontier.
        widths: the widths, where they are known from an earlier run.

    Raises:
        GateFailed: a target that no network on the path reaches.
    """
    coupling = narrower.coupling
    if widths is not None:
        return WidthChoice(narrower.build(widths), f"--keep-point {options.keep_point}")
    errors = narrower.set_errors()
    shapes, cost = ShapeModel(coupling), None
    if options.target_latency is not None:
        cost = layer_model(coupling.graph, options.device, effort.latency_seconds).predict
    path = narrowing_path(coupling, errors, options.step, cost, shapes)
    whole = path.points[0].widths
    cut_short = False
    if options.keep is not None:
        widths = uniform([c for c in coupling.open if c.name in whole], options.keep, options.step)
        why = f"{options.keep:.0%} of each channel set"
    elif options.target_macs is not None:
        macs = mac_count(narrower.reference.original)
        point = path.points[path.within(options.target_macs * macs)]
        fixed = f" ({1 - shapes.touched_macs() / macs:.0%} is in layers and products whose channels all stay)"
        _require("macs", point.cost / macs, options.target_macs, 0.0, fixed)
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
            cut_short = cut_short or left() < 0
            return math.inf if cut_short else narrower.build(point.widths).error

        index = search_error(path, measure, _FIT_SHARE * limit)
        widths, why = dict(path.points[index].widths), f"error budget {limit:g}, {len(tried)} networks built"
        if index == 0:
            why = f"no narrower network stays within the error budget of {limit:g}"
    if all(width == whole.get(name, width) for name, width in widths.items()):
        points = _frontier(path, narrower, None, effort.frontier_points, _FRONTIER_SHARE * options.time_budget)
        return WidthChoice(None, f"{why}: nothing is narrowed", path.left, points, cut_short)
    chosen = narrower.build(widths)
    points = _frontier(path, narrower, chosen, effort.frontier_points, _FRONTIER_SHARE * options.time_budget)
    return WidthChoice(chosen, why, path.left, points, cut_short)


def _require(what: str, reached: float, wanted: float, slack: float, why: str = "") -> None:
    if reached > wanted + slack:
        raise GateFailed(
            f"--target {what}={wanted:g} cannot be reached: the narrowest network still has {reached:.3f} of it{why}",
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
    path: NarrowingPath, narrower: Narrower, chosen: Narrowed | None, count: int, seconds: float
) -> tuple[FrontierPoint, ...]:
    """Pick points over the whole range; their networks are fitted as the chosen one was, where that takes no longer.

    Otherwise they are quick fits from the moments, which cost little.
    """
    whole_fit = chosen is not None and count * chosen.seconds < seconds
    reference, shapes = narrower.reference, ShapeModel(narrower.coupling)
    macs = mac_count(reference.original)
    costs = [shapes.macs(shapes.shapes(point.widths)) for point in path.points]
    wanted = [costs[0] - (costs[0] - costs[-1]) * (k / (count - 1)) ** _DENSER for k in range(count)]
    picked = sorted({min(range(len(costs)), key=lambda k: abs(costs[k] - at)) for at in wanted})
    own = shapes.macs(shapes.shapes(chosen.widths)) if chosen else -1
    found = []
    for index in picked:
        point, cost = path.points[index], costs[index]
        if chosen and (point.widths == chosen.widths or (index and abs(cost - own) < _TOO_CLOSE * macs)):
            continue
        graph: Graph
        judged: Difference | None
        if not index:
            graph, judged = reference.original, None
        elif whole_fit:
            built = narrower.build(point.widths)
            graph, judged = built.graph, built.judged
        else:
            graph = narrower.quick(point.widths)
            judged = reference.compare(graph)
        found.append(FrontierPoint(graph, cost, judged, point.predicted, False, cost / macs, point.widths))
    if chosen:
        known = next((point.predicted for point in path.points if point.widths == chosen.widths), None)
        found.append(FrontierPoint(chosen.graph, own, chosen.judged, known, True, own / macs, chosen.widths))
    return tuple(sorted(found, key=lambda point: -point.macs))


def frontier_record(
    points: Sequence[FrontierPoint], original: Graph, device: str, machine: str, seconds: float
) -> dict[str, Any]:
    """Return the frontier for the report, its networks' latencies measured in turns against the original's."""
    if not points:
        return {}
    narrow = [point.graph for point in points if point.graph is not original]
    engine = serving_engine(original, torch.device(device))
    times = iter(paired_latency([original, *narrow], 1, device, seconds)[1:])

    def timed(point: FrontierPoint) -> FrontierPoint:
        if point.graph is original:
            return point
        t = next(times)
        return replace(point, latency_ratio=t.ratio, latency_low=t.low, latency_high=t.high)

    return {
        "network": fingerprint(original),
        "latency_on": f"{machine}, {torch.get_num_threads()} threads, batch 1, engine {engine} in fp32",
        "points": [timed(point).to_json(number) for number, point in enumerate(points)],
    }


def frontier_text(points: Sequence[FrontierPoint]) -> str:
    """Return a table of the frontier for the terminal, each point with the number that ``--keep-point`` takes."""
    lines = ["  point   MACs  error  agreement"]
    for number, point in enumerate(points):
        agreement = "" if point.agreement is None else f"{point.agreement:.1%}"
        chosen = "  (this run)" if point.chosen else ""
        lines.append(f"  {number:>5}  {point.macs_ratio:.3f}  {point.error:.3f}  {agreement:>9}{chosen}")
    return "\n".join(lines)


def save_frontier(path: Path, original: Graph, points: Sequence[FrontierPoint]) -> None:
    """Write the widths of a frontier to a file, so that a later run can package any of its points."""
    found = [{"macs_ratio": point.macs_ratio, "error": point.error, "widths": dict(point.widths)} for point in points]
    write_atomically(path, json.dumps({"network": fingerprint(original), "points": found}).encode())


def known_widths(files: Sequence[Path], graph: Graph, number: int) -> dict[str, int]:
    """Return the widths of a point of the frontier in the first of ``files`` that is there.

    A file is one of `save_frontier`, or a report that holds a frontier.

    Raises:
        RedppError: there is none, it is another network's, or it has no such point.
    """
    do = "run package with --target or --max-error first, then --keep-point with the same --out"
    path = next((path for path in files if path.exists()), None)
    if path is None:
        raise RedppError(f"--keep-point {number}, but no earlier run is known", "a frontier to take a point of", do)
    try:
        document = json.loads(read_bounded(path))
        frontier = document.get("frontier", document)
        network = str(frontier["network"])
        points = [{str(name): int(width) for name, width in point["widths"].items()} for point in frontier["points"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RedppError(
            f"--keep-point {number}: {path} holds no frontier ({error!r})", "one of this version", do
        ) from error
    if network != fingerprint(graph):
        raise RedppError(f"--keep-point {number}: {path} is of another network", "the frontier of this network", do)
    if not 1 <= number < len(points):
        raise RedppError(
            f"--keep-point is {number}", f"a point from 1 to {len(points) - 1}", "choose one of the frontier"
        )
    return points[number]
