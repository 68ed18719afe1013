"""The report as one self-contained HTML page: no network, readable without scripts, light and dark.

page.html.j2 holds the cards with their titles and notes, and escapes all text; the functions below make what they show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from redpp_serve.report import charts, formats, history, tables
from redpp_serve.report.data import Layer, Report
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


class Figure(NamedTuple):
    """A chart, a caption, and for a layer's chart the layer's name."""

    chart: Markup
    caption: str
    name: str = ""


def render(report: Report) -> str:
    """Return the page: a complete HTML document without references to other files. The unknown shows as an en dash."""
    about = {"Options": report.options, "Source": report.source, "Environment": report.environment.to_json()}
    return _PAGE.render(
        report=report,
        name=report.name or "model",
        names=list(NAMES),
        sentence=_sentence(report),
        tiles=_tiles(report),
        frontier=_frontier(report),
        stages=_stages(report),
        counting=_counting(report),
        layers=[_layer_row(layer) for layer in report.layers],
        alternatives=_alternatives(report.layers),
        densities=_densities(report.layers),
        about=[(title, _items(found)) for title, found in about.items()],
        places=_measured_where(report),
        tool=f"{report.tool.name or 'redpp-serve'} {report.tool.version or DASH}",
        tables=tables,
        history=history,
        charts=charts,
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


def _frontier(report: Report) -> dict[str, Any]:
    points = tables.frontier_points(report)
    if not points:
        return {}
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
    return {"figures": drawn, "head": head, "rows": rows, "note": note}


def _stages(report: Report) -> list[tuple[Cell | str, ...]]:
    return [
        (
            stage.name or DASH,
            Cell(stage.status or DASH, css=stage.status if stage.status in ("done", "skipped", "failed") else ""),
            stage.reason or DASH,
            formats.seconds(stage.seconds),
        )
        for stage in report.stages or []
    ]


def _counting(report: Report) -> list[tuple[str, ...]]:
    return [
        (f"{reading}: {kind}", *_removed(getattr(cost, kind), show))
        for reading, cost in (("A", report.counting.kernel), ("B", report.counting.weight))
        for kind, show in (("multiplications", count), ("additions", count), ("bytes", formats.size))
    ]


def _removed(pair: Sequence[float | None], show: Callable[[Any], str]) -> tuple[str, str, str]:
    before, after = pair if len(pair) == 2 else (None, None)
    left = formats.quotient(after, before)
    return show(before), show(after), percent(None if left is None else 1 - left)


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


def _alternatives(layers: Sequence[Layer]) -> dict[str, Any]:
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
    head = ("layer", "entropy (bits)", *methods.values())
    return {"head": head, "rows": rows, "note": f"Lowest error: {won} of {len(rows)} layers."}


def _densities(layers: Sequence[Layer]) -> dict[str, Any]:
    hashed = [(layer, layer.hash) for layer in layers if layer.hash and layer.hash.density]
    figures = []
    for index, (layer, found) in enumerate(hashed[:DENSITIES_SHOWN]):
        if chart := charts.density_chart(f"density{index}", _name(layer), found.density):
            caption = f"{exact(found.values)} values, {formats.bits(found.entropy)} bits"
            figures.append(Figure(chart, caption, _name(layer)))
    note = "Curve: estimated density. Thin lines: borders of the cells. Ticks under the axis: codebook values."
    if len(hashed) > DENSITIES_SHOWN:
        note += f" The first {DENSITIES_SHOWN} of {len(hashed)} layers; report.json has all."
    return {"figures": figures, "note": note}


def _items(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the entries by key, those of a nested object (the releases) as rows of their own."""
    rows: list[tuple[str, str]] = []
    for key, value in sorted(found.items()):
        rows += _items(value) if isinstance(value, Mapping) else [(key, DASH if value is None else str(value))]
    return rows


def _measured_where(report: Report) -> list[tuple[str, str]]:
    environment = dict(_items(report.environment.to_json()))
    releases = (f"{key} {value}" for key, value in environment.items() if key != "device" and value != DASH)
    device = ", ".join([environment.get("device", DASH), *releases])
    images = exact(report.verify and report.verify.images)
    rows = [
        ("parameters, MACs, operations, bytes", "counted from shapes and stored arrays; the same on every device"),
        ("hashing errors, output error, agreement", f"{device}; {images} held-out inputs"),
    ]
    if any(figures.handler_ms or figures.latency_ms or figures.throughput_rps for figures in report.versions):
        newest = next((each for each in report.comparisons or () if len(each.cells) == 1), None)
        server = f"{newest.server}, {newest.time} UTC" if newest else "the model server"
        rows.append(("handler times, latency, throughput", f"{device}; through {shorten(server, 60)}"))
    if report.frontier and report.frontier.latency_on:
        rows.append(("latencies of the frontier", f"{report.frontier.latency_on}; without server"))
    for trial in report.smoke or []:
        took = formats.milliseconds(trial.milliseconds)
        rows.append((f"smoke test of {shorten(trial.archive or DASH, 60)}", f"{took} on {device}"))
    return rows
