"""The benchmark of verdicts: it replays the product, counts rightly, and its committed result keeps the promise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest

from benchmarks import verdict_simulation, verdicts

ROOT = Path(__file__).parents[2]


def test_the_replays_are_the_product_s_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts.check()
    monkeypatch.setattr(verdict_simulation, "RHO2", 0.1)
    with pytest.raises(SystemExit, match="the replays stop at"):
        verdicts.check()


def test_noise_has_mean_0_and_deviation_1() -> None:
    for name, noise in verdict_simulation.PAIRED.items():
        values = noise(numpy.random.default_rng(0), 400, 1000)
        assert values.shape == (400, 1000) and abs(values.mean()) < 0.03, name
        assert values.std() == pytest.approx(1.0, abs=0.1), name


def test_autoregression_has_its_correlation() -> None:
    values = verdict_simulation.autoregression(numpy.random.default_rng(0), (200, 1000), 0.8)
    lagged = [(values[:, lag:] * values[:, : 1000 - lag]).mean() for lag in (0, 1, 3)]
    assert lagged == pytest.approx([1.0, 0.8, 0.512], abs=0.03)


def test_cells_count_and_bound() -> None:
    cell = verdicts.alarms(numpy.array([math.inf] * 95 + [40.0] * 5), 500, "pairs")
    assert (cell["false_alarms"], cell["rate"]) == (5, 0.05)
    assert (cell["low"], cell["high"]) == pytest.approx((0.0215, 0.1118), abs=1e-3)  # Wilson's interval in tables
    cell = verdicts.stopping(numpy.array([10.0, 20.0, 30.0, math.inf]), 100, "pairs")
    assert (cell["median"], cell["p90"], cell["found"]) == (30, None, 0.75)


def committed() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / verdicts.OUT).read_text())
    return result


def test_no_committed_cell_has_significantly_more_than_5_percent() -> None:
    cells = [cell for cell in committed()["false_alarms"] if "foil" not in cell["method"]]
    expected = {*verdict_simulation.PAIRED, *verdicts.SPLITS, *(name for name, *_ in verdicts.GUARDS_NULL)}
    assert {cell["data"] for cell in cells} == expected
    assert all(cell["low"] <= 0.05 and cell["runs"] >= 2000 and cell["observations"] >= 4000 for cell in cells)


def test_the_committed_table_is_that_of_the_data() -> None:
    assert (ROOT / verdicts.OUT).with_suffix(".md").read_text() == verdicts.table(committed())
