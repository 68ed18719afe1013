"""The page's headline, tiles, tables and cards as text: every number with its unit, missing ones in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from redpp_serve.dashboard.window import (
    BATCH,
    HANDLER,
    NETWORK,
    REQUESTS,
    Ratio,
    Window,
    equal_batch_ratio,
    network_ratio,
    noise,
    percentile_ratio,
)
from redpp_serve.errors import printable
from redpp_serve.metrics_reader import Key
from redpp_serve.report.data import Report
from redpp_serve.report.formats import DASH, count, exact, milliseconds, percent, quotient, rate, shorten, size, times
from redpp_serve.variants import NAMES

NO_TRAFFIC = "no traffic"
Row = list[str]  # text, or text and a note below it after a line break
_EVEN = 0.02  # ratios nearer to 1 are not called faster or slower
_SOURCES = {"shadow": "shadow, same requests", "split": "split traffic"}
_VERDICTS = {
    "faster": "The pruned model is faster",
    "slower": "The pruned model is slower",
    "equivalent": "No difference that matters",
    "undecided": "Undecided so far",
}
_ADVICE = {
    "promote": "Promote the pruned model",
    "rollback": "Roll back to the original",
    "wait": "Wait for more requests",
}


@dataclass(frozen=True)
class Shown:
    """All that the page is made of.

    Attributes:
        model: served name.
        window: gains of the counters.
        values: the latest values, of gauges and counters.
        report: the folder's report.json.
        report_time: when it was written.
        server: the kind of server that runs, ``torchserve`` or ``triton``; None where it is unknown.
        problems: metrics URL -> why the last scrape failed; empty if it did not.
        serving: URLs that have shown one of the model's versions.
        others: names of other models at these URLs.
        down_s: seconds since a server of the model answered.
    """

    model: str
    window: Window
    values: Mapping[Key, float] = field(default_factory=dict)
    report: Report = field(default_factory=lambda: Report.from_json({}))
    report_time: str = ""
    server: str | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
    serving: AbstractSet[str] = frozenset()
    others: AbstractSet[str] = frozenset()
    down_s: float = 0.0

    def of_both(self, name: str, detail: str = "") -> list[float | None]:
        """Return the latest value of a gauge for each version."""
        return [self.values.get(Key(name, variant, detail)) for variant in NAMES]


def page_data(shown: Shown) -> dict[str, Any]:
    """Return the page's content but for its curves, in plain JSON types."""
    window = shown.window
    costs = list(_costs(shown))
    left = [(cost.label, rounded(100 * cost.left)) for cost in costs if cost.left is not None]
    return {
        "model": shown.model,
        "span": round(window.span, 1),
        "headline": headline(shown)._asdict(),
        "sources": [
            {"url": url, "up": not why, "text": f"down: {printable(shorten(why, 120))}" if why else "answers"}
            for url, why in shown.problems.items()
        ],
        "speedups": _speedup_tiles(window),
        "latency": _latency_rows(window),
        "traffic": _traffic_rows(window),
        "workers": _worker_rows(shown),
        "network": [cost.row() for cost in costs],
        "left": {
            "labels": [label for label, _ in left],
            "original": [100.0 for _ in left],
            "pruned": [share for _, share in left],
        },
        "batches": _batch_shares(window),
        "experiment": _experiment(shown),
        "compare": _comparison(shown),
    }


def rounded(value: float | None) -> float | None:
    """Keep four digits; None for what JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _span(low: float, high: float, scale: float = 1.0, unit: str = "") -> str:
    """Format '2.00 to 2.83 ms', or 'above 4096 ms' without an upper end."""
    start = f"{scale * low:.{2 if scale * low < 100 else 0}f}"
    end = f"above {start}" if math.isinf(high) else f"{start} to {scale * high:.{2 if scale * low < 100 else 0}f}"
    return f"{end} {unit}".rstrip()


class Headline(NamedTuple):
    """One sentence that says what the numbers say; ``state`` is faster, slower, even, waiting or down."""

    text: str
    detail: str
    state: str


def headline(shown: Shown) -> Headline:
    """Return the first that applies: no answer, no metrics, no traffic, traffic of one version, which is faster."""
    window = shown.window
    why = [why for url, why in shown.problems.items() if url in (shown.serving or shown.problems)]
    if all(why):
        since = f"For {shown.down_s:.0f} s: " if shown.down_s >= 1 else ""
        detail = f"{since}{shorten(why[0], 120) if why else 'no address'}. The page goes on by itself when it is back."
        return Headline("The server does not answer", detail, "down")
    if not shown.serving:
        names = ", ".join(shorten(name, 40) for name in sorted(shown.others)[:5])
        detail = "The address answers, without a version of this model. They show up as soon as they are served."
        detail = f"The address has metrics of {names}." if names else detail
        return Headline(f"No metrics of {shorten(shown.model, 60)} so far", detail, "waiting")
    last = f"last {window.span:.0f} s" if window.span < 120 else f"last {window.span / 60:.0f} min"
    batches = [window.total(f"{HANDLER}_count", variant) for variant in NAMES]
    busy = [variant for variant, total in zip(NAMES, batches, strict=True) if total > 0]
    if not busy:
        when = f"in the {last}" if window.span >= 1 else "yet"
        return Headline(f"No traffic {when}", "Requests to both versions show which is faster.", "waiting")
    if len(busy) == 1:
        p50 = window.quantile(HANDLER, busy[0], 0.5)
        time, answers = milliseconds(p50 and 1000 * p50.value), rate(window.rate(REQUESTS, busy[0], "ok"))
        return Headline(
            f"Only the {busy[0]} model had traffic ({last})",
            f"Handler time p50 {time}, {answers} answers. Requests to both versions show which is faster.",
            "waiting",
        )
    return _faster(window, last, f"From {exact(batches[0])} and {exact(batches[1])} batches.")


def _faster(window: Window, last: str, counts: str) -> Headline:
    mean, error = equal_batch_ratio(window), noise(window)
    if mean and error is not None and abs(math.log(mean.value)) < 2 * error:
        return Headline(
            f"No clear difference between the versions ({last})",
            f"{_pair('Mean handler time at equal batch size', mean)} At {mean.value:.2f} times, give or "
            f"take {200 * error:.1f} %, the difference can be noise. {counts}",
            "even",
        )
    original, pruned = (window.quantile(HANDLER, variant, 0.5) for variant in NAMES)
    ratio = percentile_ratio(window, 0.5)
    bounds = (ratio.low or 0.0, math.inf if ratio.high is None else ratio.high) if ratio else (0.0, math.inf)
    open_ended = bounds[0] <= 1 <= bounds[1]  # the percentiles' buckets do not tell which is faster
    if mean and original and pruned and open_ended:
        ratio, basis, measure = mean, f"mean at equal batch size, {last}", "Mean handler time"
        precision = f"Within bucket precision the factor of the p50 is {_span(*bounds)}, which tells neither."
        if original.low == pruned.low:
            where = _span(original.low, original.high, 1000, "ms")
            precision = f"The p50 of both lie in one bucket, {where}, and cannot be told apart."
    elif ratio:
        basis, measure = f"p50, {last}", "Handler time p50"
        precision = f"Within bucket precision the factor is {_span(*bounds)}."
        if open_ended:
            detail = f"{_pair(measure, ratio)} {precision} {counts}"
            return Headline(f"No clear difference between the versions ({basis})", detail, "even")
    else:
        return Headline("The handler's times are too short to compare", counts, "waiting")
    detail = f"{_pair(measure, ratio)} {precision} {counts}"
    if abs(ratio.value - 1) < _EVEN:
        return Headline(f"Both versions answer equally fast ({basis})", detail, "even")
    state = "faster" if ratio.value > 1 else "slower"
    return Headline(f"The pruned model answers {ratio.value:.2f} times as fast ({basis})", detail, state)


def _pair(what: str, ratio: Ratio) -> str:
    return f"{what}: original {milliseconds(1000 * ratio.original)}, pruned {milliseconds(1000 * ratio.pruned)}."


def _speedup_tiles(window: Window) -> list[dict[str, str]]:
    tiles = []
    for label, ratio, note in (
        ("handler p50", percentile_ratio(window, 0.5), "all batches, within bucket precision"),
        ("handler mean, equal batch size", equal_batch_ratio(window), "exact; sizes seen in both versions"),
        ("network time, mean", network_ratio(window), "the network alone, without parsing and reply"),
    ):
        value, text = NO_TRAFFIC, "needs requests to both versions"
        if ratio:
            value = times(ratio.value)
            text = f"{milliseconds(1000 * ratio.original)} against {milliseconds(1000 * ratio.pruned)}; {note}"
        tiles.append({"label": label, "value": value, "note": text})
    return tiles


def _latency_rows(window: Window) -> list[Row]:
    rows = []
    for percentile in (50, 95, 99):
        ratio = percentile_ratio(window, percentile / 100)
        cells = [_percentile(window, variant, percentile / 100) for variant in NAMES]
        rows.append([f"p{percentile}", *cells, times(ratio and ratio.value)])
    for label, name in (("mean", HANDLER), ("network alone, mean", NETWORK)):
        means = [window.mean(name, variant) for variant in NAMES]
        cells = [NO_TRAFFIC if mean is None else milliseconds(1000 * mean) for mean in means]
        rows.append([label, *cells, times(quotient(*means))])
    return rows


def _percentile(window: Window, variant: str, share: float) -> str:
    found = window.quantile(HANDLER, variant, share)
    if found is None:
        return NO_TRAFFIC
    value = f"above {milliseconds(1000 * found.low)}" if math.isinf(found.high) else milliseconds(1000 * found.value)
    return f"{value}\nbucket {_span(found.low, found.high, 1000, 'ms')}"


def _traffic_rows(window: Window) -> list[Row]:
    outcomes = [window.details(REQUESTS, variant) for variant in NAMES]

    def row(label: str, cells: Iterable[str]) -> Row:
        return [label, *(cell if each else NO_TRAFFIC for cell, each in zip(cells, outcomes, strict=True))]

    def share(of: dict[str, float], outcome: str) -> str:
        total, found = sum(of.values()), of.get(outcome, 0.0)
        return f"{exact(found)} of {exact(total)}" + (f"\n{percent(found / total)} of requests" if found else "")

    means = [window.mean(BATCH, variant) for variant in NAMES]
    return [
        row("throughput, answered", (rate(window.rate(REQUESTS, variant, "ok")) for variant in NAMES)),
        row("batches", (rate(window.rate(f"{HANDLER}_count", variant)) for variant in NAMES)),
        ["mean batch size", *(NO_TRAFFIC if mean is None else f"{mean:.2f} requests" for mean in means)],
        row("bad requests (400)", (share(each, "bad_request") for each in outcomes)),
        row("errors (500)", (share(each, "error") for each in outcomes)),
    ]


def _worker_rows(shown: Shown) -> list[Row]:
    """Show CPU in the window, memory now, and a row for each GPU."""

    def memory(label: str, name: str, detail: str = "") -> Row:
        return [label, *("unknown" if value is None else size(value) for value in shown.of_both(name, detail))]

    spent = [shown.window.rate("redpp_worker_cpu_seconds_total", variant) for variant in NAMES]
    devices = {key.detail for key in shown.values if key.name == "redpp_device_memory_bytes"} - {"cpu", ""}
    return [
        ["CPU", *("idle" if not value else f"{100 * value:.1f} % of a core" for value in spent)],
        memory("resident memory", "redpp_worker_resident_bytes"),
        *(memory(f"tensors on {shorten(each, 20)}", "redpp_device_memory_bytes", each) for each in sorted(devices)),
    ]


class _Cost(NamedTuple):
    """A figure of both networks, and how to show it."""

    label: str
    original: float | None
    pruned: float | None
    show: Callable[[Any], str]

    @property
    def left(self) -> float | None:
        return quotient(self.pruned, self.original)

    def row(self) -> Row:
        left = DASH if self.left is None else f"{100 * self.left:.1f} % left"
        return [self.label, self.show(self.original), self.show(self.pruned), left]


def _costs(shown: Shown) -> Iterator[_Cost]:
    """Yield the networks' figures as the workers say, or else as report.json has them."""
    shown_as = {
        "parameters": ("parameters", count),
        "macs": ("MACs of one input", count),
        "bytes": ("stored weights", size),
    }
    for key, (label, show) in shown_as.items():
        told = zip(shown.of_both(f"redpp_model_{key}"), shown.report.versions, strict=True)
        original, pruned = (getattr(kept, key) if value is None else value for value, kept in told)
        yield _Cost(label, original, pruned, show)


def _batch_shares(window: Window) -> dict[str, Any]:
    """Return the percentage of each version's batches that held how many requests, by the histogram's buckets."""
    counts = [_per_bucket(window.buckets(BATCH, variant)) for variant in NAMES]
    known = sorted({edge for each in counts for edge in each})
    edges = [edge for edge in known if any(each.get(edge) for each in counts)]
    shares = {
        variant: [rounded(100 * each.get(edge, 0.0) / sum(each.values())) if each else None for edge in edges]
        for variant, each in zip(NAMES, counts, strict=True)
    }
    labels = []
    for edge in edges:
        below = known[known.index(edge) - 1] if edge != known[0] else 0.0
        several = f"above {below:.0f}" if math.isinf(edge) else f"{below + 1:.0f} to {edge:.0f}"
        labels.append(f"{edge:.0f}" if edge - below <= 1 else several)
    return {"labels": labels, **shares}


def _per_bucket(cumulative: Mapping[float, float]) -> dict[float, float]:
    found, below = {}, 0.0
    for edge in sorted(cumulative):
        found[edge], below = max(cumulative[edge] - below, 0.0), cumulative[edge]
    return found if any(found.values()) else {}


def _comparison(shown: Shown) -> dict[str, Any]:
    """Return the verdict of the last `compare` on the server that runs, from the folder's report.json."""
    verdict, found, when = _compared(shown)
    if not verdict:
        on = f" on {shown.server}" if shown.server else ""
        text = f"Not compared{on} yet: redpp-serve compare sends the same inputs to both versions."
        return {"text": text, "rows": [], "note": ""}
    rows = []
    labels = {
        "handler_speedup": "handler p50",
        "speedup": "end-to-end p50",
        "throughput_gain": "throughput",
        "agreement": "same top-1 class",
    }
    for name, label in labels.items():
        value, low, high = found.get(name, (None, None, None))
        if value is not None:
            interval = DASH if low is None or high is None else f"{low:.2f} to {high:.2f}"
            rows.append([label, percent(value) if name == "agreement" else times(value), interval])
    return {"text": printable(verdict), "rows": rows, "note": when}


_Figures = dict[str, tuple[float | None, float | None, float | None]]


def _compared(shown: Shown) -> tuple[str | None, _Figures, str]:
    """Return verdict, figures by name, and where and when: of the newest comparison on the server, sweeps left out."""
    report = shown.report
    if report.comparisons:
        alone = [x for x in report.comparisons if len(x.cells) == 1 and shown.server in (None, x.server)]
        if not alone:
            return None, {}, ""
        (cell,) = alone[0].cells
        note = f"on {printable(alone[0].server or DASH)}, {printable(alone[0].time or DASH)} UTC"
        return cell.verdict, {name: (x.value, x.low, x.high) for name, x in cell.figures.items()}, note
    keys = {"handler_p50": "handler_speedup", "end_to_end_p50": "speedup", "throughput": "throughput_gain"}
    ratios = {keys[key]: x for key, x in (report.speedup or {}).items() if x and key in keys}
    found: _Figures = {name: (x.ratio, x.low, x.high) for name, x in ratios.items()}
    if report.agreement:
        found["agreement"] = (report.agreement.top1, None, None)
    return report.verdict, found, f"report.json of {shown.report_time}" if shown.report_time else ""


def _experiment(shown: Shown) -> dict[str, Any] | None:
    """Return verdict, advice, traffic share, agreement and intervals; None where no A/B test runs."""
    if not any(key.name.startswith("redpp_ab_") for key in shown.values):
        return None

    def value(name: str, detail: str = "") -> float | None:
        return shown.values.get(Key(f"redpp_ab_{name}", "", detail))

    def current(name: str, kinds: Mapping[str, str]) -> str:
        return next((kind for kind in kinds if (value(name, kind) or 0.0) >= 1), "")

    intervals = [found for source in _SOURCES if (found := _interval(source, value))]
    kind, advice = current("verdict", _VERDICTS), current("advice", _ADVICE)
    text = _VERDICTS.get(kind, "No verdict yet")
    if basis := next((each for each in intervals if _supports(each, kind)), None):
        text += f": {basis['low']:.2f} to {basis['high']:.2f} times as fast"
    told = {arm: min(max(x, 0.0), 1.0) for arm in NAMES if (x := value("traffic_ratio", arm)) is not None}
    shares = [{"arm": arm, "share": share, "text": f"{arm} {100 * share:.0f} %"} for arm, share in told.items()]
    reason = next((key.detail for key in shown.values if key.name == "redpp_ab_advice_reason"), "")
    return {
        "verdict": text,
        "kind": kind,
        "advice": _ADVICE.get(advice, "No advice yet") + (f": {printable(reason)}" if advice and reason else ""),
        "advice_kind": advice,
        "intervals": intervals,
        "shares": shares if len(shares) == len(NAMES) else [],
        "rows": _experiment_rows(shown.window, value),
    }


def _interval(source: str, value: Callable[..., float | None]) -> dict[str, Any] | None:
    low, mean, high = (value("speedup_ratio", f"{source} {bound}") for bound in ("low", "mean", "high"))
    if low is None or mean is None or high is None or min(low, mean, high) < 0:
        return None
    text = f"{mean:.2f}x ({low:.2f} to {high:.2f})"
    return {"label": _SOURCES[source], "text": text, "low": low, "mean": mean, "high": high}


def _supports(interval: Mapping[str, Any], kind: str) -> bool:
    """Tell whether a verdict can rest on an interval: with two sources, it may rest on the other one."""
    if kind in ("faster", "slower"):
        return bool(interval["low"] > 1 if kind == "faster" else interval["high"] < 1)
    return kind in _VERDICTS and bool(interval["low"] <= 1 <= interval["high"])


def _experiment_rows(window: Window, value: Callable[..., float | None]) -> list[Row]:
    sent = [window.total("redpp_ab_requests_total", "", arm) for arm in NAMES]
    parts = [f"{arm} {100 * n / sum(sent):.1f} %" for arm, n in zip(NAMES, sent, strict=True) if sum(sent)]
    rows = [["share of the requests in this window", " and ".join(parts) or "no traffic"]]
    if pairs := value("pairs_total"):
        agreement = value("agreement_ratio")
        rows.append(["pairs compared", exact(pairs)])
        rows.append(["outputs that agree", DASH if agreement is None else percent(agreement)])
    if dropped := value("dropped_total"):
        rows.append(["requests not compared, recorder busy", exact(dropped)])
    return rows
