"""Original against pruned on a live server: what was measured, and the verdict in words."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy
from tqdm import tqdm

from redpp_serve.comparison.client import Endpoint, Payload, Reply
from redpp_serve.comparison.load import (
    OpenLoop,
    Throughput,
    measure_open_loop,
    plan_blocks,
    preflight,
    require_success,
    run_blocks,
    run_paired,
)
from redpp_serve.errors import RedppError
from redpp_serve.statistics.intervals import Estimate, percentile_interval, ratio_interval
from redpp_serve.statistics.sequences import RatioSequence
from redpp_serve.statistics.verdicts import Verdict, verdict

PAIRED_SHARE = 0.6
LATENCY_PERCENTILES, HANDLER_PERCENTILES = (50, 95, 99), (50, 99)


@dataclass(frozen=True)
class Arm:
    """One arm's numbers. Percentiles ("p50", ...) are estimates in milliseconds; None where the server gave none."""

    label: str
    latency_ms: dict[str, Estimate]
    handler_ms: dict[str, Estimate] | None
    throughput_rps: float
    requests: int
    errors: int
    first_error: str
    accuracy: float | None

    def to_json(self) -> dict[str, Any]:
        """Percentiles as numbers, their intervals beside them under ``*_interval``."""
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
    """How alike the outputs are, over ``inputs`` different inputs.

    Attributes:
        top1: share of inputs with the same largest output; None where an output is no vector of classes.
        max_abs_difference: largest difference of any output value.
        mean_relative_difference: mean over inputs of |original - pruned| / |original| (Euclidean).
        inputs: how many inputs both arms answered.
    """

    top1: float | None
    max_abs_difference: float
    mean_relative_difference: float
    inputs: int


@dataclass(frozen=True)
class Comparison:
    """The result. Ratios in ``speedup`` are above 1 where the pruned network is faster; None where not measured."""

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

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, texts and lists, fit for ``json.dumps``."""
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
        }

    def to_text(self) -> str:
        """A table for the terminal that ends with the verdict."""
        rows = [("", self.original.label, self.pruned.label, "ratio (95 % interval)"), *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
        ]
        verdicts = [x.text + "." for x in (self.handler_verdict, self.verdict) if x]
        errors = [f"{x.label} failed first with: {x.first_error}" for x in (self.original, self.pruned) if x.errors]
        head = f"{self.pairs} pairs, {self.concurrency} requests at a time, {self.seconds:g} s"
        return "\n".join([head, "", *table, "", *errors, self._agreement_line(), *verdicts])

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

    def _agreement_line(self) -> str:
        same = self.agreement
        top1 = "" if same.top1 is None else f"same class on {same.top1:.2%} of {same.inputs} inputs, "
        return (
            f"Outputs: {top1}mean relative difference {same.mean_relative_difference:.3g}, "
            f"largest difference {same.max_abs_difference:.3g}"
        )


def compare_endpoints(
    original: Endpoint,
    pruned: Endpoint,
    payloads: Sequence[Payload],
    *,
    concurrency: int = 4,
    seconds: float = 20.0,
    margin: float = 0.02,
    seed: int = 0,
    rate_rps: float | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure two live endpoints with the same inputs.

    Args:
        original: the baseline arm.
        pruned: the candidate arm.
        payloads: inputs, each sent to both arms; with class labels the accuracy is measured too.
        concurrency: requests in flight at a time.
        seconds: time of the whole measurement, without warm-up: 60 % paired latencies, 40 % throughput blocks.
        margin: relative difference in speed that counts as none.
        seed: of the random order and of the bootstrap.
        rate_rps: also measure latency at this many requests per second, for another 40 % of ``seconds``.
        progress: show bars on stderr when it is a terminal.

    Raises:
        RedppError: an arm answered nothing, with the text it sent instead; or the arms' outputs differ in shape.
    """
    if margin <= 0:
        raise RedppError(f"a margin of {margin:g}", "a relative difference above 0", "pass a margin such as 0.02")
    for endpoint in (original, pruned):
        preflight(endpoint, payloads)
    paired_s = PAIRED_SHARE * seconds
    with _bar("paired latency", progress) as report:
        pairs = run_paired(original, pruned, payloads, concurrency, None, paired_s, seed, report)
    for endpoint, replies in zip((original, pruned), zip(*pairs, strict=True), strict=True):
        require_success(endpoint, replies)
    good = [(a, b) for a, b in pairs if a.ok and b.ok]
    if not good:
        raise RedppError("no input was answered by both arms", "at least one", "send inputs that both versions accept")
    agreement = _agreement(good)
    latencies = numpy.array([(a.latency_s, b.latency_s) for a, b in good])
    block_s, blocks = plan_blocks(seconds - paired_s, float(numpy.median(latencies)))
    with _bar("throughput", progress) as report:
        served = run_blocks(original, pruned, payloads, concurrency, block_s, blocks, seed + 1, report)
    open_loop = None
    if rate_rps is not None:
        with _bar(f"latency at {rate_rps:g}/s", progress) as report:
            open_loop = measure_open_loop(original, pruned, payloads, rate_rps, seconds - paired_s, seed + 2, report)
    rng, block = numpy.random.default_rng([seed, 2]), max(concurrency, round(len(good) ** (1 / 3)))
    handlers = numpy.array([(a.handler_s, b.handler_s) for a, b in good if a.handler_s and b.handler_s])
    arms = [
        _arm(endpoint, [pair[i] for pair in pairs], payloads, count, rng, block)
        for i, (endpoint, count) in enumerate(((original, served.a), (pruned, served.b)))
    ]

    def ratio(times: numpy.ndarray) -> Estimate:
        return ratio_interval(times[:, 0], times[:, 1], 0.5, rng, block=block)

    return Comparison(
        original=arms[0],
        pruned=arms[1],
        agreement=agreement,
        speedup={
            "handler_p50": ratio(handlers) if handlers.size else None,
            "end_to_end_p50": ratio(latencies),
            "throughput": served.ratio,
        },
        verdict=_decide(latencies, concurrency, margin, "end to end"),
        handler_verdict=_decide(handlers, concurrency, margin, "in the handler") if handlers.size else None,
        pairs=len(good),
        concurrency=concurrency,
        seconds=seconds,
        margin=margin,
        open_loop=open_loop,
    )


def _arm(
    endpoint: Endpoint,
    replies: list[Reply],
    payloads: Sequence[Payload],
    served: Throughput,
    rng: numpy.random.Generator,
    block: int,
) -> Arm:
    def percentiles(seconds: list[float], which: tuple[int, ...]) -> dict[str, Estimate]:
        milliseconds = 1000 * numpy.asarray(seconds)
        return {f"p{q}": percentile_interval(milliseconds, q / 100, rng, block=block) for q in which}

    good = [reply for reply in replies if reply.ok]
    handler = [reply.handler_s for reply in good if reply.handler_s]
    return Arm(
        label=endpoint.label,
        latency_ms=percentiles([reply.latency_s for reply in good], LATENCY_PERCENTILES),
        handler_ms=percentiles(handler, HANDLER_PERCENTILES) if handler else None,
        throughput_rps=served.rps,
        requests=len(replies) + served.completed + served.failed,
        errors=len(replies) - len(good) + served.failed,
        first_error=next((reply.error for reply in replies if not reply.ok), served.error),
        accuracy=_accuracy(good, payloads),
    )


def _accuracy(replies: list[Reply], payloads: Sequence[Payload]) -> float | None:
    """Share of labelled inputs, each counted once, whose largest output is the label."""
    hits = {}
    for reply in replies:
        label, top = payloads[reply.payload].label, _top(reply.outputs)
        if label is not None and top is not None:
            hits[reply.payload] = top == [label]
    return float(numpy.mean(list(hits.values()))) if hits else None


def _top(outputs: numpy.ndarray | None) -> list[int] | None:
    """Classes of an output (classes,) or (rows, classes); None for anything else."""
    if outputs is None or outputs.ndim not in (1, 2) or outputs.shape[-1] < 2:
        return None
    return numpy.atleast_1d(outputs.argmax(axis=-1)).tolist()


def _agreement(pairs: list[tuple[Reply, Reply]]) -> Agreement:
    """Compare outputs once per input."""
    same, largest, relative = [], 0.0, []
    for a, b in {a.payload: (a.outputs, b.outputs) for a, b in pairs}.values():
        assert a is not None and b is not None, "a successful reply has outputs"
        if a.shape != b.shape:
            raise RedppError(
                f"the two endpoints answer with outputs of shapes {a.shape} and {b.shape}",
                "two versions of one network",
                "check the URLs of both endpoints",
            )
        if a.size:
            largest = max(largest, float(numpy.abs(a - b).max()))
        scale = float(numpy.linalg.norm(a))
        relative.append(float(numpy.linalg.norm(a - b)) / scale if scale else float((a != b).any()))
        if _top(a) is not None:
            same.append(_top(a) == _top(b))
    return Agreement(float(numpy.mean(same)) if same else None, largest, float(numpy.mean(relative)), len(relative))


def _decide(times: numpy.ndarray, concurrency: int, margin: float, measure: str) -> Verdict:
    """``times`` (pairs, 2): seconds of original and pruned, in order of time; a block is at first about one round."""
    sequence = RatioSequence(block=concurrency)
    sequence.update(numpy.log(times[:, 0] / times[:, 1]))
    return verdict(sequence, margin, measure=measure)


def _ratio(estimate: Estimate | None) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})" if estimate else ""


@contextmanager
def _bar(title: str, shown: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr; ``disable=None`` lets tqdm hide it where stderr is no terminal."""
    layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
    with tqdm(total=1.0, desc=title, bar_format=layout, disable=None if shown else True) as bar:
        yield lambda share: bar.update(share - bar.n)
