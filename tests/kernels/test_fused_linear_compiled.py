"""What the compiler makes of the fused Linear, as it is launched for layers of real networks."""

import json
import sys
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.compiling import ARCHITECTURES, check_budget, compile_launch, recorded
from tests.support.interpreting import run_child

pytest.importorskip("triton")


class Layer(NamedTuple):
    """A Linear with bias and GELU."""

    rows: int
    n_in: int
    n_out: int
    dtype: torch.dtype = torch.float16
    residual: bool = False


LAYERS = {
    "4096x4096, 1 row": Layer(1, 4096, 4096),
    "4096x4096, 64 rows": Layer(64, 4096, 4096, torch.bfloat16, residual=True),
    "1000x2048, 256 rows": Layer(256, 2048, 1000),
    "1000x2048, 8 rows, fp32": Layer(8, 2048, 1000, torch.float32),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return run_child(__file__, "compile", TRITON_INTERPRET="0")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", LAYERS)
def test_compiles_within_its_budget(compiled: dict[str, Any], name: str, arch: int) -> None:
    case = f"linear {name}, sm_{arch}"
    check_budget(case, compiled[case])
    assert compiled[case]["mma"] == (LAYERS[name].dtype != torch.float32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["4096x4096, 1 row", "4096x4096, 64 rows", "1000x2048, 256 rows"])
def test_weights_arrive_in_the_widest_loads(compiled: dict[str, Any], name: str, arch: int) -> None:
    assert compiled[f"linear {name}, sm_{arch}"]["copies"] == [16]


# --- Below: the child process. ---


def compile_all() -> dict[str, Any]:
    from redpp_serve.kernels.fused_conv2d import kernel as fused_conv2d_triton
    from redpp_serve.kernels.fused_linear.kernel import fused_linear_triton

    found = {}
    for name, layer in LAYERS.items():
        meta = lambda *shape, dtype=layer.dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
        addend = meta(layer.rows, layer.n_out) if layer.residual else None
        with recorded(fused_conv2d_triton) as launches:
            fused_linear_triton(
                meta(layer.rows, layer.n_in),
                meta(layer.n_out, layer.n_in),
                meta(layer.n_out),
                addend,
                None,
                layer.n_out,
                "gelu",
            )
        found |= {f"linear {name}, sm_{arch}": compile_launch(launches[0], arch).usage for arch in ARCHITECTURES}
    return found


if __name__ == "__main__":
    print(json.dumps({"compile": compile_all}[sys.argv[1]]()))
