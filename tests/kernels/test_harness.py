"""The harness of the kernels' tests catches what it is there for: each fault has a kernel that has it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import compiling, sass
from tests.support.compiling import ARCHITECTURES, check_budget, compile_launch, recorded
from tests.support.interpreting import assert_as_good_as_torch, errors, poisoned, run_child
from tests.support.kernel_memory import surrounded

pytest.importorskip("triton")

FAULTS = ("forgets", "reads beyond", "writes beyond", "writes before")
PRODUCTS = {"tf32": ("tf32", 64, 4), "ieee": ("ieee", 64, 4), "too large for its warps": ("tf32", 128, 1)}
STEP = 32


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return run_child(__file__, "interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    return run_child(__file__, "compile", TRITON_INTERPRET="0")


@pytest.mark.exhaustive
def test_a_right_kernel_passes(interpreted: dict[str, Any]) -> None:
    assert_as_good_as_torch(interpreted["none"])
    assert interpreted["none"]["intact"]


@pytest.mark.exhaustive
def test_values_show_what_was_forgotten_or_read_outside(interpreted: dict[str, Any]) -> None:
    for fault in ("forgets", "reads beyond"):
        with pytest.raises(AssertionError):
            raise LookupError(fault, assert_as_good_as_torch(interpreted[fault]))


@pytest.mark.exhaustive
def test_guards_show_what_was_written_outside(interpreted: dict[str, Any]) -> None:
    for fault in ("writes beyond", "writes before"):
        assert not interpreted[fault]["intact"], fault
        assert_as_good_as_torch(interpreted[fault])  # the values alone do not


@pytest.mark.exhaustive
def test_tensor_cores_loops_and_wide_loads_are_seen_in_the_machine_code(compiled: dict[str, Any]) -> None:
    for arch in ARCHITECTURES:
        tf32, ieee = compiled[f"tf32 sm_{arch}"], compiled[f"ieee sm_{arch}"]
        assert tf32["mma"] and not ieee["mma"], arch
        # A loop does as many products as a step of the kernel; one instruction for each of a thread's products.
        assert tf32["loop_products"] == 64 * 64 * STEP and ieee["loop"] > 64 * 64 * STEP / 128, arch
        assert tf32["wide_loads"] > 0 and 16 in tf32["copies"], arch


@pytest.mark.exhaustive
def test_spills_fail_whatever_the_budget(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "BUDGETS", tmp_path / "budgets.json")
    compiling.BUDGETS.write_text('{"case": {"max_registers": 255, "max_shared": 1000000}}', encoding="utf-8")
    check_budget("case", compiled["tf32 sm_90"])
    assert compiled["too large for its warps sm_90"]["spills"] > 0
    with pytest.raises(AssertionError):
        check_budget("case", compiled["too large for its warps sm_90"])


def test_what_exceeds_a_budget_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BUDGETS", tmp_path / "budgets.json")
    budget = {"max_registers": 64, "max_shared": 1024, "max_per_weight": 4.0}
    compiling.BUDGETS.write_text(json.dumps({"case": budget}), encoding="utf-8")
    found = {"registers": 64, "spills": 0, "shared": 1024, "per_weight": 4.0}
    check_budget("case", found)
    for change in ({"registers": 65}, {"shared": 1025}, {"per_weight": 4.1}, {"spills": 8}):
        with pytest.raises(AssertionError):
            raise LookupError(change, check_budget("case", found | change))


def test_a_case_without_a_budget_fails() -> None:
    with pytest.raises(KeyError):
        check_budget("no such case", {"registers": 1, "spills": 0, "shared": 0})


def listing(*lines: str) -> str:
    return "\n".join(f"        /*{16 * k:04x}*/                   {line} ;   /* 0x0 */" for k, line in enumerate(lines))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["MOV R1, R2", "EXIT", "BRA 0x20"], []),
        (["MOV R1, R2", "FADD R1, R1, R2", "@P0 BRA 0x10", "EXIT"], [2]),
        (["MOV R1, R2", "FADD R1, R1, R2", "@P0 CALL.REL.NOINC 0x40", "BRA 0x10", "EXIT"], [3]),
        # moved behind the end, comes back: no loop
        (["MOV R1, R2", "@P0 BRA 0x40", "FADD R1, R1, R2", "EXIT", "FADD R3, R3, R3", "BRA 0x20"], []),
        # a part of the loop was moved behind the end
        (["NOP", "@P0 BRA 0x40", "@P1 BRA 0x10", "EXIT", "FADD R3, R3, R3", "BRA 0x20"], [4]),
        # one in another; the step to the outer one's head and the outer one's rest belong to it alone
        (["NOP", "NOP", "FADD R1, R1, R2", "@P0 BRA 0x20", "@P1 BRA 0x10", "EXIT"], [2, 4]),
        # threads that wait for each other go on behind the barrier
        (["BSSY B0, 0x40", "@P0 BRA 0x50", "NOP", "BSYNC B0", "EXIT", "@P1 BRA 0x50", "BRA 0x30"], [1]),
    ],
)
def test_loops(lines: list[str], expected: list[int]) -> None:
    assert sorted(len(body) for body in sass.loops(sass.instructions(listing(*lines)))) == expected


def test_the_main_loop_is_the_innermost_one_with_matrix_products() -> None:
    lines = [
        "NOP",
        "HMMA.16816.F32 R4, R8, R2, RZ",
        "NOP",
        "HMMA.16816.F32 R4, R8, R2, R4",
        "@P0 BRA 0x20",
        "@P1 BRA 0x10",
    ]
    lines += ["NOP"] * 9 + ["@P2 BRA 0x60", "EXIT"]
    found = sass.main_loop(sass.instructions(listing(*lines)))
    assert [i.address for i in found] == [0x20, 0x30, 0x40]
    assert sum(i.products for i in found) == 16 * 8 * 16


@pytest.mark.parametrize(
    ("text", "products"),
    [
        ("HMMA.1688.F32.TF32 R4, R8, R2, R4", 16 * 8 * 8),
        ("HGMMA.64x128x16.F32 R24, R4, gdesc[UR4]", 64 * 128 * 16 // 4),
        ("IMMA.16832.S8.S8 R4, R8.ROW, R2.COL, R4", 16 * 8 * 32),
        ("FFMA R4, R8, R2, R4", 0),
    ],
)
def test_products_of_an_instruction(text: str, products: int) -> None:
    assert sass.Instruction(0, text).products == products


def test_two_kernels_in_one_dump_are_refused() -> None:
    with pytest.raises(ValueError, match="one kernel"):
        sass.instructions(listing("EXIT") * 2)


def test_whatever_torch_allocates_is_poisoned_and_only_meanwhile() -> None:
    torch.use_deterministic_algorithms(False)  # conftest has it on
    like = torch.ones(3, dtype=torch.float16)
    with poisoned():
        made = (torch.empty(2, 3), torch.empty_like(like), like.new_empty(2), torch.empty_strided((2, 2), (4, 1)))
        assert all(bool(t.isnan().all()) for t in made)
        assert torch.empty(4, dtype=torch.uint8).tolist() == [255] * 4
    assert not torch.are_deterministic_algorithms_enabled()


# --- Below: the child process. ---


def faulty(fault: str) -> dict[str, float]:
    from tests.support.broken_kernels import neighbours_kernel

    x = torch.randn(37, generator=torch.Generator().manual_seed(0))
    with poisoned():
        (inner, _), (out, intact) = surrounded(x), surrounded(torch.empty(37))
        neighbours_kernel[(3,)](inner, out, 37, fault, 16)
    expected = x + torch.cat([x[1:], torch.zeros(1)])
    return errors(out, expected, expected.double()) | {"intact": intact()}


def interpret() -> dict[str, Any]:
    return {fault: faulty(fault) for fault in ("none", *FAULTS)}


def compile_all() -> dict[str, Any]:
    from tests.support import broken_kernels

    found = {}
    for name, (precision, side, warps) in PRODUCTS.items():
        a, b, out = (torch.empty(shape, device="meta") for shape in ((side, 512), (512, side), (side, side)))
        with recorded(broken_kernels) as launches:
            broken_kernels.product_kernel[(1,)](a, b, out, 512, precision, side, STEP, num_warps=warps, num_stages=3)
        for arch in ARCHITECTURES if warps > 1 else (90,):
            found[f"{name} sm_{arch}"] = compile_launch(launches[0], arch).usage
    return found


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
