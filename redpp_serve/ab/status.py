"""The state of an A/B test now: what users got, the comparisons of times, the limits, and what to do."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redpp_serve.ab.counts import COUNTERS
from redpp_serve.ab.decisions import Decision, decisions
from redpp_serve.ab.evidence import Evidence, Finding
from redpp_serve.ab.gateway import division, switched
from redpp_serve.ab.spec import Spec, Started, TrafficSplit, Users
from redpp_serve.ab.state import GATEWAY, Heartbeat
from redpp_serve.report.formats import columns
from redpp_serve.statistics.guardrails import Guardrail
from redpp_serve.statistics.verdicts import Advice
from redpp_serve.variants import NAMES

_SILENT_S, _FULL_BYTES = 10.0, 1 << 20
_SHOWN = 6  # last decisions in the text
_PERCENTILES = {"p50": 0.5, "p99": 0.99}
_LOADS = "The arms carry different loads: compare batches of equal size (below), not these percentiles."
_WORDS = {True: "kept", False: "BROKEN", None: "open"}


@dataclass(frozen=True)
class ArmStatus:
    """What users got from one arm. Times are in milliseconds, None before the first.

    Attributes:
        configured: share of users by the split in force, 0 to 1.
        requests: users' requests, without replays.
        share: share of all users' requests, 0 to 1.
        errors: requests answered with 500 or above.
        refused: requests answered with 400 to 498.
        abandoned: requests whose sender left before there was an answer.
        by_header: requests whose sender asked for the arm.
        failed_over: requests of the arm's users that the other arm answered, since this one was dead or failed.
        judged: requests that say something of the arm, see `counts.Traffic`.
        faults: those of ``judged`` that the arm failed.
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
    failed_over: int
    judged: int
    faults: int
    gateway_ms: dict[str, float | None]
    handler_ms: dict[str, float | None]


@dataclass(frozen=True)
class ShadowStatus:
    """What the replays of shadow mode say.

    Attributes:
        received: mirrored requests.
        dropped: mirrored requests that were not replayed for want of time.
        pairs: requests replayed on both versions.
        quiet_pairs: pairs fit for comparing times.
        errors: arm -> failed replays.
        compared_outputs: pairs that the original answered.
        agreeing: those whose outputs agree.
        agreement: their share, 0 to 1; None before the first.
        top1: share of pairs with the same class; None where outputs are not classes.
    """

    received: int
    dropped: int
    pairs: int
    quiet_pairs: int
    errors: dict[str, int]
    compared_outputs: int
    agreeing: int
    agreement: float | None
    top1: float | None


@dataclass(frozen=True)
class Status:
    """The state of an A/B test at one moment.

    Attributes:
        name: the name that the model is served under.
        kind: the model server.
        spec: what the test was asked to be.
        seconds: how long it has run.
        all_to: the arm that all users are sent to; None while they are divided.
        split: the split in force while they are.
        arms: arm -> what users got from it.
        strata: split -> what was judged while it was in force, see `counts.Stratum`.
        shadow: the replays; None without shadow mode.
        findings: the comparisons of times, the strongest first.
        guardrails: the limits.
        advice: what to do.
        decisions: what was decided so far.
        problems: sentences about what the supervisor could not mend.
        urls: addresses of the ``gateway`` and of the test's ``metrics``.
    """

    name: str
    kind: str
    spec: Spec
    seconds: float
    all_to: str | None
    split: TrafficSplit
    arms: dict[str, ArmStatus]
    strata: dict[str, dict[str, dict[str, int]]]
    shadow: ShadowStatus | None
    findings: list[Finding]
    guardrails: list[Guardrail]
    advice: Advice
    decisions: list[Decision]
    problems: list[str]
    urls: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, texts and lists, fit for ``json.dumps``."""
        verdicts = [{"source": f.source, "measure": f.measure, **_finite(asdict(f.verdict))} for f in self.findings]
        return {
            "name": self.name,
            "server": self.kind,
            "spec": self.spec.to_json(secrets=False),
            "seconds": self.seconds,
            "all_to": self.all_to,
            "split": str(self.split),
            "arms": {arm: asdict(status) for arm, status in self.arms.items()},
            "strata": self.strata,
            "shadow": self.shadow and asdict(self.shadow),
            "verdicts": verdicts,
            "advice": asdict(self.advice),
            "guardrails": [_finite(asdict(rail)) for rail in self.guardrails],
            "decisions": [asdict(decision) for decision in self.decisions],
            "problems": self.problems,
            "urls": dict(self.urls),
        }

    def to_text(self) -> str:
        """Return a table for the terminal that ends with the advice."""
        table = columns([("", *NAMES), *self.rows()])
        return "\n".join([*self._head(), "", *table, "", *self._body()])

    def _head(self) -> Iterator[str]:
        spec, whom = self.spec, "users" if self.spec.sticky else "requests"
        if self.all_to:
            yield f"{self.name} on {self.kind}: all {whom} go to {self.all_to}"
        else:
            by = f", by {spec.sticky}" if spec.sticky else ""
            shares = f"{self.split.original} % of {whom} to original, {self.split.pruned} % to pruned"
            yield f"{self.name} on {self.kind}: {shares}{by}"
        extras = [f"pruned from {spec.candidate}"] if spec.candidate else []
        extras += ["shadow mode"] if spec.shadow else []
        yield ", ".join([self.urls["gateway"], *extras, f"running for {_span(self.seconds)}"])
        for problem in self.problems:
            yield f"PROBLEM: {problem}"

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield the table's rows: what is counted, of the original, of the pruned version."""
        original, pruned = (self.arms[arm] for arm in NAMES)
        yield "requests", str(original.requests), str(pruned.requests)
        yield "share", _or_dash(original.share, ".1%"), _or_dash(pruned.share, ".1%")
        yield "failed (5xx)", str(original.errors), str(pruned.errors)
        yield "refused (4xx)", str(original.refused), str(pruned.refused)
        if original.abandoned or pruned.abandoned:
            yield "left unanswered", str(original.abandoned), str(pruned.abandoned)
        if original.by_header or pruned.by_header:
            yield "asked for by header", str(original.by_header), str(pruned.by_header)
        if original.failed_over or pruned.failed_over:
            yield "answered by the other", str(original.failed_over), str(pruned.failed_over)
        yield "failed/judged", f"{original.faults}/{original.judged}", f"{pruned.faults}/{pruned.judged}"
        for place, form in (("gateway", ".0f"), ("handler", ".2f")):
            for key in _PERCENTILES:
                values = [getattr(arm, f"{place}_ms")[key] for arm in (original, pruned)]
                yield f"{place} {key} (ms)", _or_dash(values[0], form), _or_dash(values[1], form)

    def _body(self) -> Iterator[str]:
        if all(arm.requests for arm in self.arms.values()):
            yield _LOADS
        if self.shadow:
            yield from _shadow_lines(self.shadow, self.spec.limits.tolerance)
        for rail in self.guardrails:
            yield f"{_WORDS[rail.ok]:<6}  {rail.text}."
        for finding in self.findings:
            yield f"{finding.source:<6}  {finding.verdict.text}."
        if self.spec.auto or len(self.decisions) > 1:
            yield ""
            yield from map(str, self.decisions[-_SHOWN:])
        yield ""
        yield self.advice.text


def make_status(
    state: Path, test: Started, evidence: Evidence, urls: Mapping[str, str], problems: Sequence[str]
) -> Status:
    """Return the status now, with all that ``evidence`` can take in; ``urls`` are of ``gateway`` and ``metrics``."""
    now = division(state / GATEWAY)
    users = Users(switched(state / GATEWAY), now.split if now else test.spec.split)
    return status_of(test, evidence, users, decisions(state), urls, problems)


def status_of(
    test: Started,
    evidence: Evidence,
    users: Users,
    made: Sequence[Decision],
    urls: Mapping[str, str],
    problems: Sequence[str],
) -> Status:
    """Return the status now of a test whose users are known to go where ``users`` says; see `make_status`."""
    evidence.refresh()
    findings, guardrails, spec = evidence.findings(), evidence.guardrails(), test.spec
    return Status(
        name=test.name,
        kind=spec.kind,
        spec=spec,
        seconds=time.time() - test.started,
        all_to=users.all_to,
        split=users.split,
        arms={arm: _arm(arm, users.split, evidence) for arm in NAMES},
        strata={
            split: {"judged": dict(stratum.judged), "faults": dict(stratum.faults)}
            for split, stratum in evidence.totals.traffic.strata.items()
        },
        shadow=_shadow(evidence) if spec.shadow else None,
        findings=findings,
        guardrails=guardrails,
        advice=evidence.advice(findings, guardrails),
        decisions=list(made),
        problems=list(problems),
        urls=urls,
    )


def read_status(state: Path, test: Started, urls: Mapping[str, str], problems: Sequence[str] = ()) -> Status:
    """Return the status of a test that another process supervises, from the files of its state folder.

    Args:
        state: the state folder; where it is lost, nothing is counted and all users get the original.
        test: the test.
        urls: of ``gateway`` and ``metrics``.
        problems: sentences about what is known to be wrong.
    """
    heartbeat = Heartbeat.read(state)
    silence = () if problems else _silence(state, heartbeat.looked)
    return make_status(state, test, Evidence(state, test.spec), urls, [*problems, *heartbeat.problems, *silence])


def _silence(state: Path, looked: float | None) -> Iterator[str]:
    """Yield a sentence if the supervisor has not written for long; ``looked`` is on the clock of ``time.monotonic``."""
    if looked is not None and (seconds := time.monotonic() - looked) > _SILENT_S:
        full = state.exists() and shutil.disk_usage(state).free < _FULL_BYTES
        why = f"the disk that holds {state} is full" if full else "it may be restarting the server"
        yield f"nothing was written down for {seconds:.0f} s, and the numbers below are as old: {why}"


def _arm(arm: str, split: TrafficSplit, evidence: Evidence) -> ArmStatus:
    traffic = evidence.totals.traffic
    return ArmStatus(
        configured=split.ratio(arm),
        share=traffic.share(arm),
        **{name: getattr(traffic, name)[arm] for name in COUNTERS},
        gateway_ms={key: traffic.percentile_ms(arm, q) for key, q in _PERCENTILES.items()},
        handler_ms={key: evidence.handler_ms(arm, q) for key, q in _PERCENTILES.items()},
    )


def _shadow(evidence: Evidence) -> ShadowStatus:
    pairs, (same, classes) = evidence.pairs, evidence.pairs.same_class
    return ShadowStatus(
        received=evidence.recorder.received,
        dropped=evidence.recorder.dropped,
        pairs=pairs.total,
        quiet_pairs=pairs.quiet,
        errors=dict(zip(NAMES, pairs.errors, strict=True)),
        compared_outputs=pairs.answered,
        agreeing=pairs.agreeing,
        agreement=pairs.agreement,
        top1=same / classes if classes else None,
    )


def _shadow_lines(shadow: ShadowStatus, tolerance: float | None) -> Iterator[str]:
    yield f"Shadow: {shadow.pairs} pairs, {shadow.quiet_pairs} of them undisturbed by other requests"
    if shadow.dropped:
        yield f"Not replayed for want of time: {shadow.dropped} of {shadow.received} requests"
    if any(shadow.errors.values()):
        yield "Replays failed: " + ", ".join(f"{count} on {arm}" for arm, count in shadow.errors.items())
    if shadow.compared_outputs:
        top1 = "" if shadow.top1 is None else f", same class on {shadow.top1:.2%}"
        within = "" if tolerance is None else f" within {tolerance:g} of the original's (relative difference)"
        yield f"Outputs: {shadow.agreeing} of {shadow.compared_outputs} agree{within}{top1}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _finite(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with null for infinite bounds, since JSON has no infinity."""
    infinite = {key for key, value in document.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in infinite else value for key, value in document.items()}


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
