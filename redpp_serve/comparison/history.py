"""What a package's report keeps of comparisons: the newest one's figures beside what was counted, and a history."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from redpp_serve.comparison.compare import Comparison, Conditions
from redpp_serve.comparison.figures import cell_record
from redpp_serve.comparison.sweep import Sweep
from redpp_serve.report.data import ComparisonRecord, Report
from redpp_serve.report.folder import change_report
from redpp_serve.variants import NAMES

KEPT, KEPT_CELLS = 10, 64  # newest comparisons of each server, and their cells in all


def record(folder: Path, result: Comparison | Sweep) -> bool:
    """Put the result into the folder's report.json and report.html; return False where they cannot be written."""
    return change_report(folder, lambda report: with_result(report, result))


def with_result(report: Report, result: Comparison | Sweep) -> Report:
    """Add the result to the history, and the figures of a comparison that is no sweep to what was counted."""
    if isinstance(result, Comparison):
        report = _beside(report, {k: v for k, v in result.to_json().items() if k not in _CONDITIONS})
    if result.conditions is not None:
        report.comparisons = kept([_record_of(result, result.conditions), *(report.comparisons or ())])
    return report


_CONDITIONS = {item.name for item in fields(Conditions)}


def kept(records: list[ComparisonRecord]) -> list[ComparisonRecord]:
    """Return the newest records, `KEPT` of each server at most; the newest come first."""
    found = []
    for index, each in enumerate(records):
        alike = [other for other in records[:index] if other.server == each.server]
        cells = sum(len(other.cells) for other in (*alike, each))
        if not alike or (len(alike) < KEPT and cells <= KEPT_CELLS):
            found.append(each)
    return found


def _beside(report: Report, measured: dict[str, Any]) -> Report:
    """Put what was measured beside what was counted. An accuracy on verification data stays."""
    before = report.to_json()
    stays = {"accuracy"} if report.accuracy_of else set()
    arms = {
        name: {**before[name], **{key: value for key, value in measured[name].items() if key not in stays}}
        for name in NAMES
    }
    return Report.from_json({**before, **measured, **arms})


def _record_of(result: Comparison | Sweep, conditions: Conditions) -> ComparisonRecord:
    several = result.comparisons if isinstance(result, Sweep) else (result,)
    return ComparisonRecord(**asdict(conditions), cells=[cell_record(each) for each in several])
