"""The report as data: one definition of every record in report.json, which it is written from and read into.

Reading is lenient, because a report may be unfinished, written by another release or edited by hand: what is missing or
of another type becomes None or an empty list, NaN and infinities become None, and keys that are not defined here are
kept and written again.

A field without a default is always written, as null where it is unknown; one with a default is left out while it is
unknown.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar

from redpp_serve.variants import canonical_name

R = TypeVar("R", bound="Record")


@dataclass(kw_only=True)
class Record:
    """A part of the report.

    Attributes:
        undefined: the entries of the JSON object that this release does not define.
    """

    undefined: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls: type[R], value: object) -> R:
        """Read a JSON object; anything but an object is read as an empty one."""
        given = dict(value) if isinstance(value, Mapping) else {}
        found: dict[str, Any] = {}
        for name, (kind, optional) in _definition(cls).items():
            if optional and given.get(name) is None:  # an explicit null stays in `given`, and is written again
                continue
            found[name] = _read(kind, given.pop(name, None))
        return cls(**found, undefined=plain(given))

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, texts, lists and dictionaries, fit for ``json.dumps``."""
        found = dict(self.undefined)
        for name, (_, optional) in _definition(type(self)).items():
            value = getattr(self, name)
            if not optional or value is not None:
                found[name] = plain(value)
        return found


def plain(value: Any) -> Any:
    """Turn records, NumPy's numbers and tuples into what JSON knows; NaN and infinities become None."""
    if isinstance(value, bool | str | int) or value is None:
        return value
    if type(value) is float:  # long lists are made of these
        return value if math.isfinite(value) else None
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a report holds numbers, text, lists and dicts, not {type(value).__name__}")


_DEFINITIONS: dict[type[Record], dict[str, tuple[Any, bool]]] = {}


def _definition(kind: type[Record]) -> dict[str, tuple[Any, bool]]:
    """Return for each key its type, and whether it may be left out."""
    if kind not in _DEFINITIONS:
        hints = typing.get_type_hints(kind)
        _DEFINITIONS[kind] = {
            f.name: (hints[f.name], f.default is not MISSING or f.default_factory is not MISSING)
            for f in fields(kind)
            if f.name != "undefined"
        }
    return _DEFINITIONS[kind]


def _read(kind: Any, value: Any) -> Any:
    """Read a JSON value as a field's type: a record, number, text or truth value, or a list or dictionary of them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return plain(value)
    if origin is list:
        items = value if _fits(kind, value) else ()
        if arguments[0] == float | None:  # densities are long
            return [plain(item) if _fits(float, item) else None for item in items]
        return [_read(arguments[0], item) for item in items if _fits(arguments[0], item)]
    if origin is dict:
        return {str(key): _read(arguments[1], item) for key, item in value.items()} if _fits(kind, value) else {}
    if NoneType in arguments:
        return _read(arguments[0], value) if _fits(arguments[0], value) else None
    if kind is bool:
        return value is True
    if issubclass(kind, Record):
        return kind.from_json(value)
    return str(value) if kind is str else plain(value)


def _fits(kind: Any, value: Any) -> bool:
    """Tell whether a JSON value is of a field's type; a number also passes as text."""
    if kind is float and type(value) is float:
        return math.isfinite(value)
    origin = typing.get_origin(kind) or kind
    if origin is float:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    if origin is str:
        return isinstance(value, str | Real)
    if origin is list:
        return isinstance(value, list | tuple)
    if isinstance(origin, type) and issubclass(origin, Record | dict):
        return isinstance(value, Mapping)
    return True


@dataclass(kw_only=True)
class Tool(Record):
    """The program that wrote the report."""

    name: str | None
    version: str | None


@dataclass(kw_only=True)
class Environment(Record):
    """The machine and the releases that figures were measured with."""

    device: str | None
    threads: float | None
    versions: dict[str, str | None]


@dataclass(kw_only=True)
class Figures(Record):
    """What one version of the network costs: counted for one input, stored in its artifact, and measured on a server.

    Attributes:
        bytes: size of the stored weights.
        accuracy: share of correct classes.
        handler_ms: percentiles (``p50``, ``p99``) of the time in the handler, milliseconds.
        latency_ms: percentiles of the time until the reply, milliseconds.
        throughput_rps: requests answered in a second.
    """

    parameters: float | None
    macs: float | None
    multiplications: float | None
    additions: float | None
    bytes: float | None
    accuracy: float | None = None
    handler_ms: dict[str, float | None] | None = None
    latency_ms: dict[str, float | None] | None = None
    throughput_rps: float | None = None


@dataclass(kw_only=True)
class SplitCost(Record):
    """Operations and stored bytes of all layers, each as [before, after] splitting."""

    multiplications: list[float | None]
    additions: list[float | None]
    bytes: list[float | None]


@dataclass(kw_only=True)
class Counting(Record):
    """The cost of splitting where its unit is a k x k kernel, and where it is a scalar weight."""

    kernel: SplitCost
    weight: SplitCost


@dataclass(kw_only=True)
class HashSummary(Record):
    """Hashing of the whole network: predicted and measured errors, and the multiplications that splitting saves."""

    method: str | None
    target: str | None
    predicted_error_typical: float | None
    predicted_error_bound: float | None
    measured_error: float | None
    predicted_ratio: float | None
    measured_ratio: float | None


@dataclass(kw_only=True)
class Codebook(Record):
    """Distinct values, their entropy in bits, and the relative RMS error of the weights."""

    values: float | None
    entropy: float | None
    error: float | None


@dataclass(kw_only=True)
class Density(Record):
    """The estimated density of a layer's weights: points of the curve, borders of the cells, codebook values."""

    x: list[float | None]
    y: list[float | None]
    edges: list[float | None]
    modes: list[float | None]


@dataclass(kw_only=True)
class LayerHash(Codebook):
    """Hashing of one layer.

    Attributes:
        zero_kernels: share of kernels that are nearly zero.
        bandwidth: width of the density estimate's kernel.
        alternatives: the codebooks of other methods at equal entropy, by method.
        density: the distribution that the codebook was made from.
    """

    zero_kernels: float | None
    bandwidth: float | None
    alternatives: dict[str, Codebook]
    density: Density | None


@dataclass(kw_only=True)
class LayerMerge(Record):
    """Output channels of one layer before and after, the error of their reconstruction, and why any were left alone."""

    channels: float | None
    kept: float | None = None
    error: float | None = None
    reason: str | None


@dataclass(kw_only=True)
class LayerSplit(Record):
    """Unique kernels of one layer, and its operations as [before, after] splitting."""

    unique_kernels: float | None
    kernels: float | None
    multiplications: list[float | None]
    additions: list[float | None]


@dataclass(kw_only=True)
class Layer(Record):
    """One layer with weights; ``error`` is that of its output, relative, ``ms`` its time for one input."""

    name: str | None
    op: str | None
    shape: list[float | None]
    pruned_shape: list[float | None] | None = None
    parameters: float | None
    macs: float | None
    ms: float | None = None
    hash: LayerHash | None = None
    merge: LayerMerge | None
    split: LayerSplit | None = None
    error: float | None = None


@dataclass(kw_only=True)
class Family(Record):
    """The error of one output on one family of inputs, and how many of them have the same class, with an interval."""

    output: str | None
    family: str | None
    error: float | None
    same: float | None = None
    of: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(kw_only=True)
class OutputError(Record):
    """One output of the pruned network against the original's, on the worst family of held-out inputs.

    Attributes:
        output: its name.
        classes: whether it holds class scores.
        error: relative, centred over the inputs; None where it is not of floating point.
        agreement: share of inputs with the same class, where it holds class scores.
    """

    output: str | None
    classes: bool | None = None
    error: float | None = None
    agreement: float | None = None


@dataclass(kw_only=True)
class Verify(Record):
    """Relative errors of the exact stages and of the pruned network's outputs, on held-out inputs.

    Attributes:
        agreement: share of inputs with the same class.
        images: number of held-out inputs.
        families: the errors behind the worst one.
        outputs: the error of each output, in order.
        known: whether the families agree on the error.
        inputs: how the inputs were made.
    """

    merge_exact: float | None
    narrow_exact: float | None = None
    split_exact: float | None
    output_error: float | None
    agreement: float | None
    images: float | None
    families: list[Family] | None = None
    outputs: list[OutputError] | None = None
    known: bool | None = None
    inputs: str | None = None


@dataclass(kw_only=True)
class FrontierPoint(Record):
    """A network that could be had: its cost as a share of the original's, its relative errors, and the flag for it."""

    macs: float | None
    macs_ratio: float | None
    error: float | None
    agreement: float | None = None
    widths: dict[str, float] | None = None
    predicted_error: float | None
    latency_ratio: float | None
    latency_low: float | None
    latency_high: float | None
    chosen: bool
    flag: str | None


@dataclass(kw_only=True)
class Frontier(Record):
    """The networks to choose from, the device that they were timed on, and a digest of the original."""

    latency_on: str | None = None
    network: str | None = None
    points: list[FrontierPoint]


@dataclass(kw_only=True)
class StageShare(Record):
    """The network after one stage: its error and agreement on held-out inputs, its cost, and the stage's seconds."""

    stage: str | None
    error: float | None
    agreement: float | None
    macs: float | None
    accuracy: float | None = None
    seconds: float | None


@dataclass(kw_only=True)
class StageRecord(Record):
    """A step of the run: ``status`` is done, skipped or failed, ``reason`` says what happened."""

    name: str | None
    status: str | None
    reason: str | None
    seconds: float | None


@dataclass(kw_only=True)
class TrialRecord(Record):
    """The trial run of one archive: the handler's time for a request after its warm-up."""

    archive: str | None
    milliseconds: float | None


@dataclass(kw_only=True)
class Ratio(Record):
    """A speed-up with its interval; above 1 the pruned version is faster."""

    ratio: float | None
    low: float | None
    high: float | None


@dataclass(kw_only=True)
class Agreement(Record):
    """How alike the served answers are.

    Attributes:
        top1: share of inputs with the same class.
        mean_relative_difference: mean over inputs of |original - pruned| / |original|, of the worst output.
        inputs: number of inputs that both versions answered.
        outputs: that mean for each output by its name, where there are several.
    """

    top1: float | None
    mean_relative_difference: float | None = None
    inputs: float | None = None
    outputs: dict[str, float] | None = None


@dataclass(kw_only=True)
class ChoiceRecord(Record):
    """The kernel of one layer at one batch size.

    Attributes:
        layer: name of the graph's node.
        name: name that the user knows the layer by.
        source: where the choice comes from, such as ``measured`` or ``rule``.
        times: seconds of each candidate.
        shape: of the layer's input.
        sizes: of the network's inputs, by symbol, where they vary.
    """

    layer: str | None = None
    name: str | None = None
    batch: Any = None
    kernel: str | None = None
    source: str | None = None
    times: dict[str, float | None]
    shape: str | None = None
    sizes: dict[str, Any] | None = None


@dataclass(kw_only=True)
class EngineRecord(Record):
    """The engine and precision that run the whole network at one batch size.

    Attributes:
        source: where the choice comes from, such as ``measured`` or ``rule``.
        times: seconds of each engine and precision that was timed.
        sizes: of the network's inputs, by symbol, where they vary.
    """

    batch: Any = None
    engine: str | None = None
    precision: str | None = None
    source: str | None = None
    times: dict[str, float | None]
    sizes: dict[str, Any] | None = None


@dataclass(kw_only=True)
class PrecisionError(Record):
    """What a precision costs a network, relative to itself in fp32, on inputs that gave no ranges.

    Attributes:
        agreement: share of inputs with the same class.
        known: whether the families of inputs agree on the error.
        note: what the precision leaves wide.
    """

    error: float | None
    agreement: float | None = None
    known: bool | None = None
    note: str | None = None


@dataclass(kw_only=True)
class GainRecord(Record):
    """How much faster one step makes a batch: time before over time after, with its interval.

    Attributes:
        step: ``engine``, ``precision``, ``pruning``, or ``all`` for their product.
        before: what runs without the step, in words.
        after: what runs with it.
    """

    batch: Any = None
    step: str | None = None
    before: str | None = None
    after: str | None = None
    ratio: float | None
    low: float | None = None
    high: float | None = None


@dataclass(kw_only=True)
class SizeRecord(Record):
    """The median latency of inputs near some sizes, in milliseconds, and its ratio, where sizes vary."""

    sizes: str | None = None
    pairs: int | None = None
    original: float | None = None
    pruned: float | None = None
    ratio: float | None
    low: float | None = None
    high: float | None = None


@dataclass(kw_only=True)
class FigureRecord(Record):
    """A measured number, with its 95 % interval where it has one."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(kw_only=True)
class CellRecord(Record):
    """Both versions under one load.

    Attributes:
        concurrency: requests in flight.
        rate: requests a second, where latency was also measured at a rate.
        batch: inputs in one request.
        inputs: number of inputs that both versions answered.
        verdict: in words.
        figures: by the names of `requirements.COMPARED`.
    """

    concurrency: float | None
    rate: float | None = None
    batch: float | None = None
    inputs: float | None = None
    verdict: str | None
    figures: dict[str, FigureRecord]

    def value(self, name: str) -> float | None:
        """Return a figure's number; None where it is unknown."""
        found = self.figures.get(name)
        return found.value if found else None


@dataclass(kw_only=True)
class ComparisonRecord(Record):
    """A comparison on a live server, or a sweep of several.

    Attributes:
        time: when it began, in UTC.
        server: ``torchserve`` or ``triton``.
        versions: the releases, by name.
        settings: of server and load, by name.
        cells: several in a sweep.
    """

    time: str | None
    server: str | None
    device: str | None
    versions: dict[str, str | None]
    settings: dict[str, Any]
    cells: list[CellRecord]


@dataclass(kw_only=True)
class PlanRecord(Record):
    """The engines and kernels that one version runs with, and the seconds that choosing them took.

    Attributes:
        left_out: why engines, or engines in a precision, are not used.
        built: the seconds that building the network took, by engine and precision.
    """

    device: str | None = None
    precision: str | None = None
    batches: list[Any]
    seconds: float | None = None
    choices: list[ChoiceRecord]
    engines: list[EngineRecord] | None = None
    left_out: dict[str, str] | None = None
    built: dict[str, float] | None = None


@dataclass(kw_only=True)
class Report(Record):
    """Everything that is known about a packaged network: what was done, what it cost, what was measured.

    Attributes:
        source: where the network came from: file, kind, digest.
        messages: notes to the user.
        options: of the run, by name.
        stages_share: what each stage changed.
        accuracy_of: what the accuracies were measured on, where `package` measured them.
        smoke: the trial runs.
        plan: chosen engines and kernels by version.
        precisions: by version and name, what each precision costs.
        speedup: ratios by quantity.
        gains: what engine, precision and pruning gain, each on its own.
        by_sizes: latencies near the planned sizes, where sizes vary.
        verdict: the newest comparison's that is no sweep, in words, as are speedup, agreement and the rest of it.
        comparisons: the history, the newest first.
    """

    tool: Tool
    name: str | None
    source: dict[str, Any]
    messages: list[Any]
    options: dict[str, Any]
    environment: Environment
    original: Figures
    pruned: Figures
    counting: Counting
    hash: HashSummary | None
    layers: list[Layer]
    verify: Verify | None
    stages_share: list[StageShare]
    accuracy_of: str | None = None
    frontier: Frontier | None = None
    smoke: list[TrialRecord] | None = None
    stages: list[StageRecord] | None = None
    plan: dict[str, PlanRecord] | None = None
    precisions: dict[str, dict[str, PrecisionError]] | None = None
    agreement: Agreement | None = None
    speedup: dict[str, Ratio | None] | None = None
    gains: list[GainRecord] | None = None
    by_sizes: list[SizeRecord] | None = None
    verdict: str | None = None
    comparisons: list[ComparisonRecord] | None = None

    def compared_on(self, server: str) -> ComparisonRecord | None:
        """Return the newest comparison on a server that holds anything; None without one."""
        return next((each for each in self.comparisons or () if each.server == server and each.cells), None)

    @classmethod
    def from_json(cls, value: object) -> Report:
        """Read report.json, also that of a former release."""
        report = super().from_json(value)
        if report.plan:
            report.plan = {canonical_name(name): plan for name, plan in report.plan.items()}
        return report

    @property
    def versions(self) -> tuple[Figures, Figures]:
        """The figures of the original and of the pruned network."""
        return self.original, self.pruned
