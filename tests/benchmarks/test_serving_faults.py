"""What became of requests while parts of an A/B test were harmed: each counts once, for the harm it began with."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import require_fp32
from benchmarks.serving_faults import Asked, fault_targets, stretches
from redpp_serve.errors import RedppError


def asked(start: float, end: float, status: int = 200, arm: str = "original", *, good: bool = True) -> Asked:
    return Asked(good, start, end, status, arm, right=good and status == 200)


DONE = {"nothing": (0.0, 0.0), "worker killed": (10.0, 10.5)}
CALM = [asked(2, 3), asked(2, 3, arm="pruned"), asked(3, 4, 400, good=False)]


def test_a_request_counts_for_the_harm_that_met_it_in_flight_or_else_for_the_one_before() -> None:
    met = asked(9.5, 13.0, 500)
    after = [asked(10, 11, 502), asked(11, 12, 500, good=False), asked(12, 13), asked(12, 13, 0, "")]
    found = stretches([*CALM, met, *after], DONE)
    assert {key: found["nothing"][key] for key in ("requests", "good", "good_lost", "bad_misjudged", "in_flight")} == {
        "requests": 3,
        "good": 2,
        "good_lost": 0,
        "bad_misjudged": 0,
        "in_flight": 0,
    }
    killed = found["worker killed"]
    assert (killed["requests"], killed["good"], killed["good_lost"], killed["bad_misjudged"]) == (4, 3, 2, 1)
    assert (killed["in_flight"], killed["in_flight_lost"], killed["longest_wait_s"]) == (1, 1, 3.5)
    assert killed["lost_with"] == {"502": 1, "500": 2, "0": 1}
    assert killed["arms_before"] == ["original", "pruned"] and killed["arms_after"] == ["original"]


def test_an_answer_of_the_wrong_outputs_is_lost() -> None:
    assert Asked(True, 0, 1, 200, "pruned", right=False).lost and not asked(0, 1).lost
    assert asked(0, 1, 200, good=False).lost and not asked(0, 1, 400, good=False).lost


def _part(*more: Asked, **changes: Any) -> dict[str, Any]:
    sound = {"stop": 0, "ports_taken": [], "stretches": stretches([*CALM, asked(12, 13), *more], DONE)}
    return {**sound, **changes}


@pytest.mark.parametrize(
    ("part", "missed"),
    [
        (_part(), []),
        (_part(asked(9, 11, 500)), []),  # it was in flight with the worker
        (_part(asked(11, 12, 500)), ["worker killed: 1 of 2 good requests lost"]),
        (_part(asked(11, 12, 500, good=False)), ["worker killed: 0 of 1 good requests lost, 1 bad ones misjudged"]),
        (_part(ports_taken=[4711]), ["after stop ports still taken: [4711]"]),
        (_part(stop=1), ["after stop ports still taken: none"]),
    ],
)
def test_missed_targets_are_said_to_be_missed(part: dict[str, Any], missed: list[str]) -> None:
    lines = [line for line in fault_targets({"triton": part}) if line.startswith("missed: ")]
    assert len(lines) == len(missed)
    assert all(line.startswith(f"missed: triton: {text}") for line, text in zip(lines, missed, strict=True))


def test_all_users_with_the_pruned_version_alone_are_a_miss() -> None:
    part = {"stop": 0, "ports_taken": [], "stretches": stretches([*CALM, asked(12, 13, arm="pruned")], DONE)}
    assert [line[:6] for line in fault_targets({"triton": part})] == ["met: t", "missed", "met: t"]


def test_a_package_in_a_lower_precision_is_refused(packaged: Path, tmp_path: Path) -> None:
    """A correct answer in eight bits is farther from the network's output than a wrong one may be."""
    with pytest.raises(RedppError, match="is served in the precision auto.*--precision fp32"):
        require_fp32(packaged)
    document = json.loads((packaged / "report.json").read_text())
    document["options"]["precision"] = "fp32"
    (tmp_path / "report.json").write_text(json.dumps(document))
    require_fp32(tmp_path)
