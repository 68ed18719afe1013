"""The engine and precision of a network: measured, checked, cached, forced, and never a reason not to start."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.engines import ENGINES, ON_CPU, Engine, processor
from redpp_serve.engines.sessions import import_openvino
from redpp_serve.engines.trial import Arrays, Trial, TrialError
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.quantization import find_ranges
from redpp_serve.runtime import engine_choice, engine_times
from redpp_serve.runtime.engine_network import Candidate, EngineRun
from redpp_serve.runtime.engine_times import Expected
from redpp_serve.runtime.model import ServingModel
from redpp_serve.runtime.plan import Plan
from redpp_serve.runtime.plan_cache import PlanCache
from redpp_serve.runtime.serving_graph import serving_graph
from tests.support.small import SHAPE, network
from tests.support.trials import TrialHere

pytestmark = pytest.mark.usefixtures("trials_here")  # where a test is not about their processes

CPU = torch.device("cpu")
SAMPLES = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(network(), [InputSpec("x", SHAPE)], [])


def artifact(graph: Graph, **precision: Any) -> bytes:
    precision.setdefault("ranges", find_ranges(serving_graph(graph, CPU), (SAMPLES,)))
    return build(graph, {"variant": "pruned", "info": {}, "precision": precision}, (SAMPLES,)).data


def load(data: bytes, **options: Any) -> ServingModel:
    return ServingModel(data, **{"batch": 2, "plan_seconds": 20.0, "cache": None} | options)


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds to add to what an engine's calls take, by candidate; the real outputs."""
    seconds: dict[str, float] = {}

    class Slow(TrialHere):
        def __init__(self, engine: str, precision: str, *rest: Any) -> None:
            super().__init__(engine, precision, *rest)
            self.wait = seconds.get(f"{engine} {precision}", 0.0)

        def time(self, batch: int, *shapes: Any) -> float:
            return super().time(batch, *shapes) + self.wait

    monkeypatch.setattr(engine_times, "Trial", Slow)
    return seconds


@pytest.mark.skipif(not processor.bf16_pays(), reason="the processor has no instructions for bf16")
def test_bf16_alone_is_built_from_the_network_in_fp32(graph: Graph) -> None:
    model = load(artifact(graph, errors={"bf16": 0.2}), precision="bf16", engine="openvino")
    assert (model.plan.engine, model.plan.precision, model.plan.left_out) == ("openvino", "bf16", {})
    torch.testing.assert_close(model(SAMPLES)[0], Program(graph)(SAMPLES)[0], rtol=0.2, atol=0.2)


@pytest.mark.parametrize("engine", ON_CPU)
def test_a_named_engine_serves_what_the_network_computes(graph: Graph, engine: str) -> None:
    model = load(artifact(graph), engine=engine)
    assert model.plan.engine == engine and model.plan.precision == "fp32"
    assert {c.source for c in model.plan.engines} == {"measured"}
    for rows in (1, 2, 5):
        x = torch.randn(rows, *SHAPE)
        torch.testing.assert_close(model(x), Program(graph)(x), rtol=1e-4, atol=1e-5)
        last = model(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, model(x))
    first = model(SAMPLES)[0].clone()
    model(torch.zeros_like(SAMPLES))
    assert torch.equal(model(SAMPLES)[0], first)  # outputs are the caller's own


def test_the_fastest_serves_and_the_others_are_told(graph: Graph, paced: dict[str, float]) -> None:
    paced |= {"onnxruntime fp32": 0.05, "openvino fp32": 0.05}
    model = load(artifact(graph))
    assert model.plan.engine == "redpp"
    assert model.plan.engines[0].times.keys() == {"redpp fp32", "openvino fp32", "onnxruntime fp32"}


def test_one_that_computes_something_else_is_left_out(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(TrialHere):
        def __init__(self, engine: str, *rest: Any) -> None:
            super().__init__(engine, *rest)
            self.engine = engine

        def outputs(self, batch: int, *shapes: Any) -> Arrays:
            found = super().outputs(batch, *shapes)
            return [y[:, :-1] if self.engine == "onnxruntime" else 1.01 * y for y in found]

    monkeypatch.setattr(engine_times, "Trial", Wrong)
    model = load(artifact(graph))
    assert model.plan.engine == "redpp"
    assert "differ by" in model.plan.left_out["openvino fp32"]
    assert "other shapes" in model.plan.left_out["onnxruntime fp32"]


def test_times_are_kept_and_nothing_is_tried_again(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = artifact(graph), tmp_path / "plans.json"
    first = load(data, cache=PlanCache(path, shipped=None))
    monkeypatch.setattr(engine_times, "Trial", lambda *_: pytest.fail("tried again"))
    again = load(data, cache=PlanCache(path, shipped=None))
    assert {c.source for c in again.plan.engines} == {"cached"}
    assert again.plan.engine == first.plan.engine and again.plan.digest == first.plan.digest


@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.exhaustive)])
def test_a_named_engine_is_not_tried_again_either(
    graph: Graph, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = artifact(graph), tmp_path / "plans.json"
    load(data, engine=engine, cache=PlanCache(path, shipped=None))
    with monkeypatch.context() as patch:
        patch.setattr(engine_times, "Trial", lambda *_: pytest.fail("tried again"))
        again = load(data, engine=engine, cache=PlanCache(path, shipped=None)).plan
    assert again.engine == engine and {c.source for c in again.engines} == {"cached"}
    assert load(data, cache=PlanCache(path, shipped=None)).plan.engines[0].source == "measured", "no choice was kept"


@pytest.mark.skipif(not processor.int8_pays(), reason="the processor has no instructions for bytes")
def test_a_kept_choice_is_held_against_all_stored_inputs(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    real = Expected.wrong

    def noted(self: Expected, candidate: Candidate, found: Any, *sizes: Any) -> str:
        checked.append(sum(len(outputs[0]) for outputs in found))
        return real(self, candidate, found, *sizes)

    data, cache = artifact(graph, errors={"int8": 0.1}), PlanCache(tmp_path / "plans.json")
    load(data, precision="int8", engine="openvino", batch=1, cache=cache)
    monkeypatch.setattr(Expected, "wrong", noted)
    plan = load(data, precision="int8", engine="openvino", batch=1, cache=cache).plan
    assert checked == [len(SAMPLES)]
    assert (plan.engine, plan.precision, plan.engines[0].source) == ("openvino", "int8", "cached")


def test_the_error_of_one_input_is_relative_to_its_own_spread() -> None:
    values = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    assert engine_times._error(values, values + 0.1) == pytest.approx(0.1, rel=0.1)
    assert engine_times._error(values.expand(4, -1), values.expand(4, -1) + 0.1) > 10


def test_a_named_engine_that_failed_is_tried_again_and_says_why(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise TrialError("no memory left")

    monkeypatch.setattr(engine_times, "Trial", fail)
    for _ in range(2):
        plan = load(artifact(graph), engine="openvino", cache=PlanCache(tmp_path / "plans.json", shipped=None)).plan
        assert (plan.engine, plan.left_out) == ("redpp", {"openvino fp32": "no memory left"})


def test_the_seconds_of_building_are_told(graph: Graph, tmp_path: Path) -> None:
    data, path = artifact(graph), tmp_path / "plans.json"
    first = load(data, cache=PlanCache(path, shipped=None)).plan
    assert first.built.keys() == {"openvino fp32", "onnxruntime fp32"}
    assert all(0 < seconds < first.seconds for seconds in first.built.values())
    again = load(data, cache=PlanCache(path, shipped=None)).plan
    assert again.built.keys() == {str(Candidate(c.engine, c.precision)) for c in again.engines if c.engine != "redpp"}
    assert Plan.from_json(again.to_json()) == again


@pytest.mark.exhaustive
def test_a_second_version_in_a_worker_imports_nothing_again(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times kept, loading starts no process, and an engine that one version has imported serves the other too."""
    monkeypatch.setattr(engine_times, "Trial", Trial)
    path = tmp_path / "plans.json"
    narrower = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(600, 5)).eval()
    versions = [artifact(graph), artifact(capture(narrower, [InputSpec("x", SHAPE)], []), ranges={})]
    for data in versions:
        load(data, cache=PlanCache(path, shipped=None))
    kept = json.loads(path.read_text())
    engines = [t for layers in kept["entries"].values() for s, t in layers.items() if s.startswith("engines")]
    for times in engines:
        times["openvino fp32"] = [1e-6, 0.5]
    path.write_text(json.dumps(kept))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    loaded = [load(versions[0], cache=PlanCache(path, shipped=None))]
    modules = {name: id(module) for name, module in sys.modules.items()}
    loaded.append(load(versions[1], cache=PlanCache(path, shipped=None)))
    assert [(m.plan.engine, m.plan.engines[0].source) for m in loaded] == [("openvino", "cached")] * 2
    assert {name: id(module) for name, module in sys.modules.items()} == modules


def test_an_engine_that_fails_at_last_leaves_the_own_runtime(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(EngineRun, "__init__", fail)
    model = load(artifact(graph), engine="openvino")
    assert model.plan.engine == "redpp" and model.plan.left_out == {"openvino fp32": "no memory left"}
    assert {c.source for c in model.plan.engines} == {"failed"}
    assert torch.isfinite(model(SAMPLES)[0]).all()


def test_a_missing_and_an_old_engine(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {
        "openvino": Engine("openvino", {"no-such-engine": (1,)}, lambda: ("fp32",), ENGINES["openvino"].session),
        "onnxruntime": Engine(
            "onnxruntime", {"onnxruntime": (99, 0)}, lambda: ("fp32",), ENGINES["onnxruntime"].session
        ),
    }
    monkeypatch.setattr(engine_choice, "ENGINES", missing)
    for wanted in ("auto", "openvino"):
        model = load(artifact(graph), engine=wanted)
        assert model.plan.engine == "redpp"
        assert "not installed (pip install" in model.plan.left_out["openvino"]
    assert "99.0 or later is needed" in load(artifact(graph)).plan.left_out["onnxruntime"]


def test_an_operator_without_a_rule_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool2d(x, 2, divisor_override=3).flatten(1)

    model = load(build(capture(Odd(), [InputSpec("x", SHAPE)], []), {"info": {}}, (SAMPLES,)).data)
    assert model.plan.engine == "redpp" and "divisor" in model.plan.left_out["openvino fp32"]


@pytest.mark.exhaustive
def test_precisions_within_the_budget(graph: Graph, paced: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx512_bf16", "avx512_vnni"}))
    data = artifact(graph, auto=["fp32", "int8"], errors={"int8": 0.4})
    paced |= {"openvino fp32": 0.02, "onnxruntime fp32": 0.02}
    model = load(data, precision="auto")
    assert {name for c in model.plan.engines for name in c.times} >= {"redpp fp32", "openvino int8"}, (
        model.plan.left_out
    )
    assert not any("bf16" in name for c in model.plan.engines for name in c.times)
    assert load(data, precision="fp32").plan.precision == "fp32"
    assert load(data, precision="auto", plan_seconds=0).plan.engines[0].source == "budget"
    int8 = load(data, precision="int8", engine="openvino")
    assert int8.plan.precision == "int8"
    difference = (int8(SAMPLES)[0] - Program(graph)(SAMPLES)[0]).norm() / Program(graph)(SAMPLES)[0].norm()
    assert 1e-5 < difference < 0.1
    without = build(graph, {"info": {}}, (SAMPLES,)).data
    assert "no ranges" in load(without, precision="int8").plan.left_out["openvino int8"]


def test_names_that_are_none() -> None:
    with pytest.raises(RedppError, match="engine is 'tensorflow'"):
        ServingModel(b"", engine="tensorflow")
    with pytest.raises(RedppError, match="precision is 'int4'"):
        ServingModel(b"", precision="int4")


def test_no_process_is_started_by_the_import_and_none_is_left(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_times, "Trial", Trial)
    before = (Path.home() / "intel").exists()  # OpenVINO's telemetry writes there, of whoever imports it unguarded
    import_openvino()
    load(artifact(graph))
    assert not psutil.Process().children(recursive=True)
    assert (Path.home() / "intel").exists() == before


def test_threads_keep_to_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    affinity = len(os.sched_getaffinity(0))
    monkeypatch.setattr(processor, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(processor, "_QUOTA_V1", tmp_path)
    assert processor.usable_threads(1) == 1 and processor.usable_threads(1000) == affinity
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert processor.usable_threads(8) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processor.usable_threads(1000) == affinity
    (tmp_path / "cpu.max").write_text("nonsense\n")
    assert processor.usable_threads(1000) == affinity


@pytest.mark.parametrize("engine", ON_CPU)
def test_an_index_out_of_range_is_refused_by_whatever_serves(engine: str) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).mean(1)

    ids = torch.tensor([[0, 6, 3]])
    graph = capture(Words().eval(), [InputSpec("ids", (3,), "int64")], [])
    model = load(build(graph, {"info": {}}, (ids,)).data, engine=engine)
    assert model.plan.engine == ("redpp" if engine == "openvino" else engine)
    torch.testing.assert_close(model(ids), Program(graph)(ids))
    with pytest.raises(Exception, match=r"(?i)ind(ex|ices)"):
        model(torch.tensor([[0, 7, 3]]))


@pytest.mark.exhaustive
def test_torch_compile_is_there_for_those_who_ask(graph: Graph) -> None:
    model = load(artifact(graph), engine="torch-compile", plan_seconds=0)
    assert model.plan.engine == "torch-compile" and model.plan.engines[0].times
    torch.testing.assert_close(model(SAMPLES[:2]), Program(graph)(SAMPLES[:2]), rtol=1e-4, atol=1e-5)


def test_torch_compile_that_fails_leaves_the_own_runtime(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(engine_choice, "CompiledRun", fail)
    model = load(artifact(graph), engine="torch-compile")
    assert model.plan.engine == "redpp" and model.plan.left_out["torch-compile fp32"] == "no compiler was found"


@pytest.mark.exhaustive
def test_a_kept_time_serves_no_other_weights_unchecked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators and shapes are the same, but one network loses its digits in the engine."""

    def network_of(constant: float) -> bytes:
        class Shifted(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("shift", torch.full((5,), constant))

            def forward(self, x: Tensor) -> Tensor:
                return (x.flatten(1)[:, :5] + self.shift) - self.shift

        return build(capture(Shifted(), [InputSpec("x", SHAPE)], []), {"info": {}}, (SAMPLES,)).data

    path = tmp_path / "plans.json"
    first = load(network_of(1.0), engine="openvino", cache=PlanCache(path, shipped=None))
    assert first.plan.engine == "openvino"
    real = EngineRun.__call__
    monkeypatch.setattr(EngineRun, "__call__", lambda self, x: tuple(y + 1 for y in real(self, x)))
    other = load(network_of(2.0), engine="openvino", cache=PlanCache(path, shipped=None))
    assert other.plan.engine == "redpp" and "differ by" in other.plan.left_out["openvino fp32"]


def test_negative_and_large_integers_are_what_torch_makes_of_them() -> None:
    class Mixed(nn.Module):
        def forward(self, i: Tensor) -> Tensor:
            return (i * 1000003 + 7).float()

    ids = torch.tensor([[1, 2]])
    model = load(
        build(capture(Mixed(), [InputSpec("i", (2,), "int64")], []), {"info": {}}, (ids,)).data, engine="openvino"
    )
    assert "int64 in fewer bits" in model.plan.left_out["openvino"]
    table = nn.Embedding(7, 4).eval()
    for engine in ON_CPU:
        model = load(
            build(capture(table, [InputSpec("i", (3,), "int64")], []), {"info": {}}, (ids[:, [0, 1, 0]],)).data,
            engine=engine,
        )
        with pytest.raises(Exception, match=r"(?i)ind(ex|ices)"):
            model(torch.tensor([[0, -1, 3]]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("section", ["x", [1], {"auto": "int8"}, {"auto": ["int8"], "ranges": {"x": [1]}, "errors": 3}])
def test_a_section_that_somebody_edited(graph: Graph, section: Any) -> None:
    model = load(build(graph, {"info": {}, "precision": section}, (SAMPLES,)).data, precision="auto")
    assert model.plan.precision == "fp32" and torch.isfinite(model(SAMPLES)[0]).all()


def test_one_that_dies_while_it_takes_turns_is_left_out(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """The incumbent is slowed, so that the engines take turns with each other."""

    class Dying(Trial):
        def __init__(self, engine: str, *rest: Any) -> None:
            super().__init__(engine, *rest)
            self.engine, self.calls = engine, 0

        def time(self, batch: int, *shapes: Any) -> float:
            self.calls += 1
            if self.engine == "onnxruntime" and self.calls > 6:
                self._process.kill()
            super().time(batch, *shapes)
            return 1e-4

    monkeypatch.setattr(engine_times, "Trial", Dying)
    monkeypatch.setattr(engine_times, "seconds_of", lambda *_: 1.0)
    plan = load(artifact(graph)).plan
    assert plan.engine == "openvino" and plan.left_out == {"onnxruntime fp32": "its process ended with code -9"}
    assert all("onnxruntime fp32" not in c.times for c in plan.engines)


def test_what_is_far_behind_is_read_once_and_its_process_ends(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, read, alive = {"openvino": 1e-4, "onnxruntime": 2e-4}, list[tuple[str, int]](), list[int]()

    class Known(Trial):
        def __init__(self, engine: str, *rest: Any) -> None:
            super().__init__(engine, *rest)
            self.engine = engine

        def time(self, batch: int, *shapes: Any) -> float:
            read.append((self.engine, batch))
            alive.append(len(psutil.Process().children()))
            return seconds[self.engine]

    monkeypatch.setattr(engine_times, "Trial", Known)
    monkeypatch.setattr(engine_times, "seconds_of", lambda *_: 1.0)
    plan = load(artifact(graph)).plan
    assert read == [("openvino", batch) for batch in (1, 1, 2, 2)] + [("onnxruntime", batch) for batch in (1, 2)]
    assert plan.engines[0].times == {"redpp fp32": 1.0, "openvino fp32": 1e-4, "onnxruntime fp32": 2e-4}
    assert max(alive) == 2
