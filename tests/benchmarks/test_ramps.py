"""A few of the simulated tests with --auto that ``benchmarks.ramps`` runs by the thousand."""

import json
from itertools import pairwise

import pytest

from benchmarks.ramp_simulation import HOLD_S, World, fly
from benchmarks.ramps import cell, table
from redpp_serve.ab.decisions import PROMOTE, RAMP, ROLLBACK, START


def test_a_difference_is_acted_on() -> None:
    promoted = fly(1, World(faster=1.25))
    assert [made.action for made in promoted] == [START, RAMP, RAMP, RAMP, PROMOTE]
    assert [made.users for made in promoted] == ["99:1", "95:5", "75:25", "50:50", "pruned"]
    assert all(b.time - a.time >= HOLD_S for a, b in pairwise(promoted))
    slower, failing = fly(1, World(faster=0.8)), fly(1, World(faster=1.25, gap=0.05))
    assert slower[-1].action == failing[-1].action == ROLLBACK
    assert "slower" in slower[-1].numbers["advice"] and "errors" in failing[-1].numbers["advice"]
    found = cell([promoted, slower, failing])
    assert (found["promoted"], found["rolled_back"], found["acted"]) == (1, 2, 1.0)
    assert found["rolled_back_since"] == {"errors beyond the limit": 1, "pruned is slower": 1}
    text = table({"cells": [{"world": "three", **json.loads(json.dumps(found))}]})
    assert "| three | 3 | 1 | 2 | 100.0% (" in text


@pytest.mark.exhaustive
def test_without_a_difference_nothing_is_decided() -> None:
    made = fly(1, World(bad_users=0.01, bad_fault=0.05))
    assert [each.action for each in made] == [START, RAMP, RAMP, RAMP]


@pytest.mark.exhaustive
def test_equal_versions_are_left_alone() -> None:
    """At most 5 % of a hundred, with room for chance: 12 or more have a chance below 1 in 200 then."""
    world = World(bad_users=0.01, bad_fault=0.05)
    acted = [fly(seed, world)[-1].action for seed in range(2000, 2100)]
    assert sum(action in (PROMOTE, ROLLBACK) for action in acted) < 12
