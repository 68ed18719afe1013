"""Where sizes of the inputs vary, engines and kernels are chosen at several, and a request is served by the nearest."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.engines import ON_CPU
from redpp_serve.engines.trial import Arrays, _tiled
from redpp_serve.graph.artifact import LoadedArtifact, build
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Size
from redpp_serve.graph.sizes import all_choices, closest, drawn, planned, resized, tiled
from redpp_serve.report.data import PlanRecord
from redpp_serve.report.tables import engine_rows, kernel_summary
from redpp_serve.runtime import engine_times
from redpp_serve.runtime.buckets import Bucket, buckets
from redpp_serve.runtime.cuda_graphs import record_sizes
from redpp_serve.runtime.engine_network import stored_inputs
from redpp_serve.runtime.model import ServingModel
from redpp_serve.runtime.plan import Plan
from redpp_serve.runtime.plan_cache import PlanCache
from tests.support.recording import StandIn
from tests.support.trials import TrialHere

pytestmark = pytest.mark.usefixtures("trials_here")

CPU = torch.device("cpu")
SPEC = InputSpec("x", (3, 16, 16), varying=((1, Size("H", 8, 32, 4)), (2, Size("W", 8, 32, 4))))
SMALL, DECLARED, LARGE = ((("H", n), ("W", n)) for n in (8, 16, 32))


@pytest.fixture(scope="module")
def graph() -> Graph:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Upsample(scale_factor=2)
        return capture(nn.Sequential(*layers).eval(), [SPEC], [])


def load(graph: Graph, **options: Any) -> ServingModel:
    data = build(graph, {"info": {}}, (picture(4),)).data
    return ServingModel(data, **{"batch": 4, "plan_seconds": 20.0, "cache": None} | options)


def picture(rows: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(rows))


def test_choices_of_sizes() -> None:
    assert planned([SPEC]) == [{"H": 16, "W": 16}, {"H": 8, "W": 8}, {"H": 32, "W": 32}] and planned([]) == [{}]
    assert closest(planned([SPEC]), {"H": 8, "W": 32}) == 0 and closest(planned([SPEC]), {"H": 8, "W": 12}) == 1
    found = drawn([SPEC], 40, seed=1)
    assert found[:3] == planned([SPEC]) and found == drawn([SPEC], 40, seed=1) != drawn([SPEC], 40, seed=2)
    assert {sizes["W"] for sizes in found} == set(range(8, 33, 4))
    few = InputSpec("x", (4, 4), varying=((0, Size("A", 1, 2)), (1, Size("B", 4, 6, 2))))
    assert all_choices([few], 4) == [{"A": a, "B": b} for a in (1, 2) for b in (4, 6)] and all_choices([few], 3) == []
    x = torch.arange(6.0).view(1, 2, 3)
    assert tiled(x, (2, 3, 2)).tolist() == [[[0, 1], [3, 4], [0, 1]]] * 2


def test_a_large_size_is_planned_for_few_inputs_at_once() -> None:
    found = buckets((1, 2, 4, 8), (DECLARED, SMALL, LARGE), [SPEC])
    assert [b.batch for b in found if b.sizes == LARGE] == [1, 2]
    assert {b.batch for b in found if b.sizes != LARGE} == {1, 2, 4, 8}
    assert str(Bucket(2)) == "batch=2" and str(Bucket(2, LARGE)) == "batch=2 H=32 W=32"


def test_each_request_is_served_by_the_choice_for_the_nearest_sizes(graph: Graph) -> None:
    model = load(graph, plan_seconds=0)
    assert {choice.bucket for choice in model.plan.engines} == set(buckets((1, 2, 4), (DECLARED, SMALL, LARGE), [SPEC]))
    asked: list[Bucket] = []
    model._engines = {c.bucket: lambda x, at=c.bucket: asked.append(at) or x for c in model.plan.engines}
    for rows, height, width in ((1, 8, 8), (2, 12, 8), (3, 16, 20), (1, 32, 28), (4, 32, 32)):
        model(picture(rows, height, width))
    assert asked == [Bucket(1, SMALL), Bucket(2, SMALL), Bucket(4, DECLARED), Bucket(1, LARGE), Bucket(1, LARGE)]


@pytest.mark.parametrize(
    "engine", ["auto", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("redpp", *ON_CPU))]
)
def test_every_size_is_answered_as_the_network_does(graph: Graph, engine: str) -> None:
    model = load(graph, engine=engine)
    assert engine in ("auto", model.plan.engine), model.plan.left_out
    model.warm_up()
    for k, sizes in enumerate(drawn([SPEC], 8, seed=5)):
        x = torch.randn(1 + k % 5, *resized(SPEC, sizes).shape)
        torch.testing.assert_close(model(x), Program(graph)(x), rtol=1e-4, atol=1e-5)


def test_an_engine_that_is_wrong_at_one_size_is_left_out(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(TrialHere):
        def outputs(self, batch: int, *shapes: Any) -> Arrays:
            return [1.1 * y if y.shape[-1] > 24 else y for y in super().outputs(batch, *shapes)]

    monkeypatch.setattr(engine_times, "Trial", Wrong)
    plan = load(graph).plan
    assert plan.engine == "redpp"
    assert all("outputs at H=" in why and "differ by" in why for why in plan.left_out.values()) and plan.left_out


def test_a_plan_tells_its_sizes(graph: Graph, tmp_path: Any) -> None:
    cache = PlanCache(tmp_path / "plans.json", shipped=None)
    plan = load(graph, engine="redpp", cache=cache).plan
    assert Plan.from_json({k: v for k, v in plan.to_json().items() if k != "digest"}) == plan
    assert (
        plan.counts(1) == {kernel: n for kernel, n in plan.counts(1).items() if n} and sum(plan.counts(1).values()) == 2
    )
    record = PlanRecord.from_json(plan.to_json())
    assert [row.batch for row in engine_rows(record)][:3] == ["1 H=16 W=16", "1 H=8 W=8", "1 H=32 W=32"]
    assert any(line.startswith("batch 2 H=8 W=8: ") for line in kernel_summary(record))
    auto = load(graph, cache=cache).plan
    again = load(graph, cache=cache).plan
    assert {choice.source for choice in again.engines} == {"cached"} and again.digest == auto.digest


def test_few_sizes_are_recorded_and_others_run_call_by_call(graph: Graph) -> None:
    sizes, program, recorder = (DECLARED, SMALL, LARGE), Program(graph), StandIn()
    programs = dict.fromkeys(buckets((1, 2), sizes, [SPEC]), program)
    with torch.inference_mode():
        found = record_sizes(programs, [SPEC], sizes, CPU, recorder)
        assert found.keys() == {((3, n, n),) for n in (8, 16, 32)}, "49 choices are too many"
        for rows, n in ((2, 8), (3, 16), (2, 32)):  # the last in two parts
            x = picture(rows, n, n)
            assert torch.allclose(found[(x.shape[1:],)](x)[0], program(x)[0], atol=1e-5)
        narrow = InputSpec("x", (3, 16, 16), varying=((1, Size("H", 8, 32, 8)),))
        assert len(record_sizes({Bucket(1, (("H", 16),)): program}, [narrow], ((("H", 16),),), CPU, recorder)) == 4
        assert record_sizes({}, [SPEC], sizes, CPU, recorder) == {}


def test_stored_inputs_at_other_sizes_are_those_of_a_trial(graph: Graph, tmp_path: Any) -> None:
    found = stored_inputs(LoadedArtifact(graph, {}, (picture(3),)), 5, {"H": 8, "W": 28})
    assert found[0].shape == (5, 3, 8, 28)
    assert (_tiled(picture(3).numpy(), (5, 3, 8, 28)) == found[0].numpy()).all()
    assert stored_inputs(LoadedArtifact(graph, {}), 2, {"W": 8})[0].shape == (2, 3, 16, 8)
