"""Synthetic inputs: matched to batch norm, deterministic, resumable, and bounded by a deadline."""

import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.graph.layers import mac_count
from redpp_serve.pruning import inputs as synthetic
from redpp_serve.pruning.inputs import (
    Matcher,
    SynthesisBudget,
    smooth_noise,
    synthesis_budget,
    synthesize,
    trained_norms,
)
from tests.support.networks import Builder, calibrated, few, network

SMALL = SynthesisBudget(images=24, batch=8, steps=6)


def trained(kind):
    graph = network(kind)
    (x,) = smooth_noise(graph.inputs, 64, 77)
    return calibrated(graph, (2 * x + 0.5,))


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_matching_lowers_the_mismatch_and_leaves_unit_scale():
    made = synthesize(trained("residual"), SynthesisBudget(16, 8, 40), seed=1)
    assert made.note == "" and made.losses[1] < 0.1 * made.losses[0]
    assert made.inputs[0].shape == (16, 3, 6, 5) and made.inputs[0].isfinite().all()
    assert 0.3 < float(made.inputs[0].std()) < 3


def matcher(graph):
    return Matcher(graph, [n for n in graph.nodes if "batch_norm" in n.op], "cpu")


def test_the_statistics_of_each_batch_norm_are_approached():
    graph = trained("chain")
    made = synthesize(graph, SynthesisBudget(32, 32, 60))
    before, after = (
        float(matcher(graph).losses(x, torch.zeros(32, dtype=torch.int64))[0].detach())
        for x in (smooth_noise(graph.inputs, 32, 0), made.inputs)
    )
    assert after == pytest.approx(made.losses[1], rel=1e-4) and after < 0.1 * before


def test_the_network_takes_each_input_for_a_class_drawn_for_it(monkeypatch):
    graph = trained("chain")
    drawn = matcher(graph).draw(32, 5 * 7919)
    classes = Program(graph)(*smooth_noise(graph.inputs, 1, 0))[0].shape[1]
    assert matcher(graph).classes == classes and set(drawn.tolist()) == set(range(classes))

    def surprise():
        scores = Program(graph)(*synthesize(graph, SynthesisBudget(32, 32, 60), seed=5).inputs)[0]
        return float(torch.nn.functional.cross_entropy(scores, drawn))

    with_classes = surprise()
    monkeypatch.setattr(synthetic, "CLASS_WEIGHT", 0.0)
    assert with_classes < 0.8 * surprise()


def test_classes_are_drawn_evenly():
    m = matcher(network("chain"))
    m.classes = 5
    assert torch.bincount(m.draw(15, 0)).tolist() == [3] * 5 and not m.draw(15, 0).equal(m.draw(15, 1))


def test_one_seed_one_result():
    graph = network("chain")
    first, second, other = (synthesize(graph, SMALL, seed=s) for s in (3, 3, 4))
    assert equal(first.inputs, second.inputs) and first == replace(second, inputs=first.inputs)
    assert not equal(first.inputs, other.inputs)
    batches = first.inputs[0].split(8)
    assert not torch.equal(batches[0], batches[1])


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path):
    graph = network("chain")
    whole = synthesize(graph, SMALL, seed=5)
    for finished in (1, 2, 3):
        checkpoint, steps = tmp_path / f"{finished}.safetensors", []

        def interrupt(done, total, at=finished * SMALL.steps + 1):
            assert total == 18
            if done == at:
                raise KeyboardInterrupt

        try:
            synthesize(graph, SMALL, seed=5, checkpoint=checkpoint, progress=interrupt)
        except KeyboardInterrupt:
            assert finished < 3
        resumed = synthesize(graph, SMALL, seed=5, checkpoint=checkpoint, progress=lambda n, _, s=steps: s.append(n))
        assert len(steps) == (3 - finished) * SMALL.steps, "finished batches were made again"
        assert equal(resumed.inputs, whole.inputs) and resumed.losses == whole.losses and resumed.note == whole.note


def steps_taken(graph, budget, seed, checkpoint):
    steps = []
    synthesize(graph, budget, seed=seed, checkpoint=checkpoint, progress=lambda done, _: steps.append(done))
    return len(steps)


def test_the_checkpoint_of_another_run_is_not_used(tmp_path):
    graph, budget, checkpoint = network("chain"), SynthesisBudget(16, 8, 2), tmp_path / "inputs.safetensors"
    synthesize(graph, budget, seed=5, checkpoint=checkpoint)
    data = checkpoint.read_bytes()
    stem = graph.node("stem")
    strided = graph.with_nodes({"stem": replace(stem, args=(*stem.args[:3], [2, 2], *stem.args[4:]))})
    heavier = graph.with_tensors({"stem.weight": 2 * graph.tensors["stem.weight"]})
    for other, how, seed in (
        (graph, budget, 6),
        (graph, replace(budget, steps=3), 5),
        (strided, budget, 5),
        (heavier, budget, 5),
    ):
        checkpoint.write_bytes(data)
        assert steps_taken(other, how, seed, checkpoint) == 2 * how.steps
    checkpoint.write_bytes(data)
    assert steps_taken(graph, budget, 5, checkpoint) == 0


def test_a_deadline_ends_the_run_with_a_note(tmp_path):
    graph, checkpoint = network("chain"), tmp_path / "inputs.safetensors"
    start = time.monotonic()
    made = synthesize(graph, SynthesisBudget(80, 8, 100000), deadline=start + 0.3, checkpoint=checkpoint)
    assert time.monotonic() - start < 5
    assert len(made.inputs[0]) == 8 and "--time-budget" in made.note and "batch 1 of 10" in made.note
    assert made.losses[1] < made.losses[0] and not checkpoint.exists()  # an unfinished batch is not kept
    fit, held_out = made.divide(16)
    assert len(fit[0]) == len(held_out[0]) == 4


def test_networks_without_batch_norm_get_noise_and_a_note():
    graph = network("bare")
    made = synthesize(graph, SMALL, seed=2)
    assert "no batch norm" in made.note and "smooth noise" in made.note
    assert all(math.isnan(loss) for loss in made.losses)
    assert equal(made.inputs, smooth_noise(graph.inputs, 24, 2))


UNTRAINED, BROKEN = (0.0, 1.0), (math.nan, 1.0)


def with_statistics(graph, statistics):
    """Each named norm with that mean and variance in all channels."""
    changed = {}
    for name, (mean, variance) in statistics.items():
        changed[f"{name}.running_mean"] = torch.full_like(graph.tensors[f"{name}.running_mean"], mean)
        changed[f"{name}.running_var"] = torch.full_like(graph.tensors[f"{name}.running_var"], variance)
    return graph.with_tensors(changed)


def test_statistics_that_say_nothing_are_not_matched_and_noted():
    graph = trained("chain")
    norms = [n.name for n in graph.nodes if "batch_norm" in n.op]
    others = synthesize(with_statistics(graph, {norms[-1]: UNTRAINED}), SMALL, seed=1)
    for statistics, words in (
        (UNTRAINED, "look untrained (mean 0, variance 1)"),
        (BROKEN, "are NaN or infinite"),
        ((0.0, math.inf), "are NaN or infinite"),
    ):
        doubtful = with_statistics(graph, {norms[-1]: statistics})
        kept, doubt = trained_norms(doubtful)
        assert [n.name for n in kept] == norms[:-1]
        assert doubt == f"the statistics of 1 of {len(norms)} batch norms {words}"
        made = synthesize(doubtful, SMALL, seed=1)
        assert doubt in made.note and "not matched" in made.note and math.isfinite(made.losses[1])
        assert equal(made.inputs, others.inputs), "values that say nothing took part"


def test_without_any_trained_statistics_there_is_noise_and_a_note():
    graph = network("chain")
    norms = [n.name for n in graph.nodes if "batch_norm" in n.op]
    for statistics in (UNTRAINED, BROKEN):
        made = synthesize(with_statistics(graph, dict.fromkeys(norms, statistics)), SMALL, seed=2)
        assert f"{len(norms)} of {len(norms)} batch norms" in made.note and "smooth noise was used" in made.note
        assert "depends on that" in made.note and equal(made.inputs, smooth_noise(graph.inputs, 24, 2))


def test_one_channel_at_mean_0_and_variance_1_is_no_doubt():
    graph = trained("chain")
    graph.tensors["inner_bn.running_mean"][0], graph.tensors["inner_bn.running_var"][0] = 0.0, 1.0
    assert trained_norms(graph)[1] == ""


def test_integer_inputs_are_random_and_noted():
    b = Builder(4, seed=0)
    b.inputs = [InputSpec("x", (4,), "int64")]
    b.op("rows", "embedding.default", b.tensor("table", b.random(10, 6)), Ref("x"))
    made = synthesize(b.graph(b.linear("rows", "head", 6, 2)), SMALL)
    assert "random integers" in made.note and made.inputs[0].dtype == torch.int64
    assert set(made.inputs[0].unique().tolist()) == {0, 1}


def test_batch_norms_that_never_saw_data_or_died():
    for mean, variance in ((0.0, 1.0), (0.0, 0.0), (50.0, 1e-12), (0.0, 1e12)):
        graph = network("chain")
        graph.tensors["inner_bn.running_mean"][:] = mean
        graph.tensors["inner_bn.running_var"][:2] = variance
        made = synthesize(graph, replace(SMALL, images=8))
        assert made.inputs[0].isfinite().all(), (mean, variance)
        assert made.losses[1] <= made.losses[0] < math.inf, (mean, variance)


def test_noise_has_unit_power_for_any_shape():
    for shape in ((3, 8, 8), (1, 1, 1), (1, 1, 9), (3, 1, 1), (7,), (), (2, 3), (2, 3, 4, 5)):
        (noise,) = smooth_noise((InputSpec("x", shape),), 400, 0)
        assert noise.shape == (400, *shape) and noise.isfinite().all(), shape
        assert 0.8 < float(noise.square().mean().sqrt()) < 1.2, shape


def test_image_noise_has_low_spatial_frequencies():
    (image,) = smooth_noise((InputSpec("x", (1, 32, 32)),), 50, 0)
    neighbours = (image[..., 1:] * image[..., :-1]).mean() / image.square().mean()
    assert 0.3 < float(neighbours) < 0.99


@given(st.floats(1, 1e5), st.sampled_from(["cpu", "cuda", "cuda:1"]), st.integers(2, 400))
@few
def test_a_budget_fits_the_time_and_depends_on_nothing_else(seconds, device, width):
    graph = network("chain", width)
    how = synthesis_budget(graph, seconds, device)
    assert how == synthesis_budget(graph, seconds, device)
    assert how.images % how.batch == 0 and how.images >= 2 * how.batch and 4 <= how.steps <= 60
    assert how.batch <= how.held_out <= how.images // 2
    spent = how.images * how.steps * 3 * mac_count(graph) / (25e9 if device == "cpu" else 2e12)
    assert spent <= seconds or (how.batch == 8 and how.images == 16) or how.steps == 4


def test_the_budget_for_a_huge_network_is_the_smallest_one(monkeypatch):
    monkeypatch.setattr(synthetic, "mac_count", lambda graph: 10**12)
    assert synthesis_budget(network("chain"), 10.0) == SynthesisBudget(16, 8, 4)
    monkeypatch.setattr(synthetic, "mac_count", lambda graph: 4 * 10**9)
    how = synthesis_budget(network("chain"), 600.0)
    assert how.images * how.steps * 3 * 4e9 <= 600 * 25e9 and how.images > 16


def test_dividing_holds_the_last_inputs_out():
    made = synthesize(network("bare"), SynthesisBudget(40, 8, 4))
    fit, held_out = made.divide(8)
    assert torch.equal(torch.cat([fit[0], held_out[0]]), made.inputs[0]) and len(held_out[0]) == 8
