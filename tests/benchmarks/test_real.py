"""The benchmark on real networks measures what it says, and never evaluates on what may be fitted."""

import struct

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("scipy")
from benchmarks import real_data, real_scores
from benchmarks.real_data import Photograph, is_evaluated, split_by_photograph, webp_images, without_copies
from benchmarks.real_scores import centred_error, clopper_pearson, score


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_constant_that_all_inputs_share_is_no_error() -> None:
    expected = torch.randn(50, 7, generator=generator())
    assert centred_error(expected + torch.arange(7.0), expected) == pytest.approx(0, abs=1e-6)


def test_a_common_constant_does_not_make_an_error_look_small() -> None:
    expected = torch.randn(50, 7, generator=generator())
    noise = 0.3 * torch.randn(50, 7, generator=generator(1))
    plain = centred_error(expected + noise, expected)
    assert centred_error(100 + expected + noise, 100 + expected) == pytest.approx(plain, rel=1e-4)
    assert plain == pytest.approx(0.3, rel=0.15)


def test_an_output_that_ignores_its_input_has_error_one() -> None:
    expected = torch.randn(50, 7, generator=generator())
    assert centred_error(torch.ones(50, 7), expected) == pytest.approx(1)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"), [(16, 16, 0.7941, 1.0), (0, 10, 0.0, 0.3085), (81, 100, 0.7193, 0.8816)]
)
def test_intervals_are_those_of_tables(hits: int, trials: int, low: float, high: float) -> None:
    assert clopper_pearson(hits, trials) == pytest.approx((low, high), abs=2e-4)


def test_a_score_counts_agreement_and_labels_apart() -> None:
    expected = torch.eye(8)[:4]
    outputs = torch.eye(8)[[0, 1, 2, 7]] + 0.5 * torch.eye(8)[[1, 2, 3, 3]] - 0.01 * torch.arange(8)
    found = score(outputs, expected, [(0,), (2, 5), (), (6,)])
    assert (found.images, found.agreement, found.labelled) == (4, 0.75, 3)
    assert (found.right, found.right_in_five) == (1, 2)  # the third label is among the five, the last is not
    assert found.low < 0.75 < found.high


def test_without_labels_there_is_no_accuracy() -> None:
    assert score(torch.eye(3), torch.eye(3), [()] * 3).right is None


def of_names(*names: str) -> list[Photograph]:
    return [Photograph(name, bytes) for name in names]


def test_halves_share_no_photograph_and_do_not_move_with_what_is_missing() -> None:
    everything = of_names(*(f"p{k}" for k in range(300)))
    evaluated, fitted = ({p.name for p in half} for half in split_by_photograph(everything, 0.6))
    assert not evaluated & fitted and len(evaluated | fitted) == 300
    assert 0.5 < len(evaluated) / 300 < 0.7
    fewer, _ = split_by_photograph(everything[::3], 0.6)
    assert {p.name for p in fewer} == evaluated & {p.name for p in everything[::3]}
    assert all(is_evaluated(p.name, 0.6) for p in fewer)


def test_a_second_view_of_a_scene_is_left_out() -> None:
    rng = np.random.default_rng(0)
    left, other = rng.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    right = (0.8 * left + 10 + rng.normal(0, 3, left.shape)).astype(np.uint8)
    kept = without_copies(of_names("left", "right", "other"), [left, right, other])
    assert [p.name for p in kept] == ["left", "other"]


def test_images_are_found_in_a_resource_file() -> None:
    first, second = (b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body for body in (b"one", b"RIFFtwo"))
    box = b"head" + first + b"RIFF\x04\0\0\0WAVE" + second + b"RIFF\xff\xff\0\0WEBPcut"
    assert list(webp_images(box)) == [first, second]


def test_crops_follow_from_the_name_alone() -> None:
    rng = np.random.default_rng(1)
    image = real_data.Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8))
    crops = [real_data.random_crop(image, real_data._generator(name)) for name in ("a", "a", "b")]
    assert crops[0].shape == (real_data.SIDE, real_data.SIDE, 3)
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])
    assert real_data.middle(image).shape == crops[0].shape


def test_modules_and_graphs_run_in_chunks() -> None:
    module = nn.Linear(3, 2).eval()
    inputs = torch.randn(19, 3, generator=generator())
    assert torch.allclose(real_scores.run(module, inputs), module(inputs))
