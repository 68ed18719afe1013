"""Which smaller networks could be had, for what error: a chart to choose a point from, and what each stage changed.

The look of the report: its style sheet, and inline SVG as pure functions from numbers to a string.

Every chart is one well-formed `<svg>` with a title and a description. The two charts over layers use lengths in
percent, so bars stretch with the page while text keeps its size; the density plot scales through its view box.

The frontier and the stages' shares as a report holds them, read and put into words.

    frontier: {axes: {macs_ratio, error, latency_ratio: words on the axes}, latency_on: device, threads, batch, points: [
        {macs, macs_ratio, error, predicted_error, latency_ratio, latency_low, latency_high, chosen, flag}]}
    stages_share: [{stage, error, agreement, macs, accuracy, seconds}]

Ratios are to the original network, errors relative; every number may be missing or None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redpp_serve.report import markup
from redpp_serve.report.formats import (
    DASH,
    count,
    dig,
    error,
    number,
    of,
    percent,
    printable,
    quotient,
    seconds,
    shorten,
)
from redpp_serve.report.markup import text_of

ROW = 30  # pixels per layer: one line of text over one bar
NAME_LIMIT = 30  # characters of a layer name that fit beside its value on a narrow screen

STYLE = """
:root{color-scheme:light dark;--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
--page:#f6f7f9;--card:#fff;--text:#1d2430;--soft:#5b6675;--rule:#e1e5ea;--track:#e6eaef;--accent:#2b6cb0;--warm:#b9561a;
--good:#1f7a4d;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--page:#12161c;--card:#1a2029;--text:#e4e8ee;--soft:#9aa6b5;--rule:#2c3440;
--track:#2a323d;--accent:#6aaaf0;--warm:#e79a5f;--good:#6cc597;--bad:#f2918a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:27px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere} h2{font-size:18px;margin:0 0 10px}
p{margin:0 0 10px;overflow-wrap:anywhere} p.soft,caption,figcaption{color:var(--soft);font-size:13.5px}
section,.tiles li{background:var(--card);border:1px solid var(--rule);border-radius:10px}
section{padding:18px 20px;margin:16px 0;min-width:0}
header{margin:0 0 18px}
.verdict{border-left:4px solid var(--accent);padding:8px 14px;background:var(--card);border-radius:4px}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:0;padding:0;list-style:none}
.tiles li{flex:1 1 140px;padding:11px 13px}
.tiles b{display:block;font-size:19px;line-height:1.4;font-weight:600;white-space:nowrap}
.tiles span{display:block;color:var(--soft);font-size:12.5px;line-height:1.4}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px} .pair section{margin:0}
.pair{margin:16px 0}
.scroll{overflow:auto;max-width:100%} .tall{max-height:1400px} .scroll:focus-visible{outline:2px solid var(--accent)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums} caption{text-align:left;padding:0 0 8px}
caption span{display:block;position:sticky;left:0;width:min(100%,100vw - 62px)} .scroll+p{margin:10px 0 0}
th,td{padding:6px 12px 6px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;line-height:1.4}
tbody tr:last-child>*{border-bottom:0} thead th{color:var(--soft);font-weight:600;font-size:13px;vertical-align:bottom}
tbody th{font-weight:500} .n{text-align:right} td.n,.fixed{white-space:nowrap}
th:last-child,td:last-child{padding-right:0}
.dense{font-size:13px}
.dense tbody th{font:12.5px/1.6 var(--mono);position:sticky;left:0;background:var(--card);min-width:150px;
overflow-wrap:anywhere}
.dense td.wide{min-width:140px} td.code,span.code{font:12.5px/1.6 var(--mono);overflow-wrap:anywhere}
.done,.best{color:var(--good)} .failed,.worse{color:var(--bad)} .best,.failed,.worse{font-weight:600}
.skipped{color:var(--warm)}
figure{margin:0;min-width:0} figcaption{padding:0 0 10px;overflow-wrap:anywhere}
.grid svg{max-width:360px} .chart{padding-right:10px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr));gap:22px 20px;margin-top:14px}
summary{cursor:pointer;font-size:18px;font-weight:600} summary:focus-visible{outline:2px solid var(--accent)}
thead button{all:unset;cursor:pointer} thead button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button::after{content:" \\2191"} th[aria-sort=descending] button::after{content:" \\2193"}
@media (max-width:560px){main{padding:18px 10px 40px} section{padding:14px 12px} h1{font-size:22px} body{font-size:14px}
.dense tbody th{min-width:126px} th,td{padding-right:8px} table{font-size:13px}}
@media print{.tall{max-height:none} section{break-inside:avoid}}
svg{display:block;font:12px/1 var(--mono)}
svg text{fill:var(--text)} svg .soft{fill:var(--soft)}
svg .track{fill:var(--track)} svg .kept{fill:var(--accent)} svg .error{fill:var(--warm)}
svg .mark{fill:var(--text)} svg .area{fill:var(--accent);fill-opacity:.22}
svg .line{fill:none;stroke:var(--accent);stroke-width:1.4} svg .cells{fill:none;stroke:var(--soft);stroke-width:.5}
svg .axis{fill:none;stroke:var(--soft);stroke-width:.8} svg .modes{fill:none;stroke:var(--warm);stroke-width:1.6}
svg .rule{stroke:var(--rule)} svg .join{stroke:var(--accent);stroke-width:1.6} svg .whisker{stroke:var(--accent)}
svg .point{fill:var(--card);stroke:var(--accent);stroke-width:1.8} svg .chosen{fill:var(--warm);stroke:var(--card)}
svg .guide{stroke:var(--warm);stroke-dasharray:3 3} svg .name{font-weight:700}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:20px 36px;margin:0 0 14px}
.panels svg{overflow:visible;max-width:640px}
"""


class KeptRow(NamedTuple):
    """Channels of one layer: how many of `total` remain."""

    name: str
    kept: int | None
    total: int | None


class ErrorRow(NamedTuple):
    """Relative errors of one layer: of its output (the bar) and of its weights after hashing (the mark)."""

    name: str
    output: float | None
    weights: float | None


def svg(identity: str, title: str, description: str, size: str, body: str) -> str:
    """A picture with an accessible title and description; `body` is markup, `size` its attributes of size."""
    return (
        f'<svg {size} role="img" aria-labelledby="{identity}-t {identity}-d">'
        f'<title id="{identity}-t">{text_of(title)}</title><desc id="{identity}-d">{text_of(description)}</desc>'
        f"{body}</svg>"
    )


def _row(index: int, name: str, value: str, bars: str) -> str:
    y = index * ROW
    return (
        f'<text x="0" y="{y + 12}">{text_of(shorten(name, NAME_LIMIT))}<title>{text_of(name)}</title></text>'
        f'<text x="100%" y="{y + 12}" text-anchor="end" class="soft">{text_of(value)}</text>'
        f'<rect class="track" x="0" y="{y + 17}" width="100%" height="7" rx="2"/>{bars}'
    )


def _bar(css: str, index: int, share: float) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<rect class="{css}" x="0" y="{index * ROW + 17}" width="{width:.2f}%" height="7" rx="2"/>' if width else ""


def kept_chart(identity: str, rows: Sequence[KeptRow]) -> str:
    """One bar per layer: the share of its channels that is kept, with the two counts.

    Args:
        identity: unique on the page; the ids of title and description start with it.
        rows: layers in network order; unknown counts draw an empty track and a dash.
    """
    body = "".join(
        _row(i, row.name, of(row.kept, row.total), _bar("kept", i, quotient(row.kept, row.total) or 0.0))
        for i, row in enumerate(rows)
    )
    cut = sum(1 for row in rows if quotient(row.kept, row.total) not in (None, 1.0))
    description = f"Kept channels of {len(rows)} layers as horizontal bars; {cut} layers lost channels."
    return svg(identity, "Kept channels per layer", description, f'width="100%" height="{len(rows) * ROW}"', body)


def error_chart(identity: str, rows: Sequence[ErrorRow]) -> str:
    """One bar per layer for its output error and a mark for its weight error, on one linear scale from zero.

    Args:
        identity: unique on the page; the ids of title and description start with it.
        rows: layers in network order; an unknown error draws nothing and a dash.
    """
    known = [v for row in rows for v in (number(row.output), number(row.weights)) if v is not None]
    top = max(known, default=0.0) or 1.0
    parts = []
    for i, row in enumerate(rows):
        bars = _bar("error", i, (number(row.output) or 0.0) / top)
        if (weights := number(row.weights)) is not None:
            # The mark is 2 pixels wide: 99.5 % keeps the largest one inside the picture.
            x = 99.5 * max(weights, 0.0) / top
            bars += f'<rect class="mark" x="{x:.2f}%" y="{i * ROW + 14}" width="2" height="13"/>'
        parts.append(_row(i, row.name, f"{error(row.output)} | {error(row.weights)}", bars))
    description = f"Relative errors of {len(rows)} layers as horizontal bars; the full width is {error(top)}."
    return svg(identity, "Error per layer", description, f'width="100%" height="{len(rows) * ROW}"', "".join(parts))


def _finite(values: Any) -> list[float]:
    return [v for v in map(number, values) if v is not None] if isinstance(values, (list, tuple)) else []


def density_chart(identity: str, name: str, density: Mapping[str, Any] | None) -> str:
    """Estimated density of one layer's weights, its cells (thin lines) and codebook values (ticks under the axis).

    Args:
        identity: unique on the page; the ids of title and description start with it.
        name: the layer, for the title.
        density: x and y (points of the curve), edges (borders of the cells), modes (codebook values).

    Returns:
        The SVG, or '' when there are fewer than two points or they span nothing.
    """
    raw = zip(dig(density, "x") or [], dig(density, "y") or [])
    points = sorted((float(x), float(y)) for x, y in raw if number(x) is not None and number(y) is not None)
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return ""
    low, high, top = points[0][0], points[-1][0], max(y for _, y in points) or 1.0
    width, floor = 320.0, 110.0

    def at(x: float) -> str:
        return f"{width * (x - low) / (high - low):.1f}"

    curve = "L".join(f"{at(x)} {floor - (floor - 8) * max(y, 0.0) / top:.1f}" for x, y in points)
    edges = [x for x in _finite(dig(density, "edges")) if low <= x <= high]
    modes = [x for x in _finite(dig(density, "modes")) if low <= x <= high]
    zero = f'<text class="soft" x="{at(0.0)}" y="132" text-anchor="middle">0</text>'
    zero = zero if low + 0.2 * (high - low) < 0 < high - 0.2 * (high - low) else ""  # not over the end labels
    body = (
        f'<path class="cells" d="{"".join(f"M{at(x)} 4V{floor:.0f}" for x in edges)}"/>'
        f'<path class="area" d="M0 {floor}L{curve}L{width} {floor}Z"/><path class="line" d="M{curve}"/>'
        f'<path class="axis" d="M0 {floor}H{width}"/>'
        f'<path class="modes" d="{"".join(f"M{at(x)} {floor:.0f}v8" for x in modes)}"/>'
        f'<text class="soft" x="0" y="132">{low:.3g}</text>{zero}'
        f'<text class="soft" x="{width:.0f}" y="132" text-anchor="end">{high:.3g}</text>'
    )
    description = f"From {low:.3g} to {high:.3g}, with {len(modes)} codebook values and {len(edges)} borders of cells."
    return svg(identity, f"Weight density of {name}", description, f'viewBox="0 0 {width:.0f} 136"', body)


class Point(NamedTuple):
    """One network that could be had: its cost, what it loses, and the flag that gives it. Unknown numbers are None."""

    macs: float | None
    macs_ratio: float | None
    error: float | None
    predicted: float | None
    latency: float | None
    low: float | None
    high: float | None
    chosen: bool
    flag: str

    @property
    def cost(self) -> str:
        """MACs, and their share of the original's: 1.20 G (52.0 %)."""
        share = "" if self.macs_ratio is None else f" ({ratio(self.macs_ratio)})"
        return f"{count(self.macs)}{share}"

    @property
    def time(self) -> str:
        """Latency as a share of the original's, with its interval: 61.0 % [59.2, 62.7]."""
        if self.latency is None or self.low is None or self.high is None:
            return ratio(self.latency)
        return f"{ratio(self.latency)} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    @property
    def label(self) -> str:
        """The flag, marked on the point that was taken."""
        return (self.flag or DASH) + (" (chosen)" if self.chosen else "")


def ratio(value: float | None) -> str:
    """A share of the original's cost: 52.0 %."""
    return DASH if value is None else f"{100 * value:.1f} %"


def frontier_points(report: Mapping[str, Any]) -> list[Point]:
    """The points of ``report["frontier"]``, the most expensive first; those of unknown cost last."""
    raw = dig(report, "frontier", "points")
    keys = ("macs", "macs_ratio", "error", "predicted_error", "latency_ratio", "latency_low", "latency_high")
    found = [
        Point(*(number(item.get(key)) for key in keys), item.get("chosen") is True, printable(item.get("flag") or ""))
        for item in (raw if isinstance(raw, (list, tuple)) else ())
        if isinstance(item, Mapping)
    ]
    return sorted(found, key=lambda point: -(point.macs_ratio if point.macs_ratio is not None else -1.0))


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` (2 or more) points in their order: both ends, the chosen one, and others spread evenly."""
    if len(points) <= limit:
        return list(points)
    last = len(points) - 1
    kept = {round(k * last / (limit - 1)) for k in range(limit)}
    for index in (i for i, point in enumerate(points) if point.chosen):
        if index not in kept:  # in the place of the nearest that is no end
            inner = [k for k in kept if k not in (0, last)] or [last]
            kept.remove(min(inner, key=lambda k: abs(k - index)))
            kept.add(index)
            break
    return [points[index] for index in sorted(kept)]


def share_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of what each stage changed; without columns that no stage filled.

    The change of the error is to the stage before it, for the first to the original, whose error is 0.
    """
    raw = dig(report, "stages_share")
    stages = [row for row in (raw if isinstance(raw, (list, tuple)) else ()) if isinstance(row, Mapping)]
    before: float | None = 0.0
    rows = []
    for stage in stages:
        now = number(stage.get("error"))
        change = DASH if now is None or before is None else f"{100 * (now - before):+.2f} points"
        before = now
        rows.append(
            [
                printable(stage.get("stage") or DASH),
                error(now),
                change,
                percent(stage.get("agreement")),
                count(stage.get("macs")),
                percent(stage.get("accuracy")),
                seconds(stage.get("seconds")),
            ]
        )
    head = ["stage", "error after it", "change", "same top-1 class", "MACs", "accuracy", "time"]
    used = [i for i in range(len(head)) if i == 0 or any(row[i] != DASH for row in rows)]
    return [head[i] for i in used], [[row[i] for i in used] for row in rows]


HEIGHT, TOP, FLOOR = 300, 58, 250  # pixels; x is in percent, so that lines stretch with the page and text does not
LEFT, RIGHT = 16.0, 95.0  # percent; the labels of the horizontal lines stand to the left
ERROR_AXIS, MACS_AXIS, LATENCY_AXIS = (
    "relative output error",
    "MACs, share of the original's",
    "latency, share of the original's",
)


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

    body = [
        f'<text class="soft" x="0" y="12">{text_of(axes[1])}</text>',
        f'<text class="soft" x="100%" y="{HEIGHT - 8}" text-anchor="end">{text_of(axes[0])}</text>',
    ]
    for y in lines:
        css = "rule" if y else "axis"
        body.append(
            f'<line class="{css}" x1="0" x2="100%" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>'
            f'<text class="soft" x="0" y="{at_y(y) - 4:.1f}">{_share(y)}</text>'
        )
    for x in columns:
        body.append(
            f'<line class="axis" x1="{at_x(x):.2f}%" x2="{at_x(x):.2f}%" y1="{FLOOR}" y2="{FLOOR + 5}"/>'
            f'<text class="soft" x="{at_x(x):.2f}%" y="{FLOOR + 19}" text-anchor="middle">'
            f"{_share(x)}</text>"
        )
    for a, b in zip(marks, marks[1:]):
        body.append(
            f'<line class="join" x1="{at_x(a.x):.2f}%" y1="{at_y(a.y):.1f}"'
            f' x2="{at_x(b.x):.2f}%" y2="{at_y(b.y):.1f}"/>'
        )
    # the chosen one last: nothing is drawn over it
    body += [_mark(mark, at_x, at_y) for mark in sorted(marks, key=lambda m: m.chosen)]
    return svg(identity, title, _description(axes, marks), f'width="100%" height="{HEIGHT}"', "".join(body))


def _mark(mark: Mark, at_x: Any, at_y: Any) -> str:
    x, y = at_x(mark.x), at_y(mark.y)
    words = f"{_share(round(mark.x, 4))}, error {error(mark.y)}"
    parts = []
    if mark.low is not None and mark.high is not None:
        parts.append(
            f'<line class="whisker" x1="{at_x(mark.low):.2f}%" x2="{at_x(mark.high):.2f}%" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    css, radius = ("point chosen", "6.5") if mark.chosen else ("point", "4")
    tip = ", ".join(part for part in (words, mark.label) if part)
    parts.append(
        f'<circle class="{css}" cx="{x:.2f}%" cy="{y:.1f}" r="{radius}"><title>{text_of(tip)}</title></circle>'
    )
    if mark.chosen:
        # Over the plot, where no line runs; turned inwards, so that it stays inside a narrow chart.
        anchor = "start" if x < 30 else "end" if x > 70 else "middle"
        parts.insert(0, f'<line class="guide" x1="{x:.2f}%" x2="{x:.2f}%" y1="{TOP - 22}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="name" x="{x:.2f}%" y="{TOP - 27}" text-anchor="{anchor}">chosen: {text_of(words)}</text>'
        )
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
    names = [
        printable(dig(axes, key) or default)
        for key, default in (("macs_ratio", MACS_AXIS), ("error", ERROR_AXIS), ("latency_ratio", LATENCY_AXIS))
    ]
    by_macs = [
        Mark(p.macs_ratio, p.error, None, None, p.chosen, p.flag)
        for p in points
        if p.macs_ratio is not None and p.error is not None
    ]
    by_time = [
        Mark(p.latency, p.error, p.low, p.high, p.chosen, p.flag)
        for p in points
        if p.latency is not None and p.error is not None
    ]
    figures = [
        _figure("frontier-macs", "Error against MACs", (names[0], names[1]), by_macs),
        _figure("frontier-latency", "Error against latency", (names[2], names[1]), by_time),
    ]
    where = printable(dig(report, "frontier", "latency_on") or "")
    notes = [
        "Each point is a network that can be had with its flag; errors are measured on held-out inputs,"
        " before distillation and final codebooks."
    ]
    if by_time:
        notes.append(
            f"Latencies are measured in turns with the original{f' on {where}' if where else ''};"
            " in brackets the 95 % interval."
        )
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
        cells = [
            point.label,
            point.cost,
            *([point.time] if timed else []),
            error(point.error),
            *([error(point.predicted)] if predicted else []),
        ]
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
