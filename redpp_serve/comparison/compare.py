"""Compare the original and the pruned version on a live server: the figures, and the verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
from redpp_serve.comparison.outputs import classes, difference
from redpp_serve.errors import RedppError
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
        top1: share of inputs with the same largest output; None where an output is no vector of classes.
        max_abs_difference: largest difference of any output value.
        mean_relative_difference: mean over inputs of |original - pruned| / |original| (Euclidean).
        inputs: number of inputs that both versions answered.
    """

    top1: float | None
    max_abs_difference: float
    mean_relative_difference: float
    inputs: int


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
class Comparison:
    """The result. Ratios in ``speedup`` are above 1 where the pruned version is faster, None where not measured."""

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

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, texts and lists, fit for ``json.dumps``."""
        return {
            "original": self.original.to_json(),
            "pruned": self.pruned.to_json(),
            "agreement": asdict(self.agreement),
            "speedup": {k: x and {"ratio": x.value, "low": x.low, "high": x.high} for k, x in self.speedup.items()},
            "verdict": self.verdict.text,
            "verdict_kind": self.verdict.kind,
            "verdict_handler": self.handler_verdict and self.handler_verdict.text,
            "verdict_handler_kind": self.handler_verdict and self.handler_verdict.kind,
            "pairs": self.pairs,
            "concurrency": self.concurrency,
            "seconds": self.seconds,
            "margin": self.margin,
            "open_loop": self.open_loop and self.open_loop.to_json(),
            "gains": [gain.to_json() for gain in self.gains],
        }

    def to_text(self) -> str:
        """Return a table for the terminal that ends with the verdict."""
        rows = [("", self.original.label, self.pruned.label, "ratio (95 % interval)"), *self._rows()]
        verdicts = [x.text + "." for x in (self.handler_verdict, self.verdict) if x]
        errors = [f"{x.label} failed first with: {x.first_error}" for x in (self.original, self.pruned) if x.errors]
        head = f"{self.pairs} pairs, {self.concurrency} requests at a time, {self.seconds:g} s"
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
        return (
            f"Outputs: {top1}mean relative difference {same.mean_relative_difference:.3g}, "
            f"largest difference {same.max_abs_difference:.3g}"
        )


@dataclass(frozen=True)
class _Measured:
    """The raw results.

    Attributes:
        pairs: replies of both versions to one input, in order of time.
        good: those of them that both answered.
        throughput: of both versions, in alternating blocks.
        open_loop: None where no rate was asked for.
    """

    pairs: list[tuple[Reply, Reply]]
    good: list[tuple[Reply, Reply]]
    throughput: BlockThroughput
    open_loop: OpenLoop | None


def compare_endpoints(
    original: Endpoint,
    pruned: Endpoint,
    payloads: Sequence[Payload],
    options: ComparisonOptions = ComparisonOptions(),
    *,
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
        progress: show bars on stderr when it is a terminal.

    Raises:
        RedppError: a version answered nothing, with the text it sent instead; or their outputs differ in shape.
    """
    load = Load(original, pruned, payloads, options.concurrency, options.seed)
    for endpoint in load.endpoints:
        preflight(endpoint, payloads)
    measured = _measure(load, options, progress)
    agreement = _agreement(measured.good)
    rng = np.random.default_rng([options.seed, 2])
    block = max(options.concurrency, round(len(measured.good) ** (1 / 3)))
    arms = [_arm(load, measured, version, rng, block) for version in (0, 1)]
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
        verdict=_decide(latencies, options, "end to end"),
        handler_verdict=_decide(handlers, options, "in the handler") if handlers.size else None,
        pairs=len(measured.good),
        concurrency=options.concurrency,
        seconds=options.duration,
        margin=options.margin,
        open_loop=measured.open_loop,
    )


def _measure(load: Load, options: ComparisonOptions, progress: bool) -> _Measured:
    paired_s = PAIRED_SHARE * options.duration
    other_s = options.duration - paired_s
    with _bar("paired latency", progress) as report:
        pairs = run_paired(load, None, paired_s, report)
    for endpoint, replies in zip(load.endpoints, zip(*pairs, strict=True), strict=True):
        require_success(endpoint, replies)
    good = [(a, b) for a, b in pairs if a.ok and b.ok]
    if not good:
        raise RedppError("no input was answered by both", "at least one", "send inputs that both versions accept")
    _require_equal_shapes(good)
    block_s, blocks = plan_blocks(other_s, float(np.median([(a.latency_s, b.latency_s) for a, b in good])))
    with _bar("throughput", progress) as report:
        throughput = run_blocks(replace(load, seed=load.seed + 1), block_s, blocks, report)
    open_loop = None
    if options.rate is not None:
        with _bar(f"latency at {options.rate:g}/s", progress) as report:
            open_loop = measure_open_loop(replace(load, seed=load.seed + 2), options.rate, other_s, report)
    return _Measured(pairs, good, throughput, open_loop)


def _arm(load: Load, measured: _Measured, version: int, rng: np.random.Generator, block: int) -> Arm:
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
        accuracy=_accuracy(good, load.payloads),
    )


def _accuracy(replies: list[Reply], payloads: Sequence[Payload]) -> float | None:
    """Return the share of labelled inputs, each counted once, whose largest output is the label."""
    hits = {}
    for reply in replies:
        label, top = payloads[reply.payload].label, None if reply.outputs is None else classes(reply.outputs)
        if label is not None and top is not None:
            hits[reply.payload] = top == [label]
    return float(np.mean(list(hits.values()))) if hits else None


def _require_equal_shapes(pairs: list[tuple[Reply, Reply]]) -> None:
    for a, b in _outputs(pairs):
        if a.shape != b.shape:
            raise RedppError(
                f"the two endpoints answer with outputs of shapes {a.shape} and {b.shape}",
                "two versions of one network",
                "check the URLs of both endpoints",
            )


def _outputs(pairs: list[tuple[Reply, Reply]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return both versions' outputs, once per input."""
    last = {a.payload: (a.outputs, b.outputs) for a, b in pairs}
    return [(a, b) for a, b in last.values() if a is not None and b is not None]


def _agreement(pairs: list[tuple[Reply, Reply]]) -> Agreement:
    outputs = _outputs(pairs)
    found = [difference([a], [b]) for a, b in outputs]
    same = [each.top1 for each in found if each.top1 is not None]
    # An original of zeros that is not met counts as wholly different: the mean stays finite.
    relative = [1.0 if math.isinf(each.relative) else each.relative for each in found]
    largest = max((float(np.abs(a - b).max()) for a, b in outputs if a.size), default=0.0)
    return Agreement(float(np.mean(same)) if same else None, largest, float(np.mean(relative)), len(relative))


def _decide(times: np.ndarray, options: ComparisonOptions, measure: str) -> Verdict:
    """Decide from ``times`` (pairs, 2), seconds in order of time; a block is at first about one round."""
    sequence = RatioSequence(block=options.concurrency)
    sequence.update(np.log(times[:, 0] / times[:, 1]))
    return verdict(sequence, options.margin, measure=measure)


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
