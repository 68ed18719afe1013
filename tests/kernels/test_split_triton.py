"""The split's Triton kernels in the interpreter, against torch's dense layers in fp64.

The interpreter is a property of the process, so the work happens in a child that runs this file; the tests here judge
the numbers that it prints. All arithmetic of these kernels is fp32, so bf16 runs as well.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.test_split_reference import CONV_CASES, Split, build_split, quantised_weight
from tests.support.interpreting import assert_as_good_as_torch, errors, run_child
from tests.support.kernel_memory import far_memory, run_guarded

pytest.importorskip("triton")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LINEAR_SHAPES = {"row": (1, 40), "rows": (5, 40), "sequence": (2, 3, 40), "empty": (0, 40)}
LAYOUTS = ("channels_last", "sliced")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run_child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONV_CASES)
def test_convolution(interpreted: dict[str, Any], name: str, dtype: str) -> None:
    assert_as_good_as_torch(interpreted[f"conv {name} {dtype}"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LINEAR_SHAPES)
def test_linear(interpreted: dict[str, Any], name: str, dtype: str) -> None:
    assert_as_good_as_torch(interpreted[f"linear {name} {dtype}"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_of_the_input_does_not_matter(interpreted: dict[str, Any], layout: str) -> None:
    assert_as_good_as_torch(interpreted[f"layout {layout}"])


def test_several_launches_give_the_same(interpreted: dict[str, Any]) -> None:
    assert interpreted["launches"] == 3
    assert_as_good_as_torch(interpreted["several launches"])


def test_dropped_inputs_are_not_read(interpreted: dict[str, Any]) -> None:
    assert_as_good_as_torch(interpreted["dropped"])


def test_all_kernels_zero_leaves_the_bias(interpreted: dict[str, Any]) -> None:
    assert_as_good_as_torch(interpreted["all zero"])


def test_offsets_beyond_2_to_the_31(interpreted: dict[str, Any]) -> None:
    assert interpreted["far"] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("member", ["index", "sign"])
def test_the_comparison_notices_one_wrong_pair(interpreted: dict[str, Any], member: str) -> None:
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(interpreted[f"wrong {member}"])


# --- Below: the child process, and what other tests take from here. ---


class Layer(NamedTuple):
    """A layer and its input. `weight`: what `split` was made of, dense and in fp64; `groups`: None for a Linear."""

    x: Tensor
    weight: Tensor
    split: Split
    bias: Tensor | None
    window: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    groups: int | None


def conv_layer(name: str, dtype: torch.dtype) -> Layer:
    """One of `CONV_CASES`; every other one with a bias."""
    x_shape, w_shape, stride, padding, dilation, groups = CONV_CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(x_shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = quantised_weight(w_shape, generator)
    bias = torch.randn(w_shape[0], generator=generator, dtype=torch.float64).to(dtype) if len(name) % 2 else None
    split = build_split(weight, groups)
    return Layer(x, weight, split._replace(kernels=split.kernels.to(dtype)), bias, (stride, padding, dilation), groups)


def linear_layer(shape: tuple[int, ...], dtype: torch.dtype) -> Layer:
    """A Linear with 13 outputs for an input of this shape."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = quantised_weight((13, shape[-1]), generator)
    bias = torch.randn(13, generator=generator, dtype=torch.float64).to(dtype)
    split = build_split(weight[:, :, None, None])
    return Layer(
        x, weight, split._replace(kernels=split.kernels.flatten().to(dtype)), bias, ((1, 1), (0, 0), (1, 1)), None
    )


def in_torch(layer: Layer, dtype: torch.dtype) -> Tensor:
    """The dense layer in this precision."""
    x, weight = layer.x.to(dtype), layer.weight.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(x, weight, bias) if layer.groups is None else F.conv2d(x, weight, bias, *layer.window, layer.groups)


def judge(layer: Layer, split: Split | None = None) -> dict[str, float]:
    """Errors of the kernels; with another split than the layer's own, where given."""
    from redpp_serve.kernels.split.kernel import split_conv2d_triton, split_linear_triton

    arguments = (layer.x, *(split or layer.split), layer.bias)
    if layer.groups is None:
        found = run_guarded(split_linear_triton, *arguments)
    else:
        found = run_guarded(split_conv2d_triton, *arguments, *layer.window)
    return errors(found, in_torch(layer, layer.x.dtype), in_torch(layer, torch.float64))


def damaged(split: Split, member: str) -> Split:
    output, column = (int(v) for v in (split.index > 0).nonzero()[0])
    wrong = getattr(split, member).clone()
    wrong[output, column] += -1 if member == "index" else -2 * wrong[output, column]
    return split._replace(**{member: wrong})


def dropped_errors(weight: Tensor) -> dict[str, float]:
    """Channels whose kernels are all zero hold NaN; the dense layer to compare with does not have them."""
    from redpp_serve.kernels.split.kernel import split_conv2d_triton

    kept = weight.abs().amax((0, 2, 3)) > 0
    x = torch.where(kept.view(1, -1, 1, 1), torch.ones(2, weight.shape[1], 4, 4), torch.nan)
    bias = torch.arange(float(len(weight)))
    found = run_guarded(split_conv2d_triton, x, *build_split(weight), bias, (1, 1), (1, 1), (1, 1))
    dense = F.conv2d(x[:, kept], weight[:, kept], bias, 1, 1) if kept.any() else bias.view(1, -1, 1, 1).expand_as(found)
    return errors(found, dense, dense.double())


def far_values() -> list[float]:
    """A 1x1 convolution that reads only the corners of its images, the last ones beyond 2^31 elements."""
    from redpp_serve.kernels.split.kernel import split_conv2d_triton

    side = 1 << 15
    x = far_memory((3, 1, side, side))
    x[2, 0, :: side - 1, :: side - 1] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    split = build_split(torch.ones(1, 1, 1, 1, dtype=torch.float16))
    found = split_conv2d_triton(x, *split, None, (side - 1, side - 1), (0, 0), (1, 1))
    return found[2].flatten().tolist()


def several_launches() -> tuple[dict[str, float], int]:
    """The plain convolution (126 positions) with room for the products of 50 at a time, and how often that launched."""
    from redpp_serve.kernels.split import kernel as split_triton

    starts: list[int] = []
    gather = split_triton.gather_sum_kernel

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            starts.append(grid[0])
            return gather[grid]

    with (
        patch.object(split_triton, "positions_per_launch", lambda rows, positions: 50),
        patch.object(split_triton, "gather_sum_kernel", Spy()),
    ):
        return judge(conv_layer("plain", torch.float32)), len(starts)


def interpret() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for key, dtype in DTYPES.items():
        results |= {f"conv {name} {key}": judge(conv_layer(name, dtype)) for name in CONV_CASES}
        results |= {f"linear {name} {key}": judge(linear_layer(shape, dtype)) for name, shape in LINEAR_SHAPES.items()}
    layer = conv_layer("plain", torch.float32)
    forms = {
        "channels_last": layer.x.to(memory_format=torch.channels_last),
        "sliced": torch.cat([layer.x, layer.x], 3)[..., : layer.x.shape[3]],
    }
    results |= {f"layout {name}": judge(layer._replace(x=x)) for name, x in forms.items()}
    layer = conv_layer("plain", torch.float16)
    results |= {f"wrong {name}": judge(layer, damaged(layer.split, name)) for name in ("index", "sign")}
    weight = torch.zeros(3, 4, 3, 3)
    results["all zero"] = dropped_errors(weight)
    weight[1, 2] = 2.0
    results["dropped"] = dropped_errors(weight)
    results["far"] = far_values()
    results["several launches"], results["launches"] = several_launches()
    return results


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret}[sys.argv[1]]()))
