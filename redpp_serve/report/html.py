"""The report as one self-contained HTML page: no network, readable without scripts, light and dark.

All text from the report is escaped in one place: `markup.table` and its like take plain strings, never markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from redpp_serve.report import charts, formats, markup, plans, text
from redpp_serve.report.formats import DASH, count, dig, error, number, percent, shorten
from redpp_serve.report.markup import text_of

DENSITIES_SHOWN = 60
RATIO_NOTE = (
    "Ratio: original / pruned for sizes, operations and times, pruned / original for throughput, so above 1 is better;"
    " accuracy as a difference. [low, high] is the interval measured with the speed-up."
)

# Sorting is an extra: without scripts the table stays in network order and loses nothing.
_SCRIPT = """
for (const head of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.type = "button"; button.append(...head.childNodes); head.append(button);
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending", body = head.closest("table").tBodies[0];
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[head.cellIndex].dataset.v ?? "", sign = up ? 1 : -1;
    const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "") : sign * order(a, b);
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  });
}
"""


def _layers(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [layer for layer in dig(report, "layers") or [] if isinstance(layer, Mapping)]


def _name(layer: Mapping[str, Any]) -> str:
    return shorten(layer.get("name") or DASH, 80)


def _headline(report: Mapping[str, Any]) -> str:
    source, before, after = (dig(report, key) for key in ("source", "original", "pruned"))
    sentence = (
        f"Pruned without data from {shorten(dig(source, 'file') or DASH, 120)} ({dig(source, 'kind') or DASH}):"
        f" {count(dig(before, 'macs'))} → {count(dig(after, 'macs'))} multiply-accumulates (MACs) per input,"
        f" {count(dig(before, 'parameters'))} → {count(dig(after, 'parameters'))} parameters."
    )
    verdict = markup.note(report["verdict"], "verdict") if report.get("verdict") else ""
    return f"<header><h1>{text_of(report.get('name') or 'model')}</h1>{markup.note(sentence, '')}{verdict}</header>"


def _tiles(report: Mapping[str, Any]) -> str:
    wanted = ("parameters", "MACs", "stored bytes", "accuracy", "handler p50", "throughput")
    rows = [row for row in text.summary_rows(report) if row.label in wanted]
    tiles = [(row.ratio.split(" [")[0], f"{row.label}: {row.original} → {row.pruned}") for row in rows]
    served = dig(report, "agreement", "top1")
    where = "served answers" if number(served) is not None else "held-out inputs"
    same = dig(report, "verify", "agreement") if served is None else served
    tiles.append((percent(same), f"same top-1 class, {where}"))
    items = "".join(f"<li><b>{text_of(value)}</b><span>{text_of(label)}</span></li>" for value, label in tiles)
    return f'<ul class="tiles">{items}</ul>'


def _stages(report: Mapping[str, Any]) -> str:
    rows = []
    for stage in dig(report, "stages") or []:
        status = str(dig(stage, "status") or DASH)
        css = status if status in ("done", "skipped", "failed") else ""
        rows.append(
            (
                str(dig(stage, "name") or DASH),
                markup.Cell(status, css=css),
                str(dig(stage, "reason") or DASH),
                formats.seconds(dig(stage, "seconds")),
            )
        )
    table = markup.table("In the order they ran", ("stage", "status", "reason", "time"), rows, "ttwn")
    return markup.section("Stages", table)


def _verification(report: Mapping[str, Any]) -> str:
    title = text.verify_title(report).capitalize()
    return markup.section(title, markup.table("", ("check", "result"), text.verify_rows(report), "tn"))


def _hashing(report: Mapping[str, Any]) -> str:
    found = dig(report, "hash")
    how = f"Method {dig(found, 'method') or DASH}, target: {dig(found, 'target') or DASH}."
    head = ("quantity", "predicted", "at most (bound)", "measured")
    note = text.bound_note(report)
    return markup.section(
        "Hashing: predicted and measured",
        markup.table(how, head, text.hash_rows(report), "tnnn"),
        markup.note(note, "worse" if "ABOVE" in note else "soft"),
    )


def _counting(report: Mapping[str, Any]) -> str:
    rows = []
    for key, reading in (("kernel", "A"), ("weight", "B")):
        for kind, show in (("multiplications", count), ("additions", count), ("bytes", formats.size)):
            pair = dig(report, "counting", key, kind)
            before, after = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
            left = formats.quotient(after, before)
            rows.append((f"{reading}: {kind}", show(before), show(after), percent(None if left is None else 1 - left)))
    caption = (
        "Splitting computes equal units of an input channel once."
        " Reading A: the unit is a k x k kernel. Reading B: the unit is a scalar weight."
    )
    table = markup.table(caption, ("reading", "before", "after", "removed"), rows, "tnnn")
    return markup.section("Splitting: both readings of the count", table)


def _layer_row(layer: Mapping[str, Any]) -> list[markup.Cell]:
    def cell(show: Any, *path: str) -> markup.Cell:
        return markup.Cell(show(dig(layer, *path)), number(dig(layer, *path)))

    before, after = formats.shape(layer.get("shape")), formats.shape(layer.get("pruned_shape"))
    kept, channels = dig(layer, "merge", "kept"), dig(layer, "merge", "channels")
    unique, kernels = dig(layer, "split", "unique_kernels"), dig(layer, "split", "kernels")
    return [
        markup.Cell(_name(layer), layer.get("name")),
        markup.Cell(str(layer.get("op") or DASH), layer.get("op")),
        markup.Cell(before if after in (DASH, before) else f"{before} → {after}"),
        cell(formats.exact, "hash", "values"),
        cell(formats.bits, "hash", "entropy"),
        cell(error, "hash", "error"),
        cell(percent, "hash", "zero_kernels"),
        markup.Cell(formats.of(kept, channels), formats.quotient(kept, channels)),
        markup.Cell(formats.of(unique, kernels), formats.quotient(unique, kernels)),
        cell(error, "error"),
        markup.Cell(shorten(dig(layer, "merge", "reason") or DASH, 200), dig(layer, "merge", "reason")),
    ]


def _charts(layers: Sequence[Mapping[str, Any]]) -> str:
    kept = [charts.KeptRow(_name(la), dig(la, "merge", "kept"), dig(la, "merge", "channels")) for la in layers]
    errors = [charts.ErrorRow(_name(la), dig(la, "error"), dig(la, "hash", "error")) for la in layers]
    figures = (
        ("Kept channels", "Channels kept of those the layer had.", charts.kept_chart("kept", kept)),
        (
            "Error per layer",
            "Bar: relative output error, pruned against original. Mark: relative RMS error of the"
            " hashed weights. Values in this order.",
            charts.error_chart("errors", errors),
        ),
    )
    return (
        '<div class="pair">'
        + "".join(
            markup.section(
                title,
                f"<figure><figcaption>{text_of(caption)}</figcaption>"
                + markup.scroll(title, f'<div class="chart">{svg}</div>', "tall")
                + "</figure>",
            )
            for title, caption, svg in figures
        )
        + "</div>"
    )


def _layer_section(layers: Sequence[Mapping[str, Any]]) -> str:
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
    return markup.section("Layers", markup.table(caption, head, rows, "ctfnnnnnnnw", "dense sortable", "tall"))


def _alternatives(layers: Sequence[Mapping[str, Any]]) -> str:
    methods = {"kde": "KDE", "kmeans": "k-means", "uniform": "uniform"}
    rows, wins = [], dict.fromkeys(methods, 0)
    for layer in layers:
        found = dig(layer, "hash", "alternatives")
        errors = {key: e for key in methods if (e := number(dig(found, key, "error"))) is not None}
        if not errors:
            continue
        best = min(errors, key=lambda key: errors[key])
        wins[best] += 1
        entropy = dig(layer, "hash", "entropy")
        row = [markup.Cell(_name(layer), layer.get("name")), markup.Cell(formats.bits(entropy), number(entropy))]
        for key in methods:
            shown = f"{error(dig(found, key, 'error'))} ({formats.exact(dig(found, key, 'values'))})"
            row.append(markup.Cell(shown, errors.get(key), "best" if key == best else ""))
        rows.append(row)
    if not rows:
        return ""
    won = ", ".join(f"{methods[key]} in {layers_won}" for key, layers_won in wins.items())
    note = f"Lowest error: {won} of {len(rows)} layers."
    caption = "Relative RMS error of the weights at equal entropy; in brackets, distinct values."
    head = ("layer", "entropy (bits)", *methods.values())
    table = markup.table(caption, head, rows, "cnnnn", "dense sortable", "tall")
    return markup.section("Other codebooks", table, markup.note(note))


def _densities(layers: Sequence[Mapping[str, Any]]) -> str:
    hashed = [layer for layer in layers if dig(layer, "hash", "density")]
    figures = []
    for index, layer in enumerate(hashed[:DENSITIES_SHOWN]):
        if svg := charts.density_chart(f"density{index}", _name(layer), dig(layer, "hash", "density")):
            values, entropy = formats.exact(dig(layer, "hash", "values")), formats.bits(dig(layer, "hash", "entropy"))
            caption = f'<span class="code">{text_of(_name(layer))}</span><br>{values} values, {entropy} bits'
            figures.append(f"<figure><figcaption>{caption}</figcaption>{svg}</figure>")
    if not figures:
        return ""
    note = "Curve: estimated density. Thin lines: borders of the cells. Ticks under the axis: codebook values."
    if len(hashed) > DENSITIES_SHOWN:
        note += f" The first {DENSITIES_SHOWN} of {len(hashed)} layers; report.json has all."
    grid = f'<div class="grid">{"".join(figures)}</div>'
    title = "Weight densities and their cells"
    return f"<section><details><summary>{title}</summary>{markup.note(note)}{grid}</details></section>"


def _items(found: Any) -> list[tuple[str, str]]:
    """Items as text, by key: the page is the same whether made from the live report or from report.json."""
    pairs = sorted(found.items()) if isinstance(found, Mapping) else []
    rows = (
        _items(v) if isinstance(v, Mapping) else [(str(k), DASH if v is None or v != v else str(v))] for k, v in pairs
    )
    return [row for group in rows for row in group]  # versions give one row each


def _pairs(title: str, found: Any) -> str:
    return markup.section(title, markup.table("", (title.lower(), "value"), _items(found), "tc"))


def _measured_where(report: Mapping[str, Any]) -> str:
    env = dict(_items(report.get("environment")))
    device = ", ".join([env.pop("device", DASH), *(f"{key} {value}" for key, value in env.items() if value != DASH)])
    images = formats.exact(dig(report, "verify", "images"))
    rows = [
        ("parameters, MACs, operations, bytes", "counted from shapes and stored arrays; the same on every device"),
        ("hashing errors, output error, agreement", f"{device}; {images} held-out inputs"),
    ]
    serving = ("handler_ms", "latency_ms", "throughput_rps")
    if any(dig(report, side, key) for side in ("original", "pruned") for key in serving):
        rows.append(("handler times, latency, throughput", f"{device}; through the model server"))
    if where := dig(report, "frontier", "latency_on"):
        rows.append(("latencies of the frontier", f"{where}; without server"))
    for smoke in dig(report, "smoke") or []:
        took = formats.milliseconds(dig(smoke, "milliseconds"))
        rows.append((f"smoke test of {shorten(dig(smoke, 'archive') or DASH, 60)}", f"{took} on {device}"))
    return markup.section("What was measured where", markup.table("", ("number", "where"), rows, "tt"))


def render(report: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        report: the content of report.json: tool, name, source, options, environment, stages, original, pruned,
            counting, hash, layers, verify, smoke and, after a comparison, agreement, speedup, verdict. Any key may be
            missing or None and shows as an en dash; plan, frontier and stages_share (`points` lists the keys of the
            last two) then show nothing. Errors, shares and accuracies are fractions of 1; times are in seconds (stages) or milliseconds
            (`*_ms`).

    Returns:
        A complete HTML document without references to other files.
    """
    layers = _layers(report)
    rows = [(row.label, row.original, row.pruned, row.ratio) for row in text.summary_rows(report)]
    parts = [
        _headline(report),
        _tiles(report),
        markup.section(
            "Original and pruned",
            markup.table("", ("quantity", "original", "pruned", "ratio"), rows, "tnnn"),
            markup.note(RATIO_NOTE),
        ),
        charts.frontier_section(report),
        charts.share_section(report),
        plans.plan_section(report),
        f'<div class="pair">{_stages(report)}{_verification(report)}{_hashing(report)}{_counting(report)}</div>',
    ]
    if layers:
        parts += [_charts(layers), _layer_section(layers), _alternatives(layers), _densities(layers)]
    parts += [
        '<div class="pair">',
        _pairs("Options", report.get("options")),
        _pairs("Source", report.get("source")),
        _pairs("Environment", report.get("environment")),
        _measured_where(report),
        "</div>",
    ]
    tool = f"{dig(report, 'tool', 'name') or 'redpp-serve'} {dig(report, 'tool', 'version') or DASH}"
    title = text_of(f"{report.get('name') or 'model'}: pruning report")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{charts.STYLE}</style></head>'
        f"<body><main>{''.join(parts)}{markup.note(f'Written by {tool}.')}</main>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
