"""The gains of engine, precision and pruning, each on its own."""

import math
from pathlib import Path

import numpy as np
import pytest

from redpp_serve.comparison import gains
from redpp_serve.comparison.gains import _gains, measure_gains
from redpp_serve.errors import RedppError


def test_each_step_is_the_ratio_of_the_arms_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arm tells what it took, a little more or less each time."""
    monkeypatch.setattr(gains, "timed", lambda arm: arm)
    rng = np.random.default_rng(1)
    arms = {
        name: lambda s=s: s * rng.uniform(0.95, 1.05)
        for name, s in (("a", 0.016), ("b", 0.008), ("c", 0.008), ("d", 0.002))
    }
    found = {g.step: g for g in _gains(arms, 4, 0.0, np.random.default_rng(0))}
    assert [(g.batch, g.before, g.after) for g in found.values()] == [
        (4, "a", "b"), (4, "b", "c"), (4, "c", "d"), (4, "a", "d")
    ]  # fmt: skip
    assert found["engine"].ratio.value == pytest.approx(2, rel=0.05)
    assert found["precision"].ratio.value == pytest.approx(1, rel=0.05)
    assert found["pruning"].ratio.value == pytest.approx(4, rel=0.05)
    product = math.prod(found[step].ratio.value for step in ("engine", "precision", "pruning"))
    assert found["all"].ratio.value == pytest.approx(product)
    assert all(g.ratio.low < g.ratio.value < g.ratio.high for g in found.values())


@pytest.mark.usefixtures("trials_here")
def test_a_package_is_measured_at_one_input_and_at_its_largest_batch(packaged: Path) -> None:
    found = measure_gains(packaged, 0.2)
    assert [(g.batch, g.step) for g in found] == [
        (batch, step) for batch in (1, 4) for step in ("engine", "precision", "pruning", "all")
    ]
    assert all(g.ratio.value > 0 for g in found)
    assert {g.before for g in found if g.step in ("engine", "all")} == {"eager PyTorch"}
    assert all(g.after.startswith("pruned, ") for g in found if g.step in ("pruning", "all"))
    with pytest.raises(RedppError, match="cannot be read"):
        measure_gains(packaged / "nowhere")
