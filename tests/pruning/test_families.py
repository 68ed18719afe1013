"""Structured inputs without data: the same for a seed, in range, of every kind and size, and unlike noise."""

import numpy as np
import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.pruning.families import (
    IMAGE,
    MASK,
    SIGNAL,
    TABLE,
    TOKENS,
    UNKNOWN,
    Scale,
    families_of,
    kind_of,
    structured,
)

PICTURE = InputSpec("x", (3, 64, 64))
SOUND = InputSpec("x", (4000,))
ROW = InputSpec("x", (12,))
WORDS = InputSpec("x", (16,), "int64", ((0, 29),))
CATEGORIES = InputSpec("x", (4, 3), "int32", ((0, 1), (5, 9), (0, 99)))
PRESENT = InputSpec("x", (2, 90), "bool")
BYTES = InputSpec("x", (24, 16, 3), "uint8", ((0, 255),))
EVERY = (PICTURE, SOUND, ROW, WORDS, CATEGORIES, PRESENT, BYTES)
CASES = [(spec, family) for spec in EVERY for family in families_of(spec)]


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
        ((), "float32", TABLE),
        ((), "bool", MASK),
        ((), "int64", UNKNOWN),
        ((16,), "int64", UNKNOWN),
        ((4, 9), "int32", UNKNOWN),
        ((2, 16000), "float32", UNKNOWN),
        ((16,), "bool", MASK),
        ((32, 48, 3), "float32", IMAGE),
        ((8, 8, 1), "float32", IMAGE),
        ((8, 3, 8), "float32", UNKNOWN),
    ],
)
def test_the_kind_follows_from_shape_and_dtype(shape, dtype, kind):
    spec = InputSpec("x", shape, dtype)
    assert kind_of(spec) == kind
    assert len(families_of(spec)) >= {IMAGE: 4, UNKNOWN: 0}.get(kind, 3)
    assert bool(families_of(spec)) == (kind != UNKNOWN)
    assert all(structured(spec, 2, 0, family).shape == (2, *shape) for family in families_of(spec)[:3])


@pytest.mark.parametrize(
    ("shape", "dtype", "ranges", "kind"),
    [
        ((16,), "int64", ((0, 999),), TOKENS),
        ((4, 9), "int32", ((0, 1), (0, 4), (0, 2)), TOKENS),
        ((16,), "int64", ((0, 1),), MASK),
        ((3, 16, 16), "uint8", ((0, 255),), IMAGE),
        ((16, 16, 4), "int64", ((0, 65535),), IMAGE),
        ((1, 16, 16), "int64", ((0, 20),), TOKENS),
        ((64,), "uint8", ((0, 255),), TOKENS),
        ((64,), "uint8", (), UNKNOWN),
    ],
)
def test_the_kind_of_integers_follows_from_their_range(shape, dtype, ranges, kind):
    assert kind_of(InputSpec("x", shape, dtype, ranges)) == kind


def test_tokens_and_masks_stay_in_their_ranges():
    for spec, ranges in ((WORDS, [(0, 29)] * 3), (CATEGORIES, CATEGORIES.ranges), (PRESENT, [(0, 1)] * 3)):
        for family in families_of(spec):
            made = structured(spec, 201, 3, family).reshape(-1, 3) + 0
            assert [(int(column.min()), int(column.max())) for column in made.T] == list(ranges), (spec, family)


def test_masks_leave_something_and_hide_something():
    for family in families_of(PRESENT):
        mask = structured(PRESENT, 100, 0, family).float().mean(2)
        assert mask.min() > 0 and mask.max() < 1
    assert structured(PRESENT, 9, 0, "padded").float().diff(dim=2).max() == 0  # ones, then zeros


def test_pictures_of_bytes_are_those_of_floats():
    floats = structured(InputSpec("x", (3, 24, 16)), 4, 5, "leaves")
    made = structured(BYTES, 4, 5, "leaves")
    assert made.dtype is torch.uint8 and made.max() > 200
    assert torch.equal(made, (255 * floats).round().to(torch.uint8).permute(0, 2, 3, 1))
    last = structured(InputSpec("x", (24, 16, 3)), 4, 5, "leaves", Scale((0.5, 0.4, 0.3), (0.2, 0.1, 0.3)))
    assert torch.equal(last, Scale((0.5, 0.4, 0.3), (0.2, 0.1, 0.3)).apply(floats).permute(0, 2, 3, 1))


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
    sound = structured(SOUND, 2, 1, "speech")
    assert torch.allclose(structured(SOUND, 2, 1, "speech", Scale((0.0,), (2**-15,))), 2**15 * sound)
