"""Which kernel a plan takes: never a slower one, within the time it has, and only one that computes the same."""

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from redpp_serve.graph.graph import Graph, Ref
from redpp_serve.runtime import fused_layer as forms
from redpp_serve.runtime.candidates import Candidate, candidates
from redpp_serve.runtime.fused_layer import FusedLayer, fused_layer, fused_layers
from redpp_serve.runtime.plan import Choice, Plan, decide
from redpp_serve.runtime.plan_cache import PlanCache, device_key
from redpp_serve.runtime.planner import confirmed, make_plan, most_roundings, time_candidates
from redpp_serve.runtime.serving_graph import PlanContext, layer_inputs, serving_graph
from redpp_serve.runtime.timing import MOST_ROUNDS, ClockTimer, in_turns, timings
from tests.support.networks import Builder

CPU = torch.device("cpu")
Run = Callable[[], float]


class World:
    """Time that passes only where something is run."""

    def __init__(self, times: Mapping[str, float] | None = None) -> None:
        self.now, self.prepared = 0.0, []
        self.times = times or {}

    def prepare(self, make: Any, tensors: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Run:
        """Take as long as ``times`` says for a kernel of `stand_in`, for each image."""
        kernel = next(name for name in tensors if name.startswith("is "))[3:]
        self.prepared.append((kernel, tuple(inputs[0].shape)))
        make(tensors)(*inputs)
        return lambda: self.passing(self.times[kernel] * len(inputs[0]))

    def passing(self, seconds: float) -> float:
        self.now += seconds
        return seconds


def stand_in(layer: FusedLayer, kernel: str, worth: bool = True, factor: float = 1.0, fails: bool = False) -> Candidate:
    """The layer's own operator under another name, with its weight times a factor."""

    def make() -> forms.Form:
        if fails:
            raise RuntimeError("no kernel image is available")
        node, tensors = forms.plain(layer)
        return node, {**tensors, layer.weight.name: layer.values * factor, f"is {kernel}": torch.zeros(1)}

    return Candidate(kernel, worth, "", make)


class Paced:
    """Networks of which the second takes ``ratio`` of the first's time; getting each ready takes a while."""

    def __init__(self, ratio: float, ready: Callable[[], object] = lambda: None) -> None:
        self.ratio, self.ready, self.prepared = ratio, ready, 0

    def prepare(self, *_: Any) -> Run:
        self.ready()
        self.prepared += 1
        seconds = 1.0 if self.prepared % 2 else self.ratio
        return lambda: seconds


Options = Callable[[FusedLayer], Iterable[Candidate]]
KEY = device_key(CPU, "fp32")


def network() -> Graph:
    """Two equal convolutions with an epilogue, one smaller one, and a Linear."""
    b = Builder(4, 6, 5)
    x = b.relu(b.conv(b.relu(b.conv("x", "first", 4, 4)), "second", 4, 4))
    return serving_graph(b.graph(b.linear(b.mean(b.relu(b.conv(x, "third", 4, 2, 1))), "head", 2, 3)), CPU)


def context_of(
    graph: Graph, find: Any = candidates, inputs: Mapping[str, tuple[int, ...]] | None = None
) -> PlanContext:
    return PlanContext(graph, CPU, "fp32", inputs or layer_inputs(graph, CPU), find)


def planned(
    options: Options, world: World, context: PlanContext | None = None, batches: Sequence[int] = (1,), **more: Any
) -> Plan:
    """A plan from these candidates in a world's time; the network as a whole gains by it."""
    context = replace(
        context or context_of(network()), find=lambda graph, node, *_: list(options(fused_layer(graph, node)))
    )
    with patch.object(time, "perf_counter", lambda: world.now):
        return make_plan(context, batches, **{"timer": world, "network_timer": Paced(0.5)} | more)


def kernels(plan: Plan) -> dict[tuple[str, int], tuple[str, str]]:
    return {(c.name, c.batch): (c.kernel, c.source) for c in plan.choices}


def two(layer: FusedLayer) -> list[Candidate]:
    return [stand_in(layer, "dense"), stand_in(layer, "other")]


def noisy(generator: random.Random, ratio: float, level: float) -> list[Run]:
    """Dense and another kernel on a busy machine: jitter, bursts of other work, a clock that wanders and jumps."""
    state = {"speed": 1.0}

    def run(seconds: float) -> float:
        state["speed"] *= math.exp(generator.gauss(0, 0.2 * level))
        if generator.random() < 0.01:
            state["speed"] = generator.choice((1.0, 1.0, 1.3))
        burst = generator.uniform(1.2, 4.0) if generator.random() < 0.05 else 1.0
        return seconds * state["speed"] * burst * math.exp(generator.gauss(0, level))

    return [lambda: run(1e-4), lambda: run(ratio * 1e-4)]


def share_chosen(ratio: float, level: float, layers: int, seed: int) -> float:
    """In which share of layers a kernel that takes ``ratio`` of the dense one's time is chosen."""
    generator, chosen = random.Random(seed), 0
    for _ in range(layers):
        rounds = in_turns(noisy(generator, ratio, level), math.inf)
        chosen += decide(timings(("dense", "other"), rounds)) == "other"
    return chosen / layers


@pytest.mark.parametrize("level", [0.005, 0.03, 0.15])
def test_what_is_slower_than_dense_is_hardly_ever_chosen(level: float) -> None:
    assert share_chosen(1 / 0.98, level, 400, seed=1) <= 0.01
    assert share_chosen(1.2, level, 100, seed=2) == 0


def test_what_is_clearly_faster_is_chosen() -> None:
    assert share_chosen(0.7, 0.03, 100, seed=3) >= 0.98 and share_chosen(0.9, 0.005, 100, seed=4) >= 0.98
    assert share_chosen(0.985, 0.005, 100, seed=5) <= 0.05  # faster, but not by 3 %


def test_rounds_go_forwards_and_backwards_and_end_early_when_all_is_clear() -> None:
    order: list[str] = []
    runs = {"a": 1.0, "b": 3.0, "c": 0.5}
    rounds = in_turns([lambda k=k, t=t: order.append(k) or t for k, t in runs.items()], math.inf)
    assert "".join(order[:12]) == "abccbaabccba" and len(rounds) == 7 and rounds[0] == [1.0, 3.0, 0.5]
    for end, count in ((math.inf, MOST_ROUNDS), (0.0, 7)):
        unclear = cycle((0.9, 0.9, 1.05, 1.05))  # rounds are 3 % faster or not by turns
        assert len(in_turns([lambda: 1.0, lambda times=unclear: next(times)], end)) == count


def test_drift_between_two_candidates_is_no_difference() -> None:
    now = [0.0]

    def run() -> float:  # each call is slower than the one before
        now[0] += 1
        return 1 + 0.05 * now[0]

    rounds = in_turns([run, run], math.inf)
    assert all(a == pytest.approx(b) for a, b in rounds) and decide(timings(("dense", "other"), rounds)) == "dense"


def test_the_faster_kernel_is_chosen_where_it_is_faster() -> None:
    plan = planned(two, World({"dense": 1e-3, "other": 0.9e-3}), batches=(1, 4))
    assert set(kernels(plan).values()) == {("other", "measured")} and len(plan.choices) == 8
    assert (
        plan.choices[0].times == pytest.approx({"dense": 1e-3, "other": 0.9e-3}) and plan.choices[1].shape == "4x4x6x5"
    )
    assert [c.name for c in plan.choices[::2]] == ["first", "second", "third", "head"]
    plan = planned(two, World({"dense": 1e-3, "other": 0.98e-3}))
    assert set(kernels(plan).values()) == {("dense", "measured")}


def test_equal_layers_are_timed_once_for_each_batch() -> None:
    world = World({"dense": 1e-3, "other": 2e-3})
    planned(two, world, batches=(1, 2))
    assert len(world.prepared) == 2 * 2 * 3  # two kernels, two batches, three kinds of layer
    assert {shape[0] for _, shape in world.prepared} == {1, 2}


def test_without_a_choice_no_time_is_spent() -> None:
    world = World()

    def hopeless(layer: FusedLayer) -> list[Candidate]:
        return [stand_in(layer, "dense"), stand_in(layer, "other", worth=False)]

    plan = planned(hopeless, world)
    assert set(kernels(plan).values()) == {("dense", "rule")} and not world.prepared and world.now == 0
    world.times = {"dense": 1.0, "other": 0.5}
    assert set(kernels(planned(hopeless, world, everything=True, seconds=1e3)).values()) == {("other", "measured")}


@pytest.mark.parametrize("bad", [{"factor": 1.001}, {"factor": math.nan}, {"fails": True}])
def test_a_kernel_that_fails_or_differs_is_out(bad: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    def options(layer: FusedLayer) -> list[Candidate]:
        return [*two(layer), stand_in(layer, "wrong", **bad)]

    world, cache = World({"dense": 1e-3, "other": 0.9e-3, "wrong": 1e-6}), PlanCache(None)
    plan = planned(options, world, cache=cache)
    assert {kernel for kernel, _ in kernels(plan).values()} == {"other"} and "wrong cannot run" in caplog.text
    assert all("wrong" not in choice.times for choice in plan.choices)
    caplog.clear()
    again = planned(options, world, cache=cache)
    assert {s for _, s in kernels(again).values()} == {"cached"} and not caplog.text  # not tried again
    assert again.digest == plan.digest


def test_a_failing_dense_kernel_is_no_plan() -> None:
    with pytest.raises(RuntimeError, match="no kernel image"):
        planned(lambda layer: [stand_in(layer, "dense", fails=True), stand_in(layer, "b")], World())


def test_another_order_of_sums_is_no_difference() -> None:
    def options(layer: FusedLayer) -> list[Candidate]:
        return [stand_in(layer, "dense"), stand_in(layer, "other", factor=1 + 2e-7)]

    assert {k for k, _ in kernels(planned(options, World({"dense": 1e-3, "other": 5e-4}))).values()} == {"other"}


def test_the_costliest_layers_come_first_and_the_rest_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    world = World({"dense": 1.0, "other": 0.5})
    plan = planned(two, world, seconds=44.0)  # 33 for layers; 7 rounds take 21
    found = kernels(plan)
    assert found["first", 1] == found["second", 1] == ("other", "measured")
    assert found["head", 1] == found["third", 1] == ("dense", "budget")
    assert "keep the dense kernel" in caplog.text and world.now <= 33.0


def test_a_layer_that_takes_longer_than_the_whole_budget_is_not_timed() -> None:
    world = World({"dense": 10.0, "other": 0.1})
    plan = planned(two, world, seconds=20.0)
    assert set(kernels(plan).values()) == {("dense", "budget")} and world.now <= 40


def test_no_budget_leaves_all_dense_but_known_times_count() -> None:
    world, cache = World({"dense": 1e-3, "other": 0.5e-3}), PlanCache(None)
    assert set(kernels(planned(two, world, seconds=0, cache=cache)).values()) == {("dense", "budget")}
    assert not world.prepared
    planned(two, world, cache=cache)
    before = len(world.prepared)
    assert set(kernels(planned(two, world, seconds=0, cache=cache)).values()) == {("other", "cached")}
    assert len(world.prepared) == before


def test_a_new_candidate_is_timed_though_others_are_known(tmp_path: Path) -> None:
    world = World({"dense": 1e-3, "other": 0.9e-3, "new": 0.5e-3})
    planned(two, world, cache=PlanCache(tmp_path / "plans.json"))
    plan = planned(lambda layer: [*two(layer), stand_in(layer, "new")], world, cache=PlanCache(tmp_path / "plans.json"))
    assert set(kernels(plan).values()) == {("new", "measured")}


def test_batches_at_which_two_layers_have_one_shape_are_told_apart() -> None:
    b = Builder(4, 6, 3)
    rows = b.op("rows", "reshape.default", Ref(b.linear("x", "many", 3, 3)), [-1, 6, 3])
    graph = serving_graph(b.graph(b.linear(b.op("one", "mean.dim", Ref(rows), [0], True), "few", 3, 3)), CPU)
    shapes = layer_inputs(graph, CPU)
    assert [shapes[layer.node.name] for layer in fused_layers(graph)] == [(1, 4, 6, 3), (1, 6, 3)]
    same = {name: (k, 6, 3) for name, k in zip(shapes, (4, 1), strict=True)}  # 4 at batch 1 is 1 at batch 4
    context = context_of(graph, inputs=same)
    plan = planned(two, World({"dense": 1e-3, "other": 2e-3}), context, (1, 4))
    assert {(c.name, c.batch) for c in plan.choices} == {("many", 1), ("many", 4), ("few", 1), ("few", 4)}


def test_tf32_rounds_like_fp16() -> None:
    class OnGpu:
        is_cuda, dtype = True, torch.float32

    result: Any = OnGpu()
    switch, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        switch.allow_tf32 = False
        assert most_roundings(result) == 256
        switch.allow_tf32 = True
        assert most_roundings(result) == 16 * 2.0**-10 / 2.0**-23
    finally:
        switch.allow_tf32 = before


def test_the_clock_reads_the_layer_alone() -> None:
    now = [0.0]

    def call(*_: Tensor) -> None:
        now[0] += 2e-4

    run = ClockTimer(lambda: now[0]).prepare(lambda _: call, {}, ())
    before = now[0]
    assert run() == pytest.approx(2e-4) and now[0] - before == pytest.approx(4e-4)  # half a millisecond of calls


def test_real_kernels_get_a_whole_plan(tmp_path: Path) -> None:
    graph = network()
    layer = fused_layers(graph)[0]
    options = [stand_in(layer, "dense"), stand_in(layer, "same")]
    found = time_candidates(layer, (2, 4, 6, 5), options, ClockTimer(), 0.05)
    assert found["dense"].high == 1.0 and 0 < found["same"].seconds < 1
    cache = PlanCache(tmp_path / "plans.json")
    plan = make_plan(context_of(graph), (1, 2), seconds=20, cache=cache)
    again = make_plan(context_of(graph), (1, 2), seconds=20, cache=PlanCache(tmp_path / "plans.json"))
    assert len(plan.choices) == 8 and again.digest == plan.digest
    assert not [c for c in again.choices if c.source == "measured"]


def choices_of(graph: Graph, kernel: str, batch: int = 1) -> list[Choice]:
    return [Choice(layer.node.name, layer.name, batch, kernel, "measured", {}, "") for layer in fused_layers(graph)]


def confirm(
    graph: Graph, choices: list[Choice], ratio: float, cache: PlanCache, seconds: float = 10.0
) -> tuple[list[Choice], int]:
    """What stands if the network takes ``ratio`` of its time with the chosen kernels; and how many were timed."""
    timer = Paced(ratio)
    return confirmed(context_of(graph), choices, cache, seconds, timer), timer.prepared


def test_choices_stand_only_where_the_network_gains() -> None:
    graph, cache = network(), PlanCache(None)
    mixed = [replace(c, kernel="dense") if c.name == "head" else c for c in choices_of(graph, "library")]
    assert confirm(graph, mixed, 0.99, PlanCache(None)) == (mixed, 2)
    kept, _ = confirm(graph, mixed, 1.01, cache)
    assert {(c.kernel, c.source) for c in kept} == {("dense", "network"), ("dense", "measured")}
    assert confirm(graph, mixed, 0.5, cache) == (kept, 0)  # known
    assert confirm(graph, choices_of(graph, "dense"), 0.5, cache)[1] == 0  # nothing to confirm


def test_what_there_is_no_time_to_confirm_stays_dense() -> None:
    kept, timed = confirm(network(), choices_of(network(), "library")[:3], 0.5, PlanCache(None), seconds=0.0)
    assert {(c.kernel, c.source) for c in kept} == {("dense", "budget")} and not timed


def test_a_network_that_fails_with_the_chosen_kernels_is_dense(caplog: pytest.LogCaptureFixture) -> None:
    graph, cache = network(), PlanCache(None)

    def fail() -> None:
        raise RuntimeError("out of memory")

    kept = confirmed(context_of(graph), choices_of(graph, "library")[:3], cache, 10.0, Paced(0.5, fail))
    assert {(c.kernel, c.source) for c in kept} == {("dense", "network")} and "out of memory" in caplog.text
    assert {c.kernel for c in confirm(graph, choices_of(graph, "library")[:3], 0.5, cache)[0]} == {
        "library"
    }  # tried again


def test_a_confirmation_that_lacks_its_time_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    graph, cache = network(), PlanCache(path)
    choices = choices_of(graph, "library")[:3]
    assert confirm(graph, choices, 0.5, cache) == (choices, 2)
    document = json.loads(path.read_text())
    for times in document["entries"][KEY].values():
        del times["planned"]  # by somebody who edits the file
    path.write_text(json.dumps(document))
    cache = PlanCache(path)
    assert confirm(graph, choices, 0.5, cache) == (choices, 2)


def test_a_confirmation_is_of_one_network() -> None:
    b = Builder(4, 6, 5)
    other = serving_graph(b.graph(b.mean(b.relu(b.conv("x", "first", 4, 4, stride=2)))), CPU)
    b = Builder(4, 6, 5)
    graph = serving_graph(b.graph(b.mean(b.relu(b.conv("x", "first", 4, 4, stride=1)))), CPU)
    cache = PlanCache(None)
    assert confirm(graph, choices_of(graph, "library"), 0.5, cache)[1] == 2
    assert confirm(other, choices_of(other, "library"), 0.5, cache)[1] == 2  # only a stride differs
    assert confirm(graph, choices_of(graph, "library"), 0.5, cache)[1] == 0
    graph, cache = network(), PlanCache(None)
    choices = choices_of(graph, "library")[:3]
    assert confirm(graph, choices, 0.5, cache)[1] == 2
    assert confirm(graph, [*choices[:1], *choices_of(graph, "dense")[1:3]], 0.5, cache)[1] == 2  # other kernels


def test_the_network_is_timed_in_what_the_layers_left_of_the_budget() -> None:
    """Layers take 21 of 44 seconds and the network needs 30 or so: that is too long, though 44 would do."""
    world = World({"dense": 1.0, "other": 0.5})
    network_timer = Paced(0.5, ready=lambda: world.passing(2.0))
    plan = planned(two, world, seconds=44.0, network_timer=network_timer)
    assert 21.0 <= world.now < 44.0 and network_timer.prepared == 2
    assert {c.source for c in plan.choices} == {"budget"} and {c.kernel for c in plan.choices} == {"dense"}
    cache = PlanCache(None)
    planned(two, world, seconds=400.0, cache=cache)  # all layers are known then
    plan = planned(two, world, seconds=44.0, network_timer=network_timer, cache=cache)
    assert {c.kernel for c in plan.choices} == {"other"}


def test_a_network_as_fast_as_before_keeps_the_choices_and_each_batch_is_judged_alone() -> None:
    graph = network()
    choices = choices_of(graph, "library")[:3] + choices_of(graph, "library", batch=2)[:3]
    assert confirm(graph, choices, 1.0, PlanCache(None)) == (choices, 4)

    class Slower(Paced):
        def prepare(self, *_: Any) -> Run:
            self.ratio = 0.5 if self.prepared < 2 else 1.5
            return super().prepare()

    kept = confirmed(context_of(graph), choices, PlanCache(None), 10.0, Slower(0.5))
    assert [c.kernel for c in kept] == ["library"] * 3 + ["dense"] * 3


def test_layers_may_take_three_quarters_of_the_budget() -> None:
    for seconds, kernel in ((39.0, "other"), (38.0, "dense")):  # a second, and 7 rounds there and back of two kernels
        found = planned(two, World({"dense": 1.0, "other": 0.5}), seconds=seconds)
        assert kernels(found)["first", 1][0] == kernel, seconds
