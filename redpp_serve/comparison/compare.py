"""Compare the original and the pruned version on a live server: the figures, and the verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from redpp_serve.comparison.client import Endpoint, Payload, Reply
from redpp_serve.comparison.load import (
    BlockThroughput,
    Load,
    OpenLoop,
    measure_open_loop,
    plan_blocks,
    preflight,
    require_success,
    run_blocks,
    run_paired,
)
from redpp_serve.comparison.outputs import UNKNOWN, Heads, classes, difference, relative_difference
from redpp_serve.errors import RedppError, printable
from redpp_serve.options import ComparisonOptions
from redpp_serve.report.formats import columns
from redpp_serve.statistics.intervals import Estimate, percentile_interval, ratio_interval
from redpp_serve.statistics.sequences import RatioSequence
from redpp_serve.statistics.verdicts import Verdict, verdict

PAIRED_SHARE = 0.6
LATENCY_PERCENTILES, HANDLER_PERCENTILES = (50, 95, 99), (50, 99)


@dataclass(frozen=True)
class Arm:
    """The figures of one version.

    Attributes:
        label: its endpoint's name.
        latency_ms: percentiles ("p50", ...) of the time from sending to the last byte, milliseconds.
        handler_ms: percentiles of the time in the handler; None where the server does not say.
        throughput_rps: requests per second in a closed loop.
        requests: all requests that were sent.
        errors: those that failed.
        first_error: the text of the first failure.
        accuracy: share of labelled inputs with the right class; None without labels.
    """

    label: str
    latency_ms: dict[str, Estimate]
    handler_ms: dict[str, Estimate] | None
    throughput_rps: float
    requests: int
    errors: int
    first_error: str
    accuracy: float | None

    def to_json(self) -> dict[str, Any]:
        """Return percentiles as numbers, their intervals beside them under ``*_interval``."""
        handler = self.handler_ms
        data: dict[str, Any] = {
            "latency_ms": {name: x.value for name, x in self.latency_ms.items()},
            "latency_ms_interval": {name: [x.low, x.high] for name, x in self.latency_ms.items()},
            "handler_ms": handler and {name: x.value for name, x in handler.items()},
            "handler_ms_interval": handler and {name: [x.low, x.high] for name, x in handler.items()},
            "throughput_rps": self.throughput_rps,
            "requests": self.requests,
            "errors": self.errors,
            "first_error": self.first_error,
        }
        return data if self.accuracy is None else {**data, "accuracy": self.accuracy}


@dataclass(frozen=True)
class Agreement:
    """The agreement of the outputs over different inputs.

    Attributes:
        top1: share of inputs with the same class in every output of class scores; None where there are none.
        max_abs_difference: largest difference of any output value.
        mean_relative_difference: mean over inputs of |original - pruned| / |original| (Euclidean), of the output where
            it is largest.
        inputs: number of inputs that both versions answered.
        outputs: that mean for each output by its name, where there are several.
    """

    top1: float | None
    max_abs_difference: float
    mean_relative_difference: float
    inputs: int
    outputs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gain:
    """How much faster one step makes a batch.

    Attributes:
        batch: the batch size.
        step: ``engine``, ``precision``, ``pruning``, or ``all`` for their product.
        before: what runs without the step, in words.
        after: what runs with it.
        ratio: time before over time after, of the medians, with its 95 % interval.
    """

    batch: int
    step: str
    before: str
    after: str
    ratio: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return {**asdict(self), "ratio": self.ratio.value, "low": self.ratio.low, "high": self.ratio.high}

    def to_text(self) -> str:
        """Return a line for the terminal."""
        x = self.ratio
        return f"{self.step} {x.value:.2f} ({x.low:.2f} to {x.high:.2f})"


@dataclass(frozen=True)
class SizeLatency:
    """The latency of inputs near some sizes, where sizes vary.

    Attributes:
        sizes: the sizes, in words.
        pairs: inputs that both versions answered.
        original: the median time of the original, milliseconds.
        pruned: that of the pruned version.
        ratio: of the original's median to the pruned version's, with its 95 % interval.
    """

    sizes: str
    pairs: int
    original: float
    pruned: float
    ratio: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return {**asdict(self), "ratio": self.ratio.value, "low": self.ratio.low, "high": self.ratio.high}

    def row(self) -> tuple[str, str, str, str]:
        """Return a line for the terminal's table."""
        return f"  near {self.sizes} (ms)", f"{self.original:.2f}", f"{self.pruned:.2f}", _ratio(self.ratio)


@dataclass(frozen=True)
class Conditions:
    """What figures were measured with.

    Attributes:
        time: when the measurement began, in UTC.
        server: ``torchserve`` or ``triton``.
        device: what ran it, in words.
        versions: the releases, by name.
        settings: of server and load, by name.
    """

    time: str
    server: str
    device: str
    versions: dict[str, str]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The result. Ratios in ``speedup`` are above 1 where the pruned version is faster, None where not measured.

    Attributes:
        batch: inputs in one request.
    """

    original: Arm
    pruned: Arm
    agreement: Agreement
    speedup: dict[str, Estimate | None]
    verdict: Verdict
    handler_verdict: Verdict | None
    pairs: int
    concurrency: int
    seconds: float
    margin: float
    open_loop: OpenLoop | None = None
    gains: tuple[Gain, ...] = ()
    by_sizes: tuple[SizeLatency, ...] = ()
    batch: int = 1
    conditions: Conditions | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, texts and lists, fit for ``json.dumps``."""
        return {
            **(asdict(self.conditions) if self.conditions else {}),
            "original": self.original.to_json(),
            "pruned": self.pruned.to_json(),
            "agreement": {key: value for key, value in asdict(self.agreement).items() if value != {}},
            "speedup": {k: x and {"ratio": x.value, "low": x.low, "high": x.high} for k, x in self.speedup.items()},
            "verdict": self.verdict.text,
            "verdict_kind": self.verdict.kind,
            "verdict_handler": self.handler_verdict and self.handler_verdict.text,
            "verdict_handler_kind": self.handler_verdict and self.handler_verdict.kind,
            "pairs": self.pairs,
            "batch": self.batch,
            "concurrency": self.concurrency,
            "seconds": self.seconds,
            "margin": self.margin,
            "open_loop": self.open_loop and self.open_loop.to_json(),
            "gains": [gain.to_json() for gain in self.gains],
            **({"by_sizes": [each.to_json() for each in self.by_sizes]} if self.by_sizes else {}),
        }

    def to_text(self) -> str:
        """Return a table for the terminal that ends with the verdict."""
        rows = [("", self.original.label, self.pruned.label, "ratio (95 % interval)"), *self._rows()]
        verdicts = [x.text + "." for x in (self.handler_verdict, self.verdict) if x]
        errors = [f"{x.label} failed first with: {x.first_error}" for x in (self.original, self.pruned) if x.errors]
        where = f"{self.conditions.server}: " if self.conditions else ""
        several = f"of {self.batch} inputs " if self.batch > 1 else ""
        head = f"{where}{self.pairs} pairs, {self.concurrency} requests {several}at a time, {self.seconds:g} s"
        return "\n".join(
            [head, "", *columns(rows, left=(0, 3)), "", *self._gain_lines(), *errors, self._agreement_line(), *verdicts]
        )

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        arms = (self.original, self.pruned)
        ratios = {"handler p50 (ms)": "handler_p50", "latency p50 (ms)": "end_to_end_p50"}
        for name, group in (("handler", "handler_ms"), ("latency", "latency_ms")):
            both = [getattr(arm, group) for arm in arms]
            for key in both[0] or {}:
                title = f"{name} {key} (ms)"
                cells = [f"{values[key].value:.2f}" if values else "-" for values in both]
                yield title, cells[0], cells[1], _ratio(self.speedup.get(ratios.get(title, "")))
                if title == "latency p50 (ms)":
                    yield from (each.row() for each in self.by_sizes)
        rates = [f"{arm.throughput_rps:.1f}" for arm in arms]
        yield "throughput (1/s)", rates[0], rates[1], _ratio(self.speedup["throughput"])
        failed = [f"{arm.errors} of {arm.requests}" for arm in arms]
        yield "failed requests", failed[0], failed[1], ""
        for row in self.open_loop.rows() if self.open_loop else ():
            yield *row, ""
        shares = ["-" if arm.accuracy is None else f"{arm.accuracy:.2%}" for arm in arms]
        if shares != ["-", "-"]:
            yield "accuracy", shares[0], shares[1], ""

    def _gain_lines(self) -> Iterator[str]:
        """Say for each batch size what each step gains, without a server."""
        for batch in dict.fromkeys(gain.batch for gain in self.gains):
            *steps, whole = [gain for gain in self.gains if gain.batch == batch]
            yield f"Gains at batch {batch}: {' x '.join(gain.to_text() for gain in steps)}; {whole.to_text()}"
            yield f"  {' -> '.join([steps[0].before, *(gain.after for gain in steps)])}"

    def _agreement_line(self) -> str:
        same = self.agreement
        top1 = "" if same.top1 is None else f"same class on {same.top1:.2%} of {same.inputs} inputs, "
        each = ", ".join(f"{printable(name)} {found:.3g}" for name, found in same.outputs.items())
        return (
            f"Outputs: {top1}mean relative difference {same.mean_relative_difference:.3g}"
            f"{f' ({each})' if each else ''}, largest difference {same.max_abs_difference:.3g}"
        )


@dataclass(frozen=True)
class Measured:
    """The raw results.

    Attributes:
        pairs: replies of both versions to one input, in order of time.
        good: those of them that both answered.
        throughput: of both versions, in alternating blocks.
        open_loop: None where no rate was asked for.
        together: how many neighbouring pairs ran together, so that they are one observation.
    """

    pairs: list[tuple[Reply, Reply]]
    good: list[tuple[Reply, Reply]]
    throughput: BlockThroughput
    open_loop: OpenLoop | None
    together: int


def compare_endpoints(
    original: Endpoint,
    pruned: Endpoint,
    payloads: Sequence[Payload],
    options: ComparisonOptions = ComparisonOptions(),
    *,
    heads: Heads = UNKNOWN,
    progress: bool = True,
) -> Comparison:
    """Measure two live endpoints with the same inputs.

    The time of ``options.duration`` is without warm-up: 60 % for paired latencies, 40 % for throughput blocks; a rate
    adds another 40 %.

    Args:
        original: the original version.
        pruned: the pruned version.
        payloads: inputs, each sent to both; with class labels the accuracy is measured too.
        options: the load; its ``inputs`` are not read.
        heads: what is known of the outputs.
        progress: show bars on stderr when it is a terminal.

    Raises:
        RedppError: a version answered nothing, with the text it sent instead; or their outputs differ in shape.
    """
    load = Load(original, pruned, payloads, options.concurrency, options.seed)
    for endpoint in load.endpoints:
        preflight(endpoint, payloads)
    return conclude(load, _measure(load, options, progress), options, heads)


def conclude(load: Load, measured: Measured, options: ComparisonOptions, heads: Heads) -> Comparison:
    """Return the figures of what was measured, and the verdict."""
    payloads, agreement = load.payloads, _agreement(measured.good, heads, load.payloads)
    rng = np.random.default_rng([options.seed, 2])
    block = max(measured.together, round(len(measured.good) ** (1 / 3)))
    arms = [_arm(load, measured, version, rng, block, heads) for version in (0, 1)]
    latencies = np.array([(a.latency_s, b.latency_s) for a, b in measured.good])
    handlers = np.array([(a.handler_s, b.handler_s) for a, b in measured.good if a.handler_s and b.handler_s])

    def ratio(times: np.ndarray) -> Estimate | None:
        return ratio_interval(times[:, 0], times[:, 1], 0.5, rng, block=block) if times.size else None

    return Comparison(
        original=arms[0],
        pruned=arms[1],
        agreement=agreement,
        speedup={
            "handler_p50": ratio(handlers),
            "end_to_end_p50": ratio(latencies),
            "throughput": measured.throughput.ratio,
        },
        verdict=_decide(latencies, measured.together, options.margin, "end to end"),
        handler_verdict=_decide(handlers, measured.together, options.margin, "in the handler")
        if handlers.size
        else None,
        pairs=len(measured.good),
        concurrency=options.concurrency,
        seconds=options.duration,
        margin=options.margin,
        open_loop=measured.open_loop,
        by_sizes=tuple(_by_sizes(measured.good, payloads, rng)),
        batch=payloads[0].items,
    )


def _by_sizes(
    pairs: list[tuple[Reply, Reply]], payloads: Sequence[Payload], rng: np.random.Generator
) -> Iterator[SizeLatency]:
    """Yield the latency near each of the sizes of the payloads, the fastest first; none without."""
    found: dict[str, list[tuple[float, float]]] = {}
    for a, b in pairs:
        if sizes := payloads[a.payload].sizes:
            found.setdefault(sizes, []).append((a.latency_s, b.latency_s))
    for sizes, rows in sorted(found.items(), key=lambda item: np.median(item[1])):
        times = np.array(rows)
        original, pruned = (1000 * np.median(times, axis=0)).tolist()
        yield SizeLatency(sizes, len(times), original, pruned, ratio_interval(times[:, 0], times[:, 1], 0.5, rng))


def _measure(load: Load, options: ComparisonOptions, progress: bool) -> Measured:
    paired_s = PAIRED_SHARE * options.duration
    other_s = options.duration - paired_s
    with _bar("paired latency", progress) as report:
        pairs = run_paired(load, None, paired_s, report)
    good = answered(load, pairs)
    block_s, blocks = plan_blocks(other_s, float(np.median([(a.latency_s, b.latency_s) for a, b in good])))
    with _bar("throughput", progress) as report:
        throughput = run_blocks(replace(load, seed=load.seed + 1), block_s, blocks, report)
    open_loop = None
    if options.rate is not None:
        with _bar(f"latency at {options.rate:g}/s", progress) as report:
            open_loop = measure_open_loop(replace(load, seed=load.seed + 2), options.rate, other_s, report)
    return Measured(pairs, good, throughput, open_loop, options.concurrency)


def answered(load: Load, pairs: list[tuple[Reply, Reply]]) -> list[tuple[Reply, Reply]]:
    """Return the pairs that both versions answered.

    Raises:
        RedppError: there is none, or their outputs differ in shape.
    """
    for endpoint, replies in zip(load.endpoints, zip(*pairs, strict=True), strict=True):
        require_success(endpoint, replies)
    good = [(a, b) for a, b in pairs if a.ok and b.ok]
    if not good:
        raise RedppError("no input was answered by both", "at least one", "send inputs that both versions accept")
    _require_equal_shapes(good)
    return good


def _arm(load: Load, measured: Measured, version: int, rng: np.random.Generator, block: int, heads: Heads) -> Arm:
    def percentiles(seconds: list[float], which: tuple[int, ...]) -> dict[str, Estimate]:
        milliseconds = 1000 * np.asarray(seconds)
        return {f"p{q}": percentile_interval(milliseconds, q / 100, rng, block=block) for q in which}

    replies = [pair[version] for pair in measured.pairs]
    good = [reply for reply in replies if reply.ok]
    handler = [reply.handler_s for reply in good if reply.handler_s]
    served = (measured.throughput.original, measured.throughput.pruned)[version]
    return Arm(
        label=load.endpoints[version].label,
        latency_ms=percentiles([reply.latency_s for reply in good], LATENCY_PERCENTILES),
        handler_ms=percentiles(handler, HANDLER_PERCENTILES) if handler else None,
        throughput_rps=served.rps,
        requests=len(replies) + served.completed + served.failed,
        errors=len(replies) - len(good) + served.failed,
        first_error=next((reply.error for reply in replies if not reply.ok), served.error),
        accuracy=_accuracy(good, load.payloads, heads),
    )


def _accuracy(replies: list[Reply], payloads: Sequence[Payload], heads: Heads) -> float | None:
    """Return the share of labelled inputs, each counted once, whose largest class score is the label's.

    The scores are those of the first output that holds some; labels themselves say that the first output does, where
    none is known to.
    """
    hits, scores = {}, (*heads.classes, 0)[0]
    for reply in replies:
        label = payloads[reply.payload].label
        top = classes(reply.outputs[scores]) if reply.outputs and scores < len(reply.outputs) else None
        if label is not None and top is not None:
            hits[reply.payload] = top == [label]
    return float(np.mean(list(hits.values()))) if hits else None


def _require_equal_shapes(pairs: list[tuple[Reply, Reply]]) -> None:
    for answers in _outputs(pairs).values():
        a, b = (", ".join(str(array.shape) for array in answer) for answer in answers)
        if a != b:
            raise RedppError(
                f"the two endpoints answer with outputs of shapes {a} and {b}",
                "two versions of one network",
                "check the URLs of both endpoints",
            )


def _outputs(pairs: list[tuple[Reply, Reply]]) -> dict[int, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Return both versions' outputs by the index of the request, the last of each."""
    last = {a.payload: (a.outputs, b.outputs) for a, b in pairs}
    return {k: (a, b) for k, (a, b) in last.items() if a is not None and b is not None}


def _agreement(pairs: list[tuple[Reply, Reply]], heads: Heads, payloads: Sequence[Payload]) -> Agreement:
    outputs = [
        both
        for k, (a, b) in _outputs(pairs).items()
        for both in ([(a, b)] if payloads[k].items == 1 else zip(_rows(a), _rows(b), strict=True))
    ]
    found = [difference(a, b, heads.classes) for a, b in outputs]
    same = [each.top1 for each in found if each.top1 is not None]
    relative = [_bounded(each.relative) for each in found]
    largest = max(
        (float(np.abs(x - y).max()) for a, b in outputs for x, y in zip(a, b, strict=True) if x.size), default=0.0
    )
    by_output = [[_bounded(relative_difference(x, y)) for x, y in zip(a, b, strict=True)] for a, b in outputs]
    names = heads.names or tuple(f"output_{k}" for k in range(len(by_output[0])))
    each_of = dict(zip(names, np.mean(by_output, axis=0).tolist(), strict=False)) if len(names) > 1 else {}
    return Agreement(float(np.mean(same)) if same else None, largest, float(np.mean(relative)), len(relative), each_of)


def _rows(outputs: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Return the outputs of each item of a request."""
    return [list(row) for row in zip(*outputs, strict=True)]


def _bounded(relative: float) -> float:
    """Count an original of zeros that is not met as wholly different, so that means stay finite."""
    return 1.0 if math.isinf(relative) else relative


def _decide(times: np.ndarray, together: int, margin: float, measure: str) -> Verdict:
    """Decide from ``times`` (pairs, 2), seconds in order of time; a block is at first about one round."""
    sequence = RatioSequence(block=together)
    sequence.update(np.log(times[:, 0] / times[:, 1]))
    return verdict(sequence, margin, measure=measure)


def _ratio(estimate: Estimate | None) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})" if estimate else ""


@contextmanager
def _bar(title: str, shown: bool) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on stderr; ``disable=None`` lets tqdm hide it where stderr is no terminal."""
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=1.0, desc=title, bar_format=layout, disable=None if shown else True) as bar:

        def report(share: float) -> None:
            bar.update(share - bar.n)

        yield report
