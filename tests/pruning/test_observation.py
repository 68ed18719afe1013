"""One pass gathers moments as NumPy has them; the selection's curve is the loss of the best linear fits."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.executor import Program
from redpp_serve.pruning import observation as module
from redpp_serve.pruning import piecewise
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.observation import Selection, observe, samples, select, select_channels, spread
from tests.support.networks import Builder, few, network, permuted, seeds


def test_moments_are_those_of_the_values(monkeypatch):
    for kind, values in product(("chain", "residual", "flatten", "mlp", "tokens", "branches"), (2**24, 1)):
        monkeypatch.setattr(piecewise, "_CHUNK_VALUES", values)
        graph = network(kind, 5)
        inputs = smooth_noise(graph.inputs, 9, 0)
        found = observe(couple(graph), inputs)
        for channel_set in found.coupling.open:
            for reader in channel_set.readers:
                x, y = Program(graph, [reader.value, reader.node])(*inputs)
                rows = x.movedim(reader.axis, -1).flatten(0, -2).double().numpy()
                each = [np.cov(rows[:, reader.positions[:, j]].T, bias=True) for j in range(reader.positions.shape[1])]
                gram = found.grams[channel_set.name, reader.value]
                np.testing.assert_allclose(gram, np.mean(each, axis=0), rtol=1e-4, atol=1e-6)
                np.testing.assert_allclose(found.means[reader.value], x.double().mean(0), rtol=1e-4, atol=1e-6)
                power = np.var(y.movedim(1 if y.dim() == 4 else -1, -1).flatten(0, -2).double().numpy(), axis=0).sum()
                assert found.power[reader.node] == pytest.approx(power, rel=1e-5)


def test_taps_correlate_as_patches_do(monkeypatch):
    monkeypatch.setattr(module, "chunk_size", lambda graph, images: images)
    graph = network("chain", 4)
    inputs = smooth_noise(graph.inputs, 8, 0)
    found = observe(couple(graph), inputs)
    (value,) = Program(graph, ["inner_bn_relu"])(*inputs)
    centred = value.double() - value.double().mean((0, 2, 3), keepdim=True)
    patches = F.unfold(centred, 3, padding=2).view(8, 4, 9, -1)  # every place at which any tap sees anything
    cross = torch.einsum("nctp,ncsp->ts", patches, patches)
    torch.testing.assert_close(found.taps["second"], cross / cross[4, 4], rtol=1e-6, atol=1e-8)
    assert torch.linalg.eigvalsh(found.taps["second"]).min() > -1e-9
    assert found.taps["head"].tolist() == [[1.0]]


def test_entries_of_a_channel_correlate_behind_a_flatten():
    graph = network("flatten", 4)
    inputs = smooth_noise(graph.inputs, 16, 0)
    found = observe(couple(graph), inputs)
    (value,) = Program(graph, ["pool"])(*inputs)
    entries = (value - value.mean(0)).double().flatten(2)  # (N, channels, H * W)
    cross = torch.einsum("ncs,nct->st", entries, entries)
    expected = cross / cross.diagonal().mean()
    torch.testing.assert_close(found.entries["inner", "pool_flat"], expected, rtol=1e-4, atol=1e-6)


def test_picks_are_the_same_places_of_every_value():
    channels = torch.arange(3 * 40 * 5.0).view(3, 5, 8, 5)
    picks = spread(channels, 1, 7)
    assert 14 <= len(picks) <= 3 * 7
    torch.testing.assert_close(samples(channels, 1, picks), samples(channels, 1)[picks])
    last = channels.movedim(1, -1)
    torch.testing.assert_close(samples(last, -1, picks), samples(channels, 1, picks))
    torch.testing.assert_close(samples(last, 3, picks), samples(channels, 1, picks))
    assert torch.equal(spread(channels, 1, 10**9), torch.arange(120))


def test_wide_inputs_are_thinned(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLES", 4)
    graph = network("chain", 6)
    found = observe(couple(graph), smooth_noise(graph.inputs, 64, 0))
    assert all(torch.linalg.eigvalsh(gram).min() > -1e-6 for gram in found.grams.values())


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reading(u, weight):
    """Second moments of u (samples, channels) and the use that a weight (n_out, channels) makes of them."""
    du = u - u.mean(0)
    return du.T @ du / len(u), weight.T @ weight


def lost(readings, kept):
    """What the best linear use of the kept channels loses, summed over readings of (u, weight), by NumPy."""
    total = 0.0
    for u, weight in readings:
        du = (u - u.mean(0)).numpy()
        target = du @ weight.T.numpy()
        best = np.linalg.lstsq(du[:, kept], target, rcond=None)[0] if kept else np.zeros((0, target.shape[1]))
        total += ((target - du[:, kept] @ best) ** 2).sum() / len(u)
    return total


@given(seeds, st.integers(2, 12), st.integers(1, 5), st.integers(1, 3))
@few
def test_the_curve_is_the_loss_of_the_best_linear_fits(seed, channels, n_out, values):
    pairs = []
    for k in range(values):
        u = gaussian(300, channels, seed=seed + k) @ gaussian(channels, channels, seed=seed + 5 + k)
        pairs.append((u, gaussian(n_out, channels, seed=seed + 10 + k)))
    order, curve = select_channels([reading(*pair) for pair in pairs])
    assert sorted(order.tolist()) == list(range(channels)) and curve[0] == 1
    expected = [lost(pairs, order[:k].tolist()) / lost(pairs, []) for k in range(channels + 1)]
    np.testing.assert_allclose(curve, expected, atol=1e-7)
    for k in range(min(channels, 3)):  # greedy: no other channel would have done better at this step
        others = [lost(pairs, [*order[:k].tolist(), c]) / lost(pairs, []) for c in range(channels)]
        assert expected[k + 1] <= min(others) + 1e-7


def test_dependent_channels_are_found_and_nothing_is_picked_by_rounding_noise():
    for channels, rank in ((16, 3), (40, 40), (512, 40)):
        u = gaussian(2000, rank) @ gaussian(rank, channels, seed=1)
        order, curve = select_channels([reading(u, gaussian(64, channels, seed=2))])
        assert sorted(order.tolist()) == list(range(channels)) and curve.isfinite().all()
        assert (curve[1:] <= curve[:-1] + 1e-12).all() and curve[rank] < 1e-8
        assert order[rank:].tolist() == sorted(order[rank:].tolist())


def test_channels_that_depend_in_one_value_only_are_both_kept():
    """After one activation two channels are the same, before it they are not."""
    plain = gaussian(500, 4)
    merged = plain.clone()
    merged[:, 1] = merged[:, 0]
    weight = torch.eye(4, dtype=torch.float64)
    assert set(select_channels([reading(merged, weight)])[0][:3].tolist()) != {0, 1}
    _, curve = select_channels([reading(merged, weight), reading(plain, weight)])
    assert curve[3] > 0.05


def test_the_selection_does_not_depend_on_scale():
    for scale in (1e-12, 1.0, 1e12):
        u, weight = gaussian(200, 9) @ gaussian(9, 9, seed=1), gaussian(4, 9, seed=2)
        plain, scaled = (select_channels([reading(s * u, weight)]) for s in (1.0, scale))
        assert torch.equal(plain[0], scaled[0]) and torch.allclose(plain[1], scaled[1], atol=1e-9)


def test_dead_channels_come_last_and_all_dead_is_no_error():
    u, weight = gaussian(100, 6), gaussian(3, 6)
    u[:, [0, 4]] = 7.0  # constant: nothing that an intercept cannot give
    order, curve = select_channels([reading(u, weight)])
    assert set(order[4:].tolist()) == {0, 4} and curve[4] < 1e-12
    order, curve = select_channels([reading(0 * u, weight)])
    assert order.tolist() == list(range(6)) and not curve[1:].any()


def test_a_channel_that_no_reader_uses_is_not_worth_keeping():
    u, weight, other = gaussian(400, 5), gaussian(3, 5, seed=1), torch.zeros(2, 5, dtype=torch.float64)
    weight[:, 2] = 0
    assert int(select_channels([reading(u, weight)])[0][-1]) == 2
    other[:, 2] = 100.0
    assert 2 in select_channels([reading(u, weight), reading(u, other)])[0][:3].tolist()


def test_kept_channels_are_ascending():
    assert Selection(torch.tensor([3, 0, 2, 1]), torch.zeros(5)).kept(3).tolist() == [0, 2, 3]


def test_the_order_follows_a_permutation_of_the_channels():
    for kind in ("chain", "residual", "depthwise", "flatten", "mlp", "tokens", "branches", "bare"):
        graph, order = network(kind, 9), torch.tensor([4, 2, 7, 0, 8, 1, 6, 3, 5])
        inputs = smooth_noise(graph.inputs, 24, 0)
        plain, moved = (select(observe(couple(g), inputs))["inner"] for g in (graph, permuted(graph, order)))
        torch.testing.assert_close(moved.curve, plain.curve, rtol=1e-3, atol=1e-6)
        assert order[moved.order].tolist() == plain.order.tolist()


def test_smooth_inputs_are_worth_more_to_a_kernel_that_sums_than_to_one_that_takes_differences():
    """Two channels of the same smooth content and weights of the same size: the sum's output is far larger."""
    b = Builder(2, 12, 12)
    hidden = b.conv("x", "inner", 2, 2, k=1)
    graph = b.graph(b.conv(hidden, "reader", 2, 3))
    graph.tensors["inner.weight"].copy_(torch.eye(2)[:, :, None, None])
    graph.tensors["reader.weight"][:, 0] = 1.0
    graph.tensors["reader.weight"][:, 1] = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1]).view(3, 3)
    for flipped in (False, True):
        weight = graph.tensors["reader.weight"]
        planted = graph.with_tensors({"reader.weight": weight.flip(1) if flipped else weight})
        found = select(observe(couple(planted), smooth_noise(graph.inputs, 24, 0)))["inner"]
        assert found.order.tolist() == ([1, 0] if flipped else [0, 1]) and found.curve[1] < 0.2
