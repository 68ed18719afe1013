"""The serving benchmark counts what is lost and missed, and results/serving.md shows its committed figures."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from benchmarks.serving import BAD_SHARE, load_part, table, targets
from benchmarks.serving_load import Cases, Sent, run_load
from redpp_serve.comparison.client import Endpoint, Exchange, Payload

ROOT = Path(__file__).parents[2]

RESULTS = ROOT / "benchmarks" / "results" / "serving.json"


def sent(
    target: str = "pruned", good: bool = True, status: int = 200, answered_by: tuple[str, ...] = ("pruned",)
) -> Sent:
    return Sent(target, good, 0.0, 1.0, status, answered_by, "")


def test_a_good_request_is_lost_without_the_right_answer() -> None:
    assert not sent().lost and not sent("default", answered_by=("original",)).lost
    assert sent(status=503, answered_by=()).lost and sent("original").lost and sent("default", answered_by=()).lost
    assert not sent(good=False, status=400, answered_by=()).lost


@pytest.mark.parametrize(("status", "misjudged"), [(400, False), (413, False), (200, True), (500, True), (0, True)])
def test_a_bad_request_has_to_get_a_4xx(status: int, misjudged: bool) -> None:
    assert sent(good=False, status=status, answered_by=()).misjudged is misjudged
    assert not sent(status=status).misjudged


class Server:
    """Answers in this process: every tenth good request of the pruned version is lost, one kind of bad one passes."""

    kind = "stand-in"

    def check_alive(self) -> None:
        pass


class Wire:
    def __init__(self, cases: Cases, variant: str) -> None:
        self.cases, self.variant, self.count = cases, variant, 0

    def send(self, payload: Payload) -> Exchange:
        self.count += 1
        if payload in self.cases.bad:
            return Exchange(0.0, 0.001, None, 200 if payload is self.cases.bad[0] else 400, b'{"outputs": [[0]]}', "")
        if self.variant == "pruned" and self.count % 10 == 0:
            return Exchange(0.0, 0.001, None, 503, b"busy", "")
        outputs = self.cases.expected[self.variant][self.cases.good.index(payload)]
        return Exchange(0.0, 0.001, None, 200, json.dumps({"outputs": [outputs.tolist()]}).encode(), "")

    def close(self) -> None:
        pass


def test_what_is_lost_and_misjudged_is_counted(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = Cases(packaged)
    monkeypatch.setattr("benchmarks.serving_load.endpoint", lambda _, variant: Endpoint(variant, "http://x", {}))
    monkeypatch.setattr(Endpoint, "connect", lambda self: Wire(cases, self.label))
    server: Any = Server()
    run = run_load(server, cases, clients=2, seconds=0.5, bad_share=0.3, targets=("original", "pruned"))
    lost = [x for x in run.sent if x.lost]
    assert {(x.target, x.status) for x in lost} == {("pruned", 503)}
    good, bad = ([x for x in run.sent if x.good is kind] for kind in (True, False))
    assert 0.02 < len(lost) / len(good) < 0.08 and 0.15 < sum(x.misjudged for x in bad) / len(bad) < 0.35
    part = load_part(server, cases, 2, 0.5)
    assert (
        0.5 * BAD_SHARE < part["bad"] / part["requests"] < 2 * BAD_SHARE and part["good_lost"] and part["bad_misjudged"]
    )


def test_answers_of_another_input_or_version_are_wrong(packaged: Path) -> None:
    cases = Cases(packaged)
    first = cases.expected["original"][0]
    assert "original" in cases.answered_by(0, first)
    assert cases.answered_by(1, first) == () and cases.answered_by(0, first + 0.1 * numpy.abs(first).max()) == ()


def test_missed_targets_are_said_to_be_missed() -> None:
    results = json.loads(RESULTS.read_text())
    for path, value, word in (
        (("triton", "load", "good_lost"), 1, "good requests lost"),
        (("triton", "load", "bad_misjudged"), 2, "without a 4xx"),
        (("torchserve", "crash", "lost_after_recovery"), 3, "recovered after"),
        (("torchserve", "crash", "served_after_recovery"), 0, "recovered after"),
        (("triton", "roll_out", "lost"), 1, "promote"),
    ):
        worse = copy.deepcopy(results)
        kind, part, key = path
        worse[kind][part][key] = value
        line = next(x for x in targets(worse) if x.split(": ")[1] == kind and word in x)
        assert line.startswith("missed: "), line
    for row in results["overhead"]:
        row["handler_percent"] = [5.1, 5.0, 5.2]
    assert sum(x.startswith("missed: handler adds 5.1") for x in targets(results)) == 2


def test_the_readme_shows_the_committed_figures() -> None:
    readme = (ROOT / "benchmarks" / "results" / "serving.md").read_text(encoding="utf-8")
    shown = readme.split("<!-- table -->")[1].split("<!-- /table -->")[0]
    assert shown.strip().startswith(table(json.loads(RESULTS.read_text())))
