"""What a test with --auto does on its verdict: climbs, promotes, rolls back, leaves to a person, or stands back."""

import json
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from redpp_serve.ab.decisions import PROMOTE, RAMP, ROLLBACK, SETTLE, STAND_BACK, START, Decision, decisions
from redpp_serve.ab.gateway import divide, set_split, switch
from redpp_serve.ab.pilot import ENOUGH, Pilot
from redpp_serve.ab.spec import parse_ramp, parse_share_or_split, parse_split, split_at
from redpp_serve.ab.state import GATEWAY
from redpp_serve.ab.status import Status
from redpp_serve.errors import RedppError
from tests.ab.test_status import Experiment

NOW = time.time()


class Flight:
    """A pilot over an experiment with a known truth, whose decisions are done as the supervisor does them."""

    def __init__(
        self, state: Path, *, ramp: str = "", hold: float = 0.0, shadow: bool = False, auto: bool = True
    ) -> None:
        shares = parse_ramp(ramp) if ramp else ()
        self.experiment = Experiment(state, shadow=shadow, split=str(split_at(shares[0])) if shares else "50:50")
        self.experiment.spec = replace(self.experiment.spec, auto=auto, ramp=shares, hold=hold)
        self.experiment.test = replace(self.experiment.test, spec=self.experiment.spec)
        self.state, self.gateway = state, state / GATEWAY
        set_split(self.gateway, self.experiment.spec.split)
        self.pilot = Pilot(state, self.experiment.spec)

    def status(self) -> Status:
        return self.experiment.status()

    def step(self, now: float = NOW, **changes: object) -> str:
        """One look; the action that was done, or nothing."""
        decision = self.pilot.decide(replace(self.status(), **changes), now)
        if decision is None:
            return ""
        if decision.action == RAMP:
            set_split(self.gateway, parse_split(decision.users))
            self.experiment.spec = replace(
                self.experiment.spec, split=parse_split(decision.users)
            )  # of what is counted
        elif decision.action in (PROMOTE, ROLLBACK):
            switch(self.gateway, decision.users)
        self.pilot.write(decision)
        return decision.action


def test_a_faster_version_climbs_the_ramp_and_is_promoted(tmp_path: Path) -> None:
    flight = Flight(tmp_path, ramp="1,25,100", hold=60)
    assert flight.step(NOW) == START
    flight.experiment.users(3000, ENOUGH - 1)
    assert flight.step(NOW + 61) == "", "too few requests at this share"
    flight.experiment.users(3000, ENOUGH)
    assert flight.step(NOW + 59) == "", "too early"
    assert flight.step(NOW + 60, problems=["a worker is being started"]) == ""
    assert flight.step(NOW + 61) == RAMP and str(flight.status().split) == "75:25"
    flight.experiment.users(9000, 3000)
    flight.experiment.windows(300, 0.8)
    assert flight.step(NOW + 100) == "" and flight.step(NOW + 122) == PROMOTE
    assert flight.status().all_to == "pruned" and flight.step(NOW + 1000) == ""
    made = decisions(tmp_path)
    assert [(d.action, d.users) for d in made] == [(START, "99:1"), (RAMP, "75:25"), (PROMOTE, "pruned")]
    assert [d.time for d in made] == [NOW + s for s in (0, 61, 122)]
    numbers = made[-1].numbers
    assert numbers["verdicts"][0]["kind"] == "faster" and numbers["verdicts"][0]["low"] > 1
    assert {rail["name"]: rail["ok"] for rail in numbers["guardrails"]} == {
        "errors": True,
        "p99": True,
        "agreement": True,
    }
    assert numbers["arms"]["pruned"]["judged"] == 3000 and "faster" in numbers["advice"]
    assert json.loads((tmp_path / "decisions.jsonl").read_text().splitlines()[1])["text"].startswith(
        "No limit is broken"
    )


@pytest.mark.parametrize("how", ["times as long", "errors"])
def test_what_is_worse_is_rolled_back_at_once(tmp_path: Path, how: str) -> None:
    flight = Flight(tmp_path, ramp="5,100", hold=3600)
    assert flight.step() == START
    flight.experiment.windows(300, 1.3 if how == "times as long" else 0.8)
    flight.experiment.users(3000, 1000, errors=0 if how == "times as long" else 300)
    assert flight.step(problems=["anything"]) == ROLLBACK and flight.status().all_to == "original"
    assert flight.step() == "" and how in decisions(tmp_path)[-1].text


def test_equally_fast_versions_are_left_to_a_person(tmp_path: Path) -> None:
    flight = Flight(tmp_path)
    flight.experiment.spec = replace(flight.experiment.spec, limits=replace(flight.experiment.spec.limits, margin=0.05))
    flight.experiment.test = replace(flight.experiment.test, spec=flight.experiment.spec)
    flight.experiment.users(5000, 5000)
    flight.experiment.windows(400)
    assert flight.status().advice.kind == "promote", "an operator may"
    assert [flight.step() for _ in range(3)] == [START, SETTLE, ""]
    assert flight.status().all_to is None and "a person decides" in decisions(tmp_path)[-1].text
    flight.experiment.users(5000, 5000, errors=2000)
    assert flight.step() == ROLLBACK, "limits are watched on"


@pytest.mark.parametrize("moved", ["promote", "rollback", "split", "lost"])
def test_it_stands_back_where_somebody_else_has_moved_users(tmp_path: Path, moved: str) -> None:
    flight = Flight(tmp_path, ramp="5,100")
    assert flight.step() == START
    if moved == "split":
        set_split(flight.gateway, parse_split("60:40"))
    else:
        switch(flight.gateway, "pruned" if moved == "promote" else "original")
    flight.experiment.users(3000, 3000, errors=1000)
    assert [flight.step(), flight.step()] == [STAND_BACK, ""]
    divide(flight.gateway)
    assert flight.step() == ""


def test_without_auto_nothing_is_decided(tmp_path: Path) -> None:
    flight = Flight(tmp_path, auto=False)
    flight.experiment.users(3000, 3000, errors=1000)
    assert flight.status().advice.kind == "rollback" and [flight.step(), flight.step()] == [START, ""]


def test_a_ramp_that_ends_below_100_stays_there(tmp_path: Path) -> None:
    flight = Flight(tmp_path, ramp="5,50")
    flight.experiment.users(3000, 1000)
    assert [flight.step(), flight.step()] == [START, RAMP]
    flight.experiment.users(9000, 9000)
    flight.experiment.windows(300, 0.8)
    assert flight.status().advice.kind == "promote" and flight.step() == "" and flight.status().all_to is None


def test_the_next_supervisors_pilot_goes_on(tmp_path: Path) -> None:
    flight = Flight(tmp_path, ramp="5,50,100", hold=60)
    flight.experiment.users(3000, 1000)
    assert [flight.step(NOW), flight.step(NOW + 61)] == [START, RAMP]
    again = Pilot(tmp_path, flight.experiment.spec)
    assert again.last == flight.pilot.last and again.last and again.last.action == RAMP
    flight.pilot = again
    flight.experiment.users(9000, 9000)
    flight.experiment.windows(300, 0.8)
    assert flight.step(NOW + 100) == "" and flight.step(NOW + 122) == PROMOTE


def test_a_decision_that_cannot_be_written_is_remembered(tmp_path: Path) -> None:
    flight = Flight(tmp_path)
    (tmp_path / "decisions.jsonl").mkdir()
    with pytest.raises(OSError):
        flight.step()
    assert flight.pilot.last and flight.pilot.last.action == START and flight.step() == ""


def test_a_line_of_the_journal_holds_no_control_characters() -> None:
    assert "\x1b" not in str(Decision(0.0, START, "90:10", "a\x1b[2Jb", {}))
    assert str(Decision(0.0, START, "90:10", "Text.", {})) == "1970-01-01 00:00:00 UTC  start: users 90:10. Text."


def test_ramps_and_splits_are_read() -> None:
    assert parse_ramp("1, 5,25.5,100") == (Decimal(1), Decimal(5), Decimal("25.5"), Decimal(100))
    assert parse_share_or_split("25") == parse_share_or_split("75:25") == parse_split("75:25")
    for text in ("", "5,5", "5,1", "0,5", "5,101", "5,,6", "a", "1;2", "-1,5", "1,5,1e2", "0.001"):
        with pytest.raises(RedppError, match="--ramp"):
            parse_ramp(text)
    for text in ("101", "-1", "x", "50:60", ""):
        with pytest.raises(RedppError):
            parse_share_or_split(text)
