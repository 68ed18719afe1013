"""Promote, roll back, or wait: one sentence from the verdict on speed and the guardrails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redpp_serve.comparison.guardrails import Guardrail
from redpp_serve.comparison.statistics import Verdict


@dataclass(frozen=True)
class Advice:
    """What to do: ``kind`` is "promote", "rollback" or "wait"; ``text`` says why, in one sentence with a full stop."""

    kind: str
    text: str


def advice(verdict: Verdict, guardrails: Sequence[Guardrail] = ()) -> Advice:
    """A broken limit or a slower network: roll back. Faster or as fast, with all limits kept: promote. Else wait."""
    broken = [rail.text for rail in guardrails if rail.ok is False]
    if broken:
        return Advice("rollback", f"Roll back: {'; '.join(broken)}.")
    if verdict.kind == "slower":
        return Advice("rollback", f"Roll back: {verdict.text}.")
    if verdict.kind == "undecided":
        return Advice("wait", f"Wait: {verdict.text}.")
    unknown = [rail.text for rail in guardrails if rail.ok is None]
    if unknown:
        return Advice("wait", f"Wait: {verdict.text}, but {'; '.join(unknown)}.")
    limits = ", and every limit is kept" if guardrails else ""
    gain = "" if verdict.kind == "faster" else ": it costs no speed and wins none"
    return Advice("promote", f"Promote: {verdict.text}{limits}{gain}.")
