"""Ridge least squares from sums: the solution NumPy finds, and a sound one where there is none."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from redpp_serve.pruning.least_squares import Sums, moments, solve
from tests.support.networks import few, seeds


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(u, y):
    return [Sums.of(u[::2], y[::2]), Sums.of(u[1::2], y[1::2])]


def solve_checked(u, y, start):
    """Fit to every other sample, with the ridge that predicts the samples between them best."""
    fit, check = halves(u, y)
    return solve(fit, start, check)


@given(seeds, st.integers(1, 9), st.integers(1, 4))
@few
def test_exact_targets_are_found_whatever_the_start(seed, d, n_out):
    scale = torch.logspace(-3, 3, d, dtype=torch.float64)
    u = (gaussian(200, d, seed=seed) + 5) * scale
    weight, start = (gaussian(d, n_out, seed=seed + k) / scale[:, None] for k in (1, 2))
    new, constant, lost = solve_checked(u, u @ weight + 3, start)
    assert lost < 1e-9
    torch.testing.assert_close(u @ new + constant, u @ weight + 3, rtol=1e-3, atol=1e-2)


def test_noisy_targets_give_the_least_squares_solution():
    u, noise = gaussian(4000, 6) @ gaussian(6, 6, seed=1) - 2, gaussian(4000, 3, seed=2)
    y = u @ gaussian(6, 3, seed=3) + noise
    new, constant, lost = solve(Sums.of(u, y), torch.zeros(6, 3, dtype=torch.float64))
    features = np.c_[u.numpy(), np.ones(4000)]
    best = np.linalg.lstsq(features, y.numpy(), rcond=None)[0]
    left, least = y - u @ new - constant, y - torch.from_numpy(features @ best)
    assert left.square().sum() < 1.001 * least.square().sum() and left.mean(0).abs().max() < 1e-9
    assert lost == pytest.approx(float(left.square().sum() / (y - y.mean(0)).square().sum()), rel=1e-6)


def test_wide_rank_deficient_features_leave_less_than_a_percent():
    """48 channels kept of 512 that have rank 40."""
    u = gaussian(2000, 40) @ gaussian(40, 512, seed=1)
    y = u @ gaussian(512, 64, seed=2)
    weight, _, lost = solve_checked(u[:, :48], y, torch.zeros(48, 64, dtype=torch.float64))
    assert weight.isfinite().all() and lost**0.5 < 1e-3


def test_fewer_samples_than_unknowns_stay_near_a_good_start():
    """With 40 samples of 200 unknowns the fit must not do worse on new samples than a start that is nearly right."""
    weight = gaussian(200, 5, seed=1)
    start = weight + 0.1 * gaussian(200, 5, seed=2)
    u, new_u = gaussian(40, 200, seed=3), gaussian(500, 200, seed=4)
    got, constant, _ = solve_checked(u, u @ weight + 2 * gaussian(40, 5, seed=5), start)
    error, before = (float((new_u @ w + c - new_u @ weight).norm()) for w, c in ((got, constant), (start, 0)))
    assert error < 1.2 * before


def test_features_that_are_constant_keep_their_start():
    u = gaussian(100, 4)
    u[:, 2] = 7
    start = torch.ones(4, 2, dtype=torch.float64)
    new, _, lost = solve_checked(u, u @ gaussian(4, 2, seed=1), start)
    assert torch.equal(new[2], start[2]) and lost < 1e-9
    for how in ([], [Sums.of(u, u[:, :2])]):
        dead = solve(Sums.of(0 * u, 0 * u[:, :2] + 3), start, *how)
        assert torch.equal(dead[0], start) and dead[1].tolist() == [3, 3] and dead[2] == 0


def test_sums_add_up():
    u, y = gaussian(30, 4) + 3, gaussian(30, 2, seed=1)
    whole, first = Sums.of(u, y), Sums.of(u[:7], y[:7])
    first.add(Sums.of(u[7:], y[7:]))
    for parts in ([whole], [first], halves(u, y)):
        m = moments(parts)
        np.testing.assert_allclose(m.uu, np.cov(u.T, bias=True), atol=1e-9)
        np.testing.assert_allclose(m.yy, np.var(y.numpy(), axis=0).sum(), atol=1e-9)
        assert m.lost(torch.zeros(4, 2, dtype=torch.float64)) == m.yy


@given(seeds)
@few
def test_features_that_vary_less_than_their_sums_are_exact_do_no_harm(seed):
    u = gaussian(300, 12, seed=seed)
    u[:, :6] = 100 + 1e-6 * u[:, :6]  # their variance is below the rounding of their squares
    weight = gaussian(12, 3, seed=seed + 1)
    y = u @ weight
    new, constant, lost = solve_checked(u, y, torch.zeros(12, 3, dtype=torch.float64))
    left = y - u @ new - constant
    assert lost < 1e-3 and left.square().mean() < 1e-3 * (y - y.mean(0)).square().mean()


def test_samples_of_another_kind_that_contradict_keep_the_start():
    """What the fit learns from one kind of samples is wrong for the other, which the start suits better."""
    u, other = gaussian(300, 6), 2 * gaussian(200, 6, seed=1) + 1
    weight, start = gaussian(6, 3, seed=2), gaussian(6, 3, seed=3)
    for true in (start, start - (weight - start)):  # the start is right; or lies between the two
        new, constant, lost = solve(Sums.of(u, u @ weight + 5), start, Sums.of(other, other @ true))
        assert torch.equal(new, start)
        torch.testing.assert_close(constant, (u @ weight + 5 - u @ start).mean(0))  # of the samples that are fitted to
        left, whole = (float((y - y.mean(0)).square().sum()) for y in (u @ (weight - start), u @ weight))
        assert lost == pytest.approx(left / whole)


def test_samples_of_another_kind_choose_how_far_the_fit_goes():
    """Of the ridges and the start, the one counts that predicts the other samples best."""
    few_u, other = gaussian(30, 20), gaussian(2000, 20, seed=1)
    weight = gaussian(20, 2, seed=2)
    start = weight + 0.3 * gaussian(20, 2, seed=3)
    for noise in (0.0, 0.5, 5.0):
        fit = Sums.of(few_u, few_u @ weight + noise * gaussian(30, 2, seed=4))
        check = Sums.of(other, other @ weight)
        losses = {name: moments([check]).lost(w) for name, w in {"start": start, "small": solve(fit, start)[0]}.items()}
        chosen = moments([check]).lost(solve(fit, start, check)[0])
        assert chosen <= min(losses.values()) * (1 + 1e-9), noise
        assert noise or chosen < 1e-6 * losses["start"]
        assert noise < 1 or losses["small"] > losses["start"]  # without a check the fit would have done harm


def test_many_features_of_any_scale_are_fitted():
    """Of so many, products are summed in float32, in which squares of 1e20 would overflow and those of 1e-25 vanish."""
    u, weight = gaussian(1400, 520) + 1, gaussian(520, 2, seed=1)
    y = u @ weight
    for scale, of_y in ((1e-25, 1.0), (1.0, 1e-25), (1e20, 1e20), (1e20, 1e-20)):
        new, constant, lost = solve(Sums.of((scale * u).float(), of_y * y), torch.zeros_like(weight))
        assert lost < 1e-4 and float((scale * u @ new + constant - of_y * y).norm() / (of_y * y).norm()) < 0.01
