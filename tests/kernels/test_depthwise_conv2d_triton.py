"""The depthwise convolution's kernel in Triton's interpreter, against convolutions in fp64.

The interpreter is a property of the process, so the work happens in a child that runs this file; the tests here judge
the numbers that it prints.
"""

import json
import sys
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.interpreting import assert_as_good_as_torch, errors, poisoned, run_child
from tests.support.kernel_memory import at_page_end, far_memory, surrounded

pytest.importorskip("triton")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Case(NamedTuple):
    """One call; the number of channels is that of `x`."""

    x: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    activation: str = "none"
    bias: bool = True


CASES = {
    "3x3": Case((2, 20, 5, 6), (3, 3), padding=(1, 1), activation="relu6"),
    "3x3 stride 2": Case((1, 13, 9, 8), (3, 3), (2, 2), (1, 1), activation="hardswish"),
    "3x3 many channels": Case((1, 70, 4, 5), (3, 3), padding=(1, 1), activation="relu", bias=False),
    "3x3 wide rows": Case((1, 3, 3, 150), (3, 3), padding=(1, 1)),
    "5x5": Case((1, 8, 6, 5), (5, 5), padding=(2, 2), activation="silu"),
    "5x5 stride 2": Case((1, 24, 5, 7), (5, 5), (2, 2), (2, 2), activation="gelu"),
    "7x7 stride 2": Case((1, 5, 5, 6), (7, 7), (2, 2), (3, 3), activation="sigmoid"),
    "1x1": Case((2, 9, 4, 5), (1, 1), activation="hardsigmoid"),
    "rectangular, asymmetric": Case((1, 12, 9, 8), (2, 4), (1, 3), (0, 2), activation="gelu_tanh"),
    "stride beyond the kernel": Case((1, 6, 17, 5), (2, 1), (4, 1)),
    "dilated": Case((1, 16, 7, 8), (3, 3), padding=(2, 2), dilation=(2, 2), activation="relu"),
    "dilated across": Case((1, 16, 6, 9), (3, 3), padding=(1, 3), dilation=(1, 3), activation="relu"),
    "one channel": Case((2, 1, 4, 7), (3, 3), padding=(1, 1)),
    "one pixel": Case((1, 40, 1, 1), (3, 3), padding=(1, 1)),
    "no images": Case((0, 8, 5, 5), (3, 3)),
    "no channels": Case((2, 0, 5, 5), (3, 3)),
}
LAYOUTS = ("channels_last", "sliced", "weight by taps")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run_child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_convolution(interpreted: dict[str, Any], name: str, dtype: str) -> None:
    assert_as_good_as_torch(interpreted[f"{name} {dtype}"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_does_not_matter(interpreted: dict[str, Any], layout: str) -> None:
    assert_as_good_as_torch(interpreted[f"layout {layout}"])


def test_images_beyond_2_to_the_31(interpreted: dict[str, Any]) -> None:
    assert interpreted["far"] == [1.0, 2.0, 3.0, 4.0]


def test_the_comparison_notices_one_wrong_tap(interpreted: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(interpreted["wrong tap"])


def test_nothing_beyond_a_tensor_is_read() -> None:
    """Not even where the value is dropped afterwards: a child that did so has been killed."""
    found = run_child(__file__, "at_page_ends", TRITON_INTERPRET="1")
    assert len(found) > 2
    for result in found.values():
        assert_as_good_as_torch(result)


# --- Below: the child process. ---


class Call(NamedTuple):
    """The arguments of one call, as the operator takes them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def make_call(case: Case, dtype: torch.dtype) -> Call:
    generator = torch.Generator().manual_seed(sum(case.x))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    channels = case.x[1]
    bias = random(channels) if case.bias else None
    window = case.stride, case.padding, case.dilation
    return Call(random(*case.x), random(channels, 1, *case.kernel), bias, case.activation, *window)


def run(call: Call) -> Tensor:
    """The kernel's result, with NaN around every tensor; nothing around them may change."""
    from redpp_serve.kernels.depthwise_conv2d import kernel as module

    guards = []

    def guarded(tensor: Tensor) -> Tensor:
        inner, intact = surrounded(tensor)
        guards.append(intact)
        return inner

    inputs = {name: guarded(value) for name, value in call._asdict().items() if isinstance(value, Tensor)}
    empty = module.empty_channels_last
    with poisoned(), patch.object(module, "empty_channels_last", lambda *args: guarded(empty(*args))):
        found = module.depthwise_conv2d_triton(*call._replace(**inputs))
    assert all(intact() for intact in guards), "the kernel wrote outside of its tensors"
    return found


def in_torch(call: Call) -> Tensor:
    from redpp_serve.kernels.epilogue import ACTIVATIONS

    x, weight, bias, activation, *window = call
    if x.shape[1] == 0:  # torch refuses a convolution without channels
        return run(call)
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias, *window, x.shape[1]))


def judge(call: Call, found: Tensor | None = None) -> dict[str, float]:
    wide = Call(*(v.double() if isinstance(v, Tensor) else v for v in call))
    exact = in_torch(wide) if call.x.shape[1] else torch.zeros(2, 0, 3, 3)
    return errors(run(call) if found is None else found, in_torch(call), exact)


def far_image() -> list[float]:
    """Only the corners of the images are read, the last ones beyond 2^31 elements."""
    from redpp_serve.kernels.depthwise_conv2d.kernel import depthwise_conv2d_triton

    side = 1 << 15
    x = far_memory((3, 1, side, side))
    x[2, 0, :: side - 1, :: side - 1] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    one = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    call = Call(x, one, None, "none", (side - 1, side - 1), (0, 0), (1, 1))
    return depthwise_conv2d_triton(*call)[2].flatten().tolist()


def interpret() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for key, dtype in DTYPES.items():
        results |= {f"{name} {key}": judge(make_call(case, dtype)) for name, case in CASES.items()}
    call = make_call(CASES["3x3"], torch.float16)
    results["layout channels_last"] = judge(call._replace(x=call.x.contiguous(memory_format=torch.channels_last)))
    sliced = torch.cat([call.x, call.x], 3)[..., : call.x.shape[3]]
    results["layout sliced"] = judge(call._replace(x=sliced, bias=call.bias.repeat_interleave(2)[::2]))
    by_taps = call.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    results["layout weight by taps"] = judge(call._replace(weight=by_taps))
    wrong = call.weight.clone()
    wrong[3, 0, 2, 0] += 0.5
    results["wrong tap"] = judge(call, run(call._replace(weight=wrong)))
    results["far"] = far_image()
    return results


def at_page_ends() -> dict[str, Any]:
    from redpp_serve.kernels.depthwise_conv2d.kernel import depthwise_conv2d_triton

    results = {}
    for name in tuple(CASES)[:3]:
        call = make_call(CASES[name], torch.float16)
        last = torch.channels_last
        call = call._replace(x=call.x.contiguous(memory_format=last), weight=call.weight.contiguous(memory_format=last))
        placed = (at_page_end(v) if isinstance(v, Tensor) else v for v in call)
        results[name] = judge(call, depthwise_conv2d_triton(*placed))
    return results


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "at_page_ends": at_page_ends}[sys.argv[1]]()))
