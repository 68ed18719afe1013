"""The running verdict: an A/B test's counts and pairs, taken in as they grow, held against its limits."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from redpp_serve.ab.counts import HandlerTimes, Stratum, Totals, Traffic, Window, WrittenCounts
from redpp_serve.ab.shadow import Pair, RecorderCounts
from redpp_serve.ab.spec import TOLERANCE, Spec, parse_split
from redpp_serve.ab.state import PAIRS, RECORDER, Lines, read_json
from redpp_serve.errors import RedppError, printable
from redpp_serve.report.data import CellRecord, Report
from redpp_serve.report.folder import read_report
from redpp_serve.statistics.guardrails import (
    Guardrail,
    agreement_guardrail,
    error_guardrail,
    p99_guardrail,
    share_bounds,
)
from redpp_serve.statistics.intervals import finite_quantile
from redpp_serve.statistics.sequences import RatioSequence
from redpp_serve.statistics.strata import over_strata
from redpp_serve.statistics.unequal_traffic import ArmSequence
from redpp_serve.statistics.verdicts import Advice, Verdict, advice, verdict
from redpp_serve.variants import NAMES

_ALPHA = 0.05  # chance that the verdict on speed is ever wrong where the versions are equally fast
_BOUNDS = tuple(0.001 * 2 ** (k / 4) for k in range(57))  # buckets of a replay's time: 1 ms to 16 s
_BATCH_FOR_BATCH = "in the handler, batch for batch"
_COMPARED, _MANY_INPUTS, _MOST_INPUTS = "in the last comparison", 100, 1e9
_NOT_COMPARED = "agreement: not compared under a split (add --shadow)"


@dataclass(frozen=True)
class Finding:
    """One comparison of times.

    Attributes:
        source: the origin of the times, ``shadow`` or ``split``.
        measure: the quantity that is compared.
        verdict: what the comparison says so far.
    """

    source: str
    measure: str
    verdict: Verdict


class Counts(Protocol):
    """The source of counts."""

    def totals(self) -> Totals | None:
        """Return the counts so far; None before the first."""

    def new_windows(self) -> list[Window]:
        """Return the windows that were added since the last call."""


class Evidence:
    """Takes in what was counted and recorded; `refresh` adds what came since the last time.

    Args:
        state: the test's state folder.
        spec: the test.
        counts: the source of the counts; by default the files in the state folder.

    Attributes:
        totals: what users got and what the server counted, over the whole test.
        pairs: the replays of shadow mode.
        arms: the server's batches, window by window.
        recorder: the recorder's own counts.
    """

    def __init__(self, state: Path, spec: Spec, counts: Counts | None = None) -> None:
        self._state, self._limits, self._shadow = state, spec.limits, spec.shadow
        self._known, self._planned = None if spec.shadow else known_agreement(spec), spec.compared_shares
        self._lines = Lines(state / PAIRS)
        self._counts: Counts = counts or WrittenCounts(state)
        alpha = _ALPHA / 3 if spec.shadow else _ALPHA  # any of the three comparisons of `findings` may decide
        self.pairs, self.arms = Pairs(spec.limits.tolerance, alpha), ArmSequence(alpha)
        self.totals = Totals(Traffic(), HandlerTimes(), {})
        self.recorder = RecorderCounts()

    def refresh(self) -> None:
        """Take in what was added."""
        self.pairs.take(Pair(**line) for line in self._lines.new())
        self.arms.update({size: (a, b, c, d) for size, (a, b, c, d) in w.items()} for w in self._counts.new_windows())
        self.totals = self._counts.totals() or self.totals
        if recorded := read_json(self._state / RECORDER):
            self.recorder = RecorderCounts(**recorded)

    def findings(self) -> list[Finding]:
        """Compare times, the strongest comparison first: quiet pairs of one request, then batches of equal size."""
        found = []
        if self._shadow:
            for measure, sequence in (("end to end", self.pairs.latency), ("in the handler", self.pairs.handler)):
                if sequence.blocks or sequence is self.pairs.latency:
                    found.append(self._finding("shadow", measure, sequence))
        if not self._shadow or all(self.arms.batches):
            found.append(self._finding("split", _BATCH_FOR_BATCH, self.arms))
        return found

    def _finding(self, source: str, measure: str, sequence: RatioSequence | ArmSequence) -> Finding:
        return Finding(source, measure, verdict(sequence, self._limits.margin, measure=measure))

    def guardrails(self) -> list[Guardrail]:
        """Judge errors, tail and agreement.

        The tail is that of the quiet pairs, where both versions had the same requests; without shadow mode it is that
        of the handlers while users were divided, split by split.
        """
        limits, pairs = self._limits, self.pairs
        rails = self._error_guardrails()
        if self._shadow:
            rails.append(p99_guardrail(*pairs.histogram(), limits.max_p99_ratio))
        elif tail := self._tail_of_users():
            rails.append(tail)
        rails.append(self._known or agreement_guardrail(pairs.agreeing, pairs.answered, limits.min_agreement))
        return rails

    def _tail_of_users(self) -> Guardrail | None:
        found = {_share(split): times.histogram() for split, times in self.totals.divided.items()}
        strata = {share: histogram for share, histogram in found.items() if histogram[0] and 0 < share < 100}

        def judge(histogram: tuple[list[float], list[int], list[int]], alpha: float) -> Guardrail:
            return p99_guardrail(*histogram, self._limits.max_p99_ratio, alpha)

        return over_strata(strata, self._planned, judge)

    def _error_guardrails(self) -> list[Guardrail]:
        """Judge the errors of users, where they are divided, and of replays, but never their sum.

        A server that is down fails users and replays, but replays then take no time and become more frequent: in a sum
        the arm with the larger part of replays would have the larger share of errors. `counts.Traffic` says which
        users' requests count: strangers, and users who choose an arm, have no say. Those of one split are compared.
        """
        strata, pairs, gap = self.totals.traffic.strata, self.pairs, self._limits.max_error_rate_gap
        both = {split: found for split, found in strata.items() if all(found.judged[arm] for arm in NAMES)}
        divided = {share: found for split, found in both.items() if 0 < (share := _share(split)) < 100}
        alpha = _ALPHA / 2 if self._shadow and divided else _ALPHA

        def judge(found: Stratum, alpha: float) -> Guardrail:
            original, pruned = ((found.faults[arm], found.judged[arm]) for arm in NAMES)
            return error_guardrail(*original, *pruned, gap, alpha)

        rails = []
        if rail := over_strata(divided, self._planned, judge, alpha):
            rails.append(rail)
        elif not self._shadow:
            rails.append(judge(Stratum(), alpha))
        if self._shadow:
            rail = error_guardrail(pairs.errors[0], pairs.total, pairs.errors[1], pairs.total, gap, alpha)
            rails.append(replace(rail, text=rail.text.replace("errors:", "errors of replays:", 1)))
        return rails

    def advice(self, findings: Sequence[Finding], guardrails: Sequence[Guardrail]) -> Advice:
        """Advise by the finding that decides and by the guardrails."""
        return advice(deciding(findings).verdict, guardrails)

    def handler_ms(self, arm: str, q: float) -> float | None:
        """Return the ``q`` quantile (0..1) of the handler's time for a batch, interpolated in its bucket, or None."""
        seconds = finite_quantile(self.totals.times.buckets[arm], q)
        return None if seconds is None else 1000 * seconds


def deciding(findings: Sequence[Finding]) -> Finding:
    """Return the finding that counts: ``slower`` before all others, else the first that has decided, else the first."""
    decided = [finding for finding in findings if finding.verdict.kind != "undecided"]
    slower = [finding for finding in decided if finding.verdict.kind == "slower"]
    return (slower or decided or list(findings))[0]


class Pairs:
    """Sums of the shadow recorder's pairs.

    Attributes:
        total: pairs recorded.
        quiet: pairs fit for comparing times, see `shadow.Replayer`.
        answered: pairs that the original answered, so that the pruned version's outputs had to agree.
        agreeing: those of ``answered`` whose outputs agree, see `options.Limits`.
        same_class: [pairs with the same class, pairs whose outputs are classes].
        errors: failures of the original and of the pruned version: no answer, or a status of 500 and above.
        latency: log ratios of the times end to end.
        handler: log ratios of the times in the handler.
    """

    def __init__(self, tolerance: float | None, alpha: float = _ALPHA) -> None:
        self._tolerance = tolerance
        self.total = self.quiet = self.answered = self.agreeing = 0
        self.same_class, self.errors = [0, 0], [0, 0]
        self.latency, self.handler = RatioSequence(alpha), RatioSequence(alpha)
        self._times = [[0] * (len(_BOUNDS) + 1) for _ in NAMES]

    def take(self, pairs: Iterable[Pair]) -> None:
        """Add pairs, in order of time."""
        latency, handler = [], []
        for pair in pairs:
            self._count(pair)
            if pair.quiet and pair.difference is not None:
                latency.append(_log_ratio(pair.seconds))
                if pair.handler:
                    handler.append(_log_ratio(pair.handler))
        self.latency.update(latency)
        self.handler.update(handler)

    def _count(self, pair: Pair) -> None:
        self.total += 1
        for arm, status in enumerate(pair.status):
            self.errors[arm] += status == 0 or status >= 500
        if pair.status[0] == 200:
            self.answered += 1
            self.agreeing += self._agree(pair)
        if pair.top1 is not None:
            self.same_class[0] += pair.top1
            self.same_class[1] += 1
        if pair.quiet and pair.difference is not None:
            self.quiet += 1
            for counts, seconds in zip(self._times, pair.seconds, strict=True):
                counts[bisect_left(_BOUNDS, seconds)] += 1

    def _agree(self, pair: Pair) -> bool:
        if self._tolerance is None and pair.top1 is not None:
            return pair.top1
        return pair.difference is not None and pair.difference <= (self._tolerance or TOLERANCE)

    def histogram(self) -> tuple[list[float], list[int], list[int]]:
        """Return the quiet pairs' times end to end, in the form of `counts.HandlerTimes.histogram`."""
        original, pruned = (list(accumulate(counts)) for counts in self._times)
        return list(_BOUNDS), original, pruned

    @property
    def agreement(self) -> float | None:
        """The share of outputs that agree, 0 to 1; None before the first."""
        return self.agreeing / self.answered if self.answered else None


def known_agreement(spec: Spec) -> Guardrail:
    """Judge agreement by the package's own report: a split compares no outputs, but packaging, or `compare`, has.

    The limit is kept where the report's share is within it. Else it is open, and speed alone is no reason to promote;
    only where a comparison of many inputs is below the limit beyond chance is it broken. A few synthetic inputs of
    packaging, which were known before the first user came, never advise anybody to roll back.
    """
    limit = spec.limits.min_agreement
    try:
        found = _reported(read_report(spec.candidate or spec.folder), spec.kind, spec.limits.tolerance)
    except RedppError:
        found = None
    if found is None:
        text = f"{_NOT_COMPARED}, and the package's report says nothing of it"
        return Guardrail("agreement", None, text, None, 0.0, 1.0, limit)
    share, inputs, source = found
    low, high = share_bounds(round(share * inputs), inputs, _ALPHA)
    broken = high < limit and source == _COMPARED and inputs >= _MANY_INPUTS
    ok = True if share >= limit else False if broken else None
    text = f"{_NOT_COMPARED}; {source} {share:.2%} of {inputs} inputs agreed ({low:.1%} to {high:.1%} is possible)"
    return Guardrail("agreement", ok, text + ("" if ok else f", {limit:.2%} wanted"), share, low, high, limit)


def _reported(report: Report, server: str, tolerance: float | None) -> tuple[float, int, str] | None:
    """Return the share of inputs that agreed, the number of inputs, and a phrase for where they were compared.

    The newest comparison on the test's own server goes before any on the other one, and these before packaging. The
    worst cell of a sweep counts.
    """
    kept = [(each.server, cells) for each in report.comparisons or () if (cells := list(filter(_usable, each.cells)))]
    own = [each for each in kept if each[0] == server]
    if kept:
        where, cells = (own or kept)[0]
        cell = min(cells, key=_agreeing)
        same, difference, inputs = cell.value("agreement"), cell.value("difference"), cell.inputs
        source = _COMPARED if own else f"{_COMPARED}, which was on {printable(where or 'another server')},"
    elif (served := report.agreement) and served.inputs is not None:  # of a release that kept no history
        same, difference, inputs = served.top1, served.mean_relative_difference, served.inputs
        source = _COMPARED
    elif (offline := report.verify) and offline.images is not None:
        same, difference, inputs = offline.agreement, offline.output_error, offline.images
        source = "when it was packaged"
    else:
        return None
    if same is not None and tolerance is None:
        return same, int(inputs or 0), source
    if difference is None:
        return None
    return float(difference <= (tolerance or TOLERANCE)), int(inputs or 0), source  # a mean: all agree, or none


def _usable(cell: CellRecord) -> bool:
    """Tell whether a cell says something of outputs; the report may have been edited or damaged."""
    same, inputs = cell.value("agreement"), cell.inputs
    return inputs is not None and 1 <= inputs < _MOST_INPUTS and (same is None or 0 <= same <= 1)


def _agreeing(cell: CellRecord) -> tuple[float, float]:
    """Return what grows with the agreement of a cell's outputs: of classes, else of numbers."""
    same, difference = cell.value("agreement"), cell.value("difference")
    return 1.0 if same is None else same, 0.0 if difference is None else -difference


def _share(split: str) -> Decimal:
    """Return the pruned version's share of a split, in per cent."""
    return parse_split(split).pruned


def _log_ratio(times: Sequence[float]) -> float:
    return math.log(times[0] / times[1])
