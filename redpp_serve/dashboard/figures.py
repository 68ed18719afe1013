"""The page's tables and tiles: formatted text, every number with its unit, missing ones in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from redpp_serve.dashboard.history import Window
from redpp_serve.dashboard.scraping import VARIANTS, Key
from redpp_serve.dashboard.speedups import (
    BATCH,
    HANDLER,
    NETWORK,
    Ratio,
    equal_batch_ratio,
    network_ratio,
    percentile_ratio,
)
from redpp_serve.dashboard.words import span
from redpp_serve.report.data import Report
from redpp_serve.report.formats import (
    DASH,
    count,
    exact,
    milliseconds,
    percent,
    printable,
    quotient,
    rate,
    shorten,
    size,
    times,
)
from redpp_serve.statistics.intervals import Quantile

NO_TRAFFIC = "no traffic"
Row = list[str]  # text, or text and a note below it after a line break
PERCENTILES = (50, 95, 99)


def speedup_tiles(window: Window) -> list[dict[str, str]]:
    """Label, value and note of the three speed-ups."""
    found = (
        ("handler p50", percentile_ratio(window, 0.5), "all batches, within bucket precision"),
        ("handler mean, equal batch size", equal_batch_ratio(window), "exact; sizes seen in both versions"),
        ("network time, mean", network_ratio(window), "the network alone, without parsing and reply"),
    )
    return [
        {"label": label, "value": times(ratio.value) if ratio else NO_TRAFFIC, "note": _ratio_note(ratio, note)}
        for label, ratio, note in found
    ]


def _ratio_note(ratio: Ratio | None, note: str) -> str:
    if ratio is None:
        return "needs requests to both versions"
    return f"{milliseconds(1000 * ratio.original)} against {milliseconds(1000 * ratio.pruned)}; {note}"


def latency_rows(window: Window) -> list[Row]:
    """Percentiles of the handler's time with their buckets, exact means of handler and network."""
    rows = []
    for percentile in PERCENTILES:
        found = [window.quantile(HANDLER, variant, percentile / 100) for variant in VARIANTS]
        ratio = percentile_ratio(window, percentile / 100)
        rows.append([f"p{percentile}", *map(_percentile, found), times(ratio and ratio.value)])
    for label, name in (("mean", HANDLER), ("network alone, mean", NETWORK)):
        means = [window.mean(name, variant) for variant in VARIANTS]
        shown = [_known(mean, lambda v: milliseconds(1000 * v)) for mean in means]
        rows.append([label, *shown, times(quotient(*means))])
    return rows


def _percentile(found: Quantile | None) -> str:
    if found is None:
        return NO_TRAFFIC
    value = f"above {milliseconds(1000 * found.low)}" if math.isinf(found.high) else milliseconds(1000 * found.value)
    return f"{value}\nbucket {span(found.low, found.high, 1000, 'ms')}"


def _known(value: float | None, show: Callable[[float], str]) -> str:
    return NO_TRAFFIC if value is None else show(value)


def traffic_rows(window: Window) -> list[Row]:
    """Throughput, batches and outcomes of both versions."""

    def rates(name: str, detail: str = "") -> list[str]:
        busy = [window.details("redpp_requests_total", variant) for variant in VARIANTS]
        return [rate(window.rate(name, v, detail)) if busy[i] else NO_TRAFFIC for i, v in enumerate(VARIANTS)]

    sizes = [_known(window.mean(BATCH, variant), lambda v: f"{v:.2f} requests") for variant in VARIANTS]
    return [
        ["throughput, answered", *rates("redpp_requests_total", "ok")],
        ["batches", *rates(f"{HANDLER}_count")],
        ["mean batch size", *sizes],
        ["bad requests (400)", *(_outcome(window, variant, "bad_request") for variant in VARIANTS)],
        ["errors (500)", *(_outcome(window, variant, "error") for variant in VARIANTS)],
    ]


def _outcome(window: Window, variant: str, outcome: str) -> str:
    outcomes = window.details("redpp_requests_total", variant)
    total, found = sum(outcomes.values()), outcomes.get(outcome, 0.0)
    if not total:
        return NO_TRAFFIC
    return f"{exact(found)} of {exact(total)}" + (f"\n{percent(found / total)} of requests" if found else "")


def worker_rows(window: Window, gauges: Mapping[Key, float]) -> list[Row]:
    """CPU in the window and memory now; a row for each GPU."""
    spent = [window.rate("redpp_worker_cpu_seconds_total", variant) for variant in VARIANTS]
    rows = [
        ["CPU", *("idle" if not value else f"{100 * value:.1f} % of a core" for value in spent)],
        ["resident memory", *(_memory(gauges, Key("redpp_worker_resident_bytes", v)) for v in VARIANTS)],
    ]
    devices = {key.detail for key in gauges if key.name == "redpp_device_memory_bytes"} - {"cpu", ""}
    for device in sorted(devices):
        held = [_memory(gauges, Key("redpp_device_memory_bytes", variant, device)) for variant in VARIANTS]
        rows.append([f"tensors on {shorten(device, 20)}", *held])
    return rows


def _memory(gauges: Mapping[Key, float], key: Key) -> str:
    return size(gauges[key]) if key in gauges else "unknown"


def model_rows(gauges: Mapping[Key, float], report: Report) -> list[Row]:
    """What the versions cost, with the share that is left."""
    rows = []
    for label, before, after, show in _costs(gauges, report):
        share = quotient(after, before)
        rows.append([label, show(before), show(after), DASH if share is None else f"{100 * share:.1f} % left"])
    return rows


def _costs(
    gauges: Mapping[Key, float], report: Report
) -> Iterator[tuple[str, float | None, float | None, Callable[[Any], str]]]:
    """Label, the versions' values, and how to show them: as the workers say, else as report.json has it."""
    for label, key, show in (
        ("parameters", "parameters", count),
        ("MACs of one input", "macs", count),
        ("stored weights", "bytes", size),
    ):
        told = [gauges.get(Key(f"redpp_model_{key}", variant)) for variant in VARIANTS]
        kept = [getattr(figures, key) for figures in report.versions]
        before, after = (kept[i] if told[i] is None else told[i] for i in (0, 1))
        yield label, before, after, show


def left_shares(gauges: Mapping[Key, float], report: Report) -> dict[str, Any]:
    """What the pruned network still has, in percent of the original."""
    found = [(label, quotient(after, before)) for label, before, after, _ in _costs(gauges, report)]
    known = [(label, share) for label, share in found if share is not None]
    return {
        "labels": [label for label, _ in known],
        "original": [100.0 for _ in known],
        "pruned": [rounded(100 * share) for _, share in known],
    }


def batch_shares(window: Window) -> dict[str, Any]:
    """How many percent of each version's batches held how many requests, by the histogram's buckets."""
    counts = [_per_bucket(window.buckets(BATCH, variant)) for variant in VARIANTS]
    edges = sorted({edge for each in counts for edge, n in each.items() if n > 0})
    known = sorted({edge for each in counts for edge in each})
    shares = {
        v: [rounded(100 * each.get(e, 0.0) / sum(each.values())) if each else None for e in edges]
        for v, each in zip(VARIANTS, counts)
    }
    return {"labels": [_size_label(edge, known) for edge in edges], **shares}


def _per_bucket(cumulative: Mapping[float, float]) -> dict[float, float]:
    found, below = {}, 0.0
    for edge in sorted(cumulative):
        found[edge], below = max(cumulative[edge] - below, 0.0), cumulative[edge]
    return found if any(found.values()) else {}


def _size_label(edge: float, known: Sequence[float]) -> str:
    i = known.index(edge)
    low = known[i - 1] if i else 0.0
    if math.isinf(edge):
        return f"above {low:.0f}"
    return f"{edge:.0f}" if edge - low <= 1 else f"{low + 1:.0f} to {edge:.0f}"


def rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def compare_card(report: Report, when: str) -> dict[str, Any]:
    """The verdict of the last `compare`, from the folder's report.json."""
    if not report.verdict:
        text = "Not compared yet: redpp-serve compare sends the same inputs to both versions."
        return {"text": text, "rows": [], "note": ""}
    rows = []
    for label, key in (
        ("handler p50", "handler_p50"),
        ("end-to-end p50", "end_to_end_p50"),
        ("end-to-end p99", "end_to_end_p99"),
        ("throughput", "throughput"),
    ):
        found = (report.speedup or {}).get(key)
        if found and found.ratio is not None:
            known = found.low is not None and found.high is not None
            rows.append([label, times(found.ratio), f"{found.low:.2f} to {found.high:.2f}" if known else DASH])
    if report.agreement and report.agreement.top1 is not None:
        rows.append(["same top-1 class", percent(report.agreement.top1), DASH])
    return {"text": printable(report.verdict), "rows": rows, "note": f"report.json of {when}" if when else ""}
