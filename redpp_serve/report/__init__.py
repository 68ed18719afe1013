"""What was done and measured, for people and machines: report.json, report.html and the terminal summary."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from redpp_serve.errors import RedppError
from redpp_serve.files import write_atomically
from redpp_serve.report.html import render


def _clean(value: Any) -> Any:
    """Plain JSON types (NumPy scalars included); NaN and infinities, which JSON lacks, become None."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a report holds numbers, text, lists and dicts, not {type(value).__name__}")


def write_reports(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json (sorted keys, finite numbers only) and report.html into `folder`, each atomically.

    Args:
        report: the keys are listed at `redpp_serve.report.html.render`; NaN and infinities become null.
        folder: created when missing; existing reports are replaced.

    Raises:
        RedppError: the folder cannot be created or written.
    """
    plain = _clean(report)
    document = json.dumps(plain, sort_keys=True, indent=1, allow_nan=False) + "\n"
    contents = {"report.json": document, "report.html": render(plain)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(folder / name, content)
    except OSError as problem:
        raise RedppError(
            f"cannot write the report into {folder}: {problem.strerror or problem}",
            "a folder that this user may write to, with space left",
            "free space, fix the permissions or choose another output folder",
        ) from problem
