"""Reconstruction: redundant channels are found, readers make up for them, and means are preserved."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Builder, few, inner_of, network, seeds

from redpp_serve.graph.channels import find_inner_channels
from redpp_serve.graph.rewrite import columns_of
from redpp_serve.pruning import reconstruct as module
from redpp_serve.pruning.reconstruct import Moments, gather_moments, keep_ratio, reconstruct, select_channels, within
from redpp_serve.pruning.synthetic import smooth_noise
from redpp_serve.pruning.verify import compare_outputs
from redpp_serve.runtime.graph import Ref
from redpp_serve.runtime.program import Program


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(u, weight):
    """Moments of features (samples, channels * taps) and what a weight (n_out, channels, taps) makes of them."""
    y = u @ weight.reshape(len(weight), -1).T
    du, dy = u - u.mean(0), y - y.mean(0)
    return Moments(
        du.T @ du / len(u), du.T @ dy / len(u), u.mean(0), y.mean(0), float(dy.square().sum() / len(u)), True
    )


def remaining(u, weight, kept):
    """Share of the output variance that the best linear use of the kept channels loses, by least squares."""
    du = (u - u.mean(0)).numpy()
    target = du @ weight.reshape(len(weight), -1).T.numpy()
    best = np.linalg.lstsq(du[:, kept], target, rcond=None)[0] if kept else np.zeros((0, target.shape[1]))
    return float(((target - du[:, kept] @ best) ** 2).sum() / (target**2).sum())


@given(seeds, st.integers(2, 12), st.integers(1, 5))
@few
def test_the_curve_is_the_loss_of_the_best_linear_fit(seed, channels, n_out):
    u, weight = (
        gaussian(300, channels, seed=seed) @ gaussian(channels, channels, seed=seed + 1),
        gaussian(n_out, channels, 1, seed=seed + 2),
    )
    order, curve = select_channels([(moments_of(u, weight), weight)], channels)
    assert sorted(order.tolist()) == list(range(channels)) and curve[0] == 1
    expected = [remaining(u, weight, order[:k].tolist()) for k in range(channels + 1)]
    np.testing.assert_allclose(curve, expected, atol=1e-7)
    for k in range(min(channels, 3)):  # greedy: no other channel would have done better at this step
        others = [remaining(u, weight, [*order[:k].tolist(), c]) for c in range(channels)]
        assert expected[k + 1] <= min(others) + 1e-7


@pytest.mark.parametrize(("channels", "rank"), [(16, 3), (40, 40), (512, 40)])
def test_dependent_channels_are_found_and_sound(channels, rank):
    """512 channels of rank 40: the selection ends at numerical rank, and the fit stays finite and small."""
    u = gaussian(2000, rank) @ gaussian(rank, channels, seed=1)
    weight = gaussian(64, channels, 1, seed=2)
    m = moments_of(u, weight)
    order, curve = select_channels([(m, weight)], channels)
    assert sorted(order.tolist()) == list(range(channels)) and curve.isfinite().all()
    assert (curve[1:] <= curve[:-1] + 1e-12).all() and curve[rank] < 1e-8
    assert order[rank:].tolist() == sorted(order[rank:].tolist())  # nothing is picked by rounding noise
    if rank < channels:
        assert within(1e-3)(curve) <= rank
        new, constant, error = module._fit(m, order[: rank + 8].sort().values, weight)
        assert new.isfinite().all() and constant.isfinite().all() and error < 0.1


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_selection_does_not_depend_on_scale(scale):
    u, weight = gaussian(200, 9) @ gaussian(9, 9, seed=1), gaussian(4, 9, 1, seed=2)
    plain, scaled = (select_channels([(moments_of(s * u, weight), weight)], 9) for s in (1.0, scale))
    assert torch.equal(plain[0], scaled[0]) and torch.allclose(plain[1], scaled[1], atol=1e-9)


def test_dead_channels_come_last_and_all_dead_is_no_error():
    u, weight = gaussian(100, 6), gaussian(3, 6, 1)
    u[:, [0, 4]] = 7.0  # constant: nothing that an intercept cannot give
    order, curve = select_channels([(moments_of(u, weight), weight)], 6)
    assert set(order[4:].tolist()) == {0, 4} and curve[4] < 1e-12
    order, curve = select_channels([(moments_of(0 * u, weight), weight)], 6)
    assert order.tolist() == list(range(6)) and not curve.any() and keep_ratio(0.5)(curve) == 3


def test_a_channel_that_no_reader_uses_is_not_worth_keeping():
    u, weight = gaussian(400, 5), gaussian(3, 5, 1)
    weight[:, 2] = 0
    assert int(select_channels([(moments_of(u, weight), weight)], 5)[0][-1]) == 2
    other = torch.zeros(2, 5, 1, dtype=torch.float64)
    other[:, 2] = 100.0
    order, _ = select_channels([(moments_of(u, weight), weight), (moments_of(u, other), other)], 5)
    assert 2 in order[:3].tolist()  # the other reader does


def test_widths_from_the_curve():
    curve = torch.tensor([1.0, 0.25, 0.04, 0.01, 0.0])
    assert [keep_ratio(r)(curve) for r in (0.01, 0.5, 0.75, 1.0)] == [1, 2, 3, 4]
    assert [within(t)(curve) for t in (1.0, 0.5, 0.3, 0.2, 0.15, 0.05, 0.0)] == [0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("kind", ["chain", "flatten", "tokens"])
@pytest.mark.parametrize("values", [2**26, 1])
def test_moments_do_not_depend_on_the_chunks(monkeypatch, kind, values):
    graph = network(kind, 5)
    inner = inner_of(graph)
    layer, inputs = inner.consumers[0][0], smooth_noise(graph.inputs, 9, 0)
    monkeypatch.setattr(module, "_CHUNK_VALUES", values)
    m = gather_moments(graph, graph, layer, 5, inputs)
    (value,), (y,) = (Program(graph, [name])(*inputs) for name in (layer.node.args[0].name, layer.node.name))
    u, y = module._features(value, layer, 5, True).double(), module._output_rows(y, layer).double()
    du, dy = u - u.mean(0), y - y.mean(0)
    weight = graph.tensors[layer.weight]
    for got, expected in ((m.uu, du.T @ du / len(u)), (m.uy, du.T @ dy / len(u)), (m.u, u.mean(0))):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert m.yy == pytest.approx(float(dy.square().sum() / len(u)), rel=1e-6)
    # the features and the weight are in the same order
    torch.testing.assert_close(dy, du @ weight.reshape(len(weight), -1).T.double(), rtol=1e-4, atol=1e-5)


def scaled_copies(graph, name="inner"):
    """Make the second half of the channels 0.5 to 2 times the first: through ReLU, so dependent after it."""
    inner, half = inner_of(graph, name), inner_of(graph, name).channels // 2
    factors = torch.linspace(0.5, 2, half)
    normed, changed = any("_bn" in t for t in inner.per_channel), {}
    for tensor in inner.per_channel:
        changed[tensor] = graph.tensors[tensor].clone()
        affine = tensor in (f"{name}_bn.weight", f"{name}_bn.bias")
        factor = factors if affine or not normed else torch.ones(half)
        changed[tensor][half:] = changed[tensor][:half] * factor.view(-1, *[1] * (changed[tensor].dim() - 1))
    if inner.depthwise:  # its own batch norm would undo the factor; equal channels then
        for part in ("weight", "bias"):
            changed[f"{name}_bn.{part}"][half:] = changed[f"{name}_bn.{part}"][:half]
    return graph.with_tensors(changed)


@pytest.mark.parametrize("kind", ["chain", "residual", "depthwise", "flatten", "mlp", "tokens", "branches", "bare"])
@pytest.mark.parametrize("per_tap", [True, False])
def test_half_of_the_channels_are_multiples_of_the_others(monkeypatch, kind, per_tap):
    if not per_tap:
        monkeypatch.setattr(module, "_MAX_UNKNOWNS", 0)
    graph = scaled_copies(network(kind, 12))
    inner, inputs = inner_of(graph), smooth_noise(graph.inputs, 192 if kind == "flatten" else 48, 0)
    narrow, (record,) = reconstruct(graph, graph, [inner], inputs, keep_ratio(0.5), 1)
    assert (record.kept, record.channels) == (6, 12) and record.error < 2e-3
    assert len(narrow.tensors["inner.weight"]) == 6
    assert compare_outputs(graph, narrow, smooth_noise(graph.inputs, 8, 9)).error < 1e-3


def test_any_linear_combination_can_go():
    b = Builder(3, 6, 5, seed=4)
    hidden = b.conv("x", "inner", 3, 10, bias=False)
    graph = b.graph(b.conv(hidden, "reader", 10, 4))
    mix = gaussian(5, 5).float()
    graph.tensors["inner.weight"][5:] = torch.einsum("ab,bijk->aijk", mix, graph.tensors["inner.weight"][:5])
    narrow, (record,) = reconstruct(
        graph, graph, [inner_of(graph)], smooth_noise(graph.inputs, 48, 0), keep_ratio(0.5), 1
    )
    assert record.kept == 5 and compare_outputs(graph, narrow, smooth_noise(graph.inputs, 8, 9)).error < 1e-3


def channel_means(graph, name, inputs):
    norm = [n.name for n in graph.users().get(name, []) if n.op == "aten.batch_norm.default"]
    value = Program(graph, [norm[0] if norm else name])(*inputs)[0].double()
    return value.mean([0, 2, 3]) if value.dim() == 4 else value.reshape(-1, value.shape[-1]).mean(0)


@pytest.mark.parametrize("kind", ["chain", "residual", "depthwise", "flatten", "mlp", "tokens", "branches", "bare"])
@pytest.mark.parametrize("per_tap", [True, False])
def test_the_mean_of_every_readers_output_is_preserved(monkeypatch, kind, per_tap):
    """Whether the constant goes into a bias, a batch norm's mean or a new bias, and with padding and flatten."""
    if not per_tap:
        monkeypatch.setattr(module, "_MAX_UNKNOWNS", 0)
    graph = network(kind, 10)
    inner, inputs = inner_of(graph), smooth_noise(graph.inputs, 40, 0)
    narrow, _ = reconstruct(graph, graph, [inner], inputs, keep_ratio(0.3), 1)
    for layer, _ in inner.consumers:
        torch.testing.assert_close(channel_means(narrow, layer.node.name, inputs), channel_means(graph, layer.node.name, inputs),
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("kind", ["chain", "flatten", "tokens", "bare", "branches"])
def test_the_error_reported_is_the_one_measured(kind):
    graph = network(kind, 10)
    inner, inputs = inner_of(graph), smooth_noise(graph.inputs, 40, 0)
    narrow, (record,) = reconstruct(graph, graph, [inner], inputs, keep_ratio(0.4), 1)
    errors = []
    for layer, _ in inner.consumers:
        users = graph.users().get(layer.node.name, [])
        if layer.bias is None and [n.op for n in users] == ["aten.batch_norm.default"]:
            continue  # there the constant is in the norm
        (new,), (old,) = (Program(g, [layer.node.name])(*inputs) for g in (narrow, graph))
        new, old = module._output_rows(new, layer).double(), module._output_rows(old, layer).double()
        errors.append(float((new - old).norm() / (old - old.mean(0)).norm()))
    assert errors and 0.01 < record.error
    assert record.error == pytest.approx(max(errors), rel=1e-3) or len(errors) < len(inner.consumers)


@pytest.mark.parametrize("kind", ["chain", "depthwise", "flatten", "mlp", "branches", "bare"])
def test_fitted_readers_do_much_better_than_readers_that_only_lose_columns(kind):
    graph = network(kind, 16)
    inner, inputs = inner_of(graph), smooth_noise(graph.inputs, 48, 0)
    narrow, _ = reconstruct(graph, graph, [inner], inputs, keep_ratio(0.6), 1)
    kept = narrow.tensors["inner.weight"]
    rows = [next(k for k in range(16) if torch.equal(graph.tensors["inner.weight"][k], row)) for row in kept]
    gone = [k for k in range(16) if k not in rows]
    cut = {}
    for layer, _ in inner.consumers:
        w = columns_of(graph.tensors[layer.weight], 16).clone()
        w[:, gone] = 0
        cut[layer.weight] = w.reshape(graph.tensors[layer.weight].shape)
    held_out = smooth_noise(graph.inputs, 16, 3)
    assert (
        compare_outputs(graph, narrow, held_out).error
        < 0.75 * compare_outputs(graph, graph.with_tensors(cut), held_out).error
    )


def test_errors_of_several_sets_do_not_pile_up_because_the_target_is_the_original():
    """The reader behind a narrowed (here: damaged) stem is fitted to what the intact network gives."""
    original = network("chain", 8)
    damaged = original.with_tensors({"inner_bn.weight": 0.9 * original.tensors["inner_bn.weight"]})
    inputs, inner = smooth_noise(original.inputs, 64, 0), inner_of(damaged)
    fitted, _ = reconstruct(damaged, original, [inner], inputs, lambda curve: 7, 1)
    assert compare_outputs(original, fitted, inputs).error < 0.8 * compare_outputs(original, damaged, inputs).error


@pytest.mark.parametrize("kind", ["chain", "bare", "mlp", "branches"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_all_sets_in_a_row_without_biases_too(kind, ratio):
    """A reader that was given a bias is the producer of the next set: its bias is narrowed with it."""
    graph = network(kind, 12)
    sets, _ = find_inner_channels(graph)
    narrow, records = reconstruct(graph, graph, sets, smooth_noise(graph.inputs, 24, 0), keep_ratio(ratio), 1)
    assert [r.kept for r in records] == [max(1, round(ratio * r.channels)) for r in records]
    assert compare_outputs(graph, narrow, smooth_noise(graph.inputs, 4, 1)).error < 1
    again, _ = find_inner_channels(narrow)
    assert [inner.channels for inner in again] == [r.kept for r in records]


@pytest.mark.parametrize(
    ("width", "step", "kept"), [(20, 8, 8), (20, 3, 6), (20, 1, 5), (6, 8, 6), (8, 8, 8), (9, 8, 8)]
)
def test_widths_are_multiples_and_small_sets_stay(width, step, kept):
    graph = network("chain", width)
    narrow, (record,) = reconstruct(
        graph, graph, [inner_of(graph)], smooth_noise(graph.inputs, 8, 0), keep_ratio(0.25), step
    )
    assert record.kept == kept == len(narrow.tensors["inner.weight"])
    if kept == width:
        assert narrow is graph and record.error == 0


def test_a_constant_does_not_go_into_a_batch_norm_that_others_use_or_whose_input_is_an_output():
    b = Builder(4, 5, 5)
    hidden = b.relu(b.conv("x", "inner", 4, 8))
    reader = b.conv(hidden, "reader", 8, 3, bias=False)
    first = b.norm(reader, "bn", 3)
    b.op(
        "again",
        "batch_norm.default",
        Ref("x2"),
        *(Ref(f"bn.{k}") for k in ("weight", "bias", "running_mean", "running_var")),
        False,
        0.1,
        1e-5,
        True,
    )
    b.nodes.insert(-1, type(b.nodes[0])("x2", "aten.slice.Tensor", (Ref("x"), 1, 0, 3)))
    shared = b.graph(first, "again")
    b.nodes = b.nodes[:-2]
    shown = b.graph(first, reader)
    for graph in (shared, shown):
        inputs = smooth_noise(graph.inputs, 30, 0)
        narrow, _ = reconstruct(graph, graph, [inner_of(graph)], inputs, keep_ratio(0.25), 1)
        assert torch.equal(narrow.tensors["bn.running_mean"], graph.tensors["bn.running_mean"])
        torch.testing.assert_close(
            channel_means(narrow, "reader", inputs), channel_means(graph, "reader", inputs), rtol=1e-4, atol=1e-4
        )


def test_thinning_keeps_features_and_outputs_in_step():
    assert [len(module._thin(torch.zeros(1000, 1), most)) for most in (300, 1000, 10**9)] == [250, 1000, 1000]


@pytest.mark.parametrize("mutant", ["no intercept", "wrong rows"])
def test_the_planted_network_notices_a_wrong_fit(monkeypatch, mutant):
    fit = module._fit

    def wrong(m, kept, weight):
        new, constant, error = fit(m, kept, weight)
        return (new, 0 * constant + 0.1, error) if mutant == "no intercept" else (new.flip(1), constant, error)

    graph = scaled_copies(network("chain", 12))
    monkeypatch.setattr(module, "_fit", wrong)
    narrow, _ = reconstruct(graph, graph, [inner_of(graph)], smooth_noise(graph.inputs, 16, 0), keep_ratio(0.5), 1)
    assert compare_outputs(graph, narrow, smooth_noise(graph.inputs, 8, 9)).error > 1e-2
