"""What the compiler makes of the codebook Linear's kernel: matrix instructions, no spills, few instructions a weight.

A GPU issues so many instructions in the time that a packed weight takes to arrive: about 3.4 a weight on an H200. More
than that, and decoding is what takes the time.
"""

import json
import sys
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.compiling import ARCHITECTURES, Launch, check_budget, compile_launch, recorded
from tests.support.interpreting import run_child

pytest.importorskip("triton")


class Layer(NamedTuple):
    """4096 x 4096 weights with bias and ReLU."""

    decode: str
    values: int
    rows: int
    dtype: torch.dtype = torch.float16


LAYERS = {
    "prmt8, 8 rows": Layer("prmt8", 8, 8),
    "prmt8, 16 rows": Layer("prmt8", 8, 16),
    "prmt8, 64 rows": Layer("prmt8", 8, 64),
    "prmt8, 8 rows, bf16": Layer("prmt8", 8, 8, torch.bfloat16),
    "prmt16, 8 rows": Layer("prmt16", 16, 8),
    "prmt16, 16 rows": Layer("prmt16", 16, 16),
    "prmt16, 32 rows, bf16": Layer("prmt16", 16, 32, torch.bfloat16),
    "prmt16, 64 rows": Layer("prmt16", 16, 64),
    "pair, 8 rows": Layer("pair", 16, 8),
    "pair, 64 rows": Layer("pair", 16, 64),
    "pointer, 8 rows": Layer("pointer", 16, 8),
    "pointer, 16 rows, fp32": Layer("pointer", 16, 16, torch.float32),
}
N_OUT, N_IN = 4096, 4096


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return run_child(__file__, "compile", TRITON_INTERPRET="0")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_within_its_budget(compiled: dict[str, Any], name: str, arch: int) -> None:
    case = f"codebook {name}, sm_{arch}"
    check_budget(case, compiled[case])
    assert compiled[case]["mma"] == (LAYERS[name].dtype != torch.float32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name].dtype != torch.float32])
def test_the_loop_that_is_counted_is_one_step(compiled: dict[str, Any], name: str, arch: int) -> None:
    """By its matrix products: neither unrolled, nor a part of it, nor work that several warps repeat."""
    assert compiled[f"codebook {name}, sm_{arch}"]["steps"] == 1.0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_weights_arrive_in_the_widest_loads(compiled: dict[str, Any], arch: int) -> None:
    assert 16 in compiled[f"codebook prmt16, 8 rows, sm_{arch}"]["copies"]


# --- Below: the child process. ---


def launch_of(layer: Layer) -> Launch:
    from redpp_serve.kernels.codebook_linear import kernel as module
    from redpp_serve.kernels.codebook_linear.packing import TABLE_ROWS, packed_bytes

    meta = lambda *shape, dtype=layer.dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    tables = {"pair": meta(256, dtype=torch.int32), "pointer": meta(layer.values)}
    module.decode_table = lambda codebook, decode: tables.get(decode, meta(8, TABLE_ROWS, dtype=torch.int32))
    indices = meta(N_OUT, packed_bytes(N_IN), dtype=torch.uint8)
    with recorded(module) as launches:
        module.codebook_linear_triton(
            meta(layer.rows, N_IN), indices, meta(layer.values), meta(N_OUT), "relu", layer.decode
        )
    return launches[0]


def compile_all() -> dict[str, Any]:
    found = {}
    for name, layer in LAYERS.items():
        launch = launch_of(layer)
        named = dict(zip(launch.kernel.arg_names, launch.arguments))
        weights = named["BLOCK_OUTPUTS"] * named["GROUPS"] * named["GROUP_BYTES"] * 2
        for arch in ARCHITECTURES:
            made = compile_launch(launch, arch)
            found[f"codebook {name}, sm_{arch}"] = {
                "registers": made.registers,
                "spills": made.spills,
                "shared": made.shared,
                "mma": made.mma,
                "copies": made.copies,
                "per_weight": round(made.loop * launch.options["num_warps"] * 32 / weights, 2),
                "steps": made.loop_products / (weights * named["BLOCK_ROWS"]),
            }
    return found


if __name__ == "__main__":
    print(json.dumps({"compile": compile_all}[sys.argv[1]]()))
