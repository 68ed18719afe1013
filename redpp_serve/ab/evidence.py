"""The running verdict: everything that an experiment has written down, taken in as it grows.

What is known of the outputs without shadow mode: a split compares none, but the package, or `compare`, has.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from redpp_serve.ab.counts import Counters, Traffic, from_json
from redpp_serve.ab.spec import TOLERANCE, Spec
from redpp_serve.ab.state import COUNTS, PAIRS, RECORDER, WINDOWS, Lines, read_json
from redpp_serve.statistics.guardrails import (
    Guardrail,
    agreement_guardrail,
    error_guardrail,
    p99_guardrail,
    share_bounds,
)
from redpp_serve.statistics.intervals import finite_quantile
from redpp_serve.statistics.sequences import RatioSequence
from redpp_serve.statistics.unequal_traffic import ArmSequence
from redpp_serve.statistics.verdicts import Advice, Verdict, advice, verdict
from redpp_serve.variants import NAMES

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
        return Guardrail(
            "agreement", None, f"agreement: {_HERE}, and the package's report says nothing of it", None, 0.0, 1.0, limit
        )
    low, high = share_bounds(round(share * inputs), inputs, 0.05)
    ok = True if share >= limit else False if high < limit else None
    text = f"agreement: {_HERE}; {source} {share:.2%} of {inputs} inputs agreed"
    return Guardrail("agreement", ok, text + ("" if ok else f", {limit:.2%} wanted"), share, low, high, limit)


def _measured(report: dict[str, Any], tolerance: float | None) -> tuple[float, int, str]:
    """Share of inputs that agreed, of how many, and where that was measured."""
    found = report.get("agreement")
    if found:
        same, difference, inputs, source = (
            found["top1"],
            found["mean_relative_difference"],
            found["inputs"],
            "in the last comparison",
        )
    else:
        found = report["verify"]
        same, difference, inputs, source = (
            found["agreement"],
            found["output_error"],
            found["images"],
            "when it was packaged",
        )
    if same is not None and tolerance is None:
        return float(same), int(inputs), source
    return float(difference <= (tolerance or TOLERANCE)), int(inputs), source  # of the mean: all of them, or none


_BOUNDS = tuple(0.001 * 2 ** (k / 4) for k in range(57))  # of a replay's time, 1 ms to 16 s
_ALPHA = 0.05  # chance that the verdict on speed is ever wrong where the versions are equally fast


class Pairs:
    """What the shadow recorder's pairs say.

    Attributes:
        total: pairs recorded.
        quiet: those fit for comparing times, see `replay.Replayer`.
        answered: those that both versions, or the original alone, answered: outputs had to agree.
        agreeing: those of them whose outputs agree, see `spec.Limits`.
        top1: [same class, pairs that have one].
        errors: of the original and the pruned version: no answer, or a status of 500 and above.
    """

    def __init__(self, tolerance: float | None, alpha: float = _ALPHA) -> None:
        self._tolerance = tolerance
        self.total = self.quiet = self.answered = self.agreeing = 0
        self.top1, self.errors = [0, 0], [0, 0]
        self.latency, self.handler = RatioSequence(alpha), RatioSequence(alpha)
        self._times = [[0] * (len(_BOUNDS) + 1) for _ in NAMES]

    def take(self, pairs: Iterable[dict[str, Any]]) -> None:
        """Lines of the recorder's file, in order of time."""
        latency, handler = [], []
        for pair in pairs:
            self._count(pair)
            if pair["quiet"] and pair["difference"] is not None:
                latency.append(_log_ratio(pair["seconds"]))
                if pair["handler"]:
                    handler.append(_log_ratio(pair["handler"]))
        self.latency.update(latency)
        self.handler.update(handler)

    def _count(self, pair: dict[str, Any]) -> None:
        self.total += 1
        for arm, status in enumerate(pair["status"]):
            self.errors[arm] += status == 0 or status >= 500
        if pair["status"][0] == 200:
            self.answered += 1
            self.agreeing += self._agree(pair)
        if pair["top1"] is not None:
            self.top1 = [self.top1[0] + pair["top1"], self.top1[1] + 1]
        if pair["quiet"] and pair["difference"] is not None:
            self.quiet += 1
            for counts, seconds in zip(self._times, pair["seconds"]):
                counts[bisect_left(_BOUNDS, seconds)] += 1

    def _agree(self, pair: dict[str, Any]) -> bool:
        if self._tolerance is None and pair["top1"] is not None:
            return bool(pair["top1"])
        return pair["difference"] is not None and pair["difference"] <= (self._tolerance or TOLERANCE)

    def histogram(self) -> tuple[list[float], list[int], list[int]]:
        """As `Counters.histogram`, of the quiet pairs' times end to end."""
        original, pruned = (list(accumulate(counts)) for counts in self._times)
        return list(_BOUNDS), original, pruned

    @property
    def agreement(self) -> float | None:
        """Share of outputs that agree; None before the first."""
        return self.agreeing / self.answered if self.answered else None


@dataclass(frozen=True)
class Finding:
    """One comparison of times: where it comes from (``shadow`` or ``split``), what it measures, and its verdict."""

    source: str
    measure: str
    verdict: Verdict


class Evidence:
    """Reads an experiment's files; `refresh` takes in what was added since the last time.

    Attributes:
        traffic: what users got.
        pairs: of shadow mode.
        arms: of the server's counters, window by window.
        counters: the server's over the whole experiment.
        divided: of them those while users were divided; after a promotion the arms' loads are other ones.
        recorder: its counts ``received``, ``dropped``, ``pairs``.
    """

    def __init__(self, state: Path, spec: Spec) -> None:
        self._state, self._limits, self._shadow = state, spec.limits, spec.shadow
        self._beforehand = None if spec.shadow else agreement_beforehand(spec)
        self._pair_lines, self._window_lines = Lines(state / PAIRS), Lines(state / WINDOWS)
        alpha = _ALPHA / 3 if spec.shadow else _ALPHA  # any of the three comparisons of `findings` may decide
        self.pairs, self.arms = Pairs(spec.limits.tolerance, alpha), ArmSequence(alpha)
        self.traffic, self.counters, self.divided = Traffic(), Counters(), Counters()
        self.recorder = {"received": 0, "dropped": 0, "pairs": 0}

    def refresh(self) -> None:
        """Take in what was added."""
        self.pairs.take(self._pair_lines.new())
        windows = (line["batches"] for line in self._window_lines.new())
        self.arms.update({int(size): (a, b, c, d) for size, (a, b, c, d) in window.items()} for window in windows)
        counts = read_json(self._state / COUNTS)
        if counts:
            self.traffic = Traffic(counts["users"])
            self.counters, self.divided = from_json(counts["buckets"]), from_json(counts["divided"])
        self.recorder = read_json(self._state / RECORDER) or self.recorder

    def findings(self) -> list[Finding]:
        """The comparisons of times, the strongest first: quiet pairs of one request, then batches of equal size."""
        margin, found = self._limits.margin, []
        if self._shadow:
            measures = [("end to end", self.pairs.latency), ("in the handler", self.pairs.handler)]
            for measure, sequence in measures:
                if sequence.blocks or measure == "end to end":
                    found.append(Finding("shadow", measure, verdict(sequence, margin, measure=measure)))
        if not self._shadow or all(self.arms.batches):
            split = verdict(self.arms, margin, measure="in the handler, batch for batch")
            found.append(Finding("split", "in the handler, batch for batch", split))
        return found

    def guardrails(self) -> list[Guardrail]:
        """Errors and tail of both arms, and agreement of outputs: in shadow mode, or as known beforehand.

        The tail is that of the quiet pairs, where both versions had the same requests, else that of the handlers while
        users were divided.
        """
        limits, pairs = self._limits, self.pairs
        rails = self._error_guardrails()
        bounds, original, pruned = (self.pairs if self._shadow else self.divided).histogram()
        if bounds:
            rails.append(p99_guardrail(bounds, original, pruned, limits.max_p99_ratio))
        if self._shadow:
            rails.append(agreement_guardrail(pairs.agreeing, pairs.answered, limits.min_agreement))
        elif self._beforehand:
            rails.append(self._beforehand)
        return rails

    def _error_guardrails(self) -> list[Guardrail]:
        """Of users, where they are divided, and of replays; never of their sum.

        A server that is down fails users and replays, but replays then take no time and are more than usual: the arm
        with the larger part of replays would have the larger share of errors. A user who left before there was an
        answer counts as an error: both arms' users leave alike unless one hangs.
        """
        users, pairs, gap = self.traffic, self.pairs, self._limits.max_error_rate_gap
        divided = all(users.requests[arm] > users.by_header[arm] for arm in NAMES)
        alpha = _ALPHA / 2 if self._shadow and divided else _ALPHA
        rails = []
        if divided or not self._shadow:
            original, pruned = ((users.errors[arm] + users.abandoned[arm], users.requests[arm]) for arm in NAMES)
            rails.append(error_guardrail(*original, *pruned, gap, alpha))
        if self._shadow:
            rail = error_guardrail(pairs.errors[0], pairs.total, pairs.errors[1], pairs.total, gap, alpha)
            rails.append(replace(rail, text=rail.text.replace("errors:", "errors of replays:", 1)))
        return rails

    def advice(self, findings: Sequence[Finding], guardrails: Sequence[Guardrail]) -> Advice:
        """From the first comparison that has decided; one that says slower goes before all others."""
        decided = [f.verdict for f in findings if f.verdict.kind != "undecided"]
        slower = [v for v in decided if v.kind == "slower"]
        return advice((slower or decided or [findings[0].verdict])[0], guardrails)

    def handler_ms(self, arm: str, q: float) -> float | None:
        """The ``q`` quantile (0..1) of the handler's time for a batch, interpolated in its bucket; None if unknown."""
        seconds = finite_quantile(self.counters.buckets[arm], q)
        return None if seconds is None else 1000 * seconds


def _log_ratio(times: Sequence[float]) -> float:
    return math.log(times[0] / times[1])
