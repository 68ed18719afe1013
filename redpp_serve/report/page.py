"""The report as one self-contained HTML page: no network, readable without scripts, light and dark.

The functions below turn the report into cards: plain texts and charts. page.html.j2 lays them out and escapes all text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from redpp_serve.report import charts, formats, tables
from redpp_serve.report.data import Layer, Report, SplitCost
from redpp_serve.report.formats import DASH, count, error, exact, percent, shorten
from redpp_serve.report.templates import ENVIRONMENT
from redpp_serve.variants import NAMES

DENSITIES_SHOWN = 60
_PAGE = ENVIRONMENT.get_template("page.html.j2")


class Cell(NamedTuple):
    """One cell of a table: its text, the number or text that it sorts by, and a CSS class."""

    text: str
    sort: Any = None
    css: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column heads its rows; without rows it shows one of dashes.

    Attributes:
        head: titles of the columns.
        rows: cells, or their texts.
        kinds: one letter for each column: t(ext), n(umber), w(ide text), c(ode), f(ixed, never wrapped).
        caption: a line above the table.
        css: CSS classes of the table; ``sortable`` lets readers sort it.
        tall: limit the height and scroll.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    kinds: str
    caption: str = ""
    css: str = ""
    tall: bool = False

    kind = "table"

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows, every cell a `Cell`."""
        return [
            [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
            for row in self.rows or [[DASH] * len(self.head)]
        ]

    @property
    def classes(self) -> list[str]:
        """The CSS class of each column."""
        return [{"t": "", "n": "n", "w": "wide", "c": "code", "f": "fixed"}[kind] for kind in self.kinds]


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str
    css: str = "soft"

    kind = "note"


class Figure(NamedTuple):
    """A chart, a caption, and for a layer's chart the layer's name."""

    chart: Markup
    caption: str
    name: str = ""


@dataclass(frozen=True)
class Figures:
    """Charts side by side; ``css`` is the layout: panels, grid, or chart for one that scrolls."""

    figures: Sequence[Figure]
    css: str

    kind = "figures"


@dataclass(frozen=True)
class Card:
    """A titled part of the page; a folded one opens on demand."""

    title: str
    parts: Sequence[Table | Note | Figures]
    folded: bool = False


def render(report: Report) -> str:
    """Return the page: a complete HTML document without references to other files. The unknown shows as an en dash."""
    single, paired = False, True  # how the cards of a row stand: below one another, or side by side
    rows = [
        (single, [_figures(report), *_frontier(report), *_shares(report), *_kernels(report)]),
        (paired, [_stages(report), _verification(report), _hashing(report), _counting(report)]),
    ]
    if layers := report.layers:
        rows.append((paired, _layer_charts(layers)))
        rows.append((single, [_layers(layers), *_alternatives(layers), *_densities(layers)]))
    about = (("Options", report.options), ("Source", report.source), ("Environment", report.environment.to_json()))
    rows.append((paired, [*(_pairs(title, found) for title, found in about), _measured_where(report)]))
    return _PAGE.render(
        report=report,
        name=report.name or "model",
        sentence=_sentence(report),
        tiles=_tiles(report),
        rows=rows,
        tool=f"{report.tool.name or 'redpp-serve'} {report.tool.version or DASH}",
    )


def _name(layer: Layer) -> str:
    return shorten(layer.name or DASH, 80)


def _sentence(report: Report) -> str:
    before, after = report.versions
    file, kind = (report.source.get(key) or DASH for key in ("file", "kind"))
    return (
        f"Pruned without data from {shorten(file, 120)} ({kind}):"
        f" {count(before.macs)} → {count(after.macs)} multiply-accumulates (MACs) per input,"
        f" {count(before.parameters)} → {count(after.parameters)} parameters."
    )


def _tiles(report: Report) -> list[tuple[str, str]]:
    wanted = ("parameters", "MACs", "stored bytes", "accuracy", "handler p50", "throughput")
    rows = [row for row in tables.summary_rows(report) if row.label in wanted]
    served = report.agreement and report.agreement.top1
    offline = report.verify and report.verify.agreement
    same = (offline, "held-out inputs") if served is None else (served, "served answers")
    return [
        *((row.ratio.split(" [")[0], f"{row.label}: {row.original} → {row.pruned}") for row in rows),
        (percent(same[0]), f"same top-1 class, {same[1]}"),
    ]


def _figures(report: Report) -> Card:
    note = (
        "Ratio: original / pruned for sizes, operations and times, pruned / original for throughput, so above 1 is"
        " better; accuracy as a difference. [low, high] is the interval measured with the speed-up."
    )
    table = Table(("quantity", *NAMES, "ratio"), tables.summary_rows(report), "tnnn")
    return Card("Original and pruned", [table, Note(note)])


def _frontier(report: Report) -> list[Card]:
    points = tables.frontier_points(report)
    if not points:
        return []
    by_latency = charts.latency_marks(points)
    drawn = [
        Figure(charts.frontier_chart(f"frontier-{key}", title, (axis, "relative output error"), marks), title)
        for key, title, axis, marks in (
            ("macs", "Error against MACs", "MACs, share of the original's", charts.macs_marks(points)),
            ("latency", "Error against latency", "latency, share of the original's", by_latency),
        )
        if marks
    ]
    note = (
        "Each point is a network that can be had with its flag; errors are measured on held-out inputs,"
        " before distillation and final codebooks."
    )
    if by_latency:
        where = report.frontier and report.frontier.latency_on
        on = f" on {where}" if where else ""
        note += f" Latencies are measured in turns with the original{on}; in brackets the 95 % interval."
    head, found = tables.frontier_table(points)
    rows = [
        [Cell(text, css="best" if point.chosen else "") for text in row]
        for point, row in zip(points, found, strict=True)
    ]
    table = Table(head, rows, "t" + "n" * (len(head) - 1))
    return [Card("Frontier: error against cost", [Figures(drawn, "panels"), table, Note(note)])]


def _shares(report: Report) -> list[Card]:
    head, rows = tables.share_table(report)
    note = "Error and agreement of the network after the stage, on held-out inputs; changes are to the row before."
    table = Table(head, rows, "t" + "n" * (len(head) - 1))
    return [Card("What each stage changed", [table, Note(note)])] if rows else []


def _kernels(report: Report) -> list[Card]:
    parts: list[Table | Note] = []
    for name, plan in (report.plan or {}).items():
        title = f"The {name} network"
        if rows := tables.kernel_rows(plan):
            parts.append(Table(tables.KernelRow._fields, rows, "ctnttnnw", title, "dense", tall=True))
        parts.append(Note(f"{title}: {'. '.join(tables.kernel_summary(plan))}."))
    return [Card("Kernels", parts)] if parts else []


def _stages(report: Report) -> Card:
    rows = [
        (
            stage.name or DASH,
            Cell(stage.status or DASH, css=stage.status if stage.status in ("done", "skipped", "failed") else ""),
            stage.reason or DASH,
            formats.seconds(stage.seconds),
        )
        for stage in report.stages or []
    ]
    return Card("Stages", [Table(("stage", "status", "reason", "time"), rows, "ttwn", "In the order they ran")])


def _verification(report: Report) -> Card:
    table = Table(("check", "result"), tables.verify_rows(report), "tn")
    return Card(tables.verify_title(report).capitalize(), [table])


def _hashing(report: Report) -> Card:
    method, target = (report.hash.method, report.hash.target) if report.hash else (None, None)
    head = ("quantity", "predicted", "at most (bound)", "measured")
    table = Table(head, tables.hash_rows(report), "tnnn", f"Method {method or DASH}, target: {target or DASH}.")
    note = tables.bound_note(report)
    return Card("Hashing: predicted and measured", [table, Note(note, "worse" if "ABOVE" in note else "soft")])


def _counting(report: Report) -> Card:
    def rows(reading: str, cost: SplitCost) -> list[tuple[str, ...]]:
        figures = (
            ("multiplications", cost.multiplications, count),
            ("additions", cost.additions, count),
            ("bytes", cost.bytes, formats.size),
        )
        return [(f"{reading}: {kind}", *_removed(pair, show)) for kind, pair, show in figures]

    caption = (
        "Splitting computes equal units of an input channel once."
        " Reading A: the unit is a k x k kernel. Reading B: the unit is a scalar weight."
    )
    body = rows("A", report.counting.kernel) + rows("B", report.counting.weight)
    table = Table(("reading", "before", "after", "removed"), body, "tnnn", caption)
    return Card("Splitting: both readings of the count", [table])


def _removed(pair: Sequence[float | None], show: Callable[[Any], str]) -> tuple[str, str, str]:
    before, after = pair if len(pair) == 2 else (None, None)
    left = formats.quotient(after, before)
    return show(before), show(after), percent(None if left is None else 1 - left)


def _layer_charts(layers: Sequence[Layer]) -> list[Card]:
    kept = Figure(charts.kept_chart(layers), "Channels kept of those the layer had.")
    errors = Figure(
        charts.error_chart(layers),
        "Bar: relative output error, pruned against original. Mark: relative RMS error of the hashed weights."
        " Values in this order.",
    )
    return [Card("Kept channels", [Figures([kept], "chart")]), Card("Error per layer", [Figures([errors], "chart")])]


def _layers(layers: Sequence[Layer]) -> Card:
    head = (
        "layer",
        "op",
        "shape → pruned",
        "values",
        "entropy (bits)",
        "RMS error",
        "near-zero kernels",
        "kept channels",
        "unique kernels",
        "output error",
        "channels left alone because",
    )
    caption = "In network order. Shapes are outputs x inputs per group x kernel; errors are relative."
    rows = [_layer_row(layer) for layer in layers]
    return Card("Layers", [Table(head, rows, "ctfnnnnnnnw", caption, "dense sortable", tall=True)])


def _layer_row(layer: Layer) -> list[Cell]:
    def cell(show: Callable[[Any], str], value: float | None) -> Cell:
        return Cell(show(value), value)

    def part(kept: float | None, whole: float | None) -> Cell:
        return Cell(formats.of(kept, whole), formats.quotient(kept, whole))

    hashed, merge, split = layer.hash, layer.merge, layer.split
    before, after = formats.shape(layer.shape), formats.shape(layer.pruned_shape)
    reason = merge and merge.reason
    return [
        Cell(_name(layer), layer.name),
        Cell(layer.op or DASH, layer.op),
        Cell(before if after in (DASH, before) else f"{before} → {after}"),
        cell(exact, hashed.values if hashed else None),
        cell(formats.bits, hashed.entropy if hashed else None),
        cell(error, hashed.error if hashed else None),
        cell(percent, hashed.zero_kernels if hashed else None),
        part(*((merge.kept, merge.channels) if merge else (None, None))),
        part(*((split.unique_kernels, split.kernels) if split else (None, None))),
        cell(error, layer.error),
        Cell(shorten(reason or DASH, 200), reason),
    ]


def _alternatives(layers: Sequence[Layer]) -> list[Card]:
    methods = {"kde": "KDE", "kmeans": "k-means", "uniform": "uniform"}
    rows, wins = [], dict.fromkeys(methods, 0)
    for layer in layers:
        books = layer.hash.alternatives if layer.hash else {}
        errors = {key: books[key].error for key in methods if key in books and books[key].error is not None}
        if layer.hash is None or not errors:
            continue
        best = min(errors, key=lambda key: errors[key] or 0.0)
        wins[best] += 1
        row = [Cell(_name(layer), layer.name), Cell(formats.bits(layer.hash.entropy), layer.hash.entropy)]
        for key in methods:
            book = books.get(key)
            shown = f"{error(book and book.error)} ({exact(book and book.values)})"
            row.append(Cell(shown, errors.get(key), "best" if key == best else ""))
        rows.append(row)
    won = ", ".join(f"{methods[key]} in {number}" for key, number in wins.items())
    caption = "Relative RMS error of the weights at equal entropy; in brackets, distinct values."
    head = ("layer", "entropy (bits)", *methods.values())
    table = Table(head, rows, "cnnnn", caption, "dense sortable", tall=True)
    return [Card("Other codebooks", [table, Note(f"Lowest error: {won} of {len(rows)} layers.")])] if rows else []


def _densities(layers: Sequence[Layer]) -> list[Card]:
    hashed = [(layer, layer.hash) for layer in layers if layer.hash and layer.hash.density]
    figures = []
    for index, (layer, found) in enumerate(hashed[:DENSITIES_SHOWN]):
        if chart := charts.density_chart(f"density{index}", _name(layer), found.density):
            caption = f"{exact(found.values)} values, {formats.bits(found.entropy)} bits"
            figures.append(Figure(chart, caption, _name(layer)))
    note = "Curve: estimated density. Thin lines: borders of the cells. Ticks under the axis: codebook values."
    if len(hashed) > DENSITIES_SHOWN:
        note += f" The first {DENSITIES_SHOWN} of {len(hashed)} layers; report.json has all."
    parts = (Note(note), Figures(figures, "grid"))
    return [Card("Weight densities and their cells", parts, folded=True)] if figures else []


def _pairs(title: str, found: Mapping[str, Any]) -> Card:
    return Card(title, [Table((title.lower(), "value"), _items(found), "tc")])


def _items(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the entries by key, those of a nested object (the releases) as rows of their own."""
    rows: list[tuple[str, str]] = []
    for key, value in sorted(found.items()):
        rows += _items(value) if isinstance(value, Mapping) else [(key, DASH if value is None else str(value))]
    return rows


def _measured_where(report: Report) -> Card:
    environment = dict(_items(report.environment.to_json()))
    releases = (f"{key} {value}" for key, value in environment.items() if key != "device" and value != DASH)
    device = ", ".join([environment.get("device", DASH), *releases])
    images = exact(report.verify and report.verify.images)
    rows = [
        ("parameters, MACs, operations, bytes", "counted from shapes and stored arrays; the same on every device"),
        ("hashing errors, output error, agreement", f"{device}; {images} held-out inputs"),
    ]
    if any(figures.handler_ms or figures.latency_ms or figures.throughput_rps for figures in report.versions):
        rows.append(("handler times, latency, throughput", f"{device}; through the model server"))
    if report.frontier and report.frontier.latency_on:
        rows.append(("latencies of the frontier", f"{report.frontier.latency_on}; without server"))
    for trial in report.smoke or []:
        took = formats.milliseconds(trial.milliseconds)
        rows.append((f"smoke test of {shorten(trial.archive or DASH, 60)}", f"{took} on {device}"))
    return Card("What was measured where", [Table(("number", "where"), rows, "tt")])
