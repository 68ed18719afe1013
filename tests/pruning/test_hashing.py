"""Codebooks: the target is met and not undershot, errors are those measured, and edge cases stay sane."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redpp_serve.options import HASHES, HashTarget
from redpp_serve.pruning import hashing
from redpp_serve.pruning.density import build_grid
from redpp_serve.pruning.hashing import at_entropy, fit_codebook, hash_weight, quantise, retuned
from tests.support.networks import few, many, seeds

pytestmark = pytest.mark.usefixtures("alone")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="module")
def alone():
    """No codebooks of the other methods, which take most of the time, but in the test that looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "HASHES", ())
        yield


def gaussian(n=60_000, seed=0, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def measured(before, after):
    before, after = before.double(), after.double()
    return float((before - after).norm() / before.norm().clamp_min(1e-300))


@pytest.mark.parametrize("method", HASHES)
def test_an_error_target_is_met_from_below_and_not_wasted(method):
    w = gaussian(30_000).view(300, 100)
    for target in (0.005, 0.02, 0.05, 0.1):
        hashed = hash_weight(w, method, HashTarget(error=target))
        assert 0.8 * target <= measured(w, hashed.weight) <= target, target
        assert len(hashed.weight.unique()) == hashed.codebook.size, target


@pytest.mark.parametrize("method", HASHES)
def test_a_number_of_values_is_met(method):
    w = gaussian(30_000)
    for values in (4, 16, 61):
        hashed = hash_weight(w, method, HashTarget(values=values))
        assert 1 <= len(hashed.weight.unique()) == hashed.codebook.size <= values
        if method != "kde":  # a density cannot have any number of modes
            assert hashed.codebook.size >= values - 1, values


def test_kmeans_is_the_quantiser_of_lloyd_and_max():
    """J. Max, Quantizing for minimum distortion, IRE Trans. IT-6 (1960), table I: relative mean squared errors."""
    grid = build_grid(gaussian(400_000))
    for values, optimum in ((4, 0.1175), (8, 0.03454), (16, 0.009497)):
        error = fit_codebook(grid, "kmeans", HashTarget(values=values)).error
        assert error**2 == pytest.approx(optimum, rel=0.03), values


def test_kmeans_is_not_worse_than_lloyds_algorithm_on_the_weights():
    w = torch.cat([gaussian(3000), 0.2 * gaussian(3000, 1) + 2]).double()
    for values in (3, 10, 40):
        mine = measured(w, hash_weight(w, "kmeans", HashTarget(values=values)).weight)
        centres = torch.quantile(w, torch.linspace(0, 1, 2 * values + 1, dtype=torch.float64)[1::2])
        for _ in range(200):
            centres = means(w, nearest(w, centres))
        assert mine <= 1.03 * measured(w, centres[nearest(w, centres)]), values


def nearest(w, centres):
    """The cell of each weight, (n,), for ascending centres."""
    return torch.bucketize(w, (centres[1:] + centres[:-1]) / 2)


def means(w, cell):
    """The mean of each cell that holds a weight."""
    count = torch.bincount(cell)
    return (torch.bincount(cell, w) / count)[count > 0]


@pytest.mark.parametrize("method", HASHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_and_the_frequencies_are_those_measured(method, dtype):
    """With zeros among weights that lie elsewhere, the cells on both sides of zero's own share a value."""
    plain = gaussian(20_000, dtype=dtype)
    with_zeros = plain + 2
    with_zeros[:500] = 0
    for w, target in itertools.product((plain, with_zeros), (HashTarget(error=0.03), HashTarget(values=20))):
        hashed = hash_weight(w, method, target)
        book = hashed.codebook
        assert hashed.weight.dtype == dtype and hashed.weight.shape == w.shape
        assert book.error == pytest.approx(measured(w, hashed.weight), rel=1e-6)
        if target.error:
            assert measured(w, hashed.weight) <= target.error
        values, count = hashed.weight.unique(return_counts=True)
        by_value = {}
        for v, f in zip(book.values.tolist(), book.frequencies.tolist(), strict=True):
            by_value[v] = by_value.get(v, 0.0) + f
        shares = {v: n / len(w) for v, n in zip(values.tolist(), count.tolist(), strict=True)}
        assert shares == pytest.approx({v: f for v, f in by_value.items() if f})
        p = count.double() / len(w)
        assert book.entropy == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-9)


@given(
    seeds,
    st.sampled_from(HASHES),
    st.sampled_from([HashTarget(error=0.02), HashTarget(error=0.2), HashTarget(values=7)]),
    st.integers(1, 700),
)
@many
def test_hashing_again_changes_nothing(seed, method, target, n):
    once = hash_weight(gaussian(n, seed), method, target).weight
    twice = hash_weight(once, method, target)
    assert torch.equal(twice.weight, once) and twice.codebook.error == 0


@given(
    seeds, st.sampled_from(HASHES), st.floats(0.01, 0.3), st.sampled_from([1e-30, 1e-12, 1.0, 1e20]), st.floats(-3, 3)
)
@few
def test_any_scale_and_offset_meets_the_target(seed, method, target, scale, offset):
    w = (gaussian(400, seed, torch.float64) + offset) * scale
    hashed = hash_weight(w, method, HashTarget(error=target))
    assert measured(w, hashed.weight) <= target * (1 + 1e-9)
    assert torch.isfinite(hashed.weight).all()


EDGES = {
    "zeros": torch.zeros(4, 3, 3),
    "few zeros": torch.zeros(2),
    "one weight": torch.tensor([[-0.7]]),
    "one zero": torch.tensor([0.0]),
    "constant": torch.full((30, 30), 0.3),
    "short constant": torch.full((5,), -2.0),
    "two values": torch.tensor([1.0, -1.0]).repeat(500),
    "nearly constant": 1 + 1e-6 * gaussian(900),
    "subnormal": 1e-40 * gaussian(900),
    "huge": 1e37 * gaussian(900),
}


@pytest.mark.parametrize("case", EDGES)
def test_edge_cases(case):
    w = EDGES[case]
    for method, target in itertools.product(HASHES, (HashTarget(error=0.02), HashTarget(values=4))):
        hashed = hash_weight(w, method, target)
        assert hashed.weight.shape == w.shape and torch.isfinite(hashed.weight).all(), (method, target)
        assert measured(w, hashed.weight) <= (target.error or math.inf), method
        assert len(hashed.weight.unique()) <= (target.values or math.inf), method
        if len(w.unique()) <= 2:
            assert torch.equal(hashed.weight, w) and hashed.codebook.error == 0, (method, target)


@pytest.mark.parametrize("method", HASHES)
def test_an_outlier_a_million_sigmas_out_is_kept_and_the_error_told(method):
    w = torch.cat([gaussian(5000), torch.tensor([1e6])])
    hashed = hash_weight(w, method, HashTarget(error=0.02))
    assert float(hashed.weight[-1]) == pytest.approx(1e6, rel=0.02)
    assert measured(w, hashed.weight) <= 0.02
    assert hashed.codebook.error == pytest.approx(measured(w, hashed.weight), abs=1e-8)


@pytest.mark.parametrize("method", HASHES)
def test_outliers_of_a_hundred_sigmas_do_not_spoil_the_target(method):
    w = torch.cat([gaussian(50_000), torch.tensor([-100.0, 100.0])])
    assert 0.5 * 0.01 < measured(w, hash_weight(w, method, HashTarget(error=0.01)).weight) <= 0.01


@pytest.mark.parametrize("method", HASHES)
def test_zeros_stay_zeros(method):
    targets = HashTarget(error=0.02), HashTarget(error=0.3), HashTarget(values=5)
    for target, share, offset in itertools.product(targets, (0.001, 0.5, 0.98), (0.0, 1.0)):
        w = gaussian(8_000) + offset
        zeros = torch.rand(len(w), generator=torch.Generator().manual_seed(1)) < share
        w[zeros] = 0
        hashed = hash_weight(w, method, target)
        case = target, share, offset
        assert (hashed.weight[zeros] == 0).all(), case
        assert hashed.codebook.error == pytest.approx(measured(w, hashed.weight), rel=1e-6), case
        assert measured(w, hashed.weight) <= (target.error or 1), case
        assert len(hashed.weight.unique()) <= (target.values or math.inf), case


def test_zeros_far_from_any_value_have_a_cell_of_one_bin():
    """Weights beside zero keep the value of the cell around it, which lies on both sides of zero's own."""
    w = gaussian(20_000) + 0.7
    w[:200] = 0
    grid = build_grid(w)
    book = fit_codebook(grid, "kmeans", HashTarget(values=6))
    (zero,) = np.flatnonzero(book.values == 0)
    place = int(grid.bin_of(torch.zeros(1)))
    assert book.borders[zero - 1 : zero + 1].tolist() == [place, place + 1]
    assert book.values[zero - 1] == book.values[zero + 1] != 0
    beside = torch.tensor([-1.5, 1.5], dtype=torch.float64) * grid.step
    assert (quantise(beside, grid, book) != 0).all()


def test_weights_of_a_quantised_network_are_left_alone():
    w = (gaussian(9000) * 20).round() / 20
    hashed = hash_weight(w, "kde", HashTarget(error=0.1))
    assert hashed.weight is w and hashed.codebook.method == "unchanged" and hashed.codebook.size == len(w.unique())
    assert len(hash_weight(w, "kde", HashTarget(values=8)).weight.unique()) <= 8


def test_a_weight_whose_sample_has_fewer_values_than_it_is_hashed():
    """Every second weight is looked at first, which has 8 of the 16 values."""
    w = (torch.arange(20_000) % 2 * 8 + torch.arange(20_000) // 2 % 8) / 16
    assert len(w[::2].unique()) == 8 and len(w.unique()) == 16
    assert len(hash_weight(w, "kmeans", HashTarget(values=8)).weight.unique()) == 8


def test_a_weight_that_is_left_alone_tells_how_often_it_has_each_value():
    book = hash_weight(torch.tensor([0.5, -1.0, 0.5, 0.5]).repeat(500), "kde", HashTarget(error=0.1)).codebook
    assert (book.method, book.values.tolist(), book.frequencies.tolist()) == ("unchanged", [-1.0, 0.5], [0.25, 0.75])
    assert book.entropy == pytest.approx(0.811278, abs=1e-6)


def test_a_codebook_of_256_values_counts_as_quantised_and_one_more_does_not():
    for values, left_alone in ((256, True), (257, False)):
        w = torch.arange(values).repeat(40) / 16 + 1
        assert (hash_weight(w, "kde", HashTarget(error=0.1)).weight is w) == left_alone, values


@pytest.mark.parametrize("method", HASHES)
def test_a_target_out_of_reach_leaves_the_weight_alone(method):
    w = gaussian(3000)
    hashed = hash_weight(w, method, HashTarget(error=1e-4))
    assert measured(w, hashed.weight) <= 1e-4 and hashed.codebook.error <= 1e-4


def test_alternatives_have_at_most_the_entropy(monkeypatch):
    monkeypatch.setattr(hashing, "HASHES", HASHES)
    hashed = hash_weight(gaussian(), "kde", HashTarget(error=0.05))
    assert set(hashed.alternatives) == set(HASHES) and hashed.alternatives["kde"] is hashed.codebook
    for book in hashed.alternatives.values():
        assert 0.9 * hashed.codebook.entropy < book.entropy <= hashed.codebook.entropy + 1e-6
    assert hashed.alternatives["uniform"].error < hashed.alternatives["kmeans"].error < hashed.codebook.error


def test_at_entropy_reaches_down_to_one_value():
    grid = build_grid(gaussian(2000) + 5)
    assert [at_entropy(grid, method, 0.0).size for method in HASHES] == [1, 1, 1]


def test_kde_puts_values_at_modes():
    modes = [-2.0, 0.0, 3.0]
    w = torch.cat([m + 0.05 * gaussian(5000, k) for k, m in enumerate(modes)])
    book = fit_codebook(build_grid(w), "kde", HashTarget(values=3))
    np.testing.assert_allclose(np.unique(book.values[book.frequencies > 0]), modes, atol=0.05)
    assert 0.0 in book.values


def test_uniform_values_are_multiples_of_one_step():
    book = fit_codebook(build_grid(gaussian(5000, dtype=torch.float64) + 0.3), "uniform", HashTarget(values=15))
    steps = np.diff(book.values)
    np.testing.assert_allclose(book.values / steps[0], np.round(book.values / steps[0]), atol=1e-9)
    np.testing.assert_allclose(steps, steps[0])


def test_the_layout_in_memory_changes_nothing():
    w = gaussian(40 * 30 * 9).view(40, 30, 3, 3)
    strided = w.contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        hash_weight(w, "kde", HashTarget(error=0.02)).weight, hash_weight(strided, "kde", HashTarget(error=0.02)).weight
    )


def test_kmeans_uses_as_many_values_as_it_may():
    for values, zeros in itertools.product((2, 16, 61), (0, 500)):
        w = gaussian(20_000)
        w[:zeros] = 0
        book = fit_codebook(build_grid(w), "kmeans", HashTarget(values=values))
        assert book.size == values and (not zeros or 0.0 in book.values), (values, zeros)


@pytest.mark.parametrize("method", HASHES)
def test_quantising_takes_each_weight_to_the_value_of_its_cell(method):
    for dtype in DTYPES:
        w = gaussian(3000, dtype=dtype).view(30, 100)
        grid = build_grid(w)
        book = fit_codebook(grid, method, HashTarget(values=12))
        got = quantise(w, grid, book)
        assert got.dtype == w.dtype and got.shape == w.shape, dtype
        assert measured(w, got) == pytest.approx(book.error, rel=1e-6), dtype
        assert set(got.double().unique().tolist()) <= set(book.values.tolist()), dtype
        order = w.flatten().double().argsort()
        assert (got.flatten().double()[order].diff() >= 0).all(), dtype  # cells are intervals


def test_a_retuned_codebook_has_the_same_cells_and_the_weights_new_values():
    w = gaussian(5000).view(50, 100)
    hashed = hash_weight(w, "kmeans", HashTarget(values=16))
    old = hashed.weight.unique()
    new = old * 1.25 + 0.01
    weight = new[torch.searchsorted(old, hashed.weight.contiguous())]
    got = retuned(hashed, weight)
    assert got.weight is weight and got.codebook.size == 16 and (got.codebook.borders == hashed.codebook.borders).all()
    assert set(got.codebook.values[got.codebook.frequencies > 0].tolist()) == set(weight.double().unique().tolist())
    assert (
        got.codebook.frequencies == hashed.codebook.frequencies
    ).all() and got.codebook.entropy == hashed.codebook.entropy
    same = retuned(hashed, hashed.weight)
    assert (same.codebook.values == hashed.codebook.values).all()


def test_a_retuned_codebook_tells_its_own_error():
    w = gaussian(5000).view(50, 100)
    hashed = hash_weight(w, "kmeans", HashTarget(values=16))
    got = retuned(hashed, hashed.weight)
    assert got.codebook.error == hashed.codebook.error == pytest.approx(measured(w, got.weight), rel=1e-6)


def test_retuning_an_unchanged_weight():
    w = (gaussian(900) * 4).round() / 4
    hashed = hash_weight(w, "kmeans", HashTarget(values=64))
    got = retuned(hashed, w * 2)
    assert got.codebook.size == hashed.codebook.size and set(got.codebook.values) == set(
        (w * 2).double().unique().tolist()
    )


@pytest.mark.parametrize("tails", ["gaussian", "long"])
def test_kmeans_is_good_where_weights_are_few_for_their_values_and_tails_are_long(tails):
    """At most a little above Lloyd's algorithm in float64 on the weights themselves, from levels after Panter-Dite."""
    for n, values in itertools.product((600, 9000), (16, 64, 256)):
        w = gaussian(n, dtype=torch.float64)
        ordered = (w * w * w.sign() if tails == "long" else w).sort().values
        # the cube root of a normal density
        place = ordered.sign() * ordered.abs() ** (0.5 if tails == "long" else 1) / 3**0.5
        cell = (torch.special.ndtr(place) * values).long()
        for _ in range(61):
            centres = means(ordered, cell)
            cell = nearest(ordered, centres)
        best = measured(ordered, centres[cell])
        assert fit_codebook(build_grid(ordered), "kmeans", HashTarget(values=values)).error <= 1.25 * best, (n, values)
