"""Synthetic inputs: matched to batch norm, deterministic, resumable; families to fit to and others to judge by."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.pruning import inputs as synthetic
from redpp_serve.pruning import matching, scales
from redpp_serve.pruning.families import Scale, families_of, structured
from redpp_serve.pruning.inputs import Sources, drawing_seconds, prepare, synthesis_budget
from redpp_serve.pruning.matching import Matcher, SynthesisBudget, smooth_noise, synthesize
from redpp_serve.pruning.read_by_norms import trained_norms
from redpp_serve.pruning.scales import estimate_scale
from redpp_serve.runtime.moments import Moments
from tests.support.networks import Builder, calibrated, few, network

SMALL = SynthesisBudget(images=24, batch=8, steps=6)


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Drawing them takes longer than everything else here."""
    monkeypatch.setattr(scales, "_IMAGES_TO_MATCH", 2)
    monkeypatch.setattr(synthetic, "_RANKED", 2)


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
    monkeypatch.setattr(matching, "CLASS_WEIGHT", 0.0)
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


def test_matching_starts_from_the_given_inputs(tmp_path):
    graph, checkpoint = trained("chain"), tmp_path / "inputs.safetensors"
    start = tuple(x * 0.5 for x in smooth_noise(graph.inputs, 24, 9))
    still = synthesize(graph, replace(SMALL, steps=1), start)
    assert equal(still.inputs, start)  # the best of one step is where it began
    moved = synthesize(graph, SMALL, start, checkpoint=checkpoint)
    assert not equal(moved.inputs, start) and moved.losses[1] < moved.losses[0]
    assert float((moved.inputs[0] - start[0]).norm()) < float(
        (moved.inputs[0] - synthesize(graph, SMALL).inputs[0]).norm()
    )
    others = synthesize(graph, SMALL, tuple(1.1 * x for x in start), checkpoint=checkpoint)
    assert not equal(others.inputs, moved.inputs), "the checkpoint of another start was used"


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


@given(st.floats(0, 1e4), st.integers(-20, 2), st.sampled_from(["chain", "bare", "residual"]))
@few
def test_as_many_inputs_are_matched_as_the_time_allows(seconds, exponent, kind):
    graph, pace = network(kind), 2.0**exponent
    how = synthesis_budget(graph, seconds, pace)
    assert how == synthesis_budget(graph, seconds, pace)
    assert (how.images, how.judged, how.batch) == (512, 48, 32) and how.matched % how.batch == 0
    cost = 3 * 8 * pace * how.matched  # forward and backward in each of eight steps
    if kind == "bare":
        assert how.matched == 0  # there is nothing to match
    else:
        assert cost <= seconds * (1 + 1e-9) and (how.matched == 512 or cost + 3 * 8 * pace * 32 > seconds)


@given(st.floats(0.01, 30))
@few
def test_as_many_inputs_are_drawn_as_the_time_allows(seconds):
    graph = picture_network()
    full, how = synthesis_budget(graph), synthesis_budget(graph, drawing=seconds)
    assert (full.images, full.judged) == (512, 48)
    if seconds >= drawing_seconds(graph, full):
        assert how == full
    else:
        least = how.images == how.batch or 8 in (how.judged, how.ranked)
        assert least or 0.8 * seconds < drawing_seconds(graph, how) <= seconds
        assert how.images % how.batch == 0 and min(how.judged, how.ranked) >= 8


@given(st.floats(0.5, 1e4), st.integers(-14, 2))
@few
def test_as_much_noise_is_matched_as_the_time_allows(seconds, exponent):
    """Of an input of an unknown kind: two rows of twelve by twelve."""
    b, pace = Builder(2, 12, 12), 2.0**exponent
    graph = b.graph(b.linear(b.mean(b.norm(b.conv("x", "stem", 2, 4), "bn", 4)), "head", 4, 3))
    full, how = synthesis_budget(graph), synthesis_budget(graph, pace=pace, drawing=seconds)
    assert full.images == 512 and how.images % 32 == 0
    cost = 3 * 24 * pace * (how.images + 64)  # those that judge, too
    assert how.images == 32 or cost <= seconds * (1 + 1e-9)
    assert how.images == 512 or cost + 3 * 24 * pace * 32 > seconds


def test_larger_networks_get_fewer_inputs_to_judge_by(monkeypatch):
    found = []
    for macs in (10**6, 5 * 10**8, 10**10):
        monkeypatch.setattr(synthetic, "mac_count", lambda graph, macs=macs: macs)
        how = synthesis_budget(network("chain"))
        assert how.images % how.batch == 0 and how.matched == how.images and how.judged >= 12
        found.append(how)
    assert [how.judged for how in found] == [48, 24, 12] and [how.batch for how in found] == [32, 32, 8]


def picture_network(norm=True):
    b = Builder(3, 12, 12)
    hidden = b.conv("x", "stem", 3, 4)
    return b.graph(b.linear(b.mean(b.relu(b.norm(hidden, "bn", 4) if norm else hidden)), "head", 4, 3))


def rows(inputs):
    return {tuple(row.flatten().tolist()) for row in inputs}


def ranked(monkeypatch, *names):
    """Take these families for those that a network takes for its own kind, in that order."""
    monkeypatch.setattr(synthetic, "_ranked", lambda *_: list(names))


def test_the_nearest_families_are_fitted_and_others_judge(monkeypatch):
    graph, budget = picture_network(), SynthesisBudget(7, 4, 2, 3)
    (spec,) = graph.inputs
    names, scale = families_of(spec), estimate_scale(graph, 5)
    for count, fitted in ((8, 4), (6, 3), (5, 2), (4, 2), (3, 1), (2, 1), (1, 1)):
        ranked(monkeypatch, *names[:count])
        made = prepare(graph, Sources(), budget, seed=5)
        assert len(made.fit[0]) == 7 and made.kind_known
        for k, name in enumerate(names[:fitted]):  # they take turns
            mine = made.fit[0][k::fitted]
            assert mine.equal(structured(spec, 7, 5, name, scale)[: len(mine)]), (count, name)
        first, rest = names[0], list(names[fitted:count])[:3]
        assert list(made.families) == (rest if len(rest) > 1 else [*rest, f"other {first}", f"faded {first}"])
        assert made.note.startswith(
            f"structured inputs ({', '.join(names[:fitted])}); judged by {', '.join(made.families)}"
        )
        for name, (x,) in made.families.items():
            assert x.shape == (3, 3, 12, 12) and not rows(x) & rows(made.fit[0]), (count, name)
    clear, faded = (made.families[f"{word} {names[0]}"][0] for word in ("other", "faded"))
    torch.testing.assert_close(faded.flatten(1).mean(1), clear.flatten(1).mean(1))
    torch.testing.assert_close(faded.flatten(1).std(1), 0.7 * clear.flatten(1).std(1))


def test_prepared_inputs_are_the_same_for_the_same_seed():
    graph, budget = picture_network(), SynthesisBudget(4, 4, 2, 2)
    first, again, other = (prepare(graph, Sources(), budget, seed=seed) for seed in (5, 5, 6))
    assert equal(first.fit, again.fit) and again.note == first.note and not equal(first.fit, other.fit)
    assert first.families.keys() == again.families.keys()
    assert all(equal(x, again.families[name]) for name, x in first.families.items())


def test_families_far_from_the_stored_statistics_tell_nothing(monkeypatch):
    """Here the families are one noise at several strengths: the last at 1, the one before it at 1.4, and so on."""
    graph, (noise,) = picture_network(), smooth_noise((InputSpec("x", (3, 12, 12)),), 64, 0)
    names = families_of(graph.inputs[0])[::-1]
    strengths = {name: 1 + 0.4 * k for k, name in enumerate(names)}
    monkeypatch.setattr(synthetic, "_structured", lambda graph, name, *_: (strengths[name] * noise,))
    monkeypatch.setattr(synthetic, "_NEAR", math.inf)
    assert synthetic._ranked(calibrated(graph, (noise,)), {}, 0) == list(names)
    monkeypatch.setattr(synthetic, "_NEAR", 4.0)
    assert synthetic._ranked(calibrated(graph, (1.25 * noise,)), {}, 0) == [names[1], names[0]]


def test_without_numbers_all_families_are_as_near(monkeypatch):
    """The run is refused afterwards, since the original itself gives none."""
    for graph in (picture_network(), picture_network(norm=False)):
        for name in ("bn.running_var", "head.weight"):
            if name in graph.tensors:
                broken = graph.with_tensors({name: torch.full_like(graph.tensors[name], -math.inf)})
                assert prepare(broken, Sources(), SynthesisBudget(4, 4, 1, 2)).kind_known
    negative = picture_network()
    negative.tensors["bn.running_var"][:] = -1e-3
    assert sorted(synthetic._ranked(negative, {}, 0)) == sorted(families_of(negative.inputs[0]))


def test_without_batch_norms_a_classifier_says_what_it_knows():
    """By the information that its answers give about the input: sure of each, and different ones."""
    silent, sure = torch.zeros(6, 3), 50 * torch.eye(3).repeat(2, 1)
    for scores, nats in (
        (silent, 0.0),
        (sure, math.log(3)),
        (sure.softmax(1), math.log(3)),
        (sure[:1].repeat(6, 1), 0.0),  # sure, but always of the same
    ):
        assert synthetic._information(scores) == pytest.approx(nats, abs=1e-5)
    b = Builder(3, 12, 12)
    graph = b.graph(b.relu(b.conv("x", "stem", 3, 4)))  # neither norms nor classes
    assert synthetic._ranked(graph, {}, 0) == list(families_of(graph.inputs[0]))


def test_the_given_range_counts(monkeypatch):
    graph = picture_network(norm=False)
    made = prepare(graph, Sources(scale=Scale((0.5,), (0.25,))), SynthesisBudget(6, 4, 2, 2))
    assert -2 <= float(made.fit[0].min()) < -0.5 and 0.5 < float(made.fit[0].max()) <= 2


def test_rows_of_tables_are_told_nothing_by_where_their_columns_have_no_scale():
    """Columns around 0.1 and around 10,000 look alike; pruned on rows of unit scale, networks are destroyed."""
    graph = network("mlp")
    budget = SynthesisBudget(8, 4, 2, 5)
    made = prepare(graph, Sources(), budget)
    assert made.unread == graph.inputs and not made.kind_known
    assert len(made.fit[0]) == 8 and len(made.families) >= 2
    for (x,) in made.families.values():
        assert len(x) == 5 and not rows(x) & rows(made.fit[0])
    real = prepare(graph, Sources(inputs=(1000 * torch.randn(12, 5),)), budget)
    assert real.kind_known and not real.unread


def test_a_batch_norm_that_reads_the_columns_tells_their_scale():
    b = Builder(5)
    graph = calibrated(b.graph(b.linear(b.norm("x", "columns", 5), "head", 5, 3)), (1000 * torch.rand(64, 5),))
    made = prepare(graph, Sources(), SynthesisBudget(8, 4, 2, 5))
    assert made.kind_known and not made.unread and made.fit[0].mean() == pytest.approx(500, rel=0.3)


def test_the_first_structured_inputs_are_matched_where_the_budget_says_so():
    graph = picture_network()
    plain = prepare(graph, Sources(), SynthesisBudget(12, 4, 2, 3))
    some = prepare(graph, Sources(), SynthesisBudget(12, 4, 2, 3, matched=8))
    assert some.fit[0][8:].equal(plain.fit[0][8:]) and len(some.fit[0]) == 12
    assert not any(a.equal(b) for a, b in zip(some.fit[0][:8], plain.fit[0][:8], strict=True))
    assert re.search(r"8 of them matched to batch norms, mismatch \S+ -> \S+; judged by", some.note)
    assert all(equal(x, plain.families[name]) for name, x in some.families.items())


def test_real_inputs_join_and_a_fifth_of_them_judges():
    for graph in (network("mlp"), network("bare")):
        real = torch.randn(30, *graph.inputs[0].shape, generator=torch.Generator().manual_seed(0))
        real = (real - real.mean()) / real.std(correction=0)  # as noise is
        budget = SynthesisBudget(8, 4, 2, 4)
        made, without = (prepare(graph, Sources(inputs=x), budget) for x in ((real,), ()))
        torch.testing.assert_close(made.fit[0], torch.cat([real[:24], without.fit[0]]))
        assert made.kind_known
        assert next(iter(made.families)) == "real" and made.families["real"][0].equal(real[24:])
        assert {name: x for name, x in made.families.items() if name != "real"}.keys() == without.families.keys()
        assert made.note.startswith("24 real inputs and ") and made.note.endswith("; 6 real ones judge")


def test_few_real_inputs_all_judge():
    graph = network("mlp")
    real = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    made = prepare(graph, Sources(inputs=(real,)), SynthesisBudget(8, 4, 2, 4))
    assert made.families["real"][0].equal(real) and len(made.fit[0]) == 8
    assert made.note.startswith("0 real inputs and ") and made.note.endswith("; 3 real ones judge")


def test_noise_of_an_unknown_kind_is_tied_to_the_network_by_its_batch_norms_alone():
    budget = SynthesisBudget(8, 8, 2, 5)
    matched, loose = (prepare(graph, Sources(), budget) for graph in (trained("chain"), network("bare")))
    assert matched.kind_known and "matched to batch-norm statistics" in matched.note
    assert not loose.kind_known and "smooth noise was used" in loose.note
    moments = Moments(1, 0, "", {}, {}, {})
    assert prepare(network("bare"), Sources(moments=moments), budget).kind_known
    for made in (matched, loose):
        assert list(made.families) == ["another start", "scaled", "louder"]
        first, scaled, louder = (x[0] for x in made.families.values())
        assert len(first) == 5 and scaled.equal(0.7 * first) and louder.equal(1.3 * first)
        assert not rows(first) & rows(made.fit[0])


def test_as_many_inputs_judge_as_the_budget_says_whatever_the_batch():
    made = prepare(trained("chain"), Sources(), SynthesisBudget(8, 4, 1, 9))
    assert [len(x[0]) for x in made.families.values()] == [9, 9, 9]
