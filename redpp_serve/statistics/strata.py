"""Limits that are judged while the split of the traffic changes: by strata, in each of which it was constant.

Sums over several splits would mislead (Simpson's paradox): where the pruned version had few users in a bad hour and
many in a good one, its share of errors in the sum is lower than the original's though the versions are alike. While
one split is in force, both have the same hours in constant shares, so counts of one stratum are compared, never sums.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import TypeVar

from redpp_serve.statistics.guardrails import Guardrail

_PLANNED = 0.9  # part of the chance of a wrong answer that belongs to the shares that were planned
Counts = TypeVar("Counts")


def stratum_alphas(alpha: float, planned: Collection[Decimal], seen: Collection[Decimal]) -> dict[Decimal, float]:
    """Divide the chance of a wrong answer over strata, so that it is ``alpha`` at most for all of them together.

    Planned shares have nine tenths of it in equal parts. The k-th other share has 1 / (k (k + 1)) of the rest, so that
    there may be any number of them.

    Args:
        alpha: chance, over the whole run, of any wrong answer in any stratum.
        planned: the pruned version's shares that were known before the first request.
        seen: all its shares so far, in the order in which they came.
    """
    rest = (1 - _PLANNED) * alpha
    alphas = dict.fromkeys(planned, _PLANNED * alpha / max(len(planned), 1))
    others = (share for share in seen if share not in planned)
    return alphas | {share: rest / (k * (k + 1)) for k, share in enumerate(others, 1)}


def over_strata(
    strata: Mapping[Decimal, Counts],
    planned: Collection[Decimal],
    judge: Callable[[Counts, float], Guardrail],
    alpha: float = 0.05,
) -> Guardrail | None:
    """Judge a limit by strata: it is broken where any of them breaks it, and kept where the largest share keeps it.

    What a small share of the traffic keeps, a version under full load may break, so the largest share decides.

    Args:
        strata: the pruned version's share -> what was counted while it was in force, in the order in which they came.
        planned: the shares that were known before the first request.
        judge: judges the counts of one stratum with this chance of a wrong answer.
        alpha: chance, over the whole run, of any wrong answer.

    Returns:
        The stratum that decides; None where there is none.
    """
    alphas = stratum_alphas(alpha, planned, strata)
    rails = {share: judge(counts, alphas[share]) for share, counts in strata.items()}
    if not rails:
        return None
    share = next((share for share, rail in rails.items() if rail.ok is False), max(rails))
    rail = rails[share]
    where = f" at {share:f} % of users" if len(rails) > 1 else ""
    return replace(rail, text=f"{rail.text}{where}")
