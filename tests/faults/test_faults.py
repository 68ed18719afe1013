"""The tables of faults fit the source, and the runner tells a fault that is noticed from one that is not."""

import json
from collections import Counter
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import pytest

from tests.faults import __main__ as faults_command
from tests.faults.__main__ import _LINKS, RESULTS, Runner
from tests.faults.table import ROOT, Fault, faults, rooms
from tests.test_project import SUBPACKAGES


def test_each_fault_can_be_planted() -> None:
    for fault in faults():
        planted_text = fault.plant()
        if fault.file.endswith(".py"):
            compile(planted_text, fault.file, "exec")


def test_the_tables_hold_a_hundred_faults_of_different_names() -> None:
    counts = Counter(fault.name for fault in faults())
    assert len(counts) >= 100 and counts.total() == len(counts), [name for name, n in counts.items() if n > 1]
    assert all(len(faults(room)) >= 5 for room in rooms())


def test_the_kept_outcomes_are_of_these_faults_and_nearly_all_were_caught() -> None:
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert kept.keys() <= {fault.name for fault in faults()}
    assert len(kept) >= 100 and sum(row["outcome"] == "caught" for row in kept.values()) >= 0.95 * len(kept)


def test_each_fault_names_tests_that_exist() -> None:
    for fault in faults():
        for test in fault.tests:
            path, *names = test.split("::")
            text = (ROOT / path).read_text(encoding="utf-8")
            assert all(f"def {name.split('[')[0]}(" in text for name in names), f"{fault.name}: {test}"


def test_the_copy_finds_packages_where_an_installation_has_them() -> None:
    assert {target: f"redpp_serve/{name}" for name, target in _LINKS.items()} == SUBPACKAGES


@pytest.fixture
def small_copy(tmp_path: Path) -> Path:
    (tmp_path / "product.py").write_text("def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n")
    (tmp_path / "test_product.py").write_text(
        "from product import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
    )
    return tmp_path


def test_the_runner_tells_what_is_noticed(small_copy: Path) -> None:
    def fault(text: str, replaced: str) -> Fault:
        return Fault("room", "name", "what", "product.py", text, replaced, ("test_product.py",))

    with closing(Runner(small_copy, slow=False)) as runner:
        assert runner.outcome(["test_product.py"]) == "survived"
        assert runner.planted(fault("2 * x", "x * 3")) == "caught"  # as long, and within the same second
        assert runner.planted(fault("def double", "def triple")) == "caught"  # its import fails
        assert runner.planted(fault("x / 2", "x / 3")) == "survived"
    assert "2 * x" in (small_copy / "product.py").read_text()


SKIPS = """import pytest


@pytest.mark.skip
def test_double():
    assert double(3) == 6


def test_half():
    pytest.importorskip("no_such_module")
"""


def test_tests_that_are_skipped_notice_nothing(small_copy: Path) -> None:
    (small_copy / "test_skips.py").write_text(SKIPS)
    (small_copy / "test_absent.py").write_text("import pytest\n\npytest.importorskip('no_such_module')\n")
    with closing(Runner(small_copy, slow=False)) as runner:
        assert runner.outcome(["test_skips.py"]) == "skipped"
        assert runner.outcome(["test_absent.py"]) == "skipped"
        assert runner.outcome(["test_skips.py", "test_product.py"]) == "survived"


def test_a_fault_whose_tests_are_skipped_is_not_judged(
    small_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_copy / "test_skips.py").write_text(SKIPS)
    rows = [
        Fault("room", name, "what", "product.py", "2 * x", "3 * x", (tests,))
        for name, tests in (("noticed", "test_product.py"), ("skipped", "test_skips.py"))
    ]
    monkeypatch.setattr(faults_command, "faults", lambda room=None: rows)
    monkeypatch.setattr(faults_command, "copied", lambda: nullcontext(small_copy))
    monkeypatch.setattr(faults_command, "Runner", partial(Runner, slow=False))
    assert faults_command.main([]) == 1
    noticed, skipped, total = capsys.readouterr().out.splitlines()
    assert " caught " in noticed and "not judged: its tests are skipped here" in skipped
    assert total == "1 of 2 faults caught"


def test_a_fault_whose_text_is_gone_is_refused(small_copy: Path) -> None:
    gone = Fault("room", "name", "what", "product.py", "4 * x", "3 * x", ("test_product.py",))
    with pytest.raises(ValueError, match=r"name finds its text 0 times.*correct tests/faults/room.toml"):
        gone.plant(small_copy)
