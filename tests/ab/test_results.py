"""What the end of a test leaves for a change request."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from redpp_serve.ab.decisions import PROMOTE, ROLLBACK, Decision
from redpp_serve.ab.results import headline, page, results_folder, verdict_text, write_results
from redpp_serve.ab.spec import Started
from redpp_serve.ab.status import Status
from tests.ab.test_status import Experiment

EVIL = "<script>alert(1)</script>\x1b[2J"


@pytest.fixture
def status(tmp_path: Path) -> Status:
    experiment = Experiment(tmp_path, shadow=False, split="80:20")
    experiment.windows(300, 0.8)
    experiment.users(3000, 900)
    spec = replace(experiment.spec, webhook="https://chat.example.com/hooks/SECRET", auto=True)
    experiment.spec, experiment.test = spec, replace(experiment.test, spec=spec)
    return experiment.status()


def moved(status: Status, arm: str | None, *actions: tuple[str, str]) -> Status:
    made = [Decision(1e9 + k, action, users, f"Reason {k}.", {}) for k, (action, users) in enumerate(actions)]
    return replace(status, all_to=arm, decisions=made)


def test_the_headline_says_who_has_moved_users(status: Status) -> None:
    for arm, actions, words in (
        ("pruned", [(PROMOTE, "pruned")], "Promoted by the verdict: all users got pruned."),
        ("original", [(ROLLBACK, "original")], "Rolled back by the verdict: all users got original."),
        ("original", [(PROMOTE, "pruned")], "Rolled back by hand"),
        ("pruned", [], "Promoted by hand"),
        (None, [], "Ended without a decision: 20 % of users got pruned."),
    ):
        found = headline(moved(status, arm, *actions))
        assert found.startswith(words) and found.endswith(status.advice.text)


def test_the_files_hold_verdict_numbers_and_decisions(status: Status, tmp_path: Path) -> None:
    ended, folder = moved(status, "pruned", (PROMOTE, "pruned")), tmp_path / "experiments" / "one"
    for _ in range(2):  # the second replaces the first
        write_results(ended, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json", "verdict.txt"]
    document = json.loads((folder / "report.json").read_text())
    assert document["headline"] == headline(ended) and document["arms"]["pruned"]["judged"] == 900
    assert document["decisions"][0]["action"] == PROMOTE and document["environment"]["versions"]["torch"]
    assert document["strata"] == {"80:20": {"judged": {"original": 3000, "pruned": 900}, "faults": {"pruned": 0}}}
    text, html = ((folder / name).read_text() for name in ("verdict.txt", "report.html"))
    for words in ("Promoted by the verdict", "Reason 0.", "80:20", "times as fast"):
        assert words in html and (words in text or words == "80:20"), words
    assert not any("SECRET" in (folder / name).read_text() for name in ("verdict.txt", "report.html", "report.json"))


def test_nothing_of_a_package_runs_in_the_page_or_moves_the_cursor(status: Status) -> None:
    evil = replace(moved(status, None), name=EVIL, problems=[EVIL], decisions=[Decision(0.0, EVIL, EVIL, EVIL, {})])
    html, text = page(evil), verdict_text(evil)
    assert "<script>alert" not in html and not re.search(r"(src|href)=", html)
    assert "\x1b" not in html + text


def test_a_test_has_a_folder_of_its_own_in_its_package(status: Status) -> None:
    test = Started(status.spec, "m", 1_795_996_598.7)
    assert results_folder(test) == status.spec.folder / "experiments" / "20261129-235638"
