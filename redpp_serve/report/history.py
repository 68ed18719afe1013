"""Rows of the comparisons that a report keeps, side by side: those of one load, and the cells of each sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from redpp_serve.errors import printable
from redpp_serve.report.data import CellRecord, ComparisonRecord, Report
from redpp_serve.report.formats import DASH, count, milliseconds, percent, rate, shorten, times

_LOAD = {"concurrency": "{} at a time", "rate": "{}/s", "batch": "batch {}"}
_FIGURES = {
    "p50": ("p50_ms", milliseconds),
    "p99": ("p99_ms", milliseconds),
    "p99 at the rate": ("rate_p99_ms", milliseconds),
    "throughput": ("throughput", rate),
}
_CHANGES = {"times faster": "speedup", "more throughput": "throughput_gain"}
HEAD = ("load", *_FIGURES, *_CHANGES, "same class", "failed")


def side_by_side(report: Report) -> tuple[list[str], list[tuple[str, ...]]]:
    """Return head and rows of a table with a column for each comparison that is no sweep, the newest first."""
    alone = [each for each in report.comparisons or () if len(each.cells) == 1]
    if not alone:
        return [], []
    columns = [(printable(each.server or DASH), *cell_row(each.cells[0]), *_with(each)) for each in alone]
    titles = ("server", *HEAD, "device", "releases", "settings")
    return ["time (UTC)", *map(_when, alone)], list(zip(titles, *columns, strict=True))


def sweeps(report: Report) -> list[tuple[str, list[tuple[str, ...]], str]]:
    """Return title, rows of cells in the order of `HEAD`, and what it was measured with, for each sweep."""
    return [
        (
            f"Sweep on {printable(each.server or DASH)}, {_when(each)} UTC",
            [cell_row(cell) for cell in each.cells],
            "; ".join(_with(each)),
        )
        for each in report.comparisons or ()
        if len(each.cells) > 1
    ]


def _when(record: ComparisonRecord) -> str:
    return shorten(record.time or DASH, 20)


def cell_row(cell: CellRecord) -> tuple[str, ...]:
    """Return a cell's load and figures, in the order of `HEAD`."""
    load = [_LOAD[name].format(count(x)) for name in _LOAD if (x := getattr(cell, name)) is not None]
    both = [
        f"{show(cell.value(f'original_{name}'))} → {show(cell.value(name))}"
        if cell.value(name) is not None or cell.value(f"original_{name}") is not None
        else DASH
        for name, show in _FIGURES.values()
    ]
    changes = [_ratio(cell, name) for name in _CHANGES.values()]
    shares = [percent(cell.value(name)) for name in ("agreement", "failed")]
    return (", ".join(load) or DASH, *both, *changes, *shares)


def _ratio(cell: CellRecord, name: str) -> str:
    found = cell.figures.get(name)
    if found is None or found.value is None:
        return DASH
    known = found.low is not None and found.high is not None
    return times(found.value) + (f" [{found.low:.2f}, {found.high:.2f}]" if known else "")


def _with(record: ComparisonRecord) -> tuple[str, str, str]:
    return shorten(record.device or DASH, 80), _words(record.versions), _words(record.settings)


def _words(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{printable(k)} {shorten(v, 40)}" for k, v in sorted(found.items()) if v is not None) or DASH
