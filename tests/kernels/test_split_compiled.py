"""What the compiler makes of the split's kernels, as they are launched for layers of real networks."""

import json
import sys
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.compiling import ARCHITECTURES, Launch, check_budget, compile_launch, recorded
from tests.support.interpreting import run_child

pytest.importorskip("triton")

KERNELS = ("multiply_kernel", "gather_sum_kernel")


class Layer(NamedTuple):
    """A layer with `unique` kernels for each input; a Linear has images of one position."""

    dtype: torch.dtype
    batch: int
    side: int
    n_in: int
    n_out: int
    kernel: int
    unique: int


LAYERS = {
    "Linear 4096, 1 row": Layer(torch.float16, 1, 1, 4096, 4096, 1, 8),
    "3x3 256-256@14": Layer(torch.bfloat16, 32, 14, 256, 256, 3, 16),
    "3x3 51-33@9 odd widths": Layer(torch.float16, 3, 9, 51, 33, 3, 33),
    "7x7 stem": Layer(torch.float32, 1, 224, 3, 64, 7, 64),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return run_child(__file__, "compile", TRITON_INTERPRET="0")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_within_its_budget(compiled: dict[str, Any], name: str, arch: int, kernel: str) -> None:
    case = f"split {name}, sm_{arch}, {kernel}"
    check_budget(case, compiled[case])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_sum_has_a_loop_over_the_inputs(compiled: dict[str, Any], arch: int) -> None:
    """So that the numbers of a budget are those of a loop and not of nothing."""
    assert all(compiled[f"split {name}, sm_{arch}, gather_sum_kernel"]["loop"] > 0 for name in LAYERS)


# --- Below: the child process. ---


def launches_of(layer: Layer) -> list[Launch]:
    from redpp_serve.kernels.split import kernel as split_triton

    def meta(*shape: int, dtype: torch.dtype = layer.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, pairs = layer.unique * layer.n_in, (layer.n_out, layer.n_in)
    padding = (layer.kernel // 2,) * 2
    with recorded(split_triton) as launches:
        split_triton.split_conv2d_triton(
            *(meta(layer.batch, layer.n_in, layer.side, layer.side), meta(rows, layer.kernel, layer.kernel)),
            *(meta(rows, dtype=torch.int64), meta(*pairs, dtype=torch.int32), meta(*pairs, dtype=torch.int8)),
            *(meta(layer.n_out), (1, 1), padding, (1, 1)),
        )
    return launches[:2]


def compile_all() -> dict[str, Any]:
    found = {}
    for name, layer in LAYERS.items():
        for launch in launches_of(layer):
            named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
            gathered = named.get("BLOCK_OUTPUTS", 0) * named.get("BLOCK_INPUTS", 0) * named["BLOCK_POSITIONS"]
            for arch in ARCHITECTURES:
                usage = compile_launch(launch, arch).usage
                threads = 32 * launch.options["num_warps"]
                per_value = {"per_weight": round(usage["loop"] * threads / gathered, 2)} if gathered else {}
                found[f"split {name}, sm_{arch}, {launch.kernel.__name__}"] = usage | per_value
    return found


if __name__ == "__main__":
    print(json.dumps({"compile": compile_all}[sys.argv[1]]()))
