"""A sweep: comparisons at several settings of the load, on one server, both versions in turns in each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from redpp_serve.comparison.compare import Comparison, Conditions, Gain
from redpp_serve.comparison.figures import cell_record
from redpp_serve.options import Axis, ComparisonOptions
from redpp_serve.report.formats import columns
from redpp_serve.report.history import HEAD, cell_row


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep.

    Attributes:
        options: the load.
        batch: inputs in one request; None to send them as they are.
    """

    options: ComparisonOptions
    batch: int | None = None


def cells(axes: Sequence[Axis], options: ComparisonOptions) -> list[Cell]:
    """Return the product of the axes' values, the last one's in the inner loop."""
    found = []
    for values in product(*(axis.values for axis in axes)):
        named: dict[str, Any] = dict(zip((axis.name for axis in axes), values, strict=True))
        batch = named.pop("batch", None)
        found.append(Cell(replace(options, **named), None if batch is None else int(batch)))
    return found


@dataclass(frozen=True)
class Sweep:
    """The comparisons of a sweep, in the order in which they were made.

    Attributes:
        axes: what was varied.
        comparisons: one for each cell.
        conditions: what all of them have in common.
        gains: what engine, precision and pruning gain, without a server.
    """

    axes: tuple[Axis, ...]
    comparisons: tuple[Comparison, ...]
    conditions: Conditions
    gains: tuple[Gain, ...] = ()

    def places(self) -> list[str]:
        """Return each cell in words, such as ``concurrency 4, batch 8``."""
        values = product(*(axis.values for axis in self.axes))
        return [", ".join(f"{a.name} {x:g}" for a, x in zip(self.axes, cell, strict=True)) for cell in values]

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, texts and lists, fit for ``json.dumps``."""
        return {
            **asdict(self.conditions),
            "sweep": {axis.name: list(axis.values) for axis in self.axes},
            "cells": [each.to_json() for each in self.comparisons],
            "gains": [gain.to_json() for gain in self.gains],
        }

    def to_text(self) -> str:
        """Return a table for each cell, and one of all of them."""
        parts = [f"== {place}\n{each.to_text()}\n" for place, each in zip(self.places(), self.comparisons, strict=True)]
        table = columns([HEAD, *(cell_row(cell_record(each)) for each in self.comparisons)])
        return "\n".join([*parts, "== all, original → pruned", *table])
