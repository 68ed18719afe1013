"""What one pass gathers: moments as NumPy has them, however the inputs are divided."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from redpp_serve.channels.coupling import couple
from redpp_serve.graph.executor import Program
from redpp_serve.pruning import observation as module
from redpp_serve.pruning import piecewise
from redpp_serve.pruning.inputs import smooth_noise
from redpp_serve.pruning.observation import observe, samples, spread
from tests.support.networks import network


@pytest.mark.parametrize("kind", ["chain", "residual", "flatten", "mlp", "tokens", "branches"])
@pytest.mark.parametrize("values", [2**24, 1])
def test_moments_are_those_of_the_values(monkeypatch, kind, values):
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
