"""Which smaller networks could be had, for what error: a chart to choose a point from, and what each stage changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redpp_serve.report import markup
from redpp_serve.report.charts import svg
from redpp_serve.report.formats import dig, error, printable
from redpp_serve.report.markup import text_of
from redpp_serve.report.points import Point, frontier_points, share_rows

HEIGHT, TOP, FLOOR = 300, 58, 250  # pixels; x is in percent, so that lines stretch with the page and text does not
LEFT, RIGHT = 16.0, 95.0  # percent; the labels of the horizontal lines stand to the left
ERROR_AXIS, MACS_AXIS, LATENCY_AXIS = (
    "relative output error", "MACs, share of the original's", "latency, share of the original's"
)  # fmt: skip


class Mark(NamedTuple):
    """A point of a chart: cost as a share (x) with an interval or None, relative error (y), and its words."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    chosen: bool = False
    label: str = ""


def frontier_chart(identity: str, title: str, axes: tuple[str, str], marks: Sequence[Mark]) -> str:
    """Error against a cost: points in order of cost joined by lines, the chosen one larger and labelled.

    Args:
        identity: unique on the page; the ids of title and description start with it.
        axes: what x and y are.
        marks: without any the chart is ''. The error's axis starts at zero; that of the cost does not.
    """
    marks = sorted((m for m in marks if math.isfinite(m.x) and math.isfinite(m.y)), key=lambda m: m.x)
    if not marks:
        return ""
    low = min(m.x if m.low is None else m.low for m in marks)
    high = max(m.x if m.high is None else m.high for m in marks)
    columns = _ticks(low, high, 5) if low < high else [low - 0.1, low, low + 0.1]
    lines = _ticks(0.0, max(0.0, *(m.y for m in marks)), 4)

    def at_x(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - columns[0]) / (columns[-1] - columns[0])

    def at_y(y: float) -> float:
        return FLOOR - (FLOOR - TOP) * y / lines[-1]

    body = [f'<text class="soft" x="0" y="12">{text_of(axes[1])}</text>',
            f'<text class="soft" x="100%" y="{HEIGHT - 8}" text-anchor="end">{text_of(axes[0])}</text>']  # fmt: skip
    for y in lines:
        css = "rule" if y else "axis"
        body.append(f'<line class="{css}" x1="0" x2="100%" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>'
                    f'<text class="soft" x="0" y="{at_y(y) - 4:.1f}">{_share(y)}</text>')  # fmt: skip
    for x in columns:
        body.append(f'<line class="axis" x1="{at_x(x):.2f}%" x2="{at_x(x):.2f}%" y1="{FLOOR}" y2="{FLOOR + 5}"/>'
                    f'<text class="soft" x="{at_x(x):.2f}%" y="{FLOOR + 19}" text-anchor="middle">'
                    f"{_share(x)}</text>")  # fmt: skip
    for a, b in zip(marks, marks[1:]):
        body.append(f'<line class="join" x1="{at_x(a.x):.2f}%" y1="{at_y(a.y):.1f}"'
                    f' x2="{at_x(b.x):.2f}%" y2="{at_y(b.y):.1f}"/>')  # fmt: skip
    # the chosen one last: nothing is drawn over it
    body += [_mark(mark, at_x, at_y) for mark in sorted(marks, key=lambda m: m.chosen)]
    return svg(identity, title, _description(axes, marks), f'width="100%" height="{HEIGHT}"', "".join(body))


def _mark(mark: Mark, at_x: Any, at_y: Any) -> str:
    x, y = at_x(mark.x), at_y(mark.y)
    words = f"{_share(round(mark.x, 4))}, error {error(mark.y)}"
    parts = []
    if mark.low is not None and mark.high is not None:
        parts.append(f'<line class="whisker" x1="{at_x(mark.low):.2f}%" x2="{at_x(mark.high):.2f}%"'
                     f' y1="{y:.1f}" y2="{y:.1f}"/>')  # fmt: skip
    css, radius = ("point chosen", "6.5") if mark.chosen else ("point", "4")
    tip = ", ".join(part for part in (words, mark.label) if part)
    parts.append(f'<circle class="{css}" cx="{x:.2f}%" cy="{y:.1f}" r="{radius}">'
                 f"<title>{text_of(tip)}</title></circle>")  # fmt: skip
    if mark.chosen:
        # Over the plot, where no line runs; turned inwards, so that it stays inside a narrow chart.
        anchor = "start" if x < 30 else "end" if x > 70 else "middle"
        parts.insert(0, f'<line class="guide" x1="{x:.2f}%" x2="{x:.2f}%" y1="{TOP - 22}" y2="{y:.1f}"/>')
        parts.append(f'<text class="name" x="{x:.2f}%" y="{TOP - 27}" text-anchor="{anchor}">'
                     f"chosen: {text_of(words)}</text>")  # fmt: skip
    return "".join(parts)


def _description(axes: tuple[str, str], marks: Sequence[Mark]) -> str:
    ends = f"from {_share(marks[0].x)} with {error(marks[0].y)} to {_share(marks[-1].x)} with {error(marks[-1].y)}"
    chosen = next((f"; chosen: {_share(m.x)} with {error(m.y)}" for m in marks if m.chosen), "")
    return f"{axes[1]} against {axes[0]} for {len(marks)} networks, {ends}{chosen}."


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose the range in at most `most` steps."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [step * k for k in range(first, max(last, first + 1) + 1)]


def frontier_section(report: Mapping[str, Any]) -> str:
    """The card with one chart or two and the table of all points; '' where the report has no frontier."""
    if not (points := frontier_points(report)):
        return ""
    axes = dig(report, "frontier", "axes")
    names = [printable(dig(axes, key) or default) for key, default in
             (("macs_ratio", MACS_AXIS), ("error", ERROR_AXIS), ("latency_ratio", LATENCY_AXIS))]  # fmt: skip
    by_macs = [Mark(p.macs_ratio, p.error, None, None, p.chosen, p.flag)
               for p in points if p.macs_ratio is not None and p.error is not None]  # fmt: skip
    by_time = [Mark(p.latency, p.error, p.low, p.high, p.chosen, p.flag)
               for p in points if p.latency is not None and p.error is not None]  # fmt: skip
    figures = [_figure("frontier-macs", "Error against MACs", (names[0], names[1]), by_macs),
               _figure("frontier-latency", "Error against latency", (names[2], names[1]), by_time)]  # fmt: skip
    where = printable(dig(report, "frontier", "latency_on") or "")
    notes = ["Each point is a network that can be had with its flag; errors are measured on held-out inputs,"
             " before distillation and final codebooks."]
    if by_time:
        notes.append(f"Latencies are measured in turns with the original{f' on {where}' if where else ''};"
                     " in brackets the 95 % interval.")  # fmt: skip
    charts = f'<div class="panels">{"".join(figures)}</div>' if any(figures) else ""
    return markup.section("Frontier: error against cost", charts, _point_table(points), markup.note(" ".join(notes)))


def _figure(identity: str, title: str, axes: tuple[str, str], marks: Sequence[Mark]) -> str:
    chart = frontier_chart(identity, title, axes, marks)
    return f"<figure><figcaption>{text_of(title)}</figcaption>{chart}</figure>" if chart else ""


def _point_table(points: Sequence[Point]) -> str:
    timed, predicted = (any(getattr(p, key) is not None for p in points) for key in ("latency", "predicted"))
    head = ["flag", "MACs", *(["latency"] if timed else []), "error", *(["predicted error"] if predicted else [])]
    rows = []
    for point in points:
        cells = [point.label, point.cost, *([point.time] if timed else []), error(point.error),
                 *([error(point.predicted)] if predicted else [])]  # fmt: skip
        rows.append([markup.Cell(cell, css="best" if point.chosen else "") for cell in cells])
    return markup.table("", head, rows, "t" + "n" * (len(head) - 1))


def share_section(report: Mapping[str, Any]) -> str:
    """The card with each stage's part in the result; '' where nobody measured it."""
    head, rows = share_rows(report)
    if not rows:
        return ""
    table = markup.table("", head, rows, "t" + "n" * (len(head) - 1))
    note = "Error and agreement of the network after the stage, on held-out inputs; changes are to the row before."
    return markup.section("What each stage changed", table, markup.note(note))

