"""Verdicts in words: which version is faster, and, with the guardrails, whether to promote it, roll back or wait."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from redpp_serve.statistics.guardrails import Guardrail
from redpp_serve.statistics.sequences import ConfidenceSequence

KINDS = ("faster", "slower", "equivalent", "undecided")
_SPEED = {"faster": "faster", "equivalent": "as fast"}
ADVICE_KINDS = ("promote", "rollback", "wait")
# While the interval is wider than this factor, its mean and noise are too rough for a forecast.
_FORESEEN = 2.0


@dataclass(frozen=True)
class Verdict:
    """A decision in words about time of the original / time of the pruned version; above 1 the pruned one is faster.

    Attributes:
        kind: one of `KINDS`.
        text: one sentence without its full stop.
        low: lower bound of the ratio, valid at all times at once; 0 while there is none.
        high: upper bound; infinite while there is none.
        mean: the ratio itself; None while there is no interval.
        needed: number of observations that a decision likely still takes; 0 once decided, None where it is unknown.
        unit: the observations that ``needed`` counts, such as "pairs".
    """

    kind: str
    text: str
    low: float
    high: float
    mean: float | None = None
    needed: int | None = None
    unit: str = "pairs"


def verdict(sequence: ConfidenceSequence, margin: float = 0.02, *, measure: str) -> Verdict:
    """Decide between the original and the pruned version.

    The verdict is "equivalent" if the whole interval lies within 1/(1+margin) to 1+margin, else "faster" or "slower"
    if the interval excludes 1, else "undecided".

    Args:
        sequence: of log(time of the original / time of the pruned version).
        margin: relative difference in speed that counts as none.
        measure: ends the statement, such as "end to end".
    """
    low, high = (math.exp(min(bound, 700.0)) if bound < math.inf else bound for bound in sequence.interval())
    if math.isinf(high) or low <= 0:
        text = f"no decision {measure} between pruned and original: {sequence.basis}, {sequence.missing}"
        return Verdict("undecided", text, 0.0, math.inf, unit=sequence.unit)
    ratio = math.exp(sequence.mean)

    def basis(start: float, end: float, digits: int = 2) -> str:
        level = f"{100 * (1 - sequence.alpha):.3g} % confidence sequence"
        return f"({level} {start:.{digits}f} to {end:.{digits}f} from {sequence.basis})"

    needed: int | None = 0
    if 1 / (1 + margin) < low and high < 1 + margin:
        kind = "equivalent"
        text = f"pruned is as fast as original {measure} within {100 * margin:g} % {basis(low, high, 3)}"
    elif low > 1:
        kind, text = "faster", f"pruned is {ratio:.2f} times as fast as original {measure} {basis(low, high)}"
    elif high < 1:
        kind = "slower"
        text = f"pruned takes {1 / ratio:.2f} times as long as original {measure} {basis(1 / high, 1 / low)}"
    else:
        kind, text = "undecided", f"no decision {measure} yet: pruned is {ratio:.2f} times as fast as original"
        needed = sequence.needed(margin) if high < _FORESEEN * low else None
        more = f": about {two_digits(needed)} more {sequence.unit} are likely needed" if needed else ""
        text = f"{text} {basis(low, high)}; measure longer{more}"
    return Verdict(kind, text, low, high, ratio, needed, sequence.unit)


def two_digits(count: int) -> str:
    """Format a forecast, which is never known to more than two digits: 1234 becomes "1,200"."""
    digits = max(len(str(count)) - 2, 0)
    return f"{round(count, -digits):,}"


@dataclass(frozen=True)
class Advice:
    """A recommendation for the operator.

    Attributes:
        kind: one of `ADVICE_KINDS`.
        text: one sentence with a full stop that gives the reason.
        reason: what it rests on, in few words that do not change from second to second.
    """

    kind: str
    text: str
    reason: str


def advice(verdict: Verdict, guardrails: Sequence[Guardrail] = ()) -> Advice:
    """Advise to roll back if a limit is broken or speed is lost, to promote if all is well, else to wait."""
    broken = [rail for rail in guardrails if rail.ok is False]
    if broken:
        return Advice("rollback", f"Roll back: {_texts(broken)}.", f"{_names(broken)} beyond the limit")
    if verdict.kind == "slower":
        return Advice("rollback", f"Roll back: {verdict.text}.", "pruned is slower")
    if verdict.kind == "undecided":
        return Advice("wait", f"Wait: {verdict.text}.", "speed not decided yet")
    unknown = [rail for rail in guardrails if rail.ok is None]
    if unknown:
        return Advice("wait", f"Wait: {verdict.text}, but {_texts(unknown)}.", f"{_names(unknown)} not decided yet")
    limits = ", and every limit is kept" if guardrails else ""
    gain = "" if verdict.kind == "faster" else ": it costs no speed and wins none"
    return Advice("promote", f"Promote: {verdict.text}{limits}{gain}.", f"pruned is {_SPEED[verdict.kind]}")


def _texts(rails: Sequence[Guardrail]) -> str:
    return "; ".join(rail.text for rail in rails)


def _names(rails: Sequence[Guardrail]) -> str:
    return " and ".join(dict.fromkeys(rail.name for rail in rails))
