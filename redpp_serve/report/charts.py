"""The look of the report: its style sheet, and inline SVG as pure functions from numbers to a string.

Every chart is one well-formed `<svg>` with a title and a description. The two charts over layers use lengths in
percent, so bars stretch with the page while text keeps its size; the density plot scales through its view box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redpp_serve.report.formats import dig, error, number, of, quotient, shorten
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
