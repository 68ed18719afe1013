"""Limits while the split changes: what a sum over splits would say wrongly, and how the chance of error is divided."""

from decimal import Decimal

import pytest

from redpp_serve.statistics.guardrails import Guardrail, error_guardrail
from redpp_serve.statistics.strata import over_strata, stratum_alphas

Counts = tuple[int, int, int, int]  # errors and requests of the original, then of the pruned version


def judge(counts: Counts, alpha: float) -> Guardrail:
    return error_guardrail(*counts, 0.01, alpha)


def decided(strata: dict[int, Counts], planned: tuple[int, ...] = ()) -> Guardrail | None:
    return over_strata({Decimal(k): v for k, v in strata.items()}, [Decimal(k) for k in planned], judge)


def test_a_bad_hour_with_another_split_is_no_fault_of_the_arm_that_had_more_users_then() -> None:
    """Simpson's paradox: both arms fail 0.1 % in a good hour and 10 % in a bad one."""
    good, bad = (9, 9000, 1, 1000), (100, 1000, 900, 9000)
    summed = error_guardrail(*(a + b for a, b in zip(good, bad, strict=True)), 0.01)
    assert summed.ok is False, "the sum would roll back"
    found = decided({10: good, 90: bad}, (10, 90))
    assert found and found.ok is not False


def test_a_fault_that_a_sum_would_hide_is_found() -> None:
    """The pruned version fails 5 points more in both hours; the bad hour was nearly all the original's."""
    strata = {5: (2000, 19000, 150, 1000), 90: (0, 1000, 450, 9000)}
    summed = error_guardrail(*map(sum, zip(*strata.values(), strict=True)), 0.01)
    found = decided(strata, (5, 90))
    assert summed.ok is True and found and found.ok is False and "% of users" in found.text


def test_the_largest_share_says_whether_a_limit_is_kept() -> None:
    little = (0, 100, 0, 100)
    found = decided({5: (0, 50000, 0, 50000), 50: little}, (5, 50))
    assert found and found.ok is None and found.text.endswith("at 50 % of users")
    alone = decided({5: (0, 50000, 0, 50000)}, (5, 50))
    assert alone and alone.ok is True and "% of users" not in alone.text
    assert decided({}) is None


@pytest.mark.parametrize(("planned", "seen"), [((10,), (10,)), ((1, 5, 25), (1, 5)), ((5,), (7, 5, 9, 60)), ((), (3,))])
def test_all_strata_together_have_one_chance_of_error(planned: tuple[int, ...], seen: tuple[int, ...]) -> None:
    shares = [Decimal(k) for k in planned], [Decimal(k) for k in seen]
    alphas = stratum_alphas(0.05, *shares)
    assert sum(alphas.values()) <= 0.05 + 1e-12 and set(alphas) == {*shares[0], *shares[1]}
    for k in planned:
        assert alphas[Decimal(k)] == pytest.approx(0.045 / len(planned))
    longer = stratum_alphas(0.05, shares[0], [*shares[1], *map(Decimal, range(200, 900))])
    assert sum(longer.values()) <= 0.05 + 1e-12
    assert all(longer[share] == alpha for share, alpha in alphas.items()), "what came later changes nothing"
