"""Distillation: it learns, never makes the held-out error worse, resumes to the byte, and keeps codebooks."""

import math
from itertools import pairwise

import pytest
import torch

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.graph.layers import mac_count
from redpp_serve.pruning import distillation as module
from redpp_serve.pruning import student as training
from redpp_serve.pruning.distillation import Lesson, OutputLoss, Schedule, distil, matched_values, mixed, schedule
from redpp_serve.pruning.judge import Reference
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.student import Student, trained_tensors, update_macs
from tests.support.judging import compare_outputs
from tests.support.networks import KINDS, Builder, network
from tests.support.pairs import pair, whole

STEPS = 24


def data(graph, images=32):
    return smooth_noise(graph.inputs, images, 0), smooth_noise(graph.inputs, 16, 1)


def run(narrow, graph, kept, how=Schedule(STEPS, 16), inputs=None, codebooks=frozenset(), **options):  # noqa: B008
    learn, held_out = data(graph)
    return distil(Lesson(narrow, Reference(graph, held_out), inputs or learn, kept, codebooks), how, **options)


def same(a, b):
    return a.nodes == b.nodes and all(a.tensors[n].equal(b.tensors[n]) for n in {*a.tensors, *b.tensors})


def test_every_kind_learns_and_every_weight_takes_part():
    for kind in KINDS:
        narrow, graph, kept = pair(kind)
        narrow = narrow.with_tensors({n: 1.2 * t for n, t in narrow.tensors.items() if t.dim() > 1})
        done = run(narrow, graph, kept)
        assert done.steps == STEPS and done.note == "" and done.reproducible, kind
        assert done.error[1] < 0.9 * done.error[0], kind
        held_out = data(graph)[1]
        measured = [compare_outputs(graph, g, held_out).error for g in (narrow, done.graph)]
        assert done.error == pytest.approx(measured, rel=1e-4), kind
        moved = {n for n in narrow.tensors if not narrow.tensors[n].equal(done.graph.tensors[n])}
        assert moved == {n for n in narrow.tensors if "running" not in n} == set(trained_tensors(narrow)), kind
        assert all(t.requires_grad is False for t in done.graph.tensors.values()), kind


def test_the_given_graphs_do_not_change():
    narrow, graph, kept = pair("depthwise")
    before = [{n: t.clone() for n, t in g.tensors.items()} for g in (narrow, graph)]
    run(narrow, graph, kept)
    for g, tensors in zip((narrow, graph), before, strict=True):
        assert all(g.tensors[n].equal(t) and not g.tensors[n].requires_grad for n, t in tensors.items())


def test_a_hostile_learning_rate_never_makes_the_result_worse():
    for rate in (1e3, 1e30):
        narrow, graph, kept = pair("residual")
        done = run(narrow, graph, kept, Schedule(STEPS, 16, rate))
        assert same(done.graph, narrow) and done.error[0] == done.error[1]
        assert "the earlier weights stay" in done.note


def test_a_perfect_network_stays_as_it_is():
    graph = network("residual")
    done = run(graph, graph, whole)
    assert same(done.graph, graph) and done.error == (0, 0) and "earlier weights stay" in done.note


def test_a_loss_that_becomes_nan_keeps_the_best_weights_until_then(monkeypatch):
    narrow, graph, kept = pair("chain")
    draw = module.mixed
    monkeypatch.setattr(
        module, "mixed", lambda x, n, seed: tuple(v * (math.nan if seed >= 10 else 1) for v in draw(x, n, seed))
    )
    done = run(narrow, graph, kept)
    assert "NaN or infinite after 10 of 24 steps" in done.note and done.steps == 10
    assert done.error[1] < done.error[0] and all(t.isfinite().all() for t in done.graph.tensors.values())


def test_inputs_that_give_nan_leave_everything_as_it_was():
    narrow, graph, kept = pair("chain")
    done = run(narrow, graph, kept, inputs=(data(graph)[0][0] * math.inf,))
    assert same(done.graph, narrow) and done.steps == 0
    assert "after 0 of 24" in done.note and "earlier weights" in done.note


def test_one_seed_one_result():
    narrow, graph, kept = pair("residual")
    first, second, other = (run(narrow, graph, kept, seed=s) for s in (1, 1, 2))
    assert same(first.graph, second.graph) and first.error == second.error
    assert not same(first.graph, other.graph)


class Interrupt(Exception):
    pass


def interrupting(at):
    def progress(done, total):
        assert total == STEPS
        if done == at:
            raise Interrupt

    return progress


@pytest.mark.exhaustive
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    original, graph, kept = pair("residual")
    for codebooks in (frozenset(), frozenset({"inner.weight", "second.weight"})):
        narrow = original.with_tensors({n: (4 * original.tensors[n]).round() / 4 for n in codebooks})
        plain = run(narrow, graph, kept, codebooks=codebooks)
        for at in (1, 11, STEPS - 1):
            checkpoint, steps = tmp_path / f"{len(codebooks)} {at}.safetensors", []
            how = {"codebooks": codebooks, "checkpoint": checkpoint}
            with pytest.raises(Interrupt):
                run(narrow, graph, kept, **how, progress=interrupting(at))
            resumed = run(narrow, graph, kept, **how, progress=lambda n, _, steps=steps: steps.append(n))
            assert steps == list(range(at, STEPS + 1)) if at > 1 else steps[0] == 1
            assert same(plain.graph, resumed.graph) and plain.error == resumed.error
            told = f"the first {at - 1} by a run that was interrupted" if at > 1 else ""
            assert (plain.note, resumed.note) == ("", told)
        again = run(narrow, graph, kept, **how, progress=interrupting(0))
        assert same(plain.graph, again.graph) and again.steps == STEPS


def test_another_runs_checkpoint_or_a_damaged_one_is_not_used(tmp_path):
    narrow, graph, kept = pair("chain")
    checkpoint = tmp_path / "distil.safetensors"
    plain = run(narrow, graph, kept, seed=3)
    run(narrow, graph, kept, seed=4, checkpoint=checkpoint)
    assert same(run(narrow, graph, kept, seed=3, checkpoint=checkpoint).graph, plain.graph)
    damaged = bytearray(checkpoint.read_bytes())
    checkpoint.write_bytes(damaged[: len(damaged) // 2])
    assert same(run(narrow, graph, kept, seed=3, checkpoint=checkpoint).graph, plain.graph)
    moved = graph.with_tensors({"head.bias": graph.tensors["head.bias"] + 1})
    assert not same(run(narrow, moved, kept, seed=3, checkpoint=checkpoint).graph, plain.graph)


def test_the_deadline_ends_it_and_the_note_says_so():
    narrow, graph, kept = pair("chain")
    done = run(narrow, graph, kept, deadline=-1.0)
    assert done.steps == 1 and not done.reproducible and "not reproducible" in done.note and "1 of 24" in done.note
    assert done.error[1] <= done.error[0]


def test_codebooks_keep_their_indices_and_their_zeros():
    for kind in ("residual", "depthwise", "tokens", "bare"):
        narrow, graph, kept = pair(kind)
        names = frozenset(n for n, t in narrow.tensors.items() if t.dim() > 1)
        coarse = narrow.with_tensors({n: (3 * narrow.tensors[n]).round() / 3 for n in names})
        done = run(coarse, graph, kept, codebooks=names)
        assert done.error[1] < done.error[0], kind
        for name in names:
            old, new = coarse.tensors[name], done.graph.tensors[name]
            assert all(len(new[old == value].unique()) == 1 for value in old.unique()), (kind, name)
            assert (new[old == 0] == 0).all() and (old == 0).any() and not new.equal(old), (kind, name)
        assert all(not done.graph.tensors[n].equal(t) for n, t in coarse.tensors.items() if n.endswith("bias")), kind


def test_a_shared_value_has_the_sum_of_its_gradients():
    tensor = torch.tensor([[0.5, -1.0, 0.0], [0.5, 0.5, -1.0]])
    shared = training.Codebook(tensor)
    values = shared.values.clone().requires_grad_()
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    (values[shared.index] * weight).sum().backward()
    expected = torch.where(shared.values == 0, 0.0, values.grad)
    torch.testing.assert_close(shared.sum(weight), expected)
    assert shared.values[shared.index].equal(tensor)


def test_a_step_is_that_of_adam_or_muon_in_each_tensors_own_unit():
    graph = network("depthwise")
    student, (inputs, _) = Student(graph, frozenset({"second.weight"}), "cpu"), data(graph)
    program = student.program(graph.outputs)
    by_adam = {n for n, p in student.parameters.items() if not p.by_muon}
    vectors = {n for n in student.parameters if not n.endswith("weight") or "_bn" in n}
    assert by_adam == vectors | {"spatial.weight", "second.weight"}
    leaves = {n: graph.tensors[n].clone().requires_grad_() for n in student.parameters}
    units = {n: p.scale for n, p in student.parameters.items()}
    groups = [{"params": [leaves[n]], "lr": 1e-3 * units[n], "eps": 1e-8 / units[n]} for n in by_adam]
    adam, reference = torch.optim.Adam(groups, betas=(0.9, 0.99)), Program(graph.with_tensors(leaves))
    momentum = {n: torch.zeros_like(p) for n, p in leaves.items()}
    for step in range(3):
        assert student.learn(0.01 * program(*inputs)[0].square().mean(), 1e-3, step)
        adam.zero_grad()
        (0.01 * reference(*inputs)[0].square().mean()).backward()
        adam.step()
        for name in leaves.keys() - by_adam:
            g = leaves[name].grad
            momentum[name] = 0.9 * momentum[name] + 0.1 * g
            move = training.orthogonalised((0.1 * g + 0.9 * momentum[name]).flatten(1)).view(g.shape)
            leaves[name].data -= 1e-3 * units[name] * move / move.square().mean().sqrt()
            leaves[name].grad = None
    for name, mine in student.parameters.items():
        torch.testing.assert_close(mine.leaf, leaves[name], rtol=1e-4, atol=1e-6, msg=name)
        assert not mine.leaf.equal(graph.tensors[name])


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (7, 7)], ids=str)
def test_an_orthogonalised_matrix_keeps_its_singular_vectors(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for scale in (1e-8, 1.0, 1e8):
        done = training.orthogonalised(scale * matrix)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ done @ v.T
        torch.testing.assert_close(inner - inner.diag().diag(), torch.zeros_like(inner), atol=1e-6, rtol=0)
        well = s > 0.05 * s.max()
        assert inner.diag()[well].min() > 0.6 and inner.diag().max() < 1.3
    assert not training.orthogonalised(torch.zeros(shape)).any()


def test_no_gradient_no_move():
    graph = network("chain")
    student = Student(graph, frozenset(), "cpu")
    assert student.learn(sum(0.0 * p.leaf.sum() for p in student.parameters.values()), 0.1, 0)
    assert all(p.leaf.equal(graph.tensors[n]) for n, p in student.parameters.items())


def test_the_cost_of_orthogonalising_leaves_wide_and_depthwise_weights_out():
    b = Builder(8, 8, 8)
    b.conv("x", "deep", 8, 8, groups=8)
    b.conv("deep", "plain", 8, 16, 1)
    graph = b.graph(b.linear(b.flatten("plain"), "wide", 1024, 2))
    graph = graph.with_tensors({"wide.weight": torch.zeros(1030, 1025)})
    assert training.update_macs(graph) == 5 * (2 * 8 * 8 * 16 + 8**3)
    assert training.update_macs(graph.with_tensors({"wide.weight": torch.zeros(2, 1024)})) > 5 * 2 * 4 * 1024


def test_a_step_whose_loss_is_not_finite_changes_nothing():
    student, (inputs, _) = Student(network("chain"), frozenset(), "cpu"), data(network("chain"))
    before = {n: t.clone() for n, t in student.state().items()}
    (y,) = student.program(("head",))(*inputs)
    assert student.learn(y.sum() * math.nan, 0.1, 0) is False
    assert all(student.state()[n].equal(t) for n, t in before.items())


def two_inputs():
    b = Builder(3, 8, 8)
    b.inputs.append(InputSpec("z", (3, 8, 8)))
    joined = b.add(b.relu(b.conv("x", "a", 3, 6)), b.relu(b.conv("z", "b", 3, 6)))
    return b.graph(b.linear(b.mean(b.relu(b.conv(joined, "c", 6, 8))), "head", 8, 3))


def test_several_inputs():
    graph = two_inputs()
    bad = graph.with_tensors({n: 1.3 * t for n, t in graph.tensors.items() if n.startswith("b.")})
    done = run(bad, graph, whole)
    assert done.note == "" and done.error[1] < 0.7 * done.error[0]


def token_ids():
    b = Builder(7)
    b.inputs = [InputSpec("ids", (7,), "int64")]
    b.op("embedded", "embedding.default", b.tensor("table", b.random(2, 5)), Ref("ids"))
    return b.graph(b.linear(b.relu(b.linear("embedded", "inner", 5, 8)), "head", 8, 3))


def test_integer_inputs_are_drawn_and_never_mixed():
    graph = token_ids()
    bad = graph.with_tensors({"inner.weight": 1.3 * graph.tensors["inner.weight"]})
    done = run(bad, graph, whole)
    assert done.note == "" and done.error[1] < 0.7 * done.error[0]
    inputs = data(graph)[0]
    (drawn,) = mixed(inputs, 50, 0)
    rows = {tuple(r) for r in inputs[0].tolist()}
    assert drawn.dtype == torch.int64 and all(tuple(r) in rows for r in drawn.tolist())


def test_mixed_batches_are_near_their_inputs_and_differ():
    x = smooth_noise((InputSpec("x", (3, 16, 24)),), 8, 0)[0]
    first, again, other = (mixed((x,), 200, s)[0] for s in (1, 1, 2))
    assert first.equal(again) and not first.equal(other) and first.shape == (200, 3, 16, 24)
    assert len({tuple(row[:5].tolist()) for row in first.flatten(1)}) == 200
    assert 0.6 < float(first.std() / x.std()) < 1.05 and first.isfinite().all()


def test_all_inputs_are_mixed_alike():
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    a, b = mixed((x, 2 * x), 300, 0)
    assert float((2 * a - b).std() / b.std()) < 0.15


def test_the_ends_of_blocks_are_compared():
    graph = two_inputs()
    assert matched_values(graph, graph, whole) == ["a_relu", "b_relu", "c_relu"]  # one join alone: every step
    b = Builder(4, 6, 6)
    value, expected = "x", []
    for k in range(40):
        branch = b.conv(value, f"c{k}", 4, 4)
        value = b.op(f"act{k}", "relu.default", Ref(b.op(f"sum{k}", "add.Tensor", Ref(value), Ref(branch))))
        expected.append(value)
    graph = b.graph(b.linear(b.mean(value), "head", 4, 2))
    found = matched_values(graph, graph, whole)
    places = [expected.index(name) for name in found]
    assert len(found) == 16 and places == sorted(places) and places[-1] == 39
    assert {b - a for a, b in pairwise(places)} <= {2, 3}


def test_values_of_other_shapes_are_compared_at_the_kept_positions_only():
    narrow, graph, kept = pair("chain")
    assert "inner_bn_relu" in matched_values(narrow, graph, kept)
    assert matched_values(narrow, graph, whole) == ["stem_bn_relu", "second_bn_relu"]
    names, inputs = ["head", "inner_bn_relu"], data(graph)[0]
    new, old = (Program(g, names)(*inputs) for g in (narrow, graph))
    expected = [
        (n - o).square().mean() / o.square().mean() for n, o in zip(new, (old[0], old[1][:, [0, 2, 3, 5]]), strict=True)
    ]
    loss = OutputLoss(Student(narrow, frozenset(), "cpu"), graph, names, 1, kept)(inputs)
    torch.testing.assert_close(loss, sum(expected))


def test_the_loss_of_the_same_network_is_zero_and_else_relative():
    graph = network("residual")
    names = [*graph.outputs, *matched_values(graph, graph, whole)]
    inputs = data(graph)[0]
    doubled = graph.with_tensors({n: 2 * graph.tensors[n] for n in ("head.weight", "head.bias")})
    for other, expected in ((graph, 0.0), (doubled, 1.0)):
        loss = OutputLoss(Student(other, frozenset(), "cpu"), graph, names, 1, whole)(inputs)
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_schedule_follows_from_cost_and_budget(monkeypatch):
    graph, narrow = network("chain", 64), network("chain", 8)
    pace = 2.0**-10
    assert schedule(graph, graph, 0.0, pace).steps == 0
    few, many = (schedule(graph, graph, seconds, pace) for seconds in (50.0, 300.0))
    assert schedule(graph, graph, 50.0, pace) == few
    assert many.batch > few.batch and few.steps < 1000 <= many.steps
    assert schedule(graph, graph, 25.0, pace).steps == pytest.approx(few.steps / 2, abs=1)
    for seconds, how in ((50.0, few), (300.0, many)):  # it fits, and no more would
        cost = how.batch * 4 * pace + update_macs(graph) / 20e9 + module._STEP_SECONDS
        assert how.steps * cost <= seconds < (how.steps + 1) * cost
    share = mac_count(narrow) / mac_count(graph)
    assert schedule(narrow, graph, 50.0, pace).steps > few.steps
    examining = schedule(narrow, graph, 50.0, pace, 1000)  # eight times, on the narrow network
    assert examining == schedule(narrow, graph, 50.0 - 8 * 1000 * pace * share, pace)
    assert schedule(graph, graph, 50.0, pace / 4).steps > few.steps
    assert schedule(graph, graph, 1e9, pace).steps == 4000
    monkeypatch.setattr(module, "_BATCH_BYTES", 1)
    assert schedule(graph, graph, 50.0, pace).batch == 4
    assert schedule(graph, graph, 50.0, 100.0).steps == 0


def test_too_small_a_budget_leaves_the_weights():
    narrow, graph, kept = pair("chain")
    done = run(narrow, graph, kept, Schedule(3, 16))
    assert done.graph is narrow and done.steps == 0 and "3 steps of at least 10" in done.note
    assert done.error[0] == done.error[1]
