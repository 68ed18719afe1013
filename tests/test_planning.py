"""`redpp-serve plan`: on a package, again from the cache, in the report; and what it refuses."""

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from redpp_serve.cli import main
from redpp_serve.errors import RedppError
from redpp_serve.options import PlanOptions
from redpp_serve.packaging.mar import ARTIFACT
from redpp_serve.planning import plan, record
from redpp_serve.runtime.plan import Plan
from redpp_serve.runtime.plan_cache import VARIABLE
from redpp_serve.variants import NAMES

pytestmark = pytest.mark.usefixtures("trials_here")

AT_ONCE = PlanOptions("cpu", time_budget=0)


@pytest.fixture
def folder(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "plans.json"))
    shutil.copytree(packaged, tmp_path / "small")
    threads = torch.get_num_threads()
    yield tmp_path / "small"
    torch.set_num_threads(threads)


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main([str(word) for word in words]))
    assert ended.value.code in (0, None)


def test_a_package_is_planned_shown_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((folder / "report.json").read_text())
    run("plan", folder, "--time-budget", "5", "--device", "cpu", "--all")
    shown = capsys.readouterr()
    assert shown.out.startswith("original\n") and "\npruned\n" in shown.out and "report.html" in shown.err
    report = json.loads((folder / "report.json").read_text())
    assert {**before, "plan": report["plan"]} == report
    assert ">Engines and kernels</h2>" in (folder / "report.html").read_text()
    plans = {arm: Plan.from_json(report["plan"][arm]) for arm in NAMES}
    assert plans["pruned"].batches == (1, 2, 4) and plans["original"].precision == "fp32"  # what the package serves
    assert all(choice.times for choice in plans["original"].engines)
    run("plan", folder, "--time-budget", "5", "--device", "cpu", "--all", "--json")
    again = json.loads(capsys.readouterr().out)
    assert "measured" not in {
        choice["source"] for arm in NAMES for choice in again[arm]["choices"] + again[arm]["engines"]
    }
    assert {arm: again[arm]["digest"] for arm in again} == {arm: plans[arm].digest for arm in plans}


def test_options_go_before_the_packages(folder: Path) -> None:
    found = plan(folder, PlanOptions("cpu", precision="bf16", batch_size=2, time_budget=0))
    assert all(found[arm]["precision"] == "bf16" and list(found[arm]["batches"]) == [1, 2] for arm in NAMES)
    assert {c["source"] for c in found["pruned"]["choices"]} <= {"budget", "rule"}  # no time, nothing known


def test_what_cannot_be_used_is_named(folder: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"device": "cpu:"}, "--device cpu:"),
        ({"device": "cuda:"}, "--device cuda:"),
        ({"device": "tpu"}, "--device tpu"),
        ({"device": ""}, "--device"),
        ({"precision": "fp8"}, "--precision is fp8"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"threads": -1}, "--threads is -1"),
    ]
    for options, says in wrong:
        with pytest.raises(RedppError, match=says):
            raise AssertionError((options, plan(folder, PlanOptions(**options))))


def test_folders_that_are_no_package(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pruned.mar").write_bytes(b"PK")
    (folder / "file").write_text("")
    for place, name in ((folder, "pruned.mar"), (folder / "none", "original.mar"), (folder / "file", "original.mar")):
        with pytest.raises(RedppError, match=f"{name} cannot be read"):
            plan(place, AT_ONCE)
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["plan", str(folder / "none")]))
    assert ended.value.code == 2 and "What to do" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"options": 3}', '{"options": {"threads": null}}'])
def test_a_damaged_report_stands_in_nothings_way(folder: Path, text: str) -> None:
    (folder / "report.json").write_text(text)
    assert list(plan(folder, AT_ONCE)["pruned"]["batches"]) == [1]
    assert record(folder, {}) == (text.startswith("{"))


def test_damaged_archives_are_no_package(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pruned.mar") as whole:
        artifact = whole.read(ARTIFACT)
    with zipfile.ZipFile(folder / "pruned.mar", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(ARTIFACT, artifact)
        size = packed.getinfo(ARTIFACT).compress_size
    sound = (folder / "pruned.mar").read_bytes()
    start, table = 30 + len(ARTIFACT), sound.rindex(b"PK\x01\x02")
    damaged = {
        "stream": sound[:start] + b"\xff" * size + sound[start + size :],
        "encrypted": sound[:6] + b"\1" + sound[7 : table + 8] + b"\1" + sound[table + 9 :],
        "method": sound[:8] + b"\x63" + sound[9 : table + 10] + b"\x63" + sound[table + 11 :],
        "end": sound[:-30],
    }
    for what, content in damaged.items():
        (folder / "pruned.mar").write_bytes(content)
        with pytest.raises(RedppError, match="pruned.mar (cannot be read|holds an encrypted)"):
            raise AssertionError((what, plan(folder, AT_ONCE)))


def test_options_that_a_report_has_wrong_are_named(folder: Path) -> None:
    for options, says in (
        ({"threads": "many"}, "threads is 'many'"),
        ({"threads": 10**9}, "threads is '1000000000'"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"engine": ["redpp"]}, "engine is "),
    ):
        (folder / "report.json").write_text(json.dumps({"options": options}))
        with pytest.raises(RedppError, match=says):
            plan(folder, AT_ONCE)
