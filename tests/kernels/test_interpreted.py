"""Every kernel in the interpreter of the Triton language, against torch's own layers in fp64.

The interpreter is a property of the process, so the work happens in a child that runs this file; the tests here judge
the numbers that it prints. It cannot run inline assembly, which test_codebook runs in a model instead. The
default run takes a sample of the cases in one precision; the exhaustive one takes all of them.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.interpreting import assert_as_good_as_torch, errors, run_child
from tests.support.kernel_cases import CALLS, LAST, Call, build_split, launcher, mover
from tests.support.kernel_memory import at_page_end, far_memory, run_guarded

pytest.importorskip("triton")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
SAMPLE = {
    "codebook_linear": ("one row, pair", "sixteen rows, shares, pointer", "no rows, pointer"),
    "depthwise_conv2d": ("3x3", "rectangular, asymmetric", "dilated across", "no channels"),
    "fused_conv2d": ("1x1 stride 2", "7x7 stride 2, flat", "shared reduction", "no inputs", "sliced"),
    "fused_linear": ("activation *", "one row", "no inputs", "shared reduction", "transposed"),
    "split_conv2d": ("strided", "groups", "one pixel", "empty batch", "sliced"),
    "split_linear": ("row", "sequence"),
}
WRONG = {  # argument that is changed, and where a fault of its kind is
    "codebook_linear": ("five rows, pair", {"indices": 1, "bias": 3, "last input": 0}),
    "depthwise_conv2d": ("one channel", {"tap": 1}),
    "fused_conv2d": ("rectangular, dilated, asymmetric", {"weight": 1, "residual": 3}),
    "fused_linear": ("17 rows", {"weight": 1}),
    "split_conv2d": ("plain", {"index": 3, "sign": 4}),
}
PAGE_ENDS = {
    "codebook_linear": ("five rows, pair", "five rows, pointer", "many programs, pair", "many programs, pointer"),
    "depthwise_conv2d": ("3x3", "3x3 many channels", "3x3 stride 2"),
    "fused_conv2d": ("3x3", "1x1 many programs", "shared reduction", "7x7 stride 2, flat"),
}


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    return run_child(__file__, "sample", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    return run_child(__file__, "everything", TRITON_INTERPRET="1")


def judge_all(results: dict[str, dict[str, float]]) -> None:
    assert results
    for name, result in results.items():
        try:
            assert_as_good_as_torch(result)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("op", CALLS)
def test_kernels_are_as_good_as_torch(sample: dict[str, Any], op: str) -> None:
    judge_all(sample["results"][op])


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", CALLS)
def test_kernels_are_as_good_as_torch_in_every_case(everything: dict[str, Any], op: str) -> None:
    judge_all(everything["results"][op])
    assert everything["paths"] == dict.fromkeys(everything["paths"], True), "a path of the convolution is not reached"


def test_nothing_beyond_a_tensor_is_read(sample: dict[str, Any]) -> None:
    """Not even where the value is dropped afterwards: the child would have been killed."""
    judge_all(sample["page ends"])


@pytest.mark.exhaustive
def test_nothing_beyond_a_tensor_is_read_in_every_case(everything: dict[str, Any]) -> None:
    judge_all(everything["page ends"])


def test_the_comparison_notices_one_wrong_value(sample: dict[str, Any]) -> None:
    assert len(sample["wrong"]) == 9
    for name, result in sample["wrong"].items():
        with pytest.raises(AssertionError):
            raise LookupError(name, assert_as_good_as_torch(result))


def test_shares_are_added_in_the_same_order(sample: dict[str, Any]) -> None:
    assert sample["repeated"] == {"fused_conv2d": True, "fused_linear": True, "codebook_linear": True}


def test_offsets_beyond_2_to_the_31(sample: dict[str, Any]) -> None:
    corners = [1.0, 2.0, 3.0, 4.0]
    assert sample["far"] == {"fused_conv2d": corners, "depthwise_conv2d": corners, "split_conv2d": corners}


@pytest.mark.exhaustive
def test_rows_beyond_2_to_the_31(everything: dict[str, Any]) -> None:
    assert everything["far rows"] == [3.0, 7.0]


def test_a_split_without_room_for_its_products_is_launched_several_times(sample: dict[str, Any]) -> None:
    assert sample["launches"] == 3
    judge_all({"several launches": sample["several launches"]})


def test_dropped_inputs_of_a_split_are_not_read(sample: dict[str, Any]) -> None:
    judge_all(sample["dropped"])


# --- Below: the child process. ---


def calls(op: str, dtype: torch.dtype, patterns: tuple[str, ...] = ("*",)) -> dict[str, Call]:
    """Cases whose names match one of the patterns, but for those that need inline assembly."""
    found = {name: call for name, call in CALLS[op](dtype) if any(fnmatch(name, p) for p in patterns)}
    half = dtype.itemsize == 2
    return {name: call for name, call in found.items() if not ("prmt" in name or (half and name.endswith("auto")))}


def judge(op: str, call: Call, found: Tensor | None = None) -> dict[str, float]:
    """Errors of a result; a sum of n numbers in fp32 may differ by the order of its additions, by about sqrt(n)."""
    found = run_guarded(launcher(op), *call.arguments) if found is None else found
    result = errors(found, call.dense(mover()), call.dense(mover(dtype=torch.float64)))
    result["rounding"] *= max(1.0, math.sqrt(call.terms)) if found.dtype == torch.float32 else 1.0
    return result


def interpret(everything: bool) -> dict[str, Any]:
    precisions = {"fp16": torch.float16} if not everything else DTYPES
    found: dict[str, Any] = {"results": {}, "page ends": {}, "wrong": {}}
    with seen_paths() as found["paths"]:
        for op in CALLS:
            more = {"bf16": torch.bfloat16} if everything and op.startswith("split") else {}  # all arithmetic is fp32
            found["results"][op] = {
                f"{name} {precision}": judge(op, call)
                for precision, dtype in (precisions | more).items()
                for name, call in calls(op, dtype, ("*",) if everything else SAMPLE[op]).items()
            }
    for op, names in PAGE_ENDS.items():
        for name in names if everything else names[-1:]:
            found["page ends"][f"{op} {name}"] = at_page_ends(op, calls(op, torch.float16)[name])
    for op, (name, places) in WRONG.items():
        call = calls(op, torch.float16)[name]
        assert_as_good_as_torch(judge(op, call))
        for what, at in places.items():
            found["wrong"][f"{op} {what}"] = judge(op, call, launcher(op)(*damaged(call, at).arguments))
    found["repeated"] = {
        "fused_conv2d": repeats("fused_conv2d", "shared reduction"),
        "fused_linear": repeats("fused_linear", "shared reduction"),
        "codebook_linear": repeats("codebook_linear", "sixteen rows, shares, pointer"),
    }
    found["far"] = {op: far_image(op) for op in ("fused_conv2d", "depthwise_conv2d", "split_conv2d")}
    found["several launches"], found["launches"] = several_launches()
    found["dropped"] = {name: dropped(name) for name in ("all", "some")}
    return found | ({"far rows": far_rows()} if everything else {})


def damaged(call: Call, at: int) -> Call:
    """Change one value of an argument."""
    wrong = call.arguments[at].clone()
    if wrong.dtype == torch.uint8:
        wrong[7, 60] ^= 0x50
    elif not wrong.is_floating_point():  # of a pair that is not the first: its neighbour's kernel, the other sign
        place = tuple((call.arguments[3] > 0).nonzero()[0])
        wrong[place] += -1 if wrong.dtype == torch.int32 else -2 * wrong[place]
    else:
        wrong.view(-1)[-1] += 3 if at == 0 else 0.5
        wrong.view(-1)[0] += 3 if at == 0 else 0.5
    return call.changed(at, wrong)


def repeats(op: str, name: str) -> bool:
    from redpp_serve.kernels import epilogue_kernel

    call, shared = calls(op, torch.float32)[name], []
    kernel = epilogue_kernel.add_shares_kernel

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            shared.append(grid)
            return kernel[grid]

    with patch.object(epilogue_kernel, "add_shares_kernel", Spy()):
        one, other = (launcher(op)(*call.arguments) for _ in range(2))
    return len(shared) == 2 and torch.equal(one, other)


def at_page_ends(op: str, call: Call) -> dict[str, float]:
    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return at_page_end(value.contiguous(memory_format=LAST) if value.dim() == 4 else value)

    return judge(op, call, launcher(op)(*call.moved(place)))


def far_image(op: str) -> list[float]:
    """A 1x1 convolution that reads only the corners of its images, the last ones beyond 2^31 elements."""
    side = 1 << 15
    x, one = far_memory((3, 1, side, side)), torch.ones(1, 1, 1, 1, dtype=torch.float16)
    x[2, 0, :: side - 1, :: side - 1] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    window = (side - 1, side - 1), (0, 0), (1, 1)
    arguments = {
        "fused_conv2d": (x, one, None, None, "none", *window),
        "depthwise_conv2d": (x, one, None, "none", *window),
        "split_conv2d": (x, *build_split(one), None, *window, 1),
    }
    return launcher(op)(*arguments[op])[2].flatten().tolist()


@contextmanager
def watched(on_launch: Callable[[tuple[int, ...], tuple[Any, ...]], tuple[int, ...]]) -> Iterator[None]:
    """Run every launch of the convolution kernel on the grid that `on_launch(grid, arguments)` returns."""
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
    with (
        watched(last_only),
        patch.object(interpreter_builder, "set_grid_idx", set_grid_idx),
        patch.object(module, "empty_channels_last", lambda like, shape: far_memory(shape)),
    ):
        found = module.launch_fused_conv2d(x, 2 * one.view(1, 1, 1, 1), one, None, "none", (1, 1), (0, 0), (1, 1))
        return found[2, 0, -1, -2:].tolist()


def several_launches() -> tuple[dict[str, float], int]:
    """The plain convolution (126 positions) with room for the products of 50 at a time, and how often that launched."""
    from redpp_serve.kernels.split import kernel as module

    starts: list[int] = []
    gather = module.gather_sum_kernel

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            starts.append(grid[0])
            return gather[grid]

    with (
        patch.object(module, "positions_per_launch", lambda rows, positions: 50),
        patch.object(module, "gather_sum_kernel", Spy()),
    ):
        return judge("split_conv2d", calls("split_conv2d", torch.float32)["plain"]), len(starts)


def dropped(which: str) -> dict[str, float]:
    """Channels whose kernels are all zero hold NaN; the dense layer to compare with does not have them."""
    weight, bias = torch.zeros(3, 4, 3, 3), torch.arange(3.0)
    if which == "some":
        weight[1, 2] = 2.0
    kept = weight.abs().amax((0, 2, 3)) > 0
    x = torch.where(kept.view(1, -1, 1, 1), torch.ones(2, 4, 4, 4), torch.nan)
    found = run_guarded(launcher("split_conv2d"), x, *build_split(weight), bias, (1, 1), (1, 1), (1, 1), 1)
    dense = F.conv2d(x[:, kept], weight[:, kept], bias, 1, 1) if kept.any() else bias.view(1, -1, 1, 1).expand_as(found)
    return errors(found, dense, dense.double())


if __name__ == "__main__":
    print(json.dumps(interpret(sys.argv[1] == "everything")))
