"""The rule that decides, the interval behind it, and plans as data."""

import json
import math

import pytest
import torch

from redpp_serve.runtime.plan import LEAST_GAIN, Choice, Plan, Timing, decide, upper_bound
from redpp_serve.runtime.timing import timings


def choice(layer: str, batch: int, kernel: str) -> Choice:
    return Choice(layer, f"{layer}.weight", batch, kernel, "measured", {"dense": 2e-3, kernel: 1e-3}, f"{batch}x8")


PLAN = Plan(
    "a device",
    "fp16",
    (1, 8),
    tuple(choice(*c) for c in [("a", 1, "fused"), ("a", 8, "dense"), ("b", 1, "fused"), ("b", 8, "split")]),
    1.5,
)


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"dense": (1.0, 1.0)}, "dense"),
        ({}, "dense"),
        ({"dense": (1.0, 1.0), "a": (0.9, 0.95)}, "a"),
        ({"dense": (1.0, 1.0), "a": (0.9, 1 - LEAST_GAIN)}, "a"),
        ({"dense": (1.0, 1.0), "a": (0.5, 0.98)}, "dense"),  # looks twice as fast, but surely only 2 %
        ({"dense": (1.0, 1.0), "a": (0.9, 1 - LEAST_GAIN), "b": (0.8, 0.9), "c": (0.7, 1.1)}, "b"),
        ({"dense": (1.0, 1.0), "a": (0.7, 0.9), "b": (0.8, 0.85)}, "a"),  # both surely: the faster, not the surer
        ({"dense": (1.0, 1.0), "a": (math.inf, math.inf)}, "dense"),
    ],
)
def test_only_what_is_surely_three_per_cent_faster_wins(times: dict[str, tuple[float, float]], winner: str) -> None:
    assert decide({kernel: Timing(*t) for kernel, t in times.items()}) == winner


@pytest.mark.parametrize("n", [7, 8, 20, 101])
def test_the_bound_is_above_the_median_in_99_of_100_cases(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    samples = torch.randn(4000, n, generator=g).exp().tolist()  # median 1
    below = sum(upper_bound(sample) < 1.0 for sample in samples) / len(samples)
    assert below <= 0.01 + 3 * (0.01 * 0.99 / len(samples)) ** 0.5
    assert n < 20 or below > 0.001  # a bound that is far off would say nothing


def test_a_kernels_time_is_the_median_of_its_rounds_and_its_ratio_is_to_the_first() -> None:
    found = [[2.0, 1.0], [4.0, 3.0], [8.0, 4.0], [3.0, 2.4], [5.0, 4.5], [1.0, 0.6], [6.0, 1.2]]
    measured = timings(("dense", "a"), found)
    assert measured == {"dense": Timing(4.0, 1.0), "a": Timing(2.4, 0.9)}


def test_few_ratios_bound_nothing() -> None:
    assert upper_bound([0.5] * 6) == math.inf and upper_bound([0.5] * 7) == 0.5


def test_kernels_of_a_plan_are_found_and_counted() -> None:
    assert PLAN.kernel("b", 8) == "split"
    assert PLAN.counts(1) == {"fused": 2} and PLAN.counts(8) == {"dense": 1, "split": 1} and PLAN.counts(2) == {}
    with pytest.raises(KeyError):
        PLAN.kernel("a", 2)


def test_a_plan_survives_json() -> None:
    document = json.loads(json.dumps(PLAN.to_json()))
    same = Plan.from_json(document)
    assert same == PLAN and same.digest == PLAN.digest == document["digest"]
    with pytest.raises((KeyError, TypeError)):
        Plan.from_json({**document, "choices": [{"layer": "a"}]})


def test_the_digest_follows_the_kernels_alone() -> None:
    slower = Plan(PLAN.device, PLAN.precision, PLAN.batches, PLAN.choices, 9.0)
    other = Plan(PLAN.device, PLAN.precision, PLAN.batches, (*PLAN.choices[:3], choice("b", 8, "dense")), 1.5)
    assert slower.digest == PLAN.digest != other.digest
    elsewhere = Plan(PLAN.device, PLAN.precision, (4, 8), (choice("a", 4, "fused"), *PLAN.choices[1:]), 1.5)
    assert elsewhere.digest != PLAN.digest
