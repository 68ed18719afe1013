"""The Triton kernels without a GPU: run in the interpreter, and compiled ahead of time for sm_80 and sm_90.

The interpreter is a property of the process (triton reads its switch at import), so the work happens in a child that
runs this file; the tests here judge the numbers it prints.
"""

import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_kernels_split_reference import CONV_CASES, Split, build_split, quantised_weight
from torch import Tensor

pytest.importorskip("triton")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LINEAR_SHAPES = {"row": (1, 40), "rows": (5, 40), "sequence": (2, 3, 40), "empty": (0, 40)}
LAYOUTS = ("channels_last", "sliced")
COMPILED = [(arch, kernel) for arch in (80, 90) for kernel in ("multiply", "gather")]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run_child("interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return run_child("compile", TRITON_INTERPRET="0")


def run_child(what: str, **environment: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, what],
            env=os.environ | {"TRITON_CACHE_DIR": cache} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_as_good_as_torch(result: dict[str, float]) -> None:
    """At most twice the error of torch's dense layer in the same precision, plus one rounding of the largest value."""
    assert result["error"] <= 2 * result["torch_error"] + result["rounding"], result


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


@pytest.mark.parametrize(("arch", "kernel"), COMPILED)
def test_compiles_without_spills(compiled: dict[str, Any], arch: int, kernel: str) -> None:
    usage = {name: value for name, value in compiled.items() if name.startswith(f"{kernel} sm_{arch} ")}
    assert len(usage) == 3
    for name, value in usage.items():
        assert value["stack"] == 0 and value["local"] == 0, (name, value)
        assert value["registers"] <= 128, (name, value)


# --- Below: the child process. ---


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fills floating-point `torch.empty` buffers with NaN, so that an element never written shows."""
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        made = original(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = original


def errors(found: Tensor, in_torch: Tensor, exact: Tensor) -> dict[str, float]:
    if exact.numel() == 0:
        return {"error": float(found.shape != exact.shape), "torch_error": 0.0, "rounding": 0.0}
    return {
        "error": (found.double() - exact).abs().max().item(),
        "torch_error": (in_torch.double() - exact).abs().max().item(),
        "rounding": torch.finfo(found.dtype).eps * exact.abs().max().item(),
    }


def conv_errors(
    name: str,
    dtype: torch.dtype,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
    damage: Callable[[Split], Split] = lambda split: split,
) -> dict[str, float]:
    from redpp_serve.kernels.split_triton import split_conv2d_triton

    x_shape, w_shape, stride, padding, dilation, groups = CONV_CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(x_shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = quantised_weight(w_shape, generator)
    bias = torch.randn(w_shape[0], generator=generator, dtype=torch.float64).to(dtype) if len(name) % 2 else None
    split = damage(build_split(weight, groups))
    split = split._replace(kernels=split.kernels.to(dtype))
    with poisoned_empty():
        found = split_conv2d_triton(prepare(x), *split, bias, stride, padding, dilation)
    window = (stride, padding, dilation, groups)
    exact = F.conv2d(x.double(), weight, None if bias is None else bias.double(), *window)
    return errors(found, F.conv2d(x, weight.to(dtype), bias, *window), exact)


def linear_errors(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    from redpp_serve.kernels.split_triton import split_linear_triton

    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = quantised_weight((13, shape[-1]), generator)
    bias = torch.randn(13, generator=generator, dtype=torch.float64).to(dtype)
    kernels, *rest = build_split(weight[:, :, None, None])
    with poisoned_empty():
        found = split_linear_triton(x, kernels.flatten().to(dtype), *rest, bias)
    exact = F.linear(x.double(), weight, bias.double())
    return errors(found, F.linear(x, weight.to(dtype), bias), exact)


def damaged(member: str) -> Callable[[Split], Split]:
    def damage(split: Split) -> Split:
        output, column = (int(v) for v in (split.index > 0).nonzero()[0])
        wrong = getattr(split, member).clone()
        wrong[output, column] += -1 if member == "index" else -2 * wrong[output, column]
        return split._replace(**{member: wrong})

    return damage


def dropped_errors(weight: Tensor) -> dict[str, float]:
    """Channels whose kernels are all zero hold NaN; the dense layer to compare with does not have them."""
    from redpp_serve.kernels.split_triton import split_conv2d_triton

    kept = weight.abs().amax((0, 2, 3)) > 0
    x = torch.where(kept.view(1, -1, 1, 1), torch.ones(2, weight.shape[1], 4, 4), torch.nan)
    bias = torch.arange(float(len(weight)))
    with poisoned_empty():
        found = split_conv2d_triton(x, *build_split(weight), bias, (1, 1), (1, 1), (1, 1))
    dense = F.conv2d(x[:, kept], weight[:, kept], bias, 1, 1) if kept.any() else bias.view(1, -1, 1, 1).expand_as(found)
    return errors(found, dense, dense.double())


def far_values() -> list[float]:
    """A 1x1 convolution that reads only the corners of its images, the last ones beyond 2^31 elements.

    The 6 GiB are reserved, not backed by memory: a handful of pages is touched.
    """
    from redpp_serve.kernels.split_triton import split_conv2d_triton

    side, images = 1 << 15, 3
    memory = mmap.mmap(-1, images * side * side * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # NORESERVE
    x = torch.frombuffer(memory, dtype=torch.float16).view(images, 1, side, side)
    x[2, 0, :: side - 1, :: side - 1] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    split = build_split(torch.ones(1, 1, 1, 1, dtype=torch.float16))
    found = split_conv2d_triton(x, *split, None, (side - 1, side - 1), (0, 0), (1, 1))
    return found[2].flatten().tolist()


def interpret() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for key, dtype in DTYPES.items():
        results |= {f"conv {name} {key}": conv_errors(name, dtype) for name in CONV_CASES}
        results |= {f"linear {name} {key}": linear_errors(shape, dtype) for name, shape in LINEAR_SHAPES.items()}
    results["layout channels_last"] = conv_errors(
        "plain", torch.float32, lambda x: x.to(memory_format=torch.channels_last)
    )
    results["layout sliced"] = conv_errors("plain", torch.float32, lambda x: torch.cat([x, x], 3)[..., : x.shape[3]])
    for member in ("index", "sign"):
        results[f"wrong {member}"] = conv_errors("plain", torch.float16, damage=damaged(member))
    weight = torch.zeros(3, 4, 3, 3)
    results["all zero"] = dropped_errors(weight)
    weight[1, 2] = 2.0
    results["dropped"] = dropped_errors(weight)
    results["far"] = far_values()
    results["several launches"], results["launches"] = several_launches()
    return results


def several_launches() -> tuple[dict[str, float], int]:
    """The plain convolution (126 positions) with room for the products of 50 at a time, and how often that launched."""
    from redpp_serve.kernels import split_triton

    starts: list[int] = []
    gather = split_triton.gather_sum_kernel

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            starts.append(grid[0])
            return gather[grid]

    split_triton.positions_per_launch = lambda rows, positions: 50
    split_triton.gather_sum_kernel = Spy()
    return conv_errors("plain", torch.float32), len(starts)


def compile_ahead() -> dict[str, Any]:
    """Registers, stack and local bytes of both kernels, over precisions and shapes, by triton's own ptxas."""
    import triton
    from redpp_serve.kernels.split_heuristics import gather_blocks, multiply_blocks
    from redpp_serve.kernels.split_triton import gather_sum_kernel, multiply_kernel

    shapes = (("fp16", 1, (1, 1)), ("bf16", 6272, (3, 3)), ("fp32", 50, (7, 7)))
    fixed = {"channel": "*i64", "index": "*i32", "sign": "*i8", "products": "*fp32", "start": "i64", "stop": "i64"}
    results: dict[str, Any] = {}
    for arch in (80, 90):
        for dtype, positions, (kernel_h, kernel_w) in shapes:
            types_of = fixed | dict.fromkeys(("x", "kernels", "bias", "out"), f"*{dtype}")
            m, g = multiply_blocks(4096, positions), gather_blocks(256, 256, positions)
            launches = {
                "multiply": (multiply_kernel, m.warps, (kernel_h, kernel_w, m.rows, m.positions)),
                "gather": (gather_sum_kernel, g.warps, (True, g.outputs, g.inputs, g.positions)),
            }
            for name, (kernel, warps, constants) in launches.items():
                types = {argument: types_of.get(argument, "i32") for argument in kernel.arg_names}
                constexprs = dict(zip(kernel.arg_names[-len(constants) :], constants))
                source = triton.compiler.ASTSource(
                    fn=kernel,
                    signature=types | dict.fromkeys(constexprs, "constexpr"),
                    constexprs=constexprs,
                    attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"},
                )
                target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
                cubin = triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]
                results[f"{name} sm_{arch} {dtype} {positions}"] = resource_usage(cubin)
    return results


def resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    return dict(zip(("registers", "stack", "local"), map(int, found.groups())))


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_ahead}[sys.argv[1]]()))
