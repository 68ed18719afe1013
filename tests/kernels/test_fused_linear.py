"""The fused Linear: its meaning, opcheck, refusals and FLOP formula; its kernel in Triton's interpreter."""

import json
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from redpp_serve import kernels
from redpp_serve.kernels.epilogue import ACTIVATIONS
from tests.support.interpreting import assert_as_good_as_torch, errors, poisoned, run_child
from tests.support.kernel_memory import surrounded

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# rows of x, n_in, n_out, activation, extras (b bias, r residual, p positions)
CASES: dict[str, tuple[tuple[int, ...], int, int, str, str]] = {
    f"activation {name}": ((3,), 20, 13, name, "br") for name in ACTIVATIONS
} | {
    "no rows": ((0,), 8, 5, "relu", "br"),
    "one row": ((1,), 33, 17, "none", "b"),
    "17 rows": ((17,), 40, 24, "relu", ""),
    "64 rows": ((64,), 48, 40, "silu", "brp"),
    "no inputs": ((3,), 0, 5, "none", "br"),
    "one input": ((3,), 1, 5, "none", "b"),
    "3-d": ((2, 3), 24, 9, "relu", "bp"),
    "shared reduction": ((3,), 1030, 20, "gelu", "brp"),
}


def arguments(name: str, dtype: torch.dtype) -> dict[str, Any]:
    rows, n_in, n_out, activation, extras = CASES[name]
    generator = torch.Generator().manual_seed(n_in + n_out)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    channels, positions = n_out, None
    if "p" in extras:  # the last half of the channels is stored twice
        channels = n_out + n_out // 2
        order = torch.randperm(channels, generator=generator).to(torch.int32)
        positions = torch.full((n_out, 2), -1, dtype=torch.int32)
        positions[:, 1] = order[:n_out]
        positions[n_out - n_out // 2 :, 0] = order[n_out:]
    return {
        "x": random(*rows, n_in),
        "weight": random(n_out, n_in),
        "bias": random(n_out) if "b" in extras else None,
        "residual": random(*rows, channels) if "r" in extras else None,
        "positions": positions,
        "channels": channels,
        "activation": activation,
    }


def in_torch(call: dict[str, Any], dtype: torch.dtype) -> Tensor:
    x, weight, bias, residual = (None if call[k] is None else call[k].to(dtype) for k in list(call)[:4])
    total = F.linear(x, weight, bias)
    if call["positions"] is not None:
        stored = total.new_full((*total.shape[:-1], call["channels"]), torch.nan)
        for o, row in enumerate(call["positions"].tolist()):
            for channel in row:
                if channel >= 0:
                    stored[..., channel] = total[..., o]
        total = stored
    return ACTIVATIONS[call["activation"]](total if residual is None else total + residual)


@pytest.mark.parametrize("name", CASES)
def test_meaning(name: str) -> None:
    call = arguments(name, torch.float64)
    torch.testing.assert_close(kernels.fused_linear(**call), in_torch(call, torch.float64))


@pytest.mark.parametrize("name", ["3-d", "64 rows", "no rows"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(torch.ops.redpp.fused_linear.default, tuple(arguments(name, torch.float32).values()))


def test_flops() -> None:
    kernels.register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        kernels.fused_linear(**arguments("3-d", torch.float32))
    assert counter.get_total_flops() == 2 * 6 * 24 * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, "scalar"),
        ({"weight": torch.zeros(9, 23)}, "weight must be"),
        ({"weight": torch.zeros(()), "channels": None}, "weight must be"),
        ({"channels": -1}, "channels must not be negative"),
        ({"channels": 1 << 50}, "exactly once"),
        ({"bias": torch.zeros(8)}, "bias must be"),
        ({"residual": torch.zeros(2, 3, 9)}, "residual must be"),
        ({"positions": None}, "channels must be"),
        ({"positions": torch.zeros(9, 2, dtype=torch.int32)}, "exactly once"),
        ({"activation": "tanh"}, "activation"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.fused_linear(**(arguments("3-d", torch.float32) | change))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    pytest.importorskip("triton")
    return run_child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*CASES, "transposed"])
def test_kernel(interpreted: dict[str, Any], name: str, dtype: str) -> None:
    assert_as_good_as_torch(interpreted[f"{name} {dtype}"])


def test_the_comparison_notices_one_wrong_weight(interpreted: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(interpreted["wrong"])


def test_shares_are_added_in_the_same_order(interpreted: dict[str, Any]) -> None:
    assert interpreted["repeated"]


# --- Below: the child process. ---


def run(call: dict[str, Any]) -> Tensor:
    """The kernel's result, with NaN around every tensor that it reads; nothing around them may change."""
    from redpp_serve.kernels.fused_linear.kernel import fused_linear_triton

    guards = {k: surrounded(v) for k, v in call.items() if isinstance(v, Tensor)}
    with poisoned():
        found = fused_linear_triton(**(call | {k: inner for k, (inner, _) in guards.items()}))
    assert all(intact() for _, intact in guards.values()), "the kernel wrote outside of its tensors"
    return found


def judge(call: dict[str, Any], found: Tensor) -> dict[str, float]:
    return errors(found, in_torch(call, call["x"].dtype), in_torch(call, torch.float64))


def interpret() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for key, dtype in DTYPES.items():
        for name in CASES:
            call = arguments(name, dtype)
            results[f"{name} {key}"] = judge(call, run(call))
        call = arguments("17 rows", dtype)
        results[f"transposed {key}"] = judge(call, run(call | {"x": call["x"].T.contiguous().T}))
    call = arguments("shared reduction", torch.float32)
    results["repeated"] = torch.equal(run(call), run(call))
    call = arguments("17 rows", torch.float16)
    wrong = call["weight"].clone()
    wrong[2, 3] += 0.5
    results["wrong"] = judge(call, run(call | {"weight": wrong}))
    return results


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret}[sys.argv[1]]()))
