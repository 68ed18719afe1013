"""The codebook Linear: meaning, opcheck, refusals, the FLOP formula; and its kernel in Triton's interpreter.

The interpreter is a property of the process, so that work happens in a child that runs this file. It cannot run inline
assembly: the kernel around the decoding is tested with the strategies without it, and
test_codebook_decode runs the assembly.
"""

import json
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from redpp_serve import kernels
from redpp_serve.kernels.codebook_linear.heuristics import codebook_blocks
from redpp_serve.kernels.epilogue import ACTIVATIONS
from tests.support.interpreting import assert_as_good_as_torch, errors, poisoned, run_child
from tests.support.kernel_memory import at_page_end, surrounded

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# rows, inputs, outputs, values, activation, bias, shape of x
CASES = {
    "one row": (1, 300, 133, 16, "none", True),
    "five rows": (5, 1025, 65, 16, "relu", True),
    "sixteen rows, shares": (16, 2100, 40, 4, "silu", False),
    "forty rows": (40, 130, 17, 7, "gelu", True),
    "many programs": (70, 257, 130, 16, "hardswish", True),
    "one input": (3, 1, 5, 1, "sigmoid", False),
    "whole groups": (8, 1024, 64, 8, "relu6", True),
    "no rows": (0, 40, 8, 3, "relu", True),
    "no inputs": (4, 0, 6, 2, "none", True),
    "no outputs": (4, 30, 0, 2, "none", False),
}
STRATEGIES = {torch.float32: ["auto", "pointer"], torch.float16: ["pair", "pointer"]}


def arguments(dtype: torch.dtype, case: str = "five rows") -> dict[str, Any]:
    rows, n_in, n_out, values, activation, bias = CASES[case]
    generator = torch.Generator().manual_seed(rows + n_in)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    index = torch.randint(0, values, (n_out, n_in), generator=generator)
    return {
        "x": random(rows, n_in),
        "indices": kernels.pack_indices(index),
        "codebook": random(values),
        "bias": random(n_out) if bias else None,
        "activation": activation,
        "index": index,
    }


def in_torch(given: dict[str, Any], work: torch.dtype) -> Tensor:
    weight = given["codebook"][given["index"]].to(work)
    bias = None if given["bias"] is None else given["bias"].to(work)
    return ACTIVATIONS[given["activation"]](F.linear(given["x"].to(work), weight, bias))


def call(given: dict[str, Any], **changed: Any) -> Tensor:
    return kernels.codebook_linear(**{k: v for k, v in (given | changed).items() if k != "index"})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_meaning(case: str, dtype: torch.dtype) -> None:
    given = arguments(dtype, case)
    found, exact = call(given), in_torch(given, torch.float64)
    assert found.dtype == dtype and found.shape == exact.shape
    torch.testing.assert_close(
        found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4 if dtype != torch.float64 else 1e-9
    )


def test_more_dimensions_and_strides() -> None:
    given = arguments(torch.float32)
    x = torch.randn(2, 1025, 3, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    torch.testing.assert_close(call(given, x=x), in_torch(given | {"x": x}, torch.float32), rtol=1e-5, atol=1e-4)


def test_a_large_weight_is_decoded_a_block_at_a_time() -> None:
    """Blocks of outputs, of which the last is smaller."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 9, (1100, 2048), generator=generator)
    x, codebook = torch.randn(2, 2048, generator=generator), torch.randn(9, generator=generator)
    found = kernels.codebook_linear(x, kernels.pack_indices(index), codebook)
    torch.testing.assert_close(found, F.linear(x, codebook[index]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    given = arguments(dtype, "one row")
    torch.library.opcheck(
        torch.ops.redpp.codebook_linear.default,
        (given["x"], given["indices"], given["codebook"], given["bias"], "relu", "auto"),
    )


def test_flops_are_those_of_the_linear_it_stands_for() -> None:
    kernels.register_flop_formulas()
    given, counted = arguments(torch.float32), []
    for run in (lambda: call(given), lambda: F.linear(given["x"], given["codebook"][given["index"]])):
        with FlopCounterMode(display=False) as counter:
            run()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x must be"),
        ({"x": torch.zeros(2, 1025, dtype=torch.int32)}, "x must be"),
        ({"codebook": torch.zeros(17)}, "codebook must hold 1 to 16 values"),
        ({"codebook": torch.zeros(0)}, "codebook must hold 1 to 16 values"),
        ({"codebook": torch.zeros(16, dtype=torch.float16)}, "codebook must be torch.float32"),
        ({"codebook": torch.zeros(15)}, "indices must be below the codebook's 15 values, found 15"),
        ({"indices": torch.zeros(65, 512, dtype=torch.uint8)}, "indices must be torch.uint8 of shape"),
        ({"indices": torch.zeros(65, 576, dtype=torch.int8)}, "indices must be torch.uint8 of shape"),
        ({"bias": torch.zeros(64)}, "bias must be"),
        ({"activation": "tanhh"}, "activation must be one of"),
        ({"decode": "guess"}, "decode must be auto or one of"),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"redpp::codebook_linear: {message}"):
        call(arguments(torch.float32), **changed)


def test_indices_that_change_are_looked_at_again() -> None:
    given = arguments(torch.float32) | {"codebook": torch.zeros(15)}
    given["indices"] = given["indices"] & 0x77
    call(given)
    given["indices"][0, 0] = 0xF0
    with pytest.raises(ValueError, match="found 15"):
        call(given)


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 33, 64, 65, 257, 1 << 22])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 25088), (1000, 2048), (1, 1), (16, 128), (31, 5), (70000, 64)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles(rows: int, shape: tuple[int, int], itemsize: int) -> None:
    n_out, n_in = shape
    packed = 64 * -(-n_in // 128)
    blocks = codebook_blocks(rows, n_out, packed, 16, itemsize, "auto", 132)
    for size in (blocks.rows, blocks.outputs, blocks.groups, blocks.split):
        assert size > 0 and size & (size - 1) == 0
    assert blocks.outputs >= 16 and blocks.rows <= 64
    steps = -(-packed // (64 * blocks.groups))
    assert blocks.split == 1 or (steps >= 2 * blocks.split and blocks.split <= 16)
    programs = -(-rows // blocks.rows) * -(-n_out // blocks.outputs) * blocks.split
    if shape[0] == 4096 and rows <= 64:
        assert programs >= 132, "every multiprocessor of an H100 has work"


# --- The interpreter ---


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    pytest.importorskip("triton")
    return run_child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.mark.parametrize(("dtype", "decode"), [(d, s) for d, names in STRATEGIES.items() for s in names])
@pytest.mark.parametrize("case", CASES)
def test_kernel(interpreted: dict[str, Any], case: str, dtype: torch.dtype, decode: str) -> None:
    assert_as_good_as_torch(interpreted[f"{case} {dtype} {decode}"])


def test_shares_are_added_in_the_same_order(interpreted: dict[str, Any]) -> None:
    assert interpreted["shares"] > 1 and interpreted["repeated"] == 0.0


def test_nothing_beyond_a_tensor_is_read() -> None:
    """Not even where the value is dropped afterwards: a child that did so has been killed."""
    pytest.importorskip("triton")
    found = run_child(__file__, "at_page_ends", TRITON_INTERPRET="1")
    assert len(found) == 4
    for result in found.values():
        assert_as_good_as_torch(result)


@pytest.mark.parametrize("what", ["index", "bias", "last input"])
def test_the_comparison_notices_one_wrong_value(interpreted: dict[str, Any], what: str) -> None:
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(interpreted[f"wrong {what}"])


# --- Below: the child process. ---


def run(given: dict[str, Any], decode: str) -> Tensor:
    """The kernel's result, with NaN around every tensor; nothing around them may change."""
    from redpp_serve.kernels.codebook_linear import kernel as module

    guards, empty = [], torch.empty

    def guarded(tensor: Tensor) -> Tensor:
        inner, intact = surrounded(tensor)
        guards.append(intact)
        return inner

    inputs = [
        guarded(v) if isinstance(v, Tensor) else v for v in (given[k] for k in ("x", "indices", "codebook", "bias"))
    ]
    with poisoned():
        nan = torch.empty
        with patch.object(
            torch, "empty", lambda *a, **k: guarded(nan(*a, **k)) if k.get("device") is not None else empty(*a, **k)
        ):
            found = module.codebook_linear_triton(*inputs, given["activation"], decode)
    assert all(intact() for intact in guards), "the kernel wrote outside of its tensors"
    return found


def judge(given: dict[str, Any], found: Tensor) -> dict[str, float]:
    return errors(found, in_torch(given, given["x"].dtype), in_torch(given, torch.float64))


def interpret() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for dtype, names in STRATEGIES.items():
        for case in CASES:
            given = arguments(dtype, case)
            results |= {f"{case} {dtype} {decode}": judge(given, run(given, decode)) for decode in names}
    given = arguments(torch.float32, "sixteen rows, shares")
    results["repeated"] = (run(given, "auto") - run(given, "auto")).abs().max().item()
    results["shares"] = codebook_blocks(16, 40, given["indices"].shape[1], 4, 4, "auto", 132).split
    given = arguments(torch.float16) | {"activation": "none"}
    index, bias, x = given["index"].clone(), given["bias"].clone(), given["x"].clone()
    index[7, 900] = (index[7, 900] + 5) % 16
    bias[64] += 1
    x[:, -1] += 3
    wrong = {"index": {"indices": kernels.pack_indices(index)}, "bias": {"bias": bias}, "last input": {"x": x}}
    return results | {f"wrong {name}": judge(given, run(given | change, "pair")) for name, change in wrong.items()}


def at_page_ends() -> dict[str, Any]:
    from redpp_serve.kernels.codebook_linear.kernel import codebook_linear_triton

    results = {}
    for case in ("five rows", "many programs"):  # neither rows nor outputs fill their last tiles
        for decode in STRATEGIES[torch.float16]:
            given = arguments(torch.float16, case)
            placed = [at_page_end(given[name]) for name in ("x", "indices", "codebook", "bias")]
            results[f"{case} {decode}"] = judge(given, codebook_linear_triton(*placed, given["activation"], decode))
    return results


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "at_page_ends": at_page_ends}[sys.argv[1]]()))
