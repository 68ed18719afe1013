"""What the compiler makes of the dense convolutions' kernels, as they are launched for layers of real networks.

Each case calls the launcher with tensors that have a shape and no memory, and compiles what it would have launched.
"""

import json
import sys
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.compiling import ARCHITECTURES, Launch, check_budget, compile_launch, recorded
from tests.support.interpreting import run_child

pytest.importorskip("triton")

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


class Layer(NamedTuple):
    """A layer with bias and ReLU. `extras`: r residual, p positions (two of each channel), t tf32."""

    dtype: torch.dtype
    batch: int
    side: int
    n_in: int
    n_out: int
    kernel: int
    stride: int = 1
    extras: str = ""
    depthwise: bool = False


LAYERS = {
    "3x3 64@56": Layer(FP16, 8, 56, 64, 64, 3, extras="r"),
    "3x3 512@7 alone": Layer(FP16, 1, 7, 512, 512, 3, extras="r"),
    "1x1 1024-256@14": Layer(BF16, 32, 14, 1024, 256, 1),
    "1x1 24-144@56": Layer(FP16, 1, 56, 24, 144, 1),
    "7x7 stem": Layer(FP16, 8, 224, 3, 64, 7, 2),
    "3x3 100-50 odd widths": Layer(BF16, 8, 28, 100, 50, 3, extras="r"),
    "3x3 64-32 duplicated": Layer(FP16, 8, 56, 64, 32, 3, extras="rp"),
    "3x3 64@56 fp32": Layer(FP32, 8, 56, 64, 64, 3, extras="r"),
    "3x3 64@56 tf32": Layer(FP32, 8, 56, 64, 64, 3, extras="rt"),
    "depthwise 3x3 144@56": Layer(FP16, 32, 56, 144, 144, 3, depthwise=True),
    "depthwise 3x3 stride 2": Layer(BF16, 32, 56, 144, 144, 3, 2, depthwise=True),
    "depthwise 5x5 672@14": Layer(FP16, 8, 14, 672, 672, 5, depthwise=True),
    "depthwise 5x5 fp32": Layer(FP32, 8, 14, 100, 100, 5, depthwise=True),
    "depthwise 7x7": Layer(FP16, 8, 14, 64, 64, 7, depthwise=True),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return run_child(__file__, "compile", TRITON_INTERPRET="0")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_within_its_budget(compiled: dict[str, Any], name: str, arch: int) -> None:
    kernels = {key: value for key, value in compiled.items() if key.startswith(f"{name}, sm_{arch}, ")}
    assert kernels
    for key, found in kernels.items():
        check_budget(key, found)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("depthwise")])
def test_products_run_on_tensor_cores_except_ieee_fp32(compiled: dict[str, Any], name: str, arch: int) -> None:
    assert compiled[f"{name}, sm_{arch}, fused_conv2d_kernel"]["mma"] == (name != "3x3 64@56 fp32")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loads_of_aligned_channels_are_as_wide_as_can_be(compiled: dict[str, Any], arch: int) -> None:
    """16 bytes: from global to shared memory for the convolution, to registers and back for the depthwise one."""
    assert compiled[f"3x3 64@56, sm_{arch}, fused_conv2d_kernel"]["copies"] == [16]
    assert compiled[f"1x1 24-144@56, sm_{arch}, fused_conv2d_kernel"]["copies"] == [16]
    assert compiled[f"depthwise 3x3 144@56, sm_{arch}, depthwise_conv2d_kernel"]["wide_stores"]


def test_a_small_plane_alone_shares_its_reduction(compiled: dict[str, Any]) -> None:
    assert "3x3 512@7 alone, sm_90, add_shares_kernel" in compiled


# --- Below: the child process. ---


def launches_of(layer: Layer) -> list[Launch]:
    from redpp_serve.kernels.depthwise_conv2d import kernel as depthwise_conv2d_triton
    from redpp_serve.kernels.fused_conv2d import kernel as fused_conv2d_triton

    def meta(*shape: int, dtype: torch.dtype = layer.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    padding, side = layer.kernel // 2, -(-layer.side // layer.stride)
    window = (layer.stride,) * 2, (padding,) * 2, (1, 1)
    x, bias = meta(layer.batch, layer.n_in, layer.side, layer.side), meta(layer.n_out)
    if layer.depthwise:
        weight = meta(layer.kernel, layer.kernel, layer.n_out, 1).permute(2, 3, 0, 1)
        with recorded(depthwise_conv2d_triton) as launches:
            depthwise_conv2d_triton.depthwise_conv2d_triton(x, weight, bias, "relu", *window)
        return launches
    weight = meta(layer.n_out, layer.n_in, layer.kernel, layer.kernel)
    positions = meta(layer.n_out, 2, dtype=torch.int32) if "p" in layer.extras else None
    channels = layer.n_out * (2 if "p" in layer.extras else 1)
    residual = meta(layer.batch, channels, side, side) if "r" in layer.extras else None
    torch.backends.cudnn.allow_tf32 = "t" in layer.extras
    with recorded(fused_conv2d_triton) as launches:
        fused_conv2d_triton.fused_conv2d_triton(x, weight, bias, residual, positions, channels, "relu", *window)
    return launches


def summary(launch: Launch, arch: int) -> dict[str, Any]:
    made = compile_launch(launch, arch)
    return {
        "registers": made.registers,
        "spills": made.spills,
        "shared": made.shared,
        "mma": made.mma,
        "copies": made.copies,
        "wide_stores": "st.global.v4.b32" in made.ptx,
    }


def compile_all() -> dict[str, Any]:
    return {
        f"{name}, sm_{arch}, {launch.kernel.__name__}": summary(launch, arch)
        for name, layer in LAYERS.items()
        for launch in launches_of(layer)
        for arch in ARCHITECTURES
    }


if __name__ == "__main__":
    print(json.dumps({"compile": compile_all}[sys.argv[1]]()))
