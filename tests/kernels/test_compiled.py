"""What the compiler of the Triton language makes of every kernel, as it is launched for layers of real networks.

Each case calls a launcher with tensors that have a shape and no memory, and compiles what it would have launched, in a
child that runs this file. `golden/kernel_budgets.json` limits registers, shared memory and instructions per weight: a
GPU issues so many instructions in the time that a packed weight takes to arrive, about 3.4 a weight on an H200. The
default run takes one case for each kernel and one architecture; the exhaustive one takes all.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.compiling import ARCHITECTURES, Launch, check_budget, compile_launch, recorded
from tests.support.interpreting import run_child

pytest.importorskip("triton")

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
SAMPLE = ("3x3 512@7 alone", "depthwise 3x3 144@56", "codebook prmt16, 8 rows", "split 3x3 256-256@14")


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    return run_child(__file__, "sample", TRITON_INTERPRET="0")


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    return run_child(__file__, "everything", TRITON_INTERPRET="0")


@pytest.mark.exhaustive
def test_each_kernel_compiles_within_its_budget(sample: dict[str, Any]) -> None:
    assert {name.rsplit(", ", 1)[1] for name in sample} == {
        *("fused_conv2d_kernel", "add_shares_kernel", "depthwise_conv2d_kernel"),
        *("codebook_linear_kernel", "multiply_kernel", "gather_sum_kernel"),
    }
    assert_good(sample)


@pytest.mark.exhaustive
def test_every_layer_compiles_within_its_budget(everything: dict[str, Any]) -> None:
    assert {name.rsplit(", sm_", 1)[0] for name in everything} == set(LAYERS)
    assert_good(everything)


def assert_good(compiled: dict[str, Any]) -> None:
    for name, found in compiled.items():
        check_budget(name, found)
        layer, kernel = name.rsplit(", sm_", 1)[0], name.rsplit(", ", 1)[1]
        if kernel in ("fused_conv2d_kernel", "codebook_linear_kernel"):  # IEEE products in fp32 are no tensor cores'
            assert found["mma"] == (not layer.endswith("fp32")), name
        if kernel == "codebook_linear_kernel" and not layer.endswith("fp32"):
            # The loop that is counted, by its products, is one step: neither unrolled, nor a part of it, nor repeated.
            assert found["steps"] == 1.0, name
        if kernel == "gather_sum_kernel":  # so that its budget is that of a loop and not of nothing
            assert found["loop"] > 0, name
        if layer in ("3x3 64@56", "1x1 24-144@56") or (layer.startswith("linear") and not layer.endswith("fp32")):
            assert found["copies"] == [16], f"{name}: aligned channels and weights arrive in the widest loads"
        if layer == "codebook prmt16, 8 rows":
            assert 16 in found["copies"], f"{name}: packed weights arrive in the widest loads"
        if layer == "depthwise 3x3 144@56":
            assert found["wide_stores"], name


# --- Below: the child process. ---


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def convolution(
    dtype: torch.dtype, batch: int, side: int, n_in: int, n_out: int, kernel: int, stride: int = 1, extras: str = ""
) -> Callable[[], list[Launch]]:
    """A layer with bias and ReLU; `extras`: r residual, t tf32."""

    def launches() -> list[Launch]:
        from redpp_serve.kernels import epilogue_kernel
        from redpp_serve.kernels.fused_conv2d import kernel as module

        size, window = -(-side // stride), ((stride,) * 2, (kernel // 2,) * 2, (1, 1))
        residual = meta(dtype, batch, n_out, size, size) if "r" in extras else None
        torch.backends.cudnn.allow_tf32 = "t" in extras
        x, weight = meta(dtype, batch, n_in, side, side), meta(dtype, n_out, n_in, kernel, kernel)
        with recorded(module, epilogue_kernel) as found:
            module.launch_fused_conv2d(x, weight, meta(dtype, n_out), residual, "relu", *window)
        return found

    return launches


def depthwise(
    dtype: torch.dtype, batch: int, side: int, channels: int, kernel: int, stride: int = 1
) -> Callable[[], list[Launch]]:
    def launches() -> list[Launch]:
        from redpp_serve.kernels.depthwise_conv2d import kernel as module

        weight = meta(dtype, kernel, kernel, channels, 1).permute(2, 3, 0, 1)
        window = (stride,) * 2, (kernel // 2,) * 2, (1, 1)
        x, bias = meta(dtype, batch, channels, side, side), meta(dtype, channels)
        with recorded(module) as found:
            module.launch_depthwise_conv2d(x, weight, bias, "relu", *window)
        return found

    return launches


def linear(
    rows: int, n_in: int, n_out: int, dtype: torch.dtype = FP16, residual: bool = False
) -> Callable[[], list[Launch]]:
    """A layer with bias and GELU."""

    def launches() -> list[Launch]:
        from redpp_serve.kernels import epilogue_kernel
        from redpp_serve.kernels.fused_conv2d import kernel as module
        from redpp_serve.kernels.fused_linear.operator import launch_fused_linear

        x, weight, bias = meta(dtype, rows, n_in), meta(dtype, n_out, n_in), meta(dtype, n_out)
        with recorded(module, epilogue_kernel) as found:
            launch_fused_linear(x, weight, bias, meta(dtype, rows, n_out) if residual else None, "gelu")
        return found[:1]

    return launches


def codebook(decode: str, values: int, rows: int, dtype: torch.dtype = FP16) -> Callable[[], list[Launch]]:
    """4096 x 4096 weights with bias and ReLU."""

    def launches() -> list[Launch]:
        from redpp_serve.kernels import epilogue_kernel
        from redpp_serve.kernels.codebook_linear import kernel as module
        from redpp_serve.kernels.codebook_linear.packing import TABLE_ROWS, packed_bytes

        tables = {"pair": meta(torch.int32, 256), "pointer": meta(dtype, values)}
        module.decode_table = lambda _, decode: tables.get(decode, meta(torch.int32, 8, TABLE_ROWS))
        indices = meta(torch.uint8, 4096, packed_bytes(4096))
        x, book, bias = meta(dtype, rows, 4096), meta(dtype, values), meta(dtype, 4096)
        with recorded(module, epilogue_kernel) as found:
            module.launch_codebook_linear(x, indices, book, bias, "relu", decode)
        return found[:1]

    return launches


def split(
    dtype: torch.dtype, batch: int, side: int, n_in: int, n_out: int, kernel: int, unique: int
) -> Callable[[], list[Launch]]:
    """A layer with `unique` kernels for each input; a Linear has images of one position."""

    def launches() -> list[Launch]:
        from redpp_serve.kernels.split import kernel as module

        rows, pairs, padding = unique * n_in, (n_out, n_in), (kernel // 2,) * 2
        x, bias, kernels = meta(dtype, batch, n_in, side, side), meta(dtype, n_out), meta(dtype, rows, kernel, kernel)
        refs = meta(torch.int64, rows), meta(torch.int32, *pairs), meta(torch.int8, *pairs)
        with recorded(module) as found:
            module.launch_split_conv2d(x, kernels, *refs, bias, (1, 1), padding, (1, 1), 1)
        return found[:2]

    return launches


LAYERS = {
    "3x3 64@56": convolution(FP16, 8, 56, 64, 64, 3, extras="r"),
    "3x3 512@7 alone": convolution(FP16, 1, 7, 512, 512, 3, extras="r"),
    "1x1 1024-256@14": convolution(BF16, 32, 14, 1024, 256, 1),
    "1x1 24-144@56": convolution(FP16, 1, 56, 24, 144, 1),
    "7x7 stem": convolution(FP16, 8, 224, 3, 64, 7, 2),
    "3x3 100-50 odd widths": convolution(BF16, 8, 28, 100, 50, 3, extras="r"),
    "3x3 64@56 fp32": convolution(FP32, 8, 56, 64, 64, 3, extras="r"),
    "3x3 64@56 tf32": convolution(FP32, 8, 56, 64, 64, 3, extras="rt"),
    "depthwise 3x3 144@56": depthwise(FP16, 32, 56, 144, 3),
    "depthwise 3x3 stride 2": depthwise(BF16, 32, 56, 144, 3, 2),
    "depthwise 5x5 672@14": depthwise(FP16, 8, 14, 672, 5),
    "depthwise 5x5 fp32": depthwise(FP32, 8, 14, 100, 5),
    "depthwise 7x7": depthwise(FP16, 8, 14, 64, 7),
    "linear 4096x4096, 1 row": linear(1, 4096, 4096),
    "linear 4096x4096, 64 rows": linear(64, 4096, 4096, BF16, residual=True),
    "linear 1000x2048, 256 rows": linear(256, 2048, 1000),
    "linear 1000x2048, 8 rows, fp32": linear(8, 2048, 1000, FP32),
    "codebook prmt8, 8 rows": codebook("prmt8", 8, 8),
    "codebook prmt8, 16 rows": codebook("prmt8", 8, 16),
    "codebook prmt8, 64 rows": codebook("prmt8", 8, 64),
    "codebook prmt8, 8 rows, bf16": codebook("prmt8", 8, 8, BF16),
    "codebook prmt16, 8 rows": codebook("prmt16", 16, 8),
    "codebook prmt16, 16 rows": codebook("prmt16", 16, 16),
    "codebook prmt16, 32 rows, bf16": codebook("prmt16", 16, 32, BF16),
    "codebook prmt16, 64 rows": codebook("prmt16", 16, 64),
    "codebook pair, 8 rows": codebook("pair", 16, 8),
    "codebook pair, 64 rows": codebook("pair", 16, 64),
    "codebook pointer, 8 rows": codebook("pointer", 16, 8),
    "codebook pointer, 16 rows, fp32": codebook("pointer", 16, 16, FP32),
    "split Linear 4096, 1 row": split(FP16, 1, 1, 4096, 4096, 1, 8),
    "split 3x3 256-256@14": split(BF16, 32, 14, 256, 256, 3, 16),
    "split 3x3 51-33@9 odd widths": split(FP16, 3, 9, 51, 33, 3, 33),
    "split 7x7 stem": split(FP32, 1, 224, 3, 64, 7, 64),
}


def usage(launch: Launch, arch: int) -> dict[str, Any]:
    made = compile_launch(launch, arch)
    found = made.usage | {"wide_stores": "st.global.v4.b32" in made.ptx}
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
    if launch.kernel.__name__ == "codebook_linear_kernel":
        weights = named["BLOCK_OUTPUTS"] * named["GROUPS"] * named["GROUP_BYTES"] * 2
        found["steps"] = made.loop_products / (weights * named["BLOCK_ROWS"])
    elif launch.kernel.__name__ == "gather_sum_kernel":
        weights = named["BLOCK_OUTPUTS"] * named["BLOCK_INPUTS"] * named["BLOCK_POSITIONS"]
    else:
        return found
    return found | {"per_weight": round(made.loop * launch.options["num_warps"] * 32 / weights, 2)}


def compile_all(everything: bool) -> dict[str, Any]:
    return {
        f"{name}, sm_{arch}, {launch.kernel.__name__}": usage(launch, arch)
        for name in (LAYERS if everything else SAMPLE)
        for launch in LAYERS[name]()
        for arch in (ARCHITECTURES if everything else ARCHITECTURES[-1:])
    }


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1] == "everything")))
