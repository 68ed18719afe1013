"""The engines benchmark times only what is right, goes on where it stopped, and prints losing cells and goals."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import engine_arms, engine_cell, engine_networks, engines
from benchmarks.engine_arms import (
    ARMS,
    BY_HAND,
    NNCF,
    ON_PHOTOGRAPHS,
    OURS,
    OURS_AUTO,
    STOCK,
    CellOptions,
    UnavailableError,
    check_here,
    ours,
)
from benchmarks.engine_cell import Timed, measure, reference, row_of, timed
from benchmarks.engine_networks import NETWORKS, Network, keep, settle, structured_inputs
from benchmarks.engine_table import goals, losing, markdown
from benchmarks.engine_worker import CONTROL, ArmRun, RemoteRun
from benchmarks.real_scores import centred_error
from redpp_serve.engines import processor
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import load
from redpp_serve.graph.graph import InputSpec
from redpp_serve.pruning.families import Scale
from tests.support.small import SHAPE, network


def tiny_network() -> nn.Module:
    module = network()
    settle(module, structured_inputs(InputSpec("x", SHAPE), 8, Scale(), 1))
    return module


TINY = Network("tiny", SHAPE, tiny_network, Scale())
TIMED = (STOCK, "onnxruntime", "openvino", OURS, OURS_AUTO)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a run keeps of the tiny network; exports by hand need packages of their own."""
    if missing := [p for p in ("onnxscript", "openvino", "onnxruntime") if find_spec(p) is None]:
        pytest.skip(f"without {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("engines")
    keep(TINY, folder)
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, trials_here: None) -> None:
    monkeypatch.setitem(engine_networks.NETWORKS, "tiny", TINY)


def options(scratch: Path, kind: str = "times", arm: str = "all", **more: Any) -> CellOptions:
    given = {"batches": (1, 2), "seconds": 0.05, "plan_seconds": 2.0, "arms": TIMED} | more
    return CellOptions(kind, "tiny", arm, 1, str(scratch), **given)


@pytest.mark.parametrize("name", ["audio", "thin"])
def test_small_networks_are_built_and_answer(name: str) -> None:
    tested = NETWORKS[name]
    with torch.inference_mode():
        assert tested.build()(tested.inputs(2)).shape[0] == 2


def test_what_is_kept_is_made_once(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep(TINY, scratch)
    assert kept.onnx.exists() and kept.openvino.exists() and set(kept.facts["precisions"]) >= {"bf16", "int8"}
    assert load(kept.artifact).description["precision"]["ranges"]
    before = kept.artifact.stat().st_mtime_ns
    assert keep(TINY, scratch).artifact.stat().st_mtime_ns == before
    monkeypatch.setattr(engine_networks, "RECIPE", "another")
    assert engine_networks.made_with() != kept.facts["made_with"]


@pytest.mark.skipif(not processor.int8_pays(), reason="eight bits need instructions of their own")
@pytest.mark.parametrize(("name", "most"), [(NNCF, 0.6), (ON_PHOTOGRAPHS, 0.3)])
def test_eight_bits_of_inputs_that_are_shown(
    name: str, most: float, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == NNCF and find_spec("nncf") is None:
        pytest.skip("without nncf")
    kept, setting = keep(TINY, scratch), options(scratch).setting()
    with pytest.raises(UnavailableError, match="photographs for lite0 alone"):
        ARMS[name].build(TINY, kept, setting)
    monkeypatch.setattr(engine_arms, "_shown", lambda network: network.inputs(16))
    x = TINY.inputs(32)
    error = centred_error(ARMS[name].build(TINY, kept, setting)(x), reference(TINY, x))
    assert 1e-3 < error < most  # rounded, and not otherwise wrong


def test_a_run_measures_and_goes_on_where_it_stopped(
    scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def here(cell: CellOptions, timeout: float) -> dict[str, Any]:
        done.append(cell.arm)
        return measure(cell)

    monkeypatch.setattr(engines, "run_cell", here)
    monkeypatch.setattr(engine_cell, "RemoteRun", ArmRun)
    monkeypatch.setattr(engines, "_READY", ("onnxruntime", ours("onnxruntime", "fp32"), OURS))
    out = tmp_path / "engines.json"
    call = ["--networks", "tiny", "--seconds", "0.05", "--plan-seconds", "2", "--scratch", str(scratch)]
    call += ["--out", str(out), "--kinds", "times", "ready", "--arms", *TIMED, "--batches", "1", "2"]
    engines.main(call)
    assert done == ["all", "onnxruntime", ours("onnxruntime", "fp32"), OURS]
    data = json.loads(out.read_text(encoding="utf-8"))
    times, *ready = data["cells"]
    assert "Each engine" not in markdown(data)  # no arm of it took part
    assert {c["status"] for c in data["cells"]} == {"measured"} and times["left_out"] == {}
    for row in times["rows"]:
        assert set(row["ms"]) == set(TIMED) and row["not timed"] == {}
        assert all(low <= middle <= high for middle, low, high in row["ms"].values())
        assert row["ratios"][f"{OURS} over best by hand"][0] in BY_HAND
        assert max(row["errors"][name] for name in TIMED[:-1]) <= engine_cell.EXACT
    assert set(times["plans"]) == {OURS, OURS_AUTO} and set(times["plans"][OURS]) == {"1", "2", "seconds"}
    named = next(c for c in ready if c["arm"] == ours("onnxruntime", "fp32"))
    assert set(named["parts"]) == {"read", "fold", "write", "compile"} and named["seconds"] > named["first_call"] > 0
    assert next(c for c in ready if c["arm"] == OURS)["seconds_again"] > 0
    assert data["environment"]["versions"]["openvino"] != "missing"
    assert out.with_suffix(".md").read_text(encoding="utf-8") == markdown(data)
    engines.main(call)
    assert len(done) == 4
    assert engines.is_done(options(scratch), data) and not engines.is_done(options(scratch, batches=(1, 3)), data)
    assert "tiny | 1 / 1" in capsys.readouterr().out


class Stub:
    """An arm that answers what it is told; an error of None stands for a failure."""

    def __init__(self, seconds: float, error: float | None = 0.0) -> None:
        self.plan: dict[str, Any] = {}
        self.seconds, self.error = seconds, error
        self.begun = 0.0

    def check(self, batch: int) -> float:
        if self.error is None:
            raise RuntimeError("no such kernel")
        return self.error

    def time(self, batch: int) -> float:
        return self.seconds * batch

    def begin(self, seconds: float) -> None:
        self.begun = seconds

    def end(self) -> int:
        return round(self.begun / self.seconds)

    def close(self) -> None: ...


def test_an_arm_that_is_wrong_or_fails_is_named_and_not_timed() -> None:
    runs = {STOCK: Stub(3.0), "openvino": Stub(1.0, 0.01), "onnxruntime": Stub(1.0, None), OURS: Stub(2.0)}
    row = row_of([timed(runs, 2, dict.fromkeys(runs, engine_cell.EXACT), 0.0, np.random.default_rng(0))])
    assert row["ms"] == {STOCK: [6000.0] * 3, OURS: [4000.0] * 3}
    assert "wrong by" in row["not timed"]["openvino"] and "no such kernel" in row["not timed"]["onnxruntime"]
    assert row["ratios"][f"{OURS} over best by hand"] == [STOCK, 1.5, 1.5, 1.5]


def test_an_arm_that_gives_nan_is_not_timed() -> None:
    part = timed({OURS: Stub(1.0, float("nan"))}, 1, {OURS: 1.0}, 0.0, np.random.default_rng(0))
    assert row_of([part])["ms"] == {}


def test_a_row_has_the_rounds_of_every_start_and_no_arm_that_was_wrong_once() -> None:
    first = Timed(2, {STOCK: 0.0, OURS: 0.1}, {}, {STOCK: np.array([2.0, 2.0]), OURS: np.array([1.0, 1.0])})
    second = Timed(2, {STOCK: 0.0, OURS: 0.3}, {}, {STOCK: np.array([2.0]), OURS: np.array([4.0])})
    row = row_of([first, second])
    assert row["rounds"] == 3 and row["errors"][OURS] == 0.3
    assert row["ms of each start"] == {STOCK: [2000.0, 2000.0], OURS: [1000.0, 4000.0]}
    assert row["ratios"][f"{OURS} over stock"][1:] == [2.0, 0.5, 2.0]
    row = row_of([first, Timed(2, {OURS: 0.9}, {OURS: "wrong"}, {STOCK: np.array([2.0])})])
    assert set(row["ms"]) == {STOCK} and row["not timed"] == {OURS: "wrong"}


def test_a_network_whose_outputs_hardly_vary_is_refused() -> None:
    def constant() -> nn.Module:
        module = network()
        for parameter in list(module.parameters())[:1]:
            parameter.data.zero_()
        return module

    with pytest.raises(RedppError, match="vary by"):
        reference(replace(TINY, build=constant), torch.randn(8, *SHAPE))


def test_settling_gives_batch_norms_the_statistics_of_their_inputs() -> None:
    module = network()
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    found: list[torch.Tensor] = []
    x = structured_inputs(TINY.spec, 8, TINY.scale, 1)
    settle(module, x)
    norm.register_forward_hook(lambda _, inputs, __: found.append(inputs[0]))
    module(x)
    torch.testing.assert_close(norm.running_mean, found[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not any(m.training for m in module.modules())


def test_a_pruned_network_is_timed_against_its_original(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cell, "RemoteRun", ArmRun)
    kept = keep(TINY, scratch)
    arms = (ours("redpp", "fp32"), ours("onnxruntime", "fp32"))
    cell = measure(options(scratch, "pruned", str(kept.artifact), batches=(2,), arms=arms))
    assert (cell["status"], cell["share"], cell["arm"]) == ("measured", 1.0, kept.artifact.name)
    assert {f"pruned over original, {arm}" for arm in arms} <= set(cell["rows"][0]["ratios"])
    assert cell["left_out"] == {}


def test_overhead_compares_with_the_engines_own_call(scratch: Path) -> None:
    cell = measure(options(scratch, "overhead", "onnxruntime"))
    value, low, high = cell["microseconds"]
    assert low <= value <= high < 1e5


def test_two_workers_are_held_against_one(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cell, "RemoteRun", lambda *_: Stub(0.001))
    cell = measure(options(scratch, "workers", CONTROL))
    assert cell["ratio"] == [2.0, 2.0, 2.0] and cell["calls_per_second"] == [1000.0] * 4


def test_an_arm_answers_from_a_process_of_its_own(tmp_path: Path) -> None:
    run = RemoteRun(CONTROL, options(tmp_path), None)
    try:
        run.begin(0.01)
        assert run.end() > 0 and 0 < run.time(1) < 1
        with pytest.raises(RuntimeError):
            run.check(-1)
        run._process.kill()
        with pytest.raises(RuntimeError, match="ended with code"):
            run.time(1)
    finally:
        run.close()


def test_a_cell_that_dies_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = engines.run_cell(options(tmp_path), 60.0)
    assert found["status"] == "failed" and "ended with 1" in found["reason"]


def test_precisions_without_instructions_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx2"}))
    check_here(ARMS[ours("openvino", "fp32")])
    with pytest.raises(UnavailableError, match="bf16"):
        check_here(ARMS["openvino bf16"])


def results(ratio: float) -> dict[str, Any]:
    interval = [ratio, ratio - 0.01, ratio + 0.01]
    ratios = {f"{OURS} over best by hand": ["openvino", *interval], f"{OURS_AUTO} over {STOCK}": [STOCK, *interval]}
    row = {"batch": 1, "errors": {}, "ms": {STOCK: [2.0, 1.9, 2.1]}, "ratios": ratios, "not timed": {OURS: "wrong"}}
    times = {"kind": "times", "network": "lite0", "arm": "all", "threads": 1, "status": "measured"}
    times |= {"rows": [row], "left_out": {"openvino bf16": "no instructions"}, "plans": {}, "clock": "cpu"}
    failed = {"kind": "ready", "network": "lite0", "arm": OURS, "threads": 1, "status": "failed", "reason": "killed"}
    environment = engines.environment() | {"processor": "x86_64 avx2 avx512f"}
    return {"environment": environment, "networks": {"lite0": {"weights_mib": 1.0}}, "cells": [times, failed]}


@pytest.mark.parametrize(
    ("ratio", "verdicts"), [(0.96, ["missed", "missed"]), (0.97, ["met", "missed"]), (3.0, ["met", "met"])]
)
def test_losing_cells_and_goals_are_printed(ratio: float, verdicts: list[str]) -> None:
    data = results(ratio)
    assert [line.split(":")[0] for line in goals(data)] == verdicts
    data["environment"]["processor"] = "x86_64 avx2"  # where nothing is wanted of lower precisions
    assert [line.split(":")[0] for line in goals(data)] == verdicts[:1]
    lines = "\n".join(losing(data))
    assert "killed" in lines and "is not timed: wrong" in lines and "no instructions" in lines
    assert ("against openvino" in lines) == (ratio < 0.99)
    assert (
        "1 / 1 (cpu time)" in markdown(data)
        and "2.00 (1.90 to 2.10)" in markdown(data)
        and "not timed" in markdown(data)
    )


def test_arms_take_turns() -> None:
    seen: list[str] = []
    readings = {name: lambda name=name: float(len(seen.append(name) or seen)) for name in "ab"}
    found = engine_cell.in_turns(readings, 0.0, np.random.default_rng(0))
    assert {len(values) for values in found.values()} == {engine_cell.FEWEST_ROUNDS}
    for first in range(2, len(seen), 4):  # behind the first readings: there and back
        assert seen[first : first + 2] == seen[first + 2 : first + 4][::-1]
