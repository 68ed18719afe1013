"""The report of a folder: both files, what is read from them, and how they are changed."""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from redpp_serve.errors import RedppError
from redpp_serve.report.data import Report
from redpp_serve.report.folder import change_report, read_report, write_report
from redpp_serve.report.page import render
from tests.support.reports import SAMPLE_PLAN, sample_report


def test_json_is_sorted_and_finite(tmp_path: Path) -> None:
    report = {**sample_report(), "zz": np.float32(0.5), "aa": [math.nan, math.inf, np.int64(3), (1, True)]}
    write_report(Report.from_json(report), tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    content = (folder / "report.json").read_text(encoding="utf-8")
    loaded = json.loads(content)
    assert (loaded["aa"], loaded["zz"]) == ([None, None, 3, [1, True]], 0.5)
    assert list(loaded) == sorted(loaded) and content.startswith('{\n "aa": [\n')
    assert (folder / "report.html").read_text(encoding="utf-8") == render(Report.from_json(loaded))


def test_writing_is_deterministic_and_replaces(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    write_report(Report.from_json(sample_report()), tmp_path)
    first = (tmp_path / "report.json").read_bytes(), (tmp_path / "report.html").read_bytes()
    write_report(Report.from_json(dict(reversed(sample_report().items()))), tmp_path)
    assert first == ((tmp_path / "report.json").read_bytes(), (tmp_path / "report.html").read_bytes())


def test_a_failed_write_leaves_the_old_report_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RedppError, match="No space left on device"):
        write_report(Report.from_json(sample_report()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_unknown_types_are_a_programming_error() -> None:
    with pytest.raises(TypeError, match="not set"):
        Report.from_json({"x": {1}})


def test_a_report_is_written_as_it_was_read() -> None:
    report = {**sample_report(), "messages": ["a"], "pairs": 12, "open_loop": None, "plan": {"pruned": SAMPLE_PLAN}}
    report["original"] |= {"errors": 0, "first_error": None, "handler_ms": None}
    report["speedup"]["handler_p50"] = None
    assert Report.from_json(report).to_json() == report


def test_a_report_of_a_former_release_has_todays_names() -> None:
    found = Report.from_json({"plan": {"original": SAMPLE_PLAN, "redpp": SAMPLE_PLAN}}).to_json()
    assert found["plan"] == {"original": SAMPLE_PLAN, "pruned": SAMPLE_PLAN}


def test_values_of_another_type_are_unknown() -> None:
    odd: dict[str, Any] = {
        "name": ["x"],
        "original": {"macs": "9", "bytes": True, "parameters": math.nan, "additions": 3},
        "layers": [None, 5, {"name": 7, "shape": [1, "x", None], "hash": 3, "merge": []}],
        "frontier": {"points": {"flag": "x"}},
        "verify": "x",
        "agreement": 1,
        "stages": None,
    }
    report = Report.from_json(odd)
    assert report.name is None and report.verify is None and report.agreement is None and report.stages is None
    found = report.original
    assert (found.macs, found.bytes, found.parameters, found.additions) == (None, None, None, 3)
    (layer,) = report.layers
    assert (layer.name, layer.shape, layer.hash, layer.merge) == (
        "7",
        [1, None, None],
        None,
        None,
    )  # a list keeps its length
    assert report.frontier is not None and report.frontier.points == []
    for value in (None, 5, [], "x"):
        assert Report.from_json(value).layers == []


def test_changes_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    write_report(Report.from_json(sample_report()), tmp_path)
    entered, go_on = Event(), Event()

    def slowly(report: Report) -> Report:
        entered.set()
        assert go_on.wait(10)
        report.verdict = "one"
        return report

    def meanwhile(report: Report) -> Report:
        report.name = "other"
        return report

    with ThreadPoolExecutor() as pool:
        first = pool.submit(change_report, tmp_path, slowly)
        assert entered.wait(10)
        second = pool.submit(change_report, tmp_path, meanwhile)
        assert not wait([second], 0.3).done
        go_on.set()
        assert first.result(10) and second.result(10)
    report = read_report(tmp_path)
    assert (report.name, report.verdict) == ("other", "one")


def test_only_a_readable_report_is_changed(tmp_path: Path) -> None:
    def rename(report: Report) -> Report:
        report.name = "other"
        return report

    assert not change_report(tmp_path, rename) and list(tmp_path.iterdir()) == []
    for text in ("{", "[]", "[" * 100_000, "\x00"):
        (tmp_path / "report.json").write_text(text)
        assert not change_report(tmp_path, rename) and (tmp_path / "report.json").read_text() == text
        with pytest.raises(RedppError, match="is not a packaged model.*redpp-serve package"):
            read_report(tmp_path)
    write_report(Report.from_json(sample_report()), tmp_path)
    assert change_report(tmp_path, rename)
    assert read_report(tmp_path).name == "other" and "<h1>other</h1>" in (tmp_path / "report.html").read_text()
