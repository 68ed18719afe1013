"""The rules behind the choice of an engine, each by itself and without an engine."""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from redpp_serve.engines import engine, processor, trial
from redpp_serve.engines.trial import Trial, TrialError
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.runtime import engine_choice
from redpp_serve.runtime.buckets import Bucket
from redpp_serve.runtime.engine_choice import Chosen, _candidates, _known, _odd, _pick, _ready
from redpp_serve.runtime.engine_network import (
    AUTO,
    Candidate,
    Clock,
    ranges,
    recorded_error,
    served_precisions,
    stored_inputs,
)
from redpp_serve.runtime.engine_times import Expected, _Race
from redpp_serve.runtime.plan import EngineChoice, Timing
from redpp_serve.runtime.plan_cache import PlanCache

OWN, A, B = "redpp fp32", "openvino fp32", "onnxruntime fp32"
Times = Mapping[int, Mapping[str, tuple[float, float]]]


def picked(times: Times, forced: str = AUTO) -> list[str]:
    timings = {Bucket(batch): {name: Timing(*t) for name, t in row.items()} for batch, row in times.items()}
    chosen = _pick(timings, tuple(timings), OWN, "measured", forced)
    return [f"{c.engine} {c.precision}" for c in chosen]


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ({1: {OWN: (2.0, 1.0), A: (1.0, 0.6)}}, [A]),
        ({1: {OWN: (2.0, 1.0), A: (1.0, 1.1)}}, [OWN]),  # it may be slower
        ({1: {OWN: (2.0, 1.0), A: (1.0, 0.6), B: (0.9, 0.7)}}, [B]),
        ({1: {OWN: (2.0, 1.0), A: (1.0, 0.6), B: (0.9, 1.2)}}, [A]),
        ({1: {OWN: (3, 1), A: (1.0, 0.5), B: (1.01, 0.5)}, 8: {OWN: (9, 1), A: (4.0, 0.5), B: (2.0, 0.5)}}, [B, B]),
        ({1: {OWN: (3, 1), A: (1.0, 0.5), B: (1.03, 0.5)}, 8: {OWN: (9, 1), A: (4.0, 0.5), B: (2.0, 0.5)}}, [A, B]),
    ],
)
def test_the_surely_faster_serves_and_one_all_buckets_where_that_costs_little(times: Times, wanted: list[str]) -> None:
    assert picked(times) == wanted


def test_a_named_engine_serves_in_its_fastest_precision_however_slow_it_is() -> None:
    times = {1: {OWN: (1.0, 1.0), A: (3.0, 3.1), "openvino int8": (2.0, 2.1), B: (0.5, 0.6)}}
    assert picked(times, "openvino") == ["openvino int8"] and picked(times, "redpp") == [OWN]


def test_kept_times_of_what_may_not_serve_now_are_left_out() -> None:
    cache = PlanCache(None, shipped=None)
    cache.add("key", {"network": {OWN: Timing(2.0, 1.0), A: Timing(1.0, 0.5)}})
    assert _known(cache, "key", "network", {OWN, B}) == {OWN: Timing(2.0, 1.0)}


def test_what_an_engine_without_64_bits_computes_otherwise_is_named() -> None:
    table = {"table": torch.zeros(7, 4)}
    shifted = (
        Node("i", "aten.add.Scalar", (Ref("x"), 1)),
        Node("y", "aten.embedding.default", (Ref("table"), Ref("i"))),
    )
    assert "out of range" in _odd(Graph((InputSpec("x", (3,), "int64"),), table, shifted, ("y",)))
    cast = Node("f", "aten.to.dtype", (Ref("x"), torch.float32))
    seen = (InputSpec("x", (3,), "uint8"),)
    assert _odd(Graph(seen, {}, (cast,), ("f",))) == ""
    both = (cast, Node("d", "aten.add.Tensor", (Ref("x"), Ref("x"))))
    assert "uint8 in fewer bits" in _odd(Graph(seen, {}, both, ("f", "d")))


def test_an_engine_that_does_not_start_leaves_its_buckets_alone_to_the_own_runtime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def built(_: Any, candidate: Candidate, *rest: Any) -> Any:
        if candidate.engine == "openvino":
            raise RuntimeError("no memory left")
        return "running"

    monkeypatch.setattr(engine_choice, "_built", built)
    choices = tuple(EngineChoice(b, *name.split(), "measured", {}) for b, name in ((1, A), (2, B), (4, OWN)))
    network: Any = SimpleNamespace(forget_models=lambda: None)
    ready = _ready(network, {"fp32": lambda x: ()}, Chosen(choices), Candidate.parse(OWN))
    assert [(c.engine, c.source) for c in ready.choices] == [
        ("redpp", "failed"),
        ("onnxruntime", "measured"),
        ("redpp", "measured"),
    ]
    assert ready.runs == {B: "running"} and ready.left_out == {A: "no memory left"}


def wrong(change: Mapping[tuple[int, int], float]) -> str:
    """What is said of two batches of two outputs whose entries at (batch, output) are off by that."""
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    network: Any = SimpleNamespace(artifact=SimpleNamespace(description={}), inputs=lambda rows, _: (x[:rows],))

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return inputs[0], 3 * inputs[0]

    found = [[y + change.get((k, n), 0.0) for n, y in enumerate(run((x[:rows],)))] for k, rows in enumerate((3, 8))]
    return Expected(network, run).wrong(Candidate("openvino", "fp32"), found)


def test_every_output_of_every_batch_is_compared() -> None:
    assert wrong({}) == "" and wrong({(0, 0): 1e-5, (1, 1): 1e-5}) == ""
    for batch in (0, 1):
        for output in (0, 1):
            assert "differ by" in wrong({(batch, output): 0.05}), (batch, output)
            assert "differ by inf" in wrong({(batch, output): math.nan}), (batch, output)


def test_stored_inputs_are_repeated_to_a_batch() -> None:
    graph = Graph((InputSpec("x", (2,)),), {}, (), ("x",))
    stored = LoadedArtifact(graph, {}, (torch.arange(6.0).view(3, 2),))
    assert stored_inputs(stored, 5)[0][:, 0].tolist() == [0, 2, 4, 0, 2] and len(stored_inputs(stored, 2)[0]) == 2
    assert stored_inputs(LoadedArtifact(graph, {}), 4)[0].tolist() == [[0, 0]] * 4


@pytest.mark.parametrize(("told", "error"), [(0.2, 0.2), (7.0, 1.0), (-0.1, 0.0), (math.nan, 0.0), ("x", 0.0)])
def test_a_recorded_error_is_at_most_one(told: Any, error: float) -> None:
    assert recorded_error({"precision": {"errors": {"bf16": told}}}, "bf16") == error


@pytest.mark.parametrize("pair", [(0, math.inf), (-math.inf, 0), (1, 0), (math.nan, 1)])
def test_impossible_ranges_count_as_none(pair: tuple[float, float]) -> None:
    assert ranges({"precision": {"ranges": {"a": (-1, 1)}}}) == {"a": (-1.0, 1.0)}
    assert ranges({"precision": {"ranges": {"a": (-1, 1), "b": pair}}}) == {}


@pytest.mark.parametrize("section", ["x", [1], {"auto": "int8"}, {"auto": ["int8"], "ranges": {"x": [1]}, "errors": 3}])
def test_a_section_that_somebody_edited_admits_nothing_that_needs_it(section: Any) -> None:
    description = {"precision": section}
    served = served_precisions(description, AUTO)
    assert served == ("fp32",) or (section["auto"] == ["int8"] and served == ("fp32", "int8"))
    assert ranges(description) == {} and recorded_error(description, "int8") == 0.0


@pytest.mark.parametrize("stored", [{}, {"ranges": {"x": (-1.0, 1.0)}}])
def test_eight_bits_are_tried_where_the_artifact_holds_ranges(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx512_vnni"}))
    network: Any = SimpleNamespace(
        device=torch.device("cpu"),
        graph=Graph((InputSpec("x", (2,)),), {}, (), ("x",)),
        precisions=("fp32", "int8"),
        artifact=SimpleNamespace(description={"precision": stored}),
    )
    found, left_out = _candidates(network, AUTO)
    assert [str(c) for c in found] == [A, *(["openvino int8"] if stored else []), B]
    assert ("no ranges" in left_out.get("openvino int8", "")) == (not stored)


def test_auto_serves_what_the_error_budget_admits() -> None:
    assert served_precisions({"precision": {"auto": ["bf16"]}}, AUTO) == ("fp32", "bf16")
    assert served_precisions({"precision": {"auto": []}}, AUTO) == served_precisions({}, AUTO) == ("fp32",)


@pytest.mark.parametrize(
    ("text", "count"), [("150000 100000", 2), ("100000 100000", 1), ("1000 100000", 1), ("max 100000", 1 << 20)]
)
def test_a_quota_is_rounded_up(text: str, count: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(processor, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda _: range(64), raising=False)
    assert processor._quota() == count and processor.usable_threads(32) == min(count, 32)


@pytest.mark.parametrize(
    ("installed", "enough"),
    [("1.9.3", False), ("1.20", True), ("1.100.0", True), ("2.0+cpu", True), ("0.99rc1", False)],
)
def test_releases_are_compared_as_numbers(installed: str, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "version", lambda _: installed)
    found = engine.Engine("e", {"package": (1, 20)}, lambda: ("fp32",), lambda *_: None)
    assert (found.unavailable() == "") == enough, found.unavailable()


def test_a_trial_waits_no_longer_than_it_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(trial.select, "select", lambda *sets: waited.append(sets[3]) or ([], [], []))
    silent = Trial.__new__(Trial)
    silent.allow(5.0)
    silent._process = SimpleNamespace(stdout=object())  # type: ignore[assignment]
    with pytest.raises(TrialError, match="not ready after 5 s"):
        silent._answer()
    assert 4 < waited[0] <= 5


def test_a_trial_repeats_its_inputs_to_a_batch() -> None:
    child = trial._Child.__new__(trial._Child)
    child._inputs = [np.arange(3)]
    assert child._batch(5, None)[0].tolist() == [0, 1, 2, 0, 1]


class Closing:
    """A trial's process."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def race(seconds: float = 10.0, clock: Clock = time.process_time) -> _Race:
    network: Any = SimpleNamespace(clock=clock)
    return _Race(network, (Bucket(1), Bucket(8)), time.monotonic() + seconds, OWN, False)


def test_those_that_are_near_at_one_bucket_stay_and_what_is_left_out_ends() -> None:
    found, trials = race(), {name: Closing() for name in (A, B, "openvino bf16")}
    found._trials = dict(trials)  # type: ignore[assignment]
    small, large = Bucket(1), Bucket(8)
    found._quick = {small: {A: 1.0, B: 2.0, "openvino bf16": 2.0}, large: {A: 3.0, B: 1.0, "openvino bf16": 2.0}}
    found._retire()
    assert found._trials.keys() == {A, B} and [t.closed for t in trials.values()] == [0, 0, 1]
    found._leave_out(A, "it failed")
    assert found._trials.keys() == {B} and trials[A].closed == 1 and trials[B].closed == 0
    assert found.measured.left_out == {A: "it failed"} and not any(A in quick for quick in found._quick.values())


def test_a_long_call_is_read_once_and_larger_batches_are_worked_out_when_the_time_is_up() -> None:
    read, found = list[int](), race()

    def call(bucket: Bucket) -> float:
        read.append(bucket.batch)
        return 0.2 * bucket.batch

    found._read(A, lambda bucket: None, call, time.monotonic() + 10)
    found._read(B, lambda bucket: None, call, time.monotonic() - 1)
    assert read == [1, 8, 1]
    assert found._quick == {Bucket(1): {A: 0.2, B: 0.2}, Bucket(8): {A: 1.6, B: 1.6}}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 12), (0.01, 12), (0.03, 4), (0.2, 3)])
def test_short_calls_take_more_turns_than_long_ones(seconds: float, rounds: int) -> None:
    found, calls = race(), {A: 0, B: 0}

    def turn(name: str, bucket: Bucket) -> float:
        calls[name] += 1
        return seconds

    found._quick[Bucket(1)] = {OWN: 9.0, A: seconds, B: seconds}
    found._calls = {name: partial(turn, name) for name in calls}
    found._finished(Bucket(1), 100.0)
    assert calls == {A: 2 * rounds, B: 2 * rounds}


def test_nothing_is_tried_when_the_time_is_up() -> None:
    late = race(-0.1)
    late.enter(Candidate.parse(A), None, 1.0)  # type: ignore[arg-type]
    assert late.measured.left_out == {A: "not tried for want of time"}


@pytest.mark.parametrize(
    ("clock", "other", "wanted"),
    [(time.process_time, A, A), (time.perf_counter, A, OWN), (time.process_time, "openvino bf16", OWN)],
)
def test_single_readings_of_processor_time_decide_where_no_precision_is_lost(
    clock: Clock, other: str, wanted: str
) -> None:
    found = race(clock=clock)
    found._quick[Bucket(1)] = {OWN: 1.0, other: 0.9}
    (choice,) = _pick({Bucket(1): found._finished(Bucket(1), 0.0)}, (Bucket(1),), OWN, "measured", AUTO)
    assert str(Candidate(choice.engine, choice.precision)) == wanted
