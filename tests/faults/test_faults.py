"""The tables of faults fit the source, and the runner tells a fault that is noticed from one that is not."""

import json
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

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


def test_a_fault_whose_text_is_gone_is_refused(small_copy: Path) -> None:
    gone = Fault("room", "name", "what", "product.py", "4 * x", "3 * x", ("test_product.py",))
    with pytest.raises(ValueError, match=r"name finds its text 0 times.*correct tests/faults/room.toml"):
        gone.plant(small_copy)
