"""What a report keeps of comparisons: the newest figures, and a bounded history that damage does not spread from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from redpp_serve.comparison.compare import Agreement, Comparison, Conditions
from redpp_serve.comparison.figures import figures
from redpp_serve.comparison.history import KEPT, KEPT_CELLS, kept, record, with_result
from redpp_serve.comparison.sweep import Sweep
from redpp_serve.options import Axis
from redpp_serve.report.data import ComparisonRecord, Report
from redpp_serve.report.folder import read_report, write_report
from redpp_serve.requirements import COMPARED
from redpp_serve.statistics.intervals import Estimate
from redpp_serve.statistics.verdicts import Verdict
from tests.comparison.test_compare import arm

CONDITIONS = Conditions("2026-01-02 03:04:05", "torchserve", "a device", {"torch": "2"}, {"workers": 1})
RESULT = Comparison(
    original=arm("original", 1.0, accuracy=0.9, errors=9),
    pruned=arm("pruned", 0.5, accuracy=0.89),
    agreement=Agreement(0.995, 0.25, 0.0123, 360),
    speedup={
        "handler_p50": Estimate(2.0, 1.95, 2.05),
        "end_to_end_p50": Estimate(1.62, 1.58, 1.66),
        "throughput": None,
    },
    verdict=Verdict("faster", "pruned is faster", 1.58, 1.66),
    handler_verdict=None,
    pairs=800,
    concurrency=4,
    seconds=20.0,
    margin=0.02,
    conditions=CONDITIONS,
)


def test_every_figure_has_its_name() -> None:
    found = figures(RESULT)
    assert list(found) == [name for name in COMPARED if name in found] and "throughput_gain" not in found
    assert found["speedup"] == (1.62, 1.58, 1.66) and found["handler_speedup"].value == 2.0
    assert found["p99_ms"].value == 56.125 and found["original_p99_ms"].value == 112.25
    assert found["original_failed"].value == 0.01 and found["failed"].value == 0
    assert found["agreement"] == (0.995, None, None) and found["difference"].value == 0.0123
    assert round(found["accuracy_drop"].value, 9) == 1.0 and found["accuracy"].value == 0.89


def test_counts_and_served_numbers_stand_side_by_side() -> None:
    report = {
        "name": "x",
        "accuracy_of": "verification data",
        "original": {"macs": 2, "accuracy": 0.95},
        "pruned": {"macs": 1, "accuracy": 0.8},
    }
    found = with_result(Report.from_json(report), RESULT)
    assert found.verdict == "pruned is faster" and found.accuracy_of == "verification data"
    # the accuracy is that on all data, not on what was sent
    assert [(x.macs, x.accuracy, x.throughput_rps) for x in found.versions] == [(2, 0.95, 400.0), (1, 0.8, 800.0)]
    assert not {"server", "device", "settings"} & set(found.to_json())
    del report["accuracy_of"]  # then it is of an earlier comparison
    assert with_result(Report.from_json(report), RESULT).original.accuracy == 0.9


def test_comparisons_are_kept_with_what_they_were_measured_with(tmp_path: Path) -> None:
    write_report(Report.from_json({"name": "x"}), tmp_path)
    assert record(tmp_path, RESULT)
    triton = replace(CONDITIONS, server="triton", time="2026-01-03 00:00:00")
    assert record(tmp_path, replace(RESULT, conditions=triton))
    newest, first = read_report(tmp_path).comparisons or []
    assert (newest.server, first.server) == ("triton", "torchserve")
    assert (first.time, first.device, first.versions) == ("2026-01-02 03:04:05", "a device", {"torch": "2"})
    assert first.settings == {"workers": 1} and first.cells[0].value("speedup") == 1.62
    assert (first.cells[0].concurrency, first.cells[0].batch, first.cells[0].inputs) == (4, 1, 360)
    page = (tmp_path / "report.html").read_text()
    for text in (
        "Comparisons",
        "2026-01-03 00:00:00",
        "triton",
        "1.62x [1.58, 1.66]",
        "a device",
        "torch 2",
        "workers 1",
    ):
        assert text in page, text
    assert "through triton, 2026-01-03 00:00:00 UTC" in page


def test_a_sweep_leaves_the_figures_of_the_last_comparison(tmp_path: Path) -> None:
    write_report(Report.from_json({"name": "x"}), tmp_path)
    record(tmp_path, RESULT)
    loud = replace(RESULT, verdict=Verdict("slower", "pruned is slower", 0.5, 0.6), concurrency=8)
    sweep = Sweep((Axis("concurrency", (4, 8)),), (RESULT, loud), replace(CONDITIONS, settings={}))
    record(tmp_path, sweep)
    report = read_report(tmp_path)
    assert report.verdict == "pruned is faster" and len(report.comparisons or ()) == 2
    page = (tmp_path / "report.html").read_text()
    assert "Sweep on torchserve, 2026-01-02 03:04:05 UTC" in page and "8 at a time, batch 1" in page


def test_the_history_is_bounded_for_each_server() -> None:
    def made(server: str, cells: int = 1) -> ComparisonRecord:
        return ComparisonRecord.from_json({"server": server, "cells": [{}] * cells})

    many = [made("torchserve") for _ in range(KEPT + 5)]
    assert kept(many) == many[:KEPT]
    assert kept([*many, made("triton")])[-1].server == "triton"  # another server's stays, however old
    sweeps = [made("torchserve", 32) for _ in range(KEPT)]
    assert sum(len(each.cells) for each in kept(sweeps)) == KEPT_CELLS
    assert len(kept([made("triton", KEPT_CELLS + 1)])) == 1  # the newest stays, whatever its size


def test_a_damaged_history_is_read_for_what_is_sound(tmp_path: Path) -> None:
    write_report(Report.from_json({"name": "x"}), tmp_path)
    record(tmp_path, RESULT)
    document: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    sound = document["comparisons"][0]
    damaged: list[Any] = [None, 7, "x", [], {}, {"cells": 3}, {"server": [], "cells": [None, {"figures": [1]}]}]
    damaged += [{"server": "<b>x</b>\x1b[2J", "time": {}, "cells": [{"figures": {"speedup": {"value": "fast"}}}]}]
    for broken in ("text", 5, {"a": 1}, [*damaged, sound]):
        (tmp_path / "report.json").write_text(json.dumps({**document, "comparisons": broken}))
        assert record(tmp_path, RESULT)
        again = read_report(tmp_path)
        assert (again.comparisons or [])[0].cells[0].value("speedup") == 1.62
    assert again.compared_on("torchserve") and len(again.comparisons or ()) <= 2 + len(damaged)
    page = (tmp_path / "report.html").read_text()
    assert "<b>x" not in page and "&lt;b&gt;x" in page and "\x1b" not in page
