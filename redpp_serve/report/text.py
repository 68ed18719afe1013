"""The report for the terminal: the summary of `package`, the table of layers, and the table of kernels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from redpp_serve.errors import printable
from redpp_serve.report.data import Layer, PlanRecord, Report
from redpp_serve.report.formats import DASH, bare_milliseconds, bits, columns, count, error, exact, of, shape, shorten
from redpp_serve.report.tables import (
    EngineRow,
    KernelRow,
    bound_note,
    engine_rows,
    frontier_points,
    frontier_table,
    hash_rows,
    kernel_rows,
    kernel_summary,
    left_alone,
    precision_rows,
    summary_rows,
    thinned,
    verify_rows,
    verify_title,
)
from redpp_serve.variants import NAMES, canonical_name

WIDTH = 110
NAMES_SHOWN = 12  # names listed under one reason before "and N more"
POINTS_SHOWN = 12  # of the frontier; report.html has all


def package_summary(report: Report) -> str:
    """Return what `package` prints at the end, in at most 110 columns and without a final newline."""
    title = f"{report.name or 'model'}: original and pruned by redpp-serve {report.tool.version or DASH}"
    lines = [shorten(title, WIDTH), "", *columns([("", *NAMES, "ratio"), *summary_rows(report)]), *_frontier(report)]
    if report.hash:
        how = ", ".join(part for part in (report.hash.method, report.hash.target) if part)
        table = columns([("", "predicted", "at most", "measured"), *hash_rows(report)], indent="  ")
        lines += ["", shorten(f"hashing ({how or DASH})", WIDTH), *table]
        lines += [f"  {note}"] if (note := bound_note(report)) else []
    if report.verify or report.agreement:
        lines += ["", verify_title(report), *columns(verify_rows(report), indent="  ")]
    if rows := precision_rows(report):
        lines += ["", *columns([("precision", "", "error", "agreement", ""), *rows], [0, 1, 4])]
    for stage in report.stages or []:
        if stage.status in ("skipped", "failed"):
            lines += ["", *_wrapped(f"{stage.status}: {stage.name} ({stage.reason or 'no reason given'})")]
    lines += _left_alone(report.layers)
    if report.verdict:
        lines += ["", *_wrapped(f"verdict: {report.verdict}")]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(printable(text), WIDTH, subsequent_indent="  ")


def _frontier(report: Report) -> list[str]:
    """Return at most thirteen lines: a head, then points from the most expensive on."""
    if not (points := frontier_points(report)):
        return []
    shown = thinned(points, POINTS_SHOWN)
    title = "frontier" if len(shown) == len(points) else f"frontier ({len(shown)} of {len(points)} points)"
    head, rows = frontier_table([*shown])
    last = (
        head.index("agreement") if "agreement" in head else head.index("error")
    ) + 1  # the predicted error is for the page
    table = columns([(title, *head[1:last]), *(("", *row[1:last]) for row in rows)])
    return [
        "",
        *(f"{line}  {shorten(flag, 30)}" for line, flag in zip(table, ["flag", *(r[0] for r in rows)], strict=True)),
    ]


def _left_alone(layers: Sequence[Layer]) -> list[str]:
    if not (found := left_alone(layers)):
        return []
    lines = ["", f"channels left alone: {sum(map(len, found.values()))} of {len(layers)} layers"]
    for reason, names in found.items():
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        listing = ", ".join(names[:NAMES_SHOWN]) + more
        for text, indent in ((f"{reason}:", "  "), (listing, "    ")):
            lines += textwrap.wrap(
                text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=text != listing
            )
    return lines


def layer_table(layers: Sequence[Layer]) -> str:
    """Return a line for each layer, at most 110 columns, without columns that nobody filled; then those left alone."""
    if not layers:
        return "no layers with weights"
    measured = ("values", "bits", "RMS", "kept", "error")
    head = ("layer", "op", "shape", "pruned to", "params", "MACs", "ms", *measured, "channels", "narrowable")
    body = [_layer_cells(layer) for layer in layers]
    used = [i for i in range(len(head)) if any(row[i] != DASH for row in body)]
    rows, left = [[row[i] for i in used] for row in (head, *body)], range(sum(i < 2 for i in used))
    if (excess := max(map(len, columns(rows, left))) - WIDTH) > 0:
        names = max(len(row[0]) for row in rows) - excess
        rows = [[shorten(row[0], max(names, 12)), *row[1:]] for row in rows]
    return "\n".join([*columns(rows, left), *_left_alone(layers)])


def _layer_cells(layer: Layer) -> tuple[str, ...]:
    merge, hashed = layer.merge, layer.hash
    kept, channels = (merge.kept, merge.channels) if merge else (None, None)
    inspected = merge is not None and kept is None and channels is not None  # nothing has been narrowed yet
    return (
        shorten(layer.name or DASH, 40),
        shorten(layer.op or DASH, 9),
        shape(layer.shape),
        shape(layer.pruned_shape) if layer.pruned_shape != layer.shape else DASH,
        count(layer.parameters),
        count(layer.macs),
        bare_milliseconds(layer.ms),
        exact(hashed and hashed.values),
        bits(hashed and hashed.entropy),
        error(hashed and hashed.error),
        *((DASH, DASH) if inspected else (of(kept, channels), error(layer.error))),
        *((exact(channels), "no" if merge and merge.reason else "yes") if inspected else (DASH, DASH)),
    )


def plan_text(plans: Mapping[str, Any]) -> str:
    """Return the tables of kernels of both versions, from what `planning.plan` returned."""
    blocks = []
    for name, found in plans.items():
        if isinstance(found, Mapping):
            plan = PlanRecord.from_json(found)
            served, rows = engine_rows(plan), kernel_rows(plan)
            left = [i for i, key in enumerate(KernelRow._fields) if key not in ("batch", "dense", "chosen")]
            engines = columns([EngineRow._fields, *served], [1, 3], indent="  ") if served else []
            table = columns([KernelRow._fields, *rows], left, indent="  ") if rows else []
            notes = [f"  {line}" for line in kernel_summary(plan)]
            blocks.append("\n".join([canonical_name(name), *engines, *table, *notes]))
    return "\n\n".join(blocks)
