"""`compare --require`, ``--junit``, ``--csv`` and ``--sweep`` from the command line, on a stand-in of a server."""

import csv
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import redpp_serve.comparison.folder as module
from redpp_serve.cli import main
from redpp_serve.comparison.contract import _make_room
from redpp_serve.report.folder import read_report
from redpp_serve.requirements import COMPARED
from tests.comparison.test_folder import Standin, standin  # noqa: F401  (a fixture)
from tests.support.small import SHAPE

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gains beside the server, short blocks, and few connections, each of which is warmed up."""
    monkeypatch.setattr(module, "measure_gains", lambda *_, **__: [])
    monkeypatch.setattr("redpp_serve.comparison.load.SHORTEST_BLOCK_S", 0.05)
    monkeypatch.setattr("redpp_serve.comparison.load.CONNECTIONS", 2)


@pytest.fixture
def folder(packaged: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packaged, tmp_path / "dist/small")


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], standin: list[Standin]) -> Iterator[Run]:  # noqa: F811
    """Exit code, stdout and stderr of `compare` on the package."""

    def command(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["compare", str(folder), "--duration", "0.3", "--concurrency", "2", *map(str, words)])
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield command


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_requirements_that_are_met(run: Run, tmp_path: Path) -> None:
    words = ("--require", "handler_speedup>=1.4,agreement>=0.9", "--require", "failed<=0")
    code, out, _ = run(*words, "--junit", tmp_path / "new/junit.xml", "--csv", tmp_path / "figures.csv")
    assert code == 0 and out.splitlines()[0].startswith("torchserve: ")
    assert [line.split()[:3] for line in out.splitlines()[-3:]] == [
        ["met", "handler_speedup>=1.4", "1.5"],
        ["met", "agreement>=0.9", "1"],
        ["met", "failed<=0", "0"],
    ]
    suite = ElementTree.parse(tmp_path / "new/junit.xml").getroot()[0]
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("3", "0")
    assert suite.attrib["name"] == "redpp-serve compare small on torchserve"
    rows = {row["figure"]: row for row in rows_of(tmp_path / "figures.csv")}
    assert float(rows["handler_speedup"]["low"]) == pytest.approx(1.5) and rows["agreement"]["low"] == ""
    assert rows["p50_ms"]["server"] == "torchserve" and rows["p50_ms"]["concurrency"] == "2"
    assert set(rows) < set(COMPARED) and "accuracy" not in rows and "rate_p50_ms" not in rows


def test_requirements_that_are_missed(run: Run, tmp_path: Path) -> None:
    code, out, err = run("--require", "handler_speedup>=1.6,failed<=0", "--json", "--junit", tmp_path / "junit.xml")
    document = json.loads(out)
    assert code == 3 and [each["met"] for each in document["requirements"]] == [False, True]
    assert "1 of 2 requirements is missed: handler_speedup is 1.5" in err and "Expected: handler_speedup>=1.6" in err
    assert ElementTree.parse(tmp_path / "junit.xml").getroot().attrib["failures"] == "1"
    assert document["server"] == "torchserve" and document["device"] and document["versions"]["torch"]
    assert document["settings"]["workers"] == 1 and document["settings"]["batch_size"] == 4


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--require", "speed>=1"], "'speed' is no figure; there are speedup"),
        (["--require", "speedup=1"], "'speedup=1' is not NAME>=NUMBER"),
        (["--require", "rate_p99_ms<=20"], "asks for rate_p99_ms, which is not measured.*add --rate R"),
        (["--require", "accuracy>=0.9,original_accuracy>=0"], "accuracy and original_accuracy, which are not measured"),
        (["--sweep", "batch=1,2", "--require", "accuracy>=0.9"], "accuracy, which is not measured"),
        (["--sweep", "rate=0"], "'0' is not a number above 0"),
        (["--sweep", "batch=1,x"], "'x' is not a whole number from 1 to 4096"),
        (["--sweep", "threads=1,2"], r"is none of concurrency=N,N,\.\.\., rate=N"),
        (["--sweep", "concurrency"], "'' is not a whole number"),
        (["--sweep", "concurrency=4,4"], "has a value twice"),
        (["--sweep", "rate=1", "--sweep", "rate=2"], "--sweep rate is given twice"),
        (["--sweep", "rate=1,2,3,4,5,6", "--sweep", "batch=1,2,3,4,5,6"], "a sweep of 36 cells. Expected: at most 32"),
        (["--sweep", "batch=8", "--server", "triton"], "Triton takes at most 4 inputs.*--batch-size 8"),
        (["--csv", "."], "--csv . cannot be written: Is a directory"),
        (["--junit", "/proc/none/junit.xml"], "--junit /proc/none/junit.xml cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_before_a_server_starts(run: Run, words: list[str], found: str) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
    assert re.search(found, err) and Standin.made == []


def test_files_of_an_earlier_run_do_not_outlive_a_failure(run: Run, tmp_path: Path) -> None:
    for name in ("junit.xml", "figures.csv"):
        (tmp_path / name).write_text("of an earlier run")
    code, _, _ = run(
        "--inputs", tmp_path / "absent.npz", "--junit", tmp_path / "junit.xml", "--csv", tmp_path / "f.csv"
    )
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert code == 2 and suite.attrib["errors"] == "1" and "absent.npz" in suite[0][0].attrib["message"]
    run("--inputs", tmp_path / "absent.npz", "--csv", tmp_path / "figures.csv")
    assert not (tmp_path / "figures.csv").exists()


def test_files_may_be_devices_and_links(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "target.csv")
    read = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()), daemon=True)
    got: list[str] = []
    read.start()
    _make_room("--csv", tmp_path / "pipe")
    read.join(10)
    assert got == [""] and (tmp_path / "pipe").is_fifo()
    _make_room("--csv", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def test_labels_and_a_rate_make_their_figures_known(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", inputs=np.zeros((3, *SHAPE), "float32"), labels=[0, 1, 2])
    words = ("--inputs", tmp_path / "data.npz", "--rate", "40", "--csv", tmp_path / "figures.csv")
    code, _, err = run(*words, "--require", "accuracy<=0.4,accuracy_drop<=0,rate_failed<=1")
    assert code == 0, err
    assert {"accuracy", "original_accuracy", "rate_p99_ms"} <= {
        row["figure"] for row in rows_of(tmp_path / "figures.csv")
    }


def test_a_sweep_measures_the_product_on_one_server(run: Run, folder: Path, tmp_path: Path) -> None:
    sweep = ("--sweep", "concurrency=1,2", "--sweep", "batch=1,3")
    code, out, err = run(*sweep, "--csv", tmp_path / "f.csv", "--junit", tmp_path / "j.xml", "--require", "failed<=0")
    assert code == 0, err
    assert len(Standin.made) == 1 and "cell 4 of 4" in err
    places = [f"concurrency {c}, batch {b}" for c in (1, 2) for b in (1, 3)]
    for place in places:
        assert f"== {place}\n" in out and f"0  {place}" in out  # a table, and an outcome
    assert "2 requests of 3 inputs at a time" in out and out.index("== all") > out.index(places[-1])
    rows = rows_of(tmp_path / "f.csv")
    assert [(r["concurrency"], r["batch"]) for r in rows if r["figure"] == "agreement"] == [
        ("1", "1"), ("1", "3"), ("2", "1"), ("2", "3"),
    ]  # fmt: skip
    assert all(float(r["value"]) == 1.0 for r in rows if r["figure"] == "agreement")
    cases = ElementTree.parse(tmp_path / "j.xml").getroot()[0]
    assert [case.attrib["classname"].split(".", 1)[1] for case in cases] == places
    kept = read_report(folder).comparisons or []
    assert len(kept) == 1 and [(c.concurrency, c.batch) for c in kept[0].cells] == [
        (1, 1), (1, 3), (2, 1), (2, 3),
    ]  # fmt: skip
    for cell in kept[0].cells:  # each input counts, not each request, and none twice
        assert cell.inputs and cell.batch and cell.inputs <= 16 and cell.inputs % cell.batch == 0
    assert kept[0].cells[3].inputs == 15
    assert "concurrency" not in kept[0].settings and kept[0].settings["workers"] == 1


def test_a_sweep_as_json(run: Run) -> None:
    # Beside other work, requests of so short a run are not sent in time, which are failed ones.
    code, out, _ = run("--sweep", "rate=20,40", "--json", "--require", "rate_failed<=1,failed<=0")
    document: dict[str, Any] = json.loads(out)
    assert code == 0 and document["sweep"] == {"rate": [20, 40]} and document["server"] == "torchserve"
    assert [cell["open_loop"]["rate_rps"] for cell in document["cells"]] == [20, 40]
    assert [each["where"] for each in document["requirements"]] == ["rate 20", "rate 20", "rate 40", "rate 40"]
