"""The fused convolution's kernel in Triton's interpreter, against convolutions in fp64.

The interpreter is a property of the process, so the work happens in a child that runs this file; the tests here judge
the numbers that it prints.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """One call. `extras`: b bias, r residual, p positions."""

    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    activation: str = "none"
    extras: str = "b"


CASES = {
    "3x3": Case((2, 20, 7, 6), (13, 20, 3, 3), padding=(1, 1), activation="relu", extras="br"),
    "3x3 stride 2": Case((2, 24, 9, 8), (40, 24, 3, 3), (2, 2), (1, 1), activation="hardswish"),
    "1x1": Case((2, 20, 7, 6), (24, 20, 1, 1), extras=""),
    "1x1 many programs": Case((2, 17, 40, 41), (70, 17, 1, 1), activation="relu", extras="r"),
    "1x1 stride 2": Case((2, 16, 7, 7), (33, 16, 1, 1), (2, 2), extras="br"),
    "1x1 padded": Case((1, 16, 3, 3), (8, 16, 1, 1), padding=(1, 2), activation="sigmoid"),
    "5x5": Case((2, 9, 6, 7), (7, 9, 5, 5), padding=(2, 2), activation="silu"),
    "7x7 stride 2, flat": Case((2, 3, 19, 18), (11, 3, 7, 7), (2, 2), (3, 3), activation="relu6"),
    "3x3 flat": Case((1, 5, 6, 6), (18, 5, 3, 3), padding=(1, 1), activation="hardsigmoid", extras="brp"),
    "rectangular, dilated, asymmetric": Case((1, 20, 9, 8), (13, 20, 2, 3), (1, 2), (1, 0), (2, 1), "gelu", "br"),
    "shared reduction": Case((1, 64, 7, 7), (32, 64, 3, 3), padding=(1, 1), activation="gelu_tanh", extras="br"),
    "shared reduction, positions": Case((1, 70, 5, 4), (9, 70, 3, 3), padding=(1, 1), activation="relu", extras="brp"),
    "positions": Case((2, 12, 5, 6), (6, 12, 3, 3), padding=(1, 1), activation="silu", extras="brp"),
    "positions, 1x1": Case((2, 20, 5, 5), (21, 20, 1, 1), extras="p"),
    "one pixel": Case((3, 40, 1, 1), (10, 40, 1, 1), activation="relu"),
    "no images": Case((0, 8, 5, 5), (4, 8, 3, 3), extras="br"),
    "no inputs": Case((2, 0, 5, 5), (4, 0, 3, 3), activation="relu", extras="br"),
    "no outputs": Case((2, 8, 5, 5), (0, 8, 3, 3)),
}
LAYOUTS = ("channels_last", "sliced", "strided weight")


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


def test_the_cases_reach_every_path(interpreted: dict[str, Any]) -> None:
    assert interpreted["paths"] == {"pointwise": True, "flat": True, "shared": True, "large tiles": True}


def test_shares_are_added_in_the_same_order(interpreted: dict[str, Any]) -> None:
    assert interpreted["repeated"] == 0.0


def test_images_beyond_2_to_the_31(interpreted: dict[str, Any]) -> None:
    assert interpreted["far image"] == [1.0, 2.0, 3.0, 4.0]


def test_rows_beyond_2_to_the_31(interpreted: dict[str, Any]) -> None:
    assert interpreted["far rows"] == [3.0, 7.0]


@pytest.mark.parametrize("what", ["weight", "residual", "positions"])
def test_the_comparison_notices_one_wrong_value(interpreted: dict[str, Any], what: str) -> None:
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(interpreted[f"wrong {what}"])


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
    residual: Tensor | None
    positions: Tensor | None
    channels: int
    activation: str
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def make_call(case: Case, dtype: torch.dtype) -> Call:
    """Random arguments; half of the computed channels are stored twice and one three times."""
    from redpp_serve.kernels.split.reference import conv_output_size

    generator = torch.Generator().manual_seed(sum(case.x) + sum(case.weight))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    n_out = case.weight[0]
    positions, channels = None, n_out
    if "p" in case.extras:
        positions, channels = scattered(n_out, generator)
    window = case.stride, case.padding, case.dilation
    size = conv_output_size(case.x[2:], case.weight[2:], *window)
    residual = random(case.x[0], channels, *size) if "r" in case.extras else None
    bias = random(n_out) if "b" in case.extras else None
    return Call(random(*case.x), random(*case.weight), bias, residual, positions, channels, case.activation, *window)


def scattered(n_out: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """A shuffled table of positions with up to three for a channel, and the number of the result's channels."""
    copies = [3 if o == 1 else 1 + o % 2 for o in range(n_out)]
    order = torch.randperm(sum(copies), generator=generator).tolist()
    table = torch.full((n_out, 3), -1, dtype=torch.int32)
    for o, count in enumerate(copies):
        for slot in range(count):
            table[o, 2 - slot] = order.pop()
    return table, sum(copies)


def run(call: Call) -> Tensor:
    """The kernel's result, with NaN around every tensor; nothing around them may change."""
    from redpp_serve.kernels.fused_conv2d import kernel as module

    guards = []

    def guarded(tensor: Tensor) -> Tensor:
        inner, intact = surrounded(tensor)
        guards.append(intact)
        return inner

    inputs = {name: guarded(value) for name, value in call._asdict().items() if isinstance(value, Tensor)}
    empty = module.empty_channels_last
    with poisoned(), patch.object(module, "empty_channels_last", lambda *args: guarded(empty(*args))):
        found = module.fused_conv2d_triton(*call._replace(**inputs))
    assert all(intact() for intact in guards), "the kernel wrote outside of its tensors"
    return found


def in_torch(call: Call) -> Tensor:
    """The same by torch's own operators in the call's precision, one after the other."""
    from redpp_serve.kernels.epilogue import ACTIVATIONS
    from redpp_serve.kernels.split.reference import conv_output_size

    x, weight, bias, residual, positions, channels, activation, *window = call
    if min(*x.shape, *weight.shape) > 0:
        total = F.conv2d(x, weight, None, *window)
    else:
        size = conv_output_size(x.shape[2:], weight.shape[2:], *window)
        total = x.new_zeros(x.shape[0], weight.shape[0], *size)
    if bias is not None:
        total = total + bias.view(1, -1, 1, 1)
    if positions is not None:
        spread = total.new_full((total.shape[0], channels, *total.shape[2:]), torch.nan)
        for o, row in enumerate(positions.tolist()):
            for channel in row:
                if channel >= 0:
                    spread[:, channel] = total[:, o]
        total = spread
    return ACTIVATIONS[activation](total if residual is None else total + residual)


def widened(call: Call) -> Call:
    return Call(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in call))


def judge(call: Call, found: Tensor | None = None) -> dict[str, float]:
    return errors(run(call) if found is None else found, in_torch(call), in_torch(widened(call)))


def interpret() -> dict[str, Any]:
    results: dict[str, Any] = {}
    with seen_paths() as paths:
        for key, dtype in DTYPES.items():
            results |= {f"{name} {key}": judge(make_call(case, dtype)) for name, case in CASES.items()}
    results["paths"] = paths
    call = make_call(CASES["3x3"], torch.float16)
    last = torch.channels_last
    results["layout channels_last"] = judge(
        call._replace(x=call.x.contiguous(memory_format=last), weight=call.weight.contiguous(memory_format=last))
    )
    results["layout sliced"] = judge(
        call._replace(
            x=torch.cat([call.x, call.x], 3)[..., : call.x.shape[3]], bias=call.bias.repeat_interleave(2)[::2]
        )
    )
    results["layout strided weight"] = judge(call._replace(weight=call.weight.repeat(1, 1, 1, 2)[..., ::2]))
    call = make_call(CASES["shared reduction"], torch.float32)
    results["repeated"] = (run(call) - run(call)).abs().max().item()
    results |= wrong_values()
    results["far image"] = far_image()
    results["far rows"] = far_rows()
    return results


def wrong_values() -> dict[str, dict[str, float]]:
    call = make_call(CASES["positions"], torch.float16)._replace(activation="none")
    right = judge(call)
    assert right["error"] <= 2 * right["torch_error"] + right["rounding"]
    changed = {name: getattr(call, name).clone() for name in ("weight", "residual", "positions")}
    changed["weight"][2, 3, 1, 1] += 0.5
    changed["residual"][1, 2, 3, 4] += 0.5
    changed["positions"][[0, 2]] = changed["positions"][[2, 0]]
    return {f"wrong {name}": judge(call, run(call._replace(**{name: value}))) for name, value in changed.items()}


@contextmanager
def watched(on_launch: Callable[[tuple[int, ...], tuple[Any, ...]], tuple[int, ...]]) -> Iterator[None]:
    """Every launch of the convolution kernel runs on the grid that `on_launch(grid, arguments)` returns."""
    from redpp_serve.kernels.fused_conv2d import kernel as module

    kernel = module.fused_conv2d_kernel

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: kernel[on_launch(grid, args)](*args, **options)

    with patch.object(module, "fused_conv2d_kernel", Spy()):
        yield


@contextmanager
def seen_paths() -> Iterator[dict[str, bool]]:
    from redpp_serve.kernels.fused_conv2d.kernel import fused_conv2d_kernel

    paths = dict.fromkeys(("pointwise", "flat", "shared", "large tiles"), False)

    def on_launch(grid: tuple[int, ...], args: tuple[Any, ...]) -> tuple[int, ...]:
        named = dict(zip(fused_conv2d_kernel.arg_names, args, strict=True))
        paths["pointwise"] |= named["POINTWISE"]
        paths["flat"] |= named["FLAT"]
        paths["shared"] |= named["SPLIT"] and grid[1] > 1
        paths["large tiles"] |= named["BLOCK_ROWS"] >= 64 and grid[0] > 2
        return grid

    with watched(on_launch):
        yield paths


def far_image() -> list[float]:
    """A 1x1 convolution that reads only the corners of its images, the last ones beyond 2^31 elements."""
    from redpp_serve.kernels.fused_conv2d.kernel import fused_conv2d_triton

    side = 1 << 15
    x = far_memory((3, 1, side, side))
    x[2, 0, :: side - 1, :: side - 1] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    one = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    call = Call(x, one, None, None, None, 1, "none", (side - 1, side - 1), (0, 0), (1, 1))
    return fused_conv2d_triton(*call)[2].flatten().tolist()


def far_rows() -> list[float]:
    """The last program of a convolution with more than 2^31 output positions, alone."""
    from triton.runtime.interpreter import interpreter_builder

    from redpp_serve.kernels.fused_conv2d import kernel as module

    side = 1 << 15
    x = far_memory((3, 1, side, side))
    x[2, 0, -1, -2:] = torch.tensor([1.0, 3.0])
    skipped = [0]

    def last_only(grid: tuple[int, ...], args: tuple[Any, ...]) -> tuple[int, ...]:
        skipped[0] = grid[0] - 1
        return (1, *grid[1:])

    def set_grid_idx(i: int, j: int, k: int) -> None:
        interpreter_builder.grid_idx = (i + skipped[0], j, k)

    one = torch.ones(1, dtype=torch.float16)
    call = Call(x, 2 * one.view(1, 1, 1, 1), one, None, None, 1, "none", (1, 1), (0, 0), (1, 1))
    with (
        watched(last_only),
        patch.object(interpreter_builder, "set_grid_idx", set_grid_idx),
        patch.object(module, "empty_channels_last", lambda like, shape: far_memory(shape)),
    ):
        return module.fused_conv2d_triton(*call)[2, 0, -1, -2:].tolist()


def at_page_ends() -> dict[str, Any]:
    from redpp_serve.kernels.fused_conv2d.kernel import fused_conv2d_triton

    results = {}
    for name in ("3x3", "1x1 many programs", "shared reduction", "7x7 stride 2, flat"):
        call = make_call(CASES[name], torch.float16)
        last = torch.channels_last
        call = call._replace(x=call.x.contiguous(memory_format=last), weight=call.weight.contiguous(memory_format=last))
        placed = (at_page_end(v) if isinstance(v, Tensor) else v for v in call)
        results[name] = judge(call, fused_conv2d_triton(*placed))
    return results


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "at_page_ends": at_page_ends}[sys.argv[1]]()))
