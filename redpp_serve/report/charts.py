"""Charts as inline SVG: this module computes where everything stands, charts.svg.j2 draws it.

Each chart is one well-formed ``<svg>`` with a title and a description. Charts over layers and the frontier use
lengths in percent, so that bars and lines stretch with the page while text keeps its size; densities scale through
their view box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from redpp_serve.report.data import Density, FrontierPoint, Layer
from redpp_serve.report.formats import DASH, error, of, quotient, shorten
from redpp_serve.report.templates import ENVIRONMENT

ROW = 30  # pixels for each layer: one line of text over one bar
NAME_LIMIT = 30  # characters of a layer's name that fit beside its value on a narrow screen
_DRAW: Any = ENVIRONMENT.get_template("charts.svg.j2").module  # its macros


class _Bar(NamedTuple):
    """One layer's line: its value in words, the bar's length and the mark's place in percent."""

    name: str
    value: str
    length: float
    mark: float | None = None


def kept_chart(layers: Sequence[Layer]) -> Markup:
    """Draw one bar for each layer, in network order: the share of its channels that is kept, with the two counts."""
    counts = [(layer.merge.kept, layer.merge.channels) if layer.merge else (None, None) for layer in layers]
    shares = [quotient(*pair) for pair in counts]
    bars = [
        _Bar(layer.name or DASH, of(*pair), _percent(share or 0.0))
        for layer, pair, share in zip(layers, counts, shares, strict=True)
    ]
    cut = sum(share not in (None, 1.0) for share in shares)
    description = f"Kept channels of {len(layers)} layers as horizontal bars; {cut} layers lost channels."
    return _bars("kept", "Kept channels per layer", description, bars)


def error_chart(layers: Sequence[Layer]) -> Markup:
    """Draw a bar for each layer's output error and a mark for its weights' error, on one linear scale from zero."""
    pairs = [(layer.error, layer.hash.error if layer.hash else None) for layer in layers]
    top = max((value for pair in pairs for value in pair if value is not None), default=0.0) or 1.0
    bars = [
        _Bar(
            layer.name or DASH,
            f"{error(output)} | {error(weights)}",
            _percent((output or 0.0) / top),
            # The mark is 2 pixels wide: 99.5 % keeps the largest one inside the picture.
            None if weights is None else 0.995 * _percent(weights / top),
        )
        for layer, (output, weights) in zip(layers, pairs, strict=True)
    ]
    description = f"Relative errors of {len(layers)} layers as horizontal bars; the full width is {error(top)}."
    return _bars("error", "Error per layer", description, bars)


def _bars(kind: str, title: str, description: str, bars: Sequence[_Bar]) -> Markup:
    rows = [bar._replace(name=shorten(bar.name, 80)) for bar in bars]
    return Markup(_DRAW.bars(kind, title, description, rows, ROW, NAME_LIMIT))


def _percent(share: float) -> float:
    return 100 * min(max(share, 0.0), 1.0)


def density_chart(identity: str, name: str, density: Density | None) -> Markup:
    """Draw the estimated density of a layer's weights, its cells (thin lines) and codebook values (ticks).

    Args:
        identity: unique on the page; the ids of title and description start with it.
        name: the layer, for the title.
        density: the curve; the chart is '' where it has fewer than two points, or they span nothing.
    """
    pairs = zip(density.x, density.y, strict=False) if density else ()
    points = sorted((x, y) for x, y in pairs if x is not None and y is not None)
    if density is None or len(points) < 2 or points[0][0] == points[-1][0]:
        return Markup()
    low, high, top = points[0][0], points[-1][0], max(y for _, y in points) or 1.0
    width, floor = 320.0, 110.0

    def at(x: float) -> str:
        return f"{width * (x - low) / (high - low):.1f}"

    edges, modes = (
        [at(x) for x in values if x is not None and low <= x <= high] for values in (density.edges, density.modes)
    )
    curve = [f"{at(x)} {floor - (floor - 8) * max(y, 0.0) / top:.1f}" for x, y in points]
    central = low + 0.2 * (high - low) < 0 < high - 0.2 * (high - low)  # so that zero's label misses those of the ends
    labels = {"low": f"{low:.3g}", "high": f"{high:.3g}", "zero": at(0.0) if central else None}
    description = f"From {low:.3g} to {high:.3g}, with {len(modes)} codebook values and {len(edges)} borders of cells."
    return Markup(_DRAW.density(identity, f"Weight density of {name}", description, curve, edges, modes, labels))


HEIGHT, TOP, FLOOR = 300, 58, 250  # pixels; x is in percent, so that lines stretch with the page and text does not
LEFT, RIGHT = 16.0, 95.0  # percent; the labels of the horizontal lines stand to the left


class Mark(NamedTuple):
    """A point of the frontier: cost as a share (x) with an interval or None, relative error (y), and its words."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    chosen: bool = False
    label: str = ""

    @property
    def words(self) -> str:
        """Return both numbers as text."""
        return f"{_share(round(self.x, 4))}, error {error(self.y)}"


def macs_marks(points: Sequence[FrontierPoint]) -> list[Mark]:
    """Return the points whose error and MACs are known."""
    return [
        Mark(p.macs_ratio, p.error, None, None, p.chosen, p.flag or "")
        for p in points
        if p.macs_ratio is not None and p.error is not None
    ]


def latency_marks(points: Sequence[FrontierPoint]) -> list[Mark]:
    """Return the points whose error and latency are known, with the latency's interval."""
    return [
        Mark(p.latency_ratio, p.error, p.latency_low, p.latency_high, p.chosen, p.flag or "")
        for p in points
        if p.latency_ratio is not None and p.error is not None
    ]


def frontier_chart(identity: str, title: str, axes: tuple[str, str], marks: Sequence[Mark]) -> Markup:
    """Draw error against a cost: points in order of cost joined by lines, the chosen one larger and labelled.

    Args:
        identity: unique on the page; the ids of title and description start with it.
        title: the chart's title.
        axes: what x and y are.
        marks: the chart is '' without any. The error's axis starts at zero, that of the cost does not.
    """
    marks = sorted((m for m in marks if math.isfinite(m.x) and math.isfinite(m.y)), key=lambda m: m.x)
    if not marks:
        return Markup()
    low = min(m.x if m.low is None else m.low for m in marks)
    high = max(m.x if m.high is None else m.high for m in marks)
    columns = _ticks(low, high, 5) if low < high else [low - 0.1, low, low + 0.1]
    lines = _ticks(0.0, max(0.0, *(m.y for m in marks)), 4)

    def at_x(x: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * (x - columns[0]) / (columns[-1] - columns[0]):.2f}%"

    def at_y(y: float) -> float:
        return FLOOR - (FLOOR - TOP) * y / lines[-1]

    def anchor(x: float) -> str:  # the label turns inwards, so that it stays inside a narrow chart
        place = float(at_x(x)[:-1])
        return "start" if place < 30 else "end" if place > 70 else "middle"

    ends = f"from {_share(marks[0].x)} with {error(marks[0].y)} to {_share(marks[-1].x)} with {error(marks[-1].y)}"
    chosen = next((f"; chosen: {_share(m.x)} with {error(m.y)}" for m in marks if m.chosen), "")
    return Markup(
        _DRAW.frontier(
            identity,
            title,
            f"{axes[1]} against {axes[0]} for {len(marks)} networks, {ends}{chosen}.",
            {
                "axes": axes,
                "height": HEIGHT,
                "top": TOP,
                "floor": FLOOR,
                "rules": [(at_y(y), _share(y), y == 0) for y in lines],
                "ticks": [(at_x(x), _share(x)) for x in columns],
                "marks": marks,
                "at_x": at_x,
                "at_y": at_y,
                "anchor": anchor,
            },
        )
    )


def _share(value: float) -> str:
    return f"{100 * value:.4g} %"


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers, 1, 2 or 5 times a power of ten apart, that enclose the range in at most ``most`` steps."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [step * k for k in range(first, max(last, first + 1) + 1)]
