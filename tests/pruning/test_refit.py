"""Fitted readers: they make up for channels that others determine, in every kind of class, and means are preserved."""

import pytest
import torch

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Ref
from redpp_serve.pruning import fit as module
from redpp_serve.pruning.fit import Epilogue, epilogue, quick_fit, reconstruct
from redpp_serve.pruning.inputs import smooth_noise
from redpp_serve.pruning.observation import observe
from redpp_serve.pruning.selection import select
from redpp_serve.pruning.verification import compare_outputs
from tests.support.networks import Builder, inner_of, network, plant

KINDS = ["chain", "residual", "flatten", "mlp", "tokens", "branches", "bare", "gate", "concat", "stream"]


def network_of(kind, width=8):
    """The kinds of `networks.network`, and a squeeze-excite block, a concatenation, a residual stream of that width."""
    if kind not in ("gate", "concat", "stream"):
        return network(kind, width)
    b = Builder(3, 6, 5, seed=3)
    hidden = b.relu(b.norm(b.conv("x", "inner", 3, width, bias=False), "inner_bn", width))
    if kind == "gate":
        pooled = b.op("pooled", "mean.dim", Ref(hidden), [2, 3], True)
        gate = b.conv(b.relu(b.conv(pooled, "squeeze", width, 3, 1)), "excite", 3, width, 1)
        hidden = b.op("gated", "mul.Tensor", Ref(hidden), Ref(b.op("gate", "sigmoid.default", Ref(gate))))
        return b.graph(b.linear(b.mean(b.relu(b.conv(hidden, "reader", width, 6))), "head", 6, 3))
    if kind == "concat":
        other = b.relu(b.conv("x", "other", 3, 5))
        joined = b.op("joined", "cat.default", [Ref(other), Ref(hidden)], 1)
        return b.graph(b.linear(b.mean(b.relu(b.conv(joined, "reader", width + 5, 6))), "head", 6, 3))
    for k in range(2):
        branch = b.relu(b.norm(b.conv(hidden, f"first{k}", width, 6, bias=False), f"first{k}_bn", 6))
        branch = b.norm(b.conv(branch, f"second{k}", 6, width, bias=False), f"second{k}_bn", width)
        hidden = b.relu(b.add(hidden, branch))
    return b.graph(b.linear(b.mean(hidden), "head", width, 3))


def scaled_copies(graph, name="inner"):
    """Make the second half of a class's channels 0.5 to 2 times the first: through ReLU, so dependent after it."""
    channel_set = inner_of(graph, name)
    half = channel_set.channels // 2
    graph = plant(graph, {half + k: k for k in range(half)}, name)
    factors = torch.ones(channel_set.channels)
    factors[half:] = torch.linspace(0.5, 2, half)
    names = {part.tensor for part in channel_set.parts}
    normed = {f"{n}_bn.{part}" for n in channel_set.producers for part in ("weight", "bias")} & names
    bare = {f"{name}.weight", f"{name}.bias"} & names
    changed = {t: graph.tensors[t] * factors.view(-1, *[1] * (graph.tensors[t].dim() - 1)) for t in normed or bare}
    return graph.with_tensors(changed)


def narrowed(graph, share, images=48, only=("inner",), original=None, **how):
    """The narrowed and fitted network, with the records and the inputs of the fit."""
    inputs, coupling = smooth_noise(graph.inputs, images, 0), couple(graph)
    observed = observe(coupling, inputs)
    chosen = select(observed)
    groups = [channel_set for channel_set in coupling.open if not only or channel_set.name in only]
    kept = {g.name: chosen[g.name].kept(max(1, round(share * g.channels))) for g in groups}
    start = quick_fit(observed, kept)
    graph, records = reconstruct(coupling, original or graph, kept, start, inputs, **how)
    return graph, records, inputs


def test_all_kinds_have_the_class():
    for kind in KINDS:
        assert inner_of(network_of(kind, 8)).channels == 8
    assert len(inner_of(network_of("stream")).producers) == 3 and len(inner_of(network_of("gate")).readers) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [False, True])
def test_half_of_the_channels_are_multiples_of_the_others(monkeypatch, kind, wide):
    if wide:
        monkeypatch.setattr(module, "_MAX_UNKNOWNS", 0)
    graph = scaled_copies(network_of(kind, 12))
    narrow, (record,), _ = narrowed(graph, 0.5, 192 if kind == "flatten" else 48)
    assert (record.layer, record.kept, record.channels) == ("inner", 6, 12) and record.error < 2e-3
    assert len(narrow.tensors["inner.weight"]) == 6
    assert compare_outputs(graph, narrow, smooth_noise(graph.inputs, 8, 9)).error < 1e-3


def test_equal_channels_with_equal_depthwise_filters():
    graph = plant(network("depthwise", 12), {6 + k: k for k in range(6)})
    narrow, (record,), _ = narrowed(graph, 0.5)
    assert record.kept == 6 and compare_outputs(graph, narrow, smooth_noise(graph.inputs, 8, 9)).error < 1e-3


def test_any_linear_combination_can_go():
    b = Builder(3, 6, 5, seed=4)
    graph = b.graph(b.conv(b.conv("x", "inner", 3, 10, bias=False), "reader", 10, 4))
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    graph.tensors["inner.weight"][5:] = torch.einsum("ab,bijk->aijk", mix, graph.tensors["inner.weight"][:5])
    narrow, (record,), _ = narrowed(graph, 0.5)
    assert record.kept == 5 and compare_outputs(graph, narrow, smooth_noise(graph.inputs, 8, 9)).error < 1e-3


def channel_means(graph, name, inputs):
    norm = [n.name for n in graph.users().get(name, []) if n.op == "aten.batch_norm.default"]
    value = Program(graph, [norm[0] if norm else name])(*inputs)[0].double()
    return value.mean([0, 2, 3]) if value.dim() == 4 else value.reshape(-1, value.shape[-1]).mean(0)


@pytest.mark.parametrize("kind", [*KINDS, "depthwise"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_mean_of_every_readers_output_is_preserved(monkeypatch, kind, wide):
    """Whether the constant goes into a bias, a batch norm's mean or a new bias, and with padding and flatten."""
    if wide:
        monkeypatch.setattr(module, "_MAX_UNKNOWNS", 0)
    graph = network_of(kind, 10)
    narrow, _, inputs = narrowed(graph, 0.3, 40, compensate=False)
    for reader in inner_of(graph).readers:
        got, expected = (channel_means(g, reader.node, inputs) for g in (narrow, graph))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["chain", "flatten", "tokens", "bare", "branches", "gate", "concat"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_error_reported_is_the_one_measured(monkeypatch, kind, wide):
    if wide:
        monkeypatch.setattr(module, "_MAX_UNKNOWNS", 0)
    graph = network_of(kind, 10)
    narrow, (record,), inputs = narrowed(graph, 0.4, 40, compensate=False)
    errors = []
    for reader in inner_of(graph).readers:
        norm = [n.name for n in graph.users().get(reader.node, []) if n.op == "aten.batch_norm.default"]
        if norm:  # weigh channels as the norm's input does
            scale = (graph.tensors[f"{norm[0]}.running_var"] + 1e-5).sqrt() / graph.tensors[f"{norm[0]}.weight"]
        new, old = (Program(g, [norm[0] if norm else reader.node])(*inputs)[0].double() for g in (narrow, graph))
        new, old = (v.movedim(1, -1).flatten(0, -2) if v.dim() == 4 else v.flatten(0, -2) for v in (new, old))
        new, old = (v * scale for v in (new, old)) if norm else (new, old)
        errors.append(float((new - old).norm() / (old - old.mean(0)).norm()))
    assert record.error > 0.01 and record.error == pytest.approx(max(errors), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_readers_do_much_better_than_readers_that_only_lose_columns(kind):
    graph = network_of(kind, 16)
    coupling, inputs = couple(graph), smooth_noise(graph.inputs, 48, 0)
    observed = observe(coupling, inputs)
    kept = {"inner": select(observed)["inner"].kept(10)}
    start = quick_fit(observed, kept)
    fitted, _ = reconstruct(coupling, graph, kept, start, inputs)
    held_out = smooth_noise(graph.inputs, 16, 3)
    cut, quick, full = (compare_outputs(graph, g, held_out).error for g in (coupling.narrow(kept), start, fitted))
    assert quick < 0.9 * cut and full < 0.75 * cut


def test_errors_of_several_classes_do_not_pile_up_because_the_target_is_the_original():
    """The reader behind a narrowed (here: damaged) stem is fitted to what the intact network gives."""
    original = network("chain", 8)
    damaged = original.with_tensors({"inner_bn.weight": 0.9 * original.tensors["inner_bn.weight"]})
    fitted, _, inputs = narrowed(damaged, 7 / 8, 64, original=original)
    assert compare_outputs(original, fitted, inputs).error < 0.8 * compare_outputs(original, damaged, inputs).error


def test_a_branch_makes_up_for_the_error_of_the_stream_it_is_added_to():
    """The stream is damaged before the branch: only the branch's last layer can mend it."""
    graph = network_of("stream", 8)
    shift = 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    damaged = graph.with_tensors({"inner_bn.bias": graph.tensors["inner_bn.bias"] + shift})
    errors = {}
    for compensate in (False, True):
        fitted, _, inputs = narrowed(
            damaged, 0.9, only=("first0",), original=graph, compensate=compensate, every_layer=False
        )
        names = ["inner_bn_relu_second0_bn_relu"]
        new, old = (Program(g, names)(*inputs)[0] for g in (fitted, graph))
        errors[compensate] = float((new - old).norm() / old.norm())
    assert errors[True] < 0.93 * errors[False]


def test_layers_that_lost_nothing_are_fitted_to_the_errors_they_read():
    graph = network_of("stream", 16)
    held_out = smooth_noise(graph.inputs, 16, 5)
    some, every = (narrowed(graph, 0.4, 96, only=("first0",), every_layer=e)[0] for e in (False, True))
    assert compare_outputs(graph, every, held_out).error < compare_outputs(graph, some, held_out).error
    assert torch.equal(some.tensors["head.weight"], graph.tensors["head.weight"])


@pytest.mark.parametrize("kind", [*KINDS, "depthwise"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_all_classes_at_once(kind, ratio):
    """A reader that was given a bias may itself be a producer that was narrowed."""
    graph = network_of(kind, 12)
    narrow, records, _ = narrowed(graph, ratio, 24, only=())
    assert {r.layer: r.kept for r in records} == {
        g.name: max(1, round(ratio * g.channels)) for g in couple(graph).open if round(ratio * g.channels) < g.channels
    }
    assert compare_outputs(graph, narrow, smooth_noise(graph.inputs, 4, 1)).error < 1
    again = {channel_set.name: channel_set.channels for channel_set in couple(narrow).open}
    assert all(again.get(r.layer, r.kept) == r.kept for r in records)


def test_nothing_narrowed_is_nothing_done():
    graph = network("chain", 6)
    inputs, coupling = smooth_noise(graph.inputs, 8, 0), couple(graph)
    kept = {"inner": torch.arange(6)}
    start = quick_fit(observe(coupling, inputs), kept)
    assert all(torch.equal(start.tensors[name], tensor) for name, tensor in graph.tensors.items())
    assert reconstruct(coupling, graph, kept, start, inputs) == (start, [])


def test_rows_that_exact_merging_took_are_left_out_of_the_target():
    """The network to narrow has lost the reader's last two outputs already."""
    graph = network("bare", 8)
    first = couple(graph)
    gone = {"second": torch.arange(6)}
    merged, places = first.narrow(gone), first.kept(gone)
    coupling, inputs = couple(merged), smooth_noise(graph.inputs, 24, 0)
    observed = observe(coupling, inputs)
    kept = {"inner": select(observed)["inner"].kept(5)}
    fitted, (record,) = reconstruct(coupling, graph, kept, quick_fit(observed, kept), inputs, rows=places)
    new, old = Program(fitted, ["second"])(*inputs)[0], Program(graph, ["second"])(*inputs)[0][:, :6]
    error = float((new - old).norm() / (old - old.mean((0, 2, 3), keepdim=True)).norm())
    assert record.error == pytest.approx(error, rel=1e-3)


def test_a_constant_does_not_go_into_a_batch_norm_that_others_use_or_whose_input_is_an_output():
    b = Builder(4, 5, 5)
    reader = b.conv(b.relu(b.conv("x", "inner", 4, 8)), "reader", 8, 3, bias=False)
    first = b.norm(reader, "bn", 3)
    tensors = [Ref(f"bn.{k}") for k in ("weight", "bias", "running_mean", "running_var")]
    b.op("again", "batch_norm.default", Ref("x2"), *tensors, False, 0.1, 1e-5, True)
    b.nodes.insert(-1, type(b.nodes[0])("x2", "aten.slice.Tensor", (Ref("x"), 1, 0, 3)))
    shared = b.graph(first, "again")
    b.nodes = b.nodes[:-2]
    shown = b.graph(first, reader)
    for graph in (shared, shown):
        narrow, _, inputs = narrowed(graph, 0.25, 30)
        assert torch.equal(narrow.tensors["bn.running_mean"], graph.tensors["bn.running_mean"])
        got, expected = (channel_means(g, "reader", inputs) for g in (narrow, graph))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_follows_a_layer():
    graph = network_of("stream", 8)
    shapes, names = value_shapes(graph), {node.name for node in graph.nodes}
    branch = graph.node("second0")
    assert epilogue(graph, branch, names, shapes) == Epilogue("second0_bn", "inner_bn_relu")
    assert epilogue(graph, branch, set(), shapes).other is None  # not computed yet
    assert epilogue(graph, branch, names, shapes, compensate=False).other is None
    assert epilogue(graph, graph.node("first0"), names, shapes).other is None  # an activation lies between
    assert epilogue(graph, graph.node("head"), names, shapes).norm is None


@pytest.mark.parametrize("mutant", ["wrong constant", "wrong rows"])
def test_the_planted_network_notices_a_wrong_fit(monkeypatch, mutant):
    solve = module.solve

    def wrong(parts, start):
        new, constant, lost = solve(parts, start)
        return (new, 0 * constant + 0.1, lost) if mutant == "wrong constant" else (new.flip(0), constant, lost)

    graph = scaled_copies(network_of("chain", 12))
    monkeypatch.setattr(module, "solve", wrong)
    narrow, _, _ = narrowed(graph, 0.5, 16, every_layer=False)
    assert compare_outputs(graph, narrow, smooth_noise(graph.inputs, 8, 9)).error > 1e-2


def test_deterministic():
    graph = network_of("stream", 10)
    (a, _, _), (b, _, _) = (narrowed(graph, 0.4, 16, only=()) for _ in range(2))
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
