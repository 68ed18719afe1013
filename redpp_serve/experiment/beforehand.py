"""What is known of the outputs without shadow mode: a split compares none, but the package, or `compare`, has."""

from __future__ import annotations

import json
from typing import Any

from redpp_serve.comparison.guardrails import Guardrail, share_bounds

from .spec import TOLERANCE, Spec

_HERE = "not compared under a split (add --shadow)"


def agreement_beforehand(spec: Spec) -> Guardrail:
    """The agreement that the pruned version's own report has, as a limit of an experiment without shadow mode.

    Kept where the report's share is within the limit, broken where it is below it beyond chance, else not known: then
    speed alone is no reason to promote.
    """
    limit = spec.limits.min_agreement
    try:
        report = json.loads(((spec.candidate or spec.folder) / "report.json").read_text(encoding="utf-8"))
        share, inputs, source = _measured(report, spec.limits.tolerance)
    except (OSError, ValueError, KeyError, TypeError):
        return Guardrail("agreement", None, f"agreement: {_HERE}, and the package's report says nothing of it", None, 0.0, 1.0, limit)
    low, high = share_bounds(round(share * inputs), inputs, 0.05)
    ok = True if share >= limit else False if high < limit else None
    text = f"agreement: {_HERE}; {source} {share:.2%} of {inputs} inputs agreed"
    return Guardrail("agreement", ok, text + ("" if ok else f", {limit:.2%} wanted"), share, low, high, limit)


def _measured(report: dict[str, Any], tolerance: float | None) -> tuple[float, int, str]:
    """Share of inputs that agreed, of how many, and where that was measured."""
    found = report.get("agreement")
    if found:
        same, difference, inputs, source = found["top1"], found["mean_relative_difference"], found["inputs"], "in the last comparison"
    else:
        found = report["verify"]
        same, difference, inputs, source = found["agreement"], found["output_error"], found["images"], "when it was packaged"
    if same is not None and tolerance is None:
        return float(same), int(inputs), source
    return float(difference <= (tolerance or TOLERANCE)), int(inputs), source  # of the mean: all of them, or none
