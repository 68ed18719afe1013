"""The reference against torch's dense layers in fp64, on splits built from quantised random weights."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.kernels.split import reference as split_reference
from redpp_serve.kernels.split.reference import split_conv2d_reference, split_linear_reference


class Split(NamedTuple):
    kernels: Tensor
    channel: Tensor
    index: Tensor
    sign: Tensor


def quantised_weight(shape: tuple[int, ...], generator: torch.Generator, step: float = 1.0) -> Tensor:
    """Few distinct values, some kernels all zero, and among the rest many equal up to their sign."""
    return (torch.randn(shape, generator=generator, dtype=torch.float64) / step).round() * step * 0.375


def build_split(weight: Tensor, groups: int = 1) -> Split:
    """Unique kernels of every input channel of a (n_out, n_in / groups, kh, kw) weight, first non-zero value > 0."""
    n_out, per_group = weight.shape[:2]
    index = torch.full((n_out, per_group), -1, dtype=torch.int32)
    sign = torch.zeros((n_out, per_group), dtype=torch.int8)
    kernels, channel = [], []
    for c in range(per_group * groups):
        group, i = divmod(c, per_group)
        seen: dict[tuple[float, ...], int] = {}
        for o in range(group * n_out // groups, (group + 1) * n_out // groups):
            values = weight[o, i].flatten()
            if not values.any():
                continue
            factor = int(values[values != 0][0].sign())
            key = tuple((values * factor + 0.0).tolist())
            if key not in seen:
                seen[key] = len(kernels)
                kernels.append(weight[o, i] * factor)
                channel.append(c)
            index[o, i], sign[o, i] = seen[key], factor
    stacked = torch.stack(kernels) if kernels else weight.new_empty((0, *weight.shape[2:]))
    return Split(stacked, torch.tensor(channel, dtype=torch.int64), index, sign)


# name: x shape, weight shape (n_out, n_in / groups, kh, kw), stride, padding, dilation, groups
CONV_CASES = {
    "plain": ((2, 3, 7, 9), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "pointwise": ((3, 8, 5, 5), (11, 8, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "strided": ((2, 4, 9, 8), (6, 4, 3, 3), (2, 3), (1, 0), (1, 1), 1),
    "dilated": ((1, 3, 11, 12), (4, 3, 3, 2), (1, 2), (2, 1), (2, 3), 1),
    "groups": ((2, 6, 6, 6), (9, 2, 3, 3), (1, 1), (1, 1), (1, 1), 3),
    "depthwise": ((2, 7, 6, 5), (7, 1, 3, 3), (2, 2), (1, 1), (1, 1), 7),
    "depthwise multiplier": ((1, 3, 6, 5), (6, 1, 5, 5), (1, 1), (2, 2), (1, 1), 3),
    "one pixel": ((1, 17, 1, 1), (33, 17, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "empty batch": ((0, 3, 4, 4), (5, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", CONV_CASES)
def test_convolution_equals_the_dense_one(name: str, with_bias: bool) -> None:
    x_shape, w_shape, stride, padding, dilation, groups = CONV_CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(x_shape, generator=generator, dtype=torch.float64)
    weight = quantised_weight(w_shape, generator)
    bias = torch.randn(w_shape[0], generator=generator, dtype=torch.float64) if with_bias else None
    split = build_split(weight, groups)
    found = split_conv2d_reference(x, *split, bias, stride, padding, dilation, groups)
    expected = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert found.is_contiguous()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (2, 3, 16), (16,), (0, 16)])
def test_linear_equals_the_dense_one(shape: tuple[int, ...], with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = quantised_weight((9, 16), generator)
    bias = torch.randn(9, generator=generator, dtype=torch.float64) if with_bias else None
    kernels, *rest = build_split(weight[:, :, None, None])
    found = split_linear_reference(x, kernels.flatten(), *rest, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("budget", [1, 60, 400, 2000])
@pytest.mark.parametrize("name", ["plain", "groups", "depthwise", "pointwise"])
def test_chunks_do_not_change_the_result(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_shape, w_shape, stride, padding, dilation, groups = CONV_CASES[name]
    generator = torch.Generator().manual_seed(budget)
    x = torch.randn(x_shape, generator=generator, dtype=torch.float64)
    weight = quantised_weight(w_shape, generator)
    split = build_split(weight, groups)
    monkeypatch.setattr(split_reference, "ELEMENT_BUDGET", budget)
    found = split_conv2d_reference(x, *split, None, stride, padding, dilation, groups)
    expected = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


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

    monkeypatch.setattr(split_reference, "ELEMENT_BUDGET", budget)
    monkeypatch.setattr(split_reference.F, "conv2d", spy)
    split_conv2d_reference(x, *split, None, (1, 1), (1, 1), (1, 1), 1)
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
    found = split_conv2d_reference(x, *split, None, (1, 1), (1, 1), (1, 1), 1)
    expected = F.conv2d(x[:, 2:], weight[:, 2:], None, (1, 1), (1, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_all_kernels_zero_leaves_the_bias() -> None:
    split = build_split(torch.zeros(2, 3, 1, 1))
    found = split_conv2d_reference(torch.ones(1, 3, 2, 2), *split, torch.tensor([1.0, -2.0]), (1, 1), (0, 0), (1, 1), 1)
    assert found.tolist() == [[[[1.0, 1.0]] * 2, [[-2.0, -2.0]] * 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_accumulates_in_fp32_and_rounds_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = quantised_weight((8, 64, 3, 3), generator)
    x = torch.randn((2, 64, 8, 8), generator=generator, dtype=torch.float64).to(dtype)
    kernels, *rest = build_split(weight)
    found = split_conv2d_reference(x, kernels.to(dtype), *rest, None, (1, 1), (1, 1), (1, 1), 1)
    exact = F.conv2d(x.double(), weight, None, 1, 1)
    magnitude = F.conv2d(x.double().abs(), weight.abs(), None, 1, 1)
    # Bound of a sum of n fp32 terms in any order, plus half a unit in the last place for the final rounding.
    limit = 64 * 9 * torch.finfo(torch.float32).eps / 2 * magnitude + torch.finfo(dtype).eps / 2 * exact.abs()
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("member", ["index", "sign"])
def test_the_comparison_notices_one_wrong_pair(member: str) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = quantised_weight((6, 4, 3, 3), generator)
    x = torch.randn((1, 4, 6, 6), generator=generator, dtype=torch.float64)
    split = build_split(weight)
    output, column = (int(v) for v in (split.index > 0).nonzero()[0])
    wrong = getattr(split, member).clone()
    wrong[output, column] += -1 if member == "index" else -2 * wrong[output, column]
    found = split_conv2d_reference(x, *split._replace(**{member: wrong}), None, (1, 1), (1, 1), (1, 1), 1)
    expected = F.conv2d(x, weight, None, 1, 1)
    differs = (found - expected).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert differs.nonzero().flatten().tolist() == [output]
