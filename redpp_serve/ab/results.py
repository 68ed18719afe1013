"""What the end of an A/B test leaves for a change request: report.html, report.json and a text with the verdict."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from redpp_serve import __version__
from redpp_serve.ab.decisions import PROMOTE, ROLLBACK
from redpp_serve.ab.spec import Started
from redpp_serve.ab.status import Status
from redpp_serve.errors import without_controls
from redpp_serve.files import write_atomically
from redpp_serve.report.templates import ENVIRONMENT
from redpp_serve.variants import NAMES, PRUNED

RESULTS = "experiments"  # in the packaged folder: a folder for each test
REPORT, DOCUMENT, VERDICT = "report.html", "report.json", "verdict.txt"


def results_folder(test: Started) -> Path:
    """Return the folder for the results of a test, named after its start (UTC)."""
    return test.spec.folder / RESULTS / time.strftime("%Y%m%d-%H%M%S", time.gmtime(test.started))


def headline(status: Status) -> str:
    """Return the outcome in a sentence or two: where users are, who has moved them, and the verdict."""
    if status.all_to is None:
        where = f"Ended without a decision: {status.split.pruned} % of users got pruned."
    else:
        word = "Promoted" if status.all_to == PRUNED.name else "Rolled back"
        acted = next((d for d in reversed(status.decisions) if d.action in (PROMOTE, ROLLBACK)), None)
        by = "by the verdict" if acted and acted.users == status.all_to else "by hand, or since the folder was lost"
        where = f"{word} {by}: all users got {status.all_to}."
    return without_controls(f"{where} {status.advice.text}")


def write_results(status: Status, folder: Path) -> None:
    """Write the three files, each of which replaces an earlier one as a whole.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    document = {"headline": headline(status), **status.to_json(), **_about()}
    write_atomically(folder / DOCUMENT, json.dumps(document, indent=1) + "\n")
    write_atomically(folder / VERDICT, verdict_text(status))
    write_atomically(folder / REPORT, page(status))


def verdict_text(status: Status) -> str:
    """Return the verdict as plain text: the outcome, the numbers, and every decision."""
    lines = [headline(status), "", status.to_text(), "", "Decisions:", *map(str, status.decisions)]
    return without_controls("\n".join([*lines, "", f"redpp-serve {__version__}", ""]))


def page(status: Status) -> str:
    """Return one self-contained HTML document; everything in it is escaped."""
    return ENVIRONMENT.get_template("experiment.html.j2").render(
        status=status,
        names=list(NAMES),
        headline=headline(status),
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time.time() - status.seconds)),
        rows=status.rows(),
        strata=[_stratum(split, counts) for split, counts in status.strata.items()],
        rails=[({True: "kept", False: "broken", None: "open"}[rail.ok], rail.text) for rail in status.guardrails],
        findings=[(finding.source, finding.verdict.kind, finding.verdict.text) for finding in status.findings],
        decisions=[_decision(made.time, made.action, made.users, made.text) for made in status.decisions],
        about=[(key, str(value)) for key, value in _options(status).items()],
        machine=[(key, str(value)) for key, value in _about()["environment"].items() if value],
        version=__version__,
    )


def _stratum(split: str, counts: dict[str, dict[str, int]]) -> tuple[str, ...]:
    shown = [f"{counts['faults'].get(arm, 0)} of {counts['judged'].get(arm, 0)}" for arm in NAMES]
    return (split, *shown)


def _decision(seconds: float, action: str, users: str, text: str) -> tuple[str, str, str, str]:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds)), action, users, text


def _options(status: Status) -> dict[str, Any]:
    spec = status.spec.to_json(secrets=False)
    limits = {key: value for key, value in asdict(status.spec.limits).items() if value is not None}
    return {key: value for key, value in {**spec, **limits}.items() if value not in (None, "", []) and key != "limits"}


def _about() -> dict[str, Any]:
    from redpp_serve.machine import describe_machine  # noqa: PLC0415 (torch; other commands start fast without)

    return {"tool": {"name": "redpp-serve", "version": __version__}, "environment": describe_machine()}
