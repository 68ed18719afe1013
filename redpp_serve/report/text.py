"""The terminal summary. The page (`report.html`) shows the same rows by the same helpers."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from redpp_serve.report.charts import frontier_points, thinned
from redpp_serve.report.formats import (
    DASH,
    bits,
    count,
    dig,
    error,
    exact,
    milliseconds,
    number,
    of,
    percent,
    printable,
    quotient,
    rate,
    shape,
    shorten,
    size,
    times,
)

WIDTH = 110
NAMES_SHOWN = 12  # names listed under one reason before "and N more"
POINTS_SHOWN = 5  # of the frontier; report.html has all


class Row(NamedTuple):
    """One line of the summary, formatted."""

    label: str
    original: str
    pruned: str
    ratio: str


class _Quantity(NamedTuple):
    label: str
    path: tuple[str, ...]
    show: Callable[[Any], str]
    always: bool = False  # shown with dashes even when nobody measured it
    speedup: str = ""  # key of the interval in report["speedup"]


_QUANTITIES = (
    _Quantity("parameters", ("parameters",), count, always=True),
    _Quantity("MACs", ("macs",), count, always=True),
    _Quantity("multiplications", ("multiplications",), count, always=True),
    _Quantity("additions", ("additions",), count, always=True),
    _Quantity("stored bytes", ("bytes",), size, always=True),
    _Quantity("accuracy", ("accuracy",), percent),
    _Quantity("handler p50", ("handler_ms", "p50"), milliseconds, speedup="handler_p50"),
    _Quantity("handler p99", ("handler_ms", "p99"), milliseconds, speedup="handler_p99"),
    _Quantity("latency p50", ("latency_ms", "p50"), milliseconds, speedup="end_to_end_p50"),
    _Quantity("latency p95", ("latency_ms", "p95"), milliseconds, speedup="end_to_end_p95"),
    _Quantity("latency p99", ("latency_ms", "p99"), milliseconds, speedup="end_to_end_p99"),
    _Quantity("throughput", ("throughput_rps",), rate, speedup="throughput"),
)


def _ratio(quantity: _Quantity, before: Any, after: Any, speedup: Any) -> str:
    if number(dig(speedup, "ratio")) is not None:
        low, high = number(dig(speedup, "low")), number(dig(speedup, "high"))
        interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
        return times(speedup["ratio"]) + interval
    if quantity.label == "accuracy":
        old, new = number(before), number(after)
        return DASH if old is None or new is None else f"{100 * (new - old):+.2f} points"
    return times(quotient(after, before) if quantity.label == "throughput" else quotient(before, after))


def summary_rows(report: Mapping[str, Any]) -> list[Row]:
    """Original | pruned | ratio. Costs always; accuracy and serving numbers only where the report has them."""
    rows = []
    for quantity in _QUANTITIES:
        before, after = (dig(report, side, *quantity.path) for side in ("original", "pruned"))
        speedup = dig(report, "speedup", quantity.speedup) if quantity.speedup else None
        if quantity.always or any(number(v) is not None for v in (before, after, dig(speedup, "ratio"))):
            ratio = _ratio(quantity, before, after, speedup)
            rows.append(Row(quantity.label, quantity.show(before), quantity.show(after), ratio))
    return rows


def hash_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(quantity, predicted, predicted bound, measured) for the hashing stage."""
    keys = ("predicted_error_typical", "predicted_error_bound", "measured_error")
    typical, bound, measured = (error(dig(report, "hash", key)) for key in keys)
    predicted, found = (percent(dig(report, "hash", key)) for key in ("predicted_ratio", "measured_ratio"))
    return [
        ("relative output error", typical, bound, measured),
        ("multiplications removed by splitting", predicted, DASH, found),
    ]


def bound_note(report: Mapping[str, Any]) -> str:
    """Whether the measured error respects the predicted bound; '' when either is unknown."""
    bound, measured = (number(dig(report, "hash", key)) for key in ("predicted_error_bound", "measured_error"))
    if bound is None or measured is None:
        return ""
    return "The measured error is " + ("within the bound." if measured <= bound else "ABOVE the predicted bound.")


def verify_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(check, result) of the verification stage, and the agreement of the served answers where measured."""
    rows = [
        ("exact merging, relative error", error(dig(report, "verify", "merge_exact"))),
        ("leaving out unread channels, relative error", error(dig(report, "verify", "narrow_exact"))),
        ("exact splitting, relative error", error(dig(report, "verify", "split_exact"))),
        ("pruned against original, relative output error", error(dig(report, "verify", "output_error"))),
        ("same top-1 class", percent(dig(report, "verify", "agreement"))),
    ]
    if number(dig(report, "agreement", "top1")) is not None:
        rows.append(("same top-1 class, served answers", percent(dig(report, "agreement", "top1"))))
    return rows


def verify_title(report: Mapping[str, Any]) -> str:
    images = number(dig(report, "verify", "images"))
    return "verification" + ("" if images is None else f" ({images:.0f} held-out inputs)")


def reasons(layers: Iterable[Any]) -> dict[str, list[str]]:
    """Reason -> names of the layers whose channels were left alone, most frequent reason first."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if reason := printable(dig(layer, "merge", "reason") or ""):
            groups.setdefault(reason, []).append(shorten(dig(layer, "name") or DASH, 60))
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _columns(rows: Sequence[Sequence[str]], left: int = 1, indent: str = "") -> list[str]:
    """Rows of equal length as aligned lines: the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = ((c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows)
    return [(indent + "  ".join(row)).rstrip() for row in cells]


def _left_alone(layers: Sequence[Any]) -> list[str]:
    if not (groups := reasons(layers)):
        return []
    lines = ["", f"channels left alone: {sum(map(len, groups.values()))} of {len(layers)} layers"]
    for reason, names in groups.items():
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        lines += textwrap.wrap(f"{reason}:", WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += textwrap.wrap(
            ", ".join(names[:NAMES_SHOWN]) + more,
            WIDTH,
            initial_indent="    ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
    return lines


def _frontier(report: Mapping[str, Any]) -> list[str]:
    """At most six lines: a head, then points from the most expensive on."""
    if not (points := frontier_points(report)):
        return []
    shown = thinned(points, POINTS_SHOWN)
    head = "frontier" if len(shown) == len(points) else f"frontier ({len(shown)} of {len(points)} points)"
    timed = any(point.latency is not None for point in points)
    rows = [(head, "MACs", *(["latency"] if timed else []), "error")]
    rows += [("", p.cost, *([p.time] if timed else []), error(p.error)) for p in shown]
    labels = ["flag", *(point.label for point in shown)]
    return ["", *(f"{line}  {shorten(label, 30)}" for line, label in zip(_columns(rows), labels))]


def package_summary(report: Mapping[str, Any]) -> str:
    """What `package` prints at the end, in at most 110 columns and without a final newline.

    Args:
        report: the content of report.json; any key may be missing or None.
    """
    by = f"redpp-serve {dig(report, 'tool', 'version') or DASH}"
    table = _columns([("", "original", "pruned", "ratio"), *summary_rows(report)])
    title = shorten(f"{dig(report, 'name') or 'model'}: original and pruned by {by}", WIDTH)
    lines = [title, "", *table, *_frontier(report)]
    if dig(report, "hash"):
        how = ", ".join(str(part) for key in ("method", "target") if (part := dig(report, "hash", key)))
        lines += ["", shorten(f"hashing ({how or DASH})", WIDTH)]
        lines += _columns([("", "predicted", "at most", "measured"), *hash_rows(report)], indent="  ")
        lines += [f"  {note}"] if (note := bound_note(report)) else []
    if dig(report, "verify") or dig(report, "agreement"):
        lines += ["", verify_title(report), *_columns(verify_rows(report), indent="  ")]
    for stage in dig(report, "stages") or []:
        if dig(stage, "status") in ("skipped", "failed"):
            line = printable(f"{stage['status']}: {dig(stage, 'name')} ({dig(stage, 'reason') or 'no reason given'})")
            lines += ["", *textwrap.wrap(line, WIDTH, subsequent_indent="  ")]
    lines += _left_alone(dig(report, "layers") or [])
    if verdict := dig(report, "verdict"):
        lines += ["", *textwrap.wrap(printable(f"verdict: {verdict}"), WIDTH, subsequent_indent="  ")]
    return "\n".join(lines)


def _layer_cells(layer: Any) -> tuple[str, ...]:
    after, kept, channels = dig(layer, "pruned_shape"), dig(layer, "merge", "kept"), dig(layer, "merge", "channels")
    inspected = number(kept) is None and number(channels) is not None  # and nothing has been narrowed
    return (
        shorten(dig(layer, "name") or DASH, 40),
        shorten(dig(layer, "op") or DASH, 9),
        shape(dig(layer, "shape")),
        shape(after) if after != dig(layer, "shape") else DASH,
        count(dig(layer, "parameters")),
        count(dig(layer, "macs")),
        exact(dig(layer, "hash", "values")),
        bits(dig(layer, "hash", "entropy")),
        error(dig(layer, "hash", "error")),
        *((DASH, DASH) if inspected else (of(kept, channels), error(dig(layer, "error")))),
        *((exact(channels), "no" if dig(layer, "merge", "reason") else "yes") if inspected else (DASH, DASH)),
    )


def layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """One line per layer, at most 110 columns; columns nobody filled are left out. Then the layers left alone."""
    if not layers:
        return "no layers with weights"
    measured = ("values", "bits", "RMS", "kept", "error")
    head = ("layer", "op", "shape", "pruned to", "params", "MACs", *measured, "channels", "narrowable")
    body = [_layer_cells(layer) for layer in layers]
    used = [i for i in range(len(head)) if any(row[i] != DASH for row in body)]
    rows, left = [[row[i] for i in used] for row in (head, *body)], sum(i < 2 for i in used)
    if (excess := max(map(len, _columns(rows, left))) - WIDTH) > 0:
        names = max(len(row[0]) for row in rows) - excess
        rows = [[shorten(row[0], max(names, 12)), *row[1:]] for row in rows]
    return "\n".join([*_columns(rows, left), *_left_alone(layers)])
