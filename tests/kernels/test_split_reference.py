"""The split's reference: what it computes once, what it drops, and how much memory it takes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.kernels.split import reference
from redpp_serve.kernels.split.reference import split_conv2d_reference
from tests.support.kernel_cases import CALLS, build_split, mover, quantised_weight

SAME = (1, 1), (1, 1), (1, 1), 1  # a 3x3 window that keeps the size of an image


def test_results_equal_the_dense_ones_up_to_rounding() -> None:
    for op in ("split_conv2d", "split_linear"):
        for name, call in CALLS[op](torch.float64):
            found = getattr(reference, f"{op}_reference")(*call.arguments)
            torch.testing.assert_close(found, call.dense(mover()), rtol=1e-13, atol=1e-13, msg=name)
            assert found.is_contiguous(), name


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    for budget in (1, 60, 400, 2000):
        monkeypatch.setattr(reference, "ELEMENT_BUDGET", budget)
        for name, call in CALLS["split_conv2d"](torch.float64):
            found = split_conv2d_reference(*call.arguments)
            torch.testing.assert_close(found, call.dense(mover()), rtol=1e-13, atol=1e-13, msg=f"{name}, {budget}")


@pytest.mark.parametrize("budget", [64, 600])
def test_no_temporary_passes_the_budget(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((16, 6, 4, 4), generator=generator, dtype=torch.float64)
    split = build_split(quantised_weight((8, 6, 3, 3), generator, step=2.0))
    products: list[int] = []
    dense_conv2d = F.conv2d

    def spy(*args: object) -> Tensor:
        made = dense_conv2d(*args)
        products.append(made.numel())
        return made

    monkeypatch.setattr(reference, "ELEMENT_BUDGET", budget)
    monkeypatch.setattr(F, "conv2d", spy)
    split_conv2d_reference(x, *split, None, *SAME)
    assert len(products) > 1 and max(products) <= max(budget, 8 * 4 * 4)
    assert sum(products) == len(split.kernels) * 16 * 4 * 4, "every unique product is computed exactly once"


def test_dropped_kernels_are_not_computed() -> None:
    weight = torch.zeros(4, 3, 3, 3, dtype=torch.float64)
    weight[1, 2] = 2.0
    weight[3, 2] = -2.0
    split = build_split(weight)
    assert len(split.kernels) == 1
    x = torch.full((1, 3, 5, 5), torch.nan, dtype=torch.float64)
    x[:, 2] = 1.0
    expected = F.conv2d(x[:, 2:], weight[:, 2:], None, (1, 1), (1, 1))
    assert torch.equal(split_conv2d_reference(x, *split, None, *SAME), expected)


def test_all_kernels_zero_leaves_the_bias() -> None:
    split = build_split(torch.zeros(2, 3, 1, 1))
    found = split_conv2d_reference(torch.ones(1, 3, 2, 2), *split, torch.tensor([1.0, -2.0]), (1, 1), (0, 0), (1, 1), 1)
    assert found.tolist() == [[[[1.0, 1.0]] * 2, [[-2.0, -2.0]] * 2]]


def test_low_precision_accumulates_in_fp32_and_rounds_once() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        generator = torch.Generator().manual_seed(3)
        weight = quantised_weight((8, 64, 3, 3), generator)
        x = torch.randn((2, 64, 8, 8), generator=generator, dtype=torch.float64).to(dtype)
        kernels, *rest = build_split(weight)
        found = split_conv2d_reference(x, kernels.to(dtype), *rest, None, *SAME)
        exact = F.conv2d(x.double(), weight, None, 1, 1)
        magnitude = F.conv2d(x.double().abs(), weight.abs(), None, 1, 1)
        # Bound of a sum of n fp32 terms in any order, plus half a unit in the last place for the final rounding.
        limit = 64 * 9 * torch.finfo(torch.float32).eps / 2 * magnitude + torch.finfo(dtype).eps / 2 * exact.abs()
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= limit).all(), dtype


def test_the_comparison_notices_one_wrong_pair() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = quantised_weight((6, 4, 3, 3), generator)
    x = torch.randn((1, 4, 6, 6), generator=generator, dtype=torch.float64)
    split = build_split(weight)
    output, column = (int(v) for v in (split.index > 0).nonzero()[0])
    for member in ("index", "sign"):
        wrong = getattr(split, member).clone()
        wrong[output, column] += -1 if member == "index" else -2 * wrong[output, column]
        found = split_conv2d_reference(x, *split._replace(**{member: wrong}), None, *SAME)
        differs = (found - F.conv2d(x, weight, None, 1, 1)).abs().amax(dim=(0, 2, 3)) > 1e-6
        assert differs.nonzero().flatten().tolist() == [output], member
