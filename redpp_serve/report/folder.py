"""The report of a packaged folder: report.json for programs, report.html for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from redpp_serve.errors import RedppError
from redpp_serve.files import read_bounded, write_atomically
from redpp_serve.report.data import Report, plain
from redpp_serve.report.page import render
from redpp_serve.state_folders import alone

REPORT, PAGE = "report.json", "report.html"


def read_report(folder: Path) -> Report:
    """Read the report of a packaged folder.

    Raises:
        RedppError: there is none, or it is damaged.
    """
    try:
        found = json.loads(read_bounded(folder / REPORT))
        if not isinstance(found, dict):
            raise ValueError(f"{REPORT} is no JSON object")
        return Report.from_json(found)
    except (OSError, ValueError, RecursionError) as error:
        raise not_packaged(folder, error) from error


def not_packaged(folder: Path, why: object) -> RedppError:
    """Return the refusal of a folder whose report cannot be used."""
    return RedppError(
        f"{folder} is not a packaged model: {why}",
        "a folder written by redpp-serve package",
        "package a model first, or correct the path",
    )


def write_report(report: Report, folder: Path) -> None:
    """Write report.json (sorted keys, finite numbers) and report.html, each atomically; make the folder when missing.

    Raises:
        RedppError: the folder cannot be made or written to.
    """
    document = json.dumps(plain(report), sort_keys=True, indent=1, allow_nan=False) + "\n"
    page = render(Report.from_json(json.loads(document)))  # as it will be read
    try:
        write_atomically(folder / REPORT, document)
        write_atomically(folder / PAGE, page)
    except OSError as problem:
        raise RedppError(
            f"cannot write the report into {folder}: {problem.strerror or problem}",
            "a folder that this user may write to, with space left",
            "free space, fix the permissions or choose another output folder",
        ) from problem


def change_report(folder: Path, change: Callable[[Report], Report]) -> bool:
    """Write what ``change`` makes of a folder's report; return False where it cannot be read or written.

    Processes take turns, so that none loses what another one has just added.
    """
    try:
        with alone(folder):
            write_report(change(read_report(folder)), folder)
    except (RedppError, OSError):
        return False
    return True
