"""The step of widths: the largest that an engine's tiles pay for, measured once, and a number for all stages."""

import math

import pytest
import torch

from redpp_serve.engines import ENGINES
from redpp_serve.errors import RedppError
from redpp_serve.options import Options, Serving
from redpp_serve.pruning import tiles
from redpp_serve.pruning.pipeline import prune
from redpp_serve.pruning.tiles import WIDTHS, best_step, measured_step, with_step
from redpp_serve.runtime.plan import Timing
from redpp_serve.runtime.plan_cache import PlanCache
from redpp_serve.stages import Stages
from tests.support.networks import trained

CPU = torch.device("cpu")


def padded(tile, constant=0.2e-3, each=0.01e-3):
    """Seconds at each width in an engine that pads widths to a tile."""
    return {width: constant + each * math.ceil(width / tile) * tile for width in WIDTHS}


@pytest.mark.parametrize("tile", [1, 4, 8, 16, 32, 64])
def test_the_step_is_the_tile(tile):
    assert best_step(padded(tile)) == max(8, tile)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_reading_that_is_off_does_not_change_the_step(sign):
    for tile in (8, 16):
        times = padded(tile)
        times[72] *= 1 + 0.1 * sign
        assert best_step(times) == tile


def test_times_that_do_not_grow_say_nothing():
    assert best_step(dict.fromkeys(WIDTHS, 1e-3)) == 8


def test_a_number_stays_and_needs_no_stage():
    stages = Stages(quiet=True)
    options = Options(round_to=24)
    assert with_step(options, stages, trained()) is options and not stages.stages


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_is_measured_once(engine, monkeypatch, tmp_path):
    path = tmp_path / "plans.json"
    found = measured_step(CPU, Serving(engine=engine), PlanCache(path, shipped=None))
    precision = "bf16" if "bf16" in ENGINES[engine].precisions() else "fp32"  # in which auto serves
    assert found.channels in tiles.STEPS and f"{engine} {precision}" in found.reason
    monkeypatch.setattr(tiles, "_measure", lambda *given: pytest.fail("measured again"))
    assert measured_step(CPU, Serving(engine=engine), PlanCache(path, shipped=None)) == found


def test_kept_times_decide(monkeypatch):
    cache = PlanCache(None, shipped=None)
    monkeypatch.setattr(
        tiles, "_measure", lambda *given: {f"openvino fp32 {w}": Timing(s, 1.0) for w, s in padded(32).items()}
    )
    assert measured_step(CPU, Serving(), cache).channels == 32


@pytest.mark.parametrize("serving", [Serving(engine="redpp"), Serving(engine="onnxruntime", precision="bf16")])
def test_the_own_runtime_keeps_eight(serving):
    assert measured_step(CPU, serving, PlanCache(None, shipped=None)).channels == 8


def test_eight_without_an_engine_and_on_a_gpu(monkeypatch):
    assert measured_step(torch.device("cuda:0"), Serving(), PlanCache(None, shipped=None)).channels == 8
    for name in ENGINES:
        monkeypatch.setitem(ENGINES, name, replaced(name))
    found = measured_step(CPU, Serving(), PlanCache(None, shipped=None))
    assert found.channels == 8 and "own runtime" in found.reason


def replaced(name):
    engine = ENGINES[name]
    return type(engine)(name, {"no-such-package": (1,)}, engine.precisions, engine.session)


def test_what_goes_wrong_leaves_eight_with_a_reason(monkeypatch):
    def fail(*given):
        raise RuntimeError("no memory for the engine")

    monkeypatch.setattr(tiles, "_measure", fail)
    threads = torch.get_num_threads()
    found = measured_step(CPU, Serving(threads=threads + 1), PlanCache(None, shipped=None))
    assert found.channels == 8 and "no memory for the engine" in found.reason and torch.get_num_threads() == threads


def stepped(monkeypatch, graph, tile, **how):
    """The run of a narrowing whose engine pads widths to a tile, and the reason of its step."""
    times = {f"openvino fp32 {w}": Timing(s, 1.0) for w, s in padded(tile).items()}
    monkeypatch.setattr(tiles, "_measure", lambda *given: times)
    monkeypatch.setattr(tiles, "default_path", lambda: None)
    stages = Stages(quiet=True)
    options = Options(keep=0.4, distil=0.0, accept_unmeasured=True, max_error=10.0, **how)
    return prune(graph, options, stages=stages), stages.named("step").reason


def test_a_run_uses_the_step_and_says_why(quick, monkeypatch):
    result, reason = stepped(monkeypatch, trained("mlp", 64), 16)
    assert "multiples of 16: openvino fp32 takes as long" in reason
    assert set(result.choice.narrowed.widths.values()) == {32}


def test_half_of_the_layers_have_four_steps_to_choose_from(quick, monkeypatch):
    result, reason = stepped(monkeypatch, trained("mlp", 64), 64)
    assert "multiples of 16: openvino fp32 takes as long" in reason and "(64 channels)" in reason
    assert set(result.choice.narrowed.widths.values()) == {32}


def test_networks_of_few_channels_keep_eight_and_measure_nothing(quick, monkeypatch):
    monkeypatch.setattr(tiles, "measured_step", lambda *given: pytest.fail("measured"))
    result, reason = stepped(monkeypatch, trained("mlp", 32), 32)
    assert "at most 32 channels" in reason and set(result.choice.narrowed.widths.values()) == {16}


def test_duplicates_alone_go_in_steps_of_eight():
    found = with_step(Options(method="red++"), Stages(quiet=True), trained("mlp", 64))
    assert found.round_to == 8


def test_other_words_are_refused():
    for value in ("some", 0, 2.5):
        with pytest.raises(RedppError) as refusal:
            Options(round_to=value)
        assert "or auto" in refusal.value.expected and "--round-to" in refusal.value.do
