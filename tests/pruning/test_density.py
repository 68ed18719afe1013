"""The binned density against SciPy's, and the sums over cells against the weights themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gaussian_kde

from redpp_serve.pruning.density import build_grid, cell_costs, cells_of, density, entropy
from tests.support.networks import few, seeds


def sample(kind, n=1500, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    if kind == "mixture":
        return x * 0.1 + torch.randint(-1, 2, (n,), generator=g)
    return {"normal": x, "skewed": x.exp(), "far from zero": x + 1000, "tiny": x * 1e-20, "heavy": x**3}[kind]


@pytest.mark.parametrize("kind", ["normal", "mixture", "skewed", "far from zero", "tiny", "heavy"])
def test_density_is_that_of_scipy(kind):
    x = sample(kind)
    grid = build_grid(x)
    points = np.linspace(0, grid.bins, 400).astype(int)
    for share in (0.01, 0.05, 0.3):
        bandwidth = share * float(x.std())
        expected = gaussian_kde(x.numpy(), bw_method=bandwidth / x.numpy().std(ddof=1))(grid.points()[points])
        curve = density(grid, bandwidth)
        tolerance = 1e-3 if bandwidth > 8 * grid.step else 2e-2  # linear binning needs a few bins in a kernel
        assert np.abs(curve[points] - expected).max() < tolerance * curve.max(), share


def test_density_integrates_to_one_where_the_kernel_fits():
    grid = build_grid(torch.cat([sample("normal"), torch.tensor([-20.0, 20.0])]))
    assert density(grid, 0.2).sum() * grid.step == pytest.approx(1, abs=1e-3)


def test_wide_kernels_do_not_wrap_around():
    """All mass at the left: nothing may come back in from the right."""
    x = torch.cat([torch.zeros(999), torch.tensor([10.0])])
    grid = build_grid(x)
    places = [0, grid.bins // 2, grid.bins]
    for scale in (0.5, 3.0, 10.0):
        expected = gaussian_kde(x.numpy(), bw_method=scale / x.numpy().std(ddof=1))(grid.points()[places])
        np.testing.assert_allclose(density(grid, scale)[places], expected, rtol=2e-3, atol=1e-6)


def test_minima_and_modes_of_a_mixture():
    modes, widths = [-3.0, -0.5, 1.0, 4.0], 0.2
    x = torch.cat(
        [m + widths * torch.randn(20000, generator=torch.Generator().manual_seed(k)) for k, m in enumerate(modes)]
    )
    grid = build_grid(x)
    borders, found = cells_of(density(grid, 0.15))
    np.testing.assert_allclose(grid.points()[found], modes, atol=0.03)
    assert [a < b < c for a, b, c in zip(modes, grid.points()[borders], modes[1:], strict=False)] == [True] * 3


def test_cells_of_small_curves():
    for curve, borders, modes in (
        ([0, 1, 2, 1, 0], [], [2]),
        ([2, 1, 0, 1, 2], [2], [0, 4]),
        ([0, 2, 2, 2, 0], [], [2]),
        ([0, 2, 1, 1, 1, 2, 0], [3], [1, 5]),
        ([3, 2, 1], [], [0]),
        ([1, 2, 3], [], [2]),
        ([1, 1, 1], [], [1]),
        ([5, 0, 0, 0, 5], [2], [0, 4]),
    ):
        got = cells_of(np.array(curve, dtype=float))
        assert (got[0].tolist(), got[1].tolist()) == (borders, modes), curve


@given(seeds, st.floats(0.01, 1.0))
@few
def test_every_mode_lies_in_its_cell(seed, bandwidth):
    grid = build_grid(sample("normal", 300, seed))
    borders, modes = cells_of(density(grid, bandwidth))
    edges = [0, *borders, grid.bins]
    assert len(modes) == len(borders) + 1 and all(a <= m <= b for a, m, b in zip(edges, modes, edges[1:], strict=False))


@given(
    seeds,
    st.lists(st.integers(1, 16383), max_size=6, unique=True),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
@few
def test_cell_costs_are_those_of_the_weights(seed, borders, dtype):
    x = sample("normal", 700, seed).to(dtype)
    grid, borders = build_grid(x), np.array(sorted(borders), dtype=np.int64)
    values = np.linspace(-1, 1, len(borders) + 1)
    cell = np.searchsorted(borders, grid.bin_of(x).numpy(), side="right")
    count, error = cell_costs(grid, borders, values)
    assert count.tolist() == np.bincount(cell, minlength=len(values)).tolist()
    w = x.double().numpy()
    assert error == pytest.approx(np.linalg.norm(w - values[cell]) / np.linalg.norm(w), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_grid_counts_everything_once(dtype):
    x = (sample("mixture") * (sample("normal") > -1)).to(dtype)
    grid = build_grid(x.view(30, 50).T)
    assert grid.weights == grid.linear.sum() == pytest.approx(1500) and grid.zeros == int((x == 0).sum()) > 100
    assert grid.rms == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-9)
    assert grid.total[-1] == pytest.approx(float(x.double().sum()), rel=1e-9)
    assert grid.dtype is dtype


@pytest.mark.parametrize(
    "x", [torch.zeros(7), torch.full((9,), -2.5), torch.tensor([3e-30]), torch.tensor([-1.0, 1.0])]
)
def test_grids_of_degenerate_weights_hold_each_weight(x):
    grid = build_grid(x)
    index = grid.bin_of(x)
    assert grid.weights == len(x) and int(index.min()) >= 0 and int(index.max()) < grid.bins
    np.testing.assert_allclose(grid.low + grid.step * index.numpy(), x.double().numpy(), rtol=1e-3)


def test_the_grid_is_finer_than_the_rms_weight_under_outliers():
    x = torch.cat([sample("normal", 100_000), torch.tensor([60.0])])
    grid = build_grid(x)
    assert grid.step < grid.rms / 2000 * 1.001 and grid.bins <= 1 << 18


def test_entropy():
    assert entropy(np.array([1.0, 1, 1, 1])) == 2 and entropy(np.array([5.0, 0])) == 0
    assert entropy(np.array([1.0, 3])) == pytest.approx(0.811278, abs=1e-6)
