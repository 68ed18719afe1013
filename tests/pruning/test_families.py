"""Structured inputs without data: the same for a seed, in range, of every kind and size, and unlike noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec, Ref
from redpp_serve.pruning.families import (
    IMAGE,
    SIGNAL,
    TABLE,
    TOKENS,
    UNKNOWN,
    Scale,
    estimate_scale,
    families_of,
    kind_of,
    structured,
)
from tests.support.networks import Builder, calibrated, network

PICTURE = InputSpec("x", (3, 64, 64))
SOUND = InputSpec("x", (4000,))
ROW = InputSpec("x", (12,))
WORDS = InputSpec("x", (16,), "int64")
CASES = [(spec, family) for spec in (PICTURE, SOUND, ROW, WORDS) for family in families_of(spec)]


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((3, 224, 224), "float32", IMAGE),
        ((1, 28, 28), "float32", IMAGE),
        ((4, 8, 512), "float16", IMAGE),
        ((3, 7, 224), "float32", UNKNOWN),
        ((2, 32, 32), "float32", UNKNOWN),
        ((16000,), "float32", SIGNAL),
        ((1, 256), "float32", SIGNAL),
        ((255,), "float32", TABLE),
        ((1, 30), "float64", TABLE),
        ((16,), "int64", TOKENS),
        ((4, 9), "int32", TOKENS),
        ((2, 16000), "float32", UNKNOWN),
        ((16,), "bool", UNKNOWN),
    ],
)
def test_the_kind_follows_from_shape_and_dtype(shape, dtype, kind):
    spec = InputSpec("x", shape, dtype)
    assert kind_of(spec) == kind
    assert len(families_of(spec)) >= {IMAGE: 4, UNKNOWN: 0}.get(kind, 3)
    assert bool(families_of(spec)) == (kind != UNKNOWN)


@pytest.mark.parametrize(("spec", "family"), CASES)
def test_an_input_depends_on_family_seed_and_place_alone(spec, family):
    two, three, other = (structured(spec, n, seed, family) for n, seed in ((2, 7), (3, 7), (2, 8)))
    assert two.shape == (2, *spec.shape) and two.dtype == getattr(torch, spec.dtype)
    assert torch.equal(two, three[:2]) and not torch.equal(two, other)
    assert len({tuple(x.flatten().tolist()) for x in three}) == 3
    assert structured(spec, 0, 7, family).shape == (0, *spec.shape)


def test_small_grey_images_show_marks_first_and_others_mixtures():
    assert families_of(InputSpec("x", (1, 28, 28)))[0] == "glyphs" and families_of(PICTURE)[0] == "mixed"
    assert set(families_of(InputSpec("x", (1, 28, 28)))) == set(families_of(PICTURE))
    marks = structured(InputSpec("x", (1, 28, 28)), 24, 0)
    border = torch.cat([marks[..., 0], marks[..., -1]], dim=2).flatten(1)
    assert float((border.std(dim=1) < 0.02).float().mean()) > 0.9  # plain paper around one mark in the middle


def test_an_unknown_kind_or_family_is_refused():
    with pytest.raises(RedppError, match="no family of inputs 'speech'.*one of mixed"):
        structured(PICTURE, 1, 0, "speech")
    with pytest.raises(RedppError, match="--inputs"):
        structured(InputSpec("x", (2, 2, 2)), 1, 0)


@pytest.mark.parametrize("family", families_of(PICTURE))
@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 28, 28), (3, 70, 33)])
def test_pictures_fill_their_range_at_any_size(shape, family):
    x = structured(InputSpec("x", shape), 3, 3, family)
    assert x.shape == (3, *shape) and x.isfinite().all() and float(x.min()) >= 0 and float(x.max()) <= 1
    assert (x.flatten(1).std(dim=1) > 0.005).all() and float(x.std()) > 0.08


def slope(x):
    """Return the exponent of the falling power spectrum of images (N, channels, side, side)."""
    grey = x.mean(dim=1).double().numpy()
    window = np.hanning(grey.shape[1])[:, None] * np.hanning(grey.shape[2])
    power = np.abs(np.fft.fft2((grey - grey.mean(axis=(1, 2), keepdims=True)) * window)) ** 2
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(grey.shape[1])] * 2))
    band = (radius > 3 / grey.shape[1]) & (radius < 0.35)
    logs = np.log(power.mean(axis=0)[band])
    return -np.polyfit(np.log(radius[band]), logs, 1)[0]


def peakedness(x):
    """Return the kurtosis of the differences between neighbours: 3 for Gaussian noise, more for edges."""
    step = (x[..., 1:] - x[..., :-1]).double()
    return float((step**4).mean() / (step**2).mean() ** 2)


@pytest.mark.parametrize("family", families_of(PICTURE))
def test_pictures_have_the_statistics_of_photographs(family):
    x = structured(PICTURE, 16, 5, family)
    assert 1.2 < slope(x) < 3.5 and peakedness(x) > 5
    centred = x - x.mean(dim=(2, 3), keepdim=True)
    assert np.corrcoef(centred.transpose(0, 1).flatten(1).numpy()).min() > 0.6
    contrast = x.mean(dim=1).flatten(1).std(dim=1)
    assert float(contrast.max() / contrast.min()) > 1.5
    noise = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert abs(slope(noise)) < 0.3 and peakedness(noise) < 5  # what the figures above would be


def test_a_scale_maps_the_range_of_images():
    x = structured(PICTURE, 2, 1, "leaves")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    scaled = structured(PICTURE, 2, 1, "leaves", Scale(mean, std))
    for c in range(3):
        assert torch.allclose(scaled[:, c], (x[:, c] - mean[c]) / std[c])
    assert torch.allclose(structured(PICTURE, 2, 1, "leaves", Scale((1.0,), (-1.0,))), 1 - x, atol=1e-6)


def reads_images(channels):
    """Return a small network with batch norm for images of 24x24, not trained yet."""
    b = Builder(channels, 24, 24, seed=channels)
    b.inputs = [InputSpec("x", (channels, 24, 24))]
    x = b.relu(b.norm(b.conv("x", "stem", channels, 12), "stem_bn", 12))
    return b.graph(b.linear(b.mean(b.relu(b.norm(b.conv(x, "next", 12, 12), "next_bn", 12))), "head", 12, 3))


RANGES = [Scale((0.0,), (1.0,)), Scale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), Scale((0.0,), (1 / 255,))]


@pytest.mark.parametrize("scale", RANGES)
def test_the_range_is_found_from_batch_norms_that_were_trained_in_it(scale):
    graph = reads_images(3)
    pictures = structured(graph.inputs[0], 16, 9, "scenes", scale)  # a family that the estimate does not use
    assert estimate_scale(calibrated(graph, (pictures,))) == scale


def test_the_range_of_a_standardised_grey_data_set_is_nearly_found():
    graph, scale = reads_images(1), Scale((0.3,), (0.35,))
    pictures = structured(graph.inputs[0], 16, 9, "scenes", scale)
    found = estimate_scale(calibrated(graph, (pictures,)))
    assert found.mean[0] == pytest.approx(0.3, abs=0.21) and found.std[0] == pytest.approx(0.35, abs=0.11)


def test_the_range_is_that_of_raw_pictures_where_nothing_tells():
    assert estimate_scale(network("mlp")) == Scale() == estimate_scale(network("chain"))  # no image, too small
    graph = reads_images(1)
    two = replace(graph, inputs=(*graph.inputs, InputSpec("y", (1, 24, 24))))
    assert estimate_scale(two) == Scale()


@pytest.mark.parametrize("scale", [Scale(), Scale((1.0,), (-1.0,)), Scale((0.1307,), (0.3081,))])
def test_the_range_of_a_classifier_without_batch_norm_follows_from_its_scores(scale):
    """Templates of marks tell marks from each other in their own range best, and surely, as trained networks do."""
    spec = InputSpec("x", (1, 16, 16))
    b = Builder(*spec.shape)
    templates = structured(spec, 10, 3, "glyphs", scale).flatten(1)
    weight = b.tensor("head.weight", 20 * templates)
    bias = b.tensor("head.bias", -10 * templates.square().sum(dim=1))
    graph = b.graph(b.op("head", "linear.default", Ref(b.flatten("x")), weight, bias))
    assert estimate_scale(graph) == scale
