"""An experiment now: what users got, the comparisons of times, the limits, and what to do."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redpp_serve.ab.evidence import Evidence, Finding
from redpp_serve.ab.gateway import switched
from redpp_serve.ab.spec import Spec
from redpp_serve.ab.state import GATEWAY, SPEC, STATUS, read_json
from redpp_serve.errors import RedppError
from redpp_serve.statistics.guardrails import Guardrail
from redpp_serve.statistics.verdicts import Advice
from redpp_serve.variants import NAMES

_SILENT_S, _FULL_BYTES = 10.0, 1 << 20
_LOADS = "The arms carry different loads: compare batches of equal size (below), not these percentiles."


@dataclass(frozen=True)
class ArmStatus:
    """What users got from one arm. Times in milliseconds, None before the first.

    Attributes:
        configured: share of users by the split, 0 to 1.
        requests: of users, without replays.
        share: of all users' requests, 0 to 1.
        errors: answered with 500 or above.
        refused: answered with 400 to 498.
        abandoned: whose sender left before there was an answer.
        by_header: whose sender asked for the arm.
        gateway_ms: p50 and p99 of the server's time for a good request, as the gateway sees it, to 1 ms.
        handler_ms: p50 and p99 of the handler's time for a batch, replays included.
    """

    configured: float
    requests: int
    share: float | None
    errors: int
    refused: int
    abandoned: int
    by_header: int
    gateway_ms: dict[str, float | None]
    handler_ms: dict[str, float | None]


@dataclass(frozen=True)
class Status:
    """See the module. ``all_to`` is the arm that all users are sent to, None while they are divided; ``problems`` are
    what the supervisor could not mend.
    """

    name: str
    kind: str
    spec: Spec
    seconds: float
    all_to: str | None
    arms: dict[str, ArmStatus]
    shadow: dict[str, Any] | None
    findings: list[Finding]
    guardrails: list[Guardrail]
    advice: Advice
    problems: list[str]
    urls: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, texts and lists, fit for ``json.dumps``."""
        verdicts = [{"source": f.source, "measure": f.measure, **_finite(asdict(f.verdict))} for f in self.findings]
        return {
            "name": self.name,
            "server": self.kind,
            "experiment": self.spec.to_json(),
            "seconds": self.seconds,
            "all_to": self.all_to,
            "arms": {arm: asdict(status) for arm, status in self.arms.items()},
            "shadow": self.shadow,
            "verdicts": verdicts,
            "advice": asdict(self.advice),
            "guardrails": [_finite(asdict(rail)) for rail in self.guardrails],
            "problems": self.problems,
            "urls": self.urls,
        }

    def to_text(self) -> str:
        """A table for the terminal that ends with the advice."""
        rows = [("", *NAMES), *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows]
        return "\n".join([*self._head(), "", *table, "", *self._body()])

    def _head(self) -> Iterator[str]:
        spec, whom = self.spec, "users" if self.spec.sticky else "requests"
        if self.all_to:
            yield f"{self.name} on {self.kind}: all {whom} go to {self.all_to}"
        else:
            by = f", by {spec.sticky}" if spec.sticky else ""
            shares = f"{spec.split.original} % of {whom} to original, {spec.split.pruned} % to pruned"
            yield f"{self.name} on {self.kind}: {shares}{by}"
        extras = [f"pruned from {spec.candidate}"] if spec.candidate else []
        extras += ["shadow mode"] if spec.shadow else []
        yield ", ".join([self.urls["gateway"], *extras, f"running for {_span(self.seconds)}"])
        for problem in self.problems:
            yield f"PROBLEM: {problem}"

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        both = [self.arms[arm] for arm in NAMES]

        def row(title: str, cells: list[str]) -> tuple[str, str, str]:
            return title, cells[0], cells[1]

        yield row("requests", [str(arm.requests) for arm in both])
        yield row("share", ["-" if arm.share is None else f"{arm.share:.1%}" for arm in both])
        yield row("failed (5xx)", [str(arm.errors) for arm in both])
        yield row("refused (4xx)", [str(arm.refused) for arm in both])
        if any(arm.abandoned for arm in both):
            yield row("left unanswered", [str(arm.abandoned) for arm in both])
        if any(arm.by_header for arm in both):
            yield row("asked for by header", [str(arm.by_header) for arm in both])
        for title, group in (("gateway", "gateway_ms"), ("handler", "handler_ms")):
            for key in ("p50", "p99"):
                values = [getattr(arm, group)[key] for arm in both]
                digits = 0 if group == "gateway_ms" else 2
                yield row(f"{title} {key} (ms)", ["-" if value is None else f"{value:.{digits}f}" for value in values])

    def _body(self) -> Iterator[str]:
        if all(arm.requests for arm in self.arms.values()):
            yield _LOADS
        if self.shadow:
            yield from _shadow_lines(self.shadow, self.spec.limits.tolerance)
        for rail in self.guardrails:
            yield f"{ {True: 'kept', False: 'BROKEN', None: 'open'}[rail.ok]:<6}  {rail.text}."
        for finding in self.findings:
            yield f"{finding.source:<6}  {finding.verdict.text}."
        yield ""
        yield self.advice.text


def read_status(state: Path, urls: dict[str, str], evidence: Evidence | None = None) -> Status:
    """The status from an experiment's files.

    Args:
        state: its state folder.
        urls: ``gateway`` and ``metrics``.
        evidence: what has been read before; by default everything is read.

    Raises:
        RedppError: the state folder is gone.
    """
    document = read_json(state / SPEC)
    if document is None:
        raise RedppError(
            f"the experiment's folder {state} is gone, and what it recorded with it",
            "its state folder",
            "end it with redpp-serve ab stop, and start another one",
        )
    spec = Spec.from_json(document["spec"])
    evidence = evidence or Evidence(state, spec)
    evidence.refresh()
    findings, guardrails = evidence.findings(), evidence.guardrails()
    supervisor = read_json(state / STATUS) or {}
    problems = [*supervisor.get("problems", []), *_silence(state, supervisor.get("looked"))]
    return Status(
        name=document["name"],
        kind=spec.kind,
        spec=spec,
        seconds=time.time() - document["started"],
        all_to=switched(state / GATEWAY),
        arms={arm: _arm(arm, spec, evidence) for arm in NAMES},
        shadow=_shadow(evidence) if spec.shadow else None,
        findings=findings,
        guardrails=guardrails,
        advice=evidence.advice(findings, guardrails),
        problems=problems,
        urls=urls,
    )


def _silence(state: Path, looked: float | None) -> Iterator[str]:
    """A sentence where the supervisor has not written for long; ``looked`` is on the clock of ``time.monotonic``."""
    if looked is not None and (seconds := time.monotonic() - looked) > _SILENT_S:
        disk = shutil.disk_usage(state)
        full = f"the disk that holds {state} is full" if disk.free < _FULL_BYTES else "it may be restarting the server"
        yield f"nothing was written down for {seconds:.0f} s, and the numbers below are as old: {full}"


def _arm(arm: str, spec: Spec, evidence: Evidence) -> ArmStatus:
    traffic, percentiles = evidence.traffic, {"p50": 0.5, "p99": 0.99}
    return ArmStatus(
        spec.split.ratio(arm),
        traffic.requests[arm],
        traffic.share(arm),
        traffic.errors[arm],
        traffic.refused[arm],
        traffic.abandoned[arm],
        traffic.by_header[arm],
        {key: traffic.percentile_ms(arm, q) for key, q in percentiles.items()},
        {key: evidence.handler_ms(arm, q) for key, q in percentiles.items()},
    )


def _shadow(evidence: Evidence) -> dict[str, Any]:
    pairs = evidence.pairs
    return {
        "received": evidence.recorder["received"],
        "dropped": evidence.recorder["dropped"],
        "pairs": pairs.total,
        "quiet_pairs": pairs.quiet,
        "errors": {arm: pairs.errors[k] for k, arm in enumerate(NAMES)},
        "compared_outputs": pairs.answered,
        "agreeing": pairs.agreeing,
        "agreement": pairs.agreement,
        "top1": pairs.top1[0] / pairs.top1[1] if pairs.top1[1] else None,
    }


def _shadow_lines(shadow: dict[str, Any], tolerance: float | None) -> Iterator[str]:
    yield f"Shadow: {shadow['pairs']} pairs, {shadow['quiet_pairs']} of them undisturbed by other requests"
    if shadow["dropped"]:
        yield f"Not replayed for want of time: {shadow['dropped']} of {shadow['received']} requests"
    if any(shadow["errors"].values()):
        yield f"Replays failed: {shadow['errors']['original']} on original, {shadow['errors']['pruned']} on pruned"
    if shadow["compared_outputs"]:
        top1 = "" if shadow["top1"] is None else f", same class on {shadow['top1']:.2%}"
        within = "" if tolerance is None else f" within {tolerance:g} of the original's (relative difference)"
        yield f"Outputs: {shadow['agreeing']} of {shadow['compared_outputs']} agree{within}{top1}"


def _finite(document: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a bound that is not there is null."""

    def there(value: Any) -> bool:
        return not isinstance(value, float) or math.isfinite(value)

    return {key: value if there(value) else None for key, value in document.items()}


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
