"""Rows of text that both the terminal and the page show: figures, hashing, checks, frontier, stages and kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from redpp_serve.errors import printable
from redpp_serve.report.data import (
    ChoiceRecord,
    EngineRecord,
    Family,
    Figures,
    FrontierPoint,
    GainRecord,
    Layer,
    PlanRecord,
    Ratio,
    Report,
    SizeRecord,
    Verify,
)
from redpp_serve.report.formats import (
    DASH,
    count,
    error,
    milliseconds,
    number,
    percent,
    quotient,
    rate,
    seconds,
    share,
    shorten,
    size,
    times,
)


class Row(NamedTuple):
    """One figure of both versions."""

    label: str
    original: str
    pruned: str
    ratio: str


class _Quantity(NamedTuple):
    """A figure: how it is read and shown, and its key in the report's ``speedup``."""

    label: str
    read: Callable[[Figures], Any]
    show: Callable[[Any], str]
    speedup: str = ""


_COSTS = (  # shown with dashes even where they are unknown
    _Quantity("parameters", lambda f: f.parameters, count),
    _Quantity("MACs", lambda f: f.macs, count),
    _Quantity("multiplications", lambda f: f.multiplications, count),
    _Quantity("additions", lambda f: f.additions, count),
    _Quantity("stored bytes", lambda f: f.bytes, size),
)
_MEASURED = (
    _Quantity("accuracy", lambda f: f.accuracy, percent),
    _Quantity("handler p50", lambda f: (f.handler_ms or {}).get("p50"), milliseconds, "handler_p50"),
    _Quantity("handler p99", lambda f: (f.handler_ms or {}).get("p99"), milliseconds, "handler_p99"),
    _Quantity("latency p50", lambda f: (f.latency_ms or {}).get("p50"), milliseconds, "end_to_end_p50"),
    _Quantity("latency p95", lambda f: (f.latency_ms or {}).get("p95"), milliseconds, "end_to_end_p95"),
    _Quantity("latency p99", lambda f: (f.latency_ms or {}).get("p99"), milliseconds, "end_to_end_p99"),
    _Quantity("throughput", lambda f: f.throughput_rps, rate, "throughput"),
)


def summary_rows(report: Report) -> list[Row]:
    """Return the figures of both versions with their ratios; accuracy and serving figures only where they are known."""
    rows = []
    for quantity in (*_COSTS, *_MEASURED):
        before, after = map(quantity.read, report.versions)
        speedup = (report.speedup or {}).get(quantity.speedup)
        known = before is not None or after is not None or (speedup is not None and speedup.ratio is not None)
        if known or quantity in _COSTS:
            ratio = _ratio(quantity.label, before, after, speedup)
            rows.append(Row(quantity.label, quantity.show(before), quantity.show(after), ratio))
    return rows


def _ratio(label: str, before: float | None, after: float | None, speedup: Ratio | None) -> str:
    if speedup is not None and speedup.ratio is not None:
        return _interval(speedup)
    if label == "accuracy":
        return DASH if before is None or after is None else f"{100 * (after - before):+.2f} points"
    return times(quotient(after, before) if label == "throughput" else quotient(before, after))


def hash_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Return (quantity, predicted, predicted bound, measured) for hashing."""
    found = report.hash
    if found is None:
        return []
    typical, bound = error(found.predicted_error_typical), error(found.predicted_error_bound)
    return [
        ("relative output error", typical, bound, error(found.measured_error)),
        ("multiplications removed by splitting", percent(found.predicted_ratio), DASH, percent(found.measured_ratio)),
    ]


def bound_note(report: Report) -> str:
    """Say whether the measured error respects the predicted bound; return '' where either is unknown."""
    found = report.hash
    if found is None or found.predicted_error_bound is None or found.measured_error is None:
        return ""
    within = found.measured_error <= found.predicted_error_bound
    return "The measured error is " + ("within the bound." if within else "ABOVE the predicted bound.")


_CHECKS: tuple[tuple[str, Callable[[Verify], str]], ...] = (
    ("exact merging, relative error", lambda v: error(v.merge_exact)),
    ("leaving out unread channels, relative error", lambda v: error(v.narrow_exact)),
    ("exact splitting, relative error", lambda v: error(v.split_exact)),
    ("pruned against original, relative output error", lambda v: error(v.output_error)),
    ("same top-1 class", lambda v: percent(v.agreement)),
)


def verify_rows(report: Report) -> list[tuple[str, str]]:
    """Return (check, result) of the verification, and the agreement of the served answers where it was measured."""
    rows = [(label, show(report.verify) if report.verify else DASH) for label, show in _CHECKS]
    families = (report.verify and report.verify.families) or []
    heads = dict.fromkeys(family.output for family in families)
    for head in heads:
        mine = [family for family in families if family.output == head]
        if len(heads) > 1:
            worst = max((family.error for family in mine if family.error is not None), default=None)
            rows.append((f"  output {printable(head or DASH)}", error(worst)))
        indent = "  " * min(len(heads), 2)
        rows += [(f"{indent}on {printable(x.family or DASH)}", error(x.error) + _same(x)) for x in mine]
    if report.verify and report.verify.known is False:
        why = "the families differ by more than a factor of two"
        why = why if report.verify.output_error is not None else "nothing tells which integers the network reads"
        rows.append(("error on real inputs", f"unknown: {why}"))
    if report.agreement and report.agreement.top1 is not None:
        rows.append(("same top-1 class, served answers", percent(report.agreement.top1)))
    return rows


def _same(family: Family) -> str:
    """Format an agreement with its interval; one that is complete as the least that it proves."""
    if family.of is None or family.same is None or family.low is None or family.high is None:
        return ""
    if family.same == family.of:
        return f"; same class on {family.same:.0f} of {family.of:.0f}, at least {percent(family.low)}"
    return f"; same class on {percent(family.same / family.of)} [{100 * family.low:.0f}, {100 * family.high:.0f}]"


def verify_title(report: Report) -> str:
    """Return the heading of `verify_rows`, with the number of inputs."""
    images = report.verify and report.verify.images
    return "verification" + ("" if images is None else f" ({images:.0f} held-out inputs)")


def left_alone(layers: Iterable[Layer]) -> dict[str, list[str]]:
    """Return reason -> names of the layers whose channels were left alone for it, the most frequent reason first."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if reason := printable((layer.merge and layer.merge.reason) or ""):
            found.setdefault(reason, []).append(shorten(layer.name or DASH, 60))
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def frontier_points(report: Report) -> list[FrontierPoint]:
    """Return the frontier's points, the most expensive first; those of unknown cost last."""
    points = report.frontier.points if report.frontier else []
    return sorted(points, key=lambda point: -(-1.0 if point.macs_ratio is None else point.macs_ratio))


def thinned(points: Sequence[FrontierPoint], limit: int) -> list[FrontierPoint]:
    """Return at most ``limit`` (2 or more) points in order: both ends, the chosen one, and others spread evenly."""
    if len(points) <= limit:
        return list(points)
    last = len(points) - 1
    kept = {round(k * last / (limit - 1)) for k in range(limit)}
    chosen = next((index for index, point in enumerate(points) if point.chosen), 0)
    if chosen not in kept:  # it takes the place of the nearest point that is no end
        inner = [k for k in kept if k not in (0, last)] or [last]
        kept.remove(min(inner, key=lambda k: abs(k - chosen)))
        kept.add(chosen)
    return [points[index] for index in sorted(kept)]


def frontier_table(points: Sequence[FrontierPoint]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the frontier's table; columns that no point fills are left out."""
    head = ["flag", "MACs", "latency", "error", "agreement", "predicted error"]
    rows = [
        [
            (printable(p.flag or "") or DASH) + (" (chosen)" if p.chosen else ""),
            count(p.macs) + ("" if p.macs_ratio is None else f" ({share(p.macs_ratio)})"),
            _latency(p),
            error(p.error),
            percent(p.agreement),
            error(p.predicted_error),
        ]
        for p in points
    ]
    return _filled(head, rows, always=("flag", "MACs", "error"))


def _latency(point: FrontierPoint) -> str:
    """Format a latency as a share of the original's, with its interval: 61.0 % [59.2, 62.7]."""
    low, high = point.latency_low, point.latency_high
    known = point.latency_ratio is not None and low is not None and high is not None
    return share(point.latency_ratio) + (f" [{100 * low:.1f}, {100 * high:.1f}]" if known else "")  # type: ignore[operator]


def share_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of what each stage changed; columns that no stage fills are left out.

    The change of the error is to the stage before it; for the first one to the original, whose error is 0.
    """
    head = ["stage", "error after it", "change", "same top-1 class", "MACs", "accuracy", "time"]
    rows = []
    before: float | None = 0.0
    for stage in report.stages_share:
        known = stage.error is not None and before is not None
        rows.append(
            [
                printable(stage.stage or DASH),
                error(stage.error),
                f"{100 * (stage.error - before):+.2f} points" if known else DASH,  # type: ignore[operator]
                percent(stage.agreement),
                count(stage.macs),
                percent(stage.accuracy),
                seconds(stage.seconds),
            ]
        )
        before = stage.error
    return _filled(head, rows, always=("stage",))


def _filled(head: list[str], rows: list[list[str]], always: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    used = [i for i, name in enumerate(head) if name in always or any(row[i] != DASH for row in rows)]
    return [head[i] for i in used], [[row[i] for i in used] for row in rows]


class KernelRow(NamedTuple):
    """Equal layers at one batch size, the kernel that runs them, and the times of all candidates."""

    layer: str
    input: str
    batch: str
    kernel: str
    source: str
    dense: str
    chosen: str
    others: str


_WHY = {  # source of a choice -> why it is dense
    "rule": "dense without timing: no other kernel was worth it",
    "budget": "dense: the time for planning was over",
    "network": "dense: the whole network was not faster with the kernel that won alone",
}


def kernel_rows(plan: PlanRecord) -> list[KernelRow]:
    """Return a row for each set of equal layers that had a choice, in the network's order."""
    alike: dict[str, list[ChoiceRecord]] = {}
    for choice in plan.choices:
        if choice.times:
            key = repr([choice.shape, _bucket(choice), choice.kernel, choice.source, sorted(choice.times.items())])
            alike.setdefault(key, []).append(choice)
    return [_kernel_row(choices[0], len(choices) - 1) for choices in alike.values()]


def _kernel_row(choice: ChoiceRecord, more: int) -> KernelRow:
    others = [
        f"{printable(name)} {_time(value)}"
        for name, value in choice.times.items()
        if name not in ("dense", choice.kernel)
    ]
    return KernelRow(
        shorten(choice.name or DASH, 48) + (f" and {more} alike" if more else ""),
        printable(choice.shape),
        _bucket(choice),
        printable(choice.kernel),
        printable(choice.source),
        _time(choice.times.get("dense")),
        _time(choice.times.get(choice.kernel or "")),
        ", ".join(others) or DASH,
    )


def kernel_summary(plan: PlanRecord) -> list[str]:
    """Return what no row says: layers of each kernel, their times in all, what was not timed, how the plan was made."""
    found = {each: [c for c in plan.choices if _bucket(c) == each] for each in map(_bucket, plan.choices)}
    lines = [*engine_lines(plan), *(_batch_line(each, found[each]) for each in sorted(found, key=_by_batch))]
    sources = Counter(choice.source for choice in plan.choices)
    lines += [
        f"{sources[source]} of {len(plan.choices)} choices {why}" for source, why in _WHY.items() if sources[source]
    ]
    if any(map(_beaten, plan.choices)):
        lines.append("a kernel with a lower median than dense is not taken where it is not surely 3 % faster")
    made = f"plan made in {seconds(plan.seconds)} on {shorten(plan.device or DASH, 60)}, {printable(plan.precision)}"
    return [*lines, made]


class EngineRow(NamedTuple):
    """The engine that serves a batch size, its time, and the times of the others that were tried."""

    batch: str
    engine: str
    time: str
    others: str


def engine_rows(plan: PlanRecord) -> list[EngineRow]:
    """Return a row for each batch size for which an engine was chosen."""
    rows = []
    for choice in plan.engines or ():
        name = f"{choice.engine or DASH} {choice.precision or ''}".strip()
        timed = sorted((value, key) for key, value in choice.times.items() if value is not None)
        others = ", ".join(f"{printable(key)} {_time(value)}" for value, key in timed if key != name)
        rows.append(EngineRow(_bucket(choice), printable(name), _time(choice.times.get(name)), others or DASH))
    return rows


def engine_lines(plan: PlanRecord) -> list[str]:
    """Return how long building took in each engine, and why others were left out."""
    built = ", ".join(f"{printable(name)} {seconds(value)}" for name, value in sorted((plan.built or {}).items()))
    left = [f"{printable(name)} left out: {printable(why)}" for name, why in (plan.left_out or {}).items()]
    return [f"built in: {built}", *left] if built else left


def gain_rows(report: Report) -> list[tuple[str, ...]]:
    """Return batch, step, before, after and ratio for each gain that was measured."""
    return [
        (printable(g.batch), printable(g.step), printable(g.before), printable(g.after), _interval(g))
        for g in report.gains or ()
    ]


def size_rows(report: Report) -> list[tuple[str, ...]]:
    """Return sizes, pairs, both latencies and their ratio for each of the planned sizes."""
    return [
        (printable(s.sizes), count(s.pairs), milliseconds(s.original), milliseconds(s.pruned), _interval(s))
        for s in report.by_sizes or ()
    ]


def _interval(found: GainRecord | SizeRecord | Ratio) -> str:
    known = found.low is not None and found.high is not None
    return (
        DASH if found.ratio is None else times(found.ratio) + (f" [{found.low:.2f}, {found.high:.2f}]" if known else "")
    )


def precision_rows(report: Report) -> list[tuple[str, ...]]:
    """Return version, precision, error, agreement and a note for each precision that was measured."""
    rows: list[tuple[str, ...]] = []
    for version, found in (report.precisions or {}).items():
        for name, record in found.items():
            unknown = "unknown on real inputs: families differ by more than a factor of two"
            notes = [record.note or "", unknown if record.known is False else ""]
            rows.append((version, name, error(record.error), percent(record.agreement), "; ".join(filter(None, notes))))
    return rows


def _bucket(choice: ChoiceRecord | EngineRecord) -> str:
    """Return what a choice serves: a batch size, and sizes of the inputs where they vary."""
    return " ".join(printable(each) for each in (choice.batch, *(f"{k}={n}" for k, n in (choice.sizes or {}).items())))


def _by_batch(bucket: str) -> tuple[int, str]:
    batch, *sizes = bucket.split(" ")
    return int(batch) if batch.isdecimal() else 0, " ".join(sizes)


def _batch_line(batch: str, choices: Sequence[ChoiceRecord]) -> str:
    counts = Counter(printable(choice.kernel) for choice in choices)
    line = f"batch {batch}: " + ", ".join(f"{n} {kernel}" for kernel, n in sorted(counts.items()))
    pairs = [(c.times.get("dense"), c.times.get(c.kernel or "")) for c in choices]
    timed = [(dense, chosen) for dense, chosen in pairs if dense is not None and chosen is not None]
    if not timed:
        return line
    dense, chosen = map(sum, zip(*timed, strict=True))
    return f"{line}; {len(timed)} timed, which take {_time(dense)} with dense kernels, {_time(chosen)} as chosen"


def _beaten(choice: ChoiceRecord) -> bool:
    """Tell whether another kernel has a lower time than the dense one, which stayed after timing."""
    dense = choice.times.get("dense")
    if dense is None or choice.kernel != "dense" or choice.source not in ("measured", "cached", "shipped"):
        return False
    return any(value is not None and value < dense for value in choice.times.values())


def _time(value: float | None) -> str:
    found = number(value)
    return DASH if found is None else f"{1e6 * found:.1f} us" if found < 1e-3 else f"{1e3 * found:.2f} ms"
