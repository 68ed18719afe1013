"""Kernels compiled ahead of time, without a GPU, by the ptxas that comes with Triton; and what it made of them."""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.support.sass import Instruction, instructions, main_loop

BUDGETS = Path(__file__).parent.parent / "golden" / "kernel_budgets.json"
ARCHITECTURES = (80, 90)
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int8: "*i8",
}
_COPY = r"cp\.async\.c[ag]\.shared\.global.*?, 0x([0-9a-f]+)"  # bytes, in hexadecimal


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture.

    Attributes:
        ptx: its PTX.
        sass: its machine code.
        registers: registers of a thread.
        spills: bytes of registers per thread that went to memory.
        shared: bytes of shared memory.
        warps: warps of a program.
    """

    ptx: str
    sass: str
    registers: int
    spills: int
    shared: int
    warps: int

    @property
    def mma(self) -> bool:
        """Tell whether it has matrix instructions of tensor cores."""
        return any(i.products for i in instructions(self.sass))

    @cached_property
    def _main_loop(self) -> list[Instruction]:
        return main_loop(instructions(self.sass))

    @property
    def loop(self) -> int:
        """Instructions of a warp for each time round the main loop; 0 without one."""
        return len(self._main_loop)

    @property
    def loop_products(self) -> int:
        """Multiply-accumulates on tensor cores that a program does each time round the main loop."""
        return self.warps * sum(i.products for i in self._main_loop)

    @property
    def copies(self) -> list[int]:
        """Bytes of the asynchronous copies from global to shared memory."""
        return sorted({int(n, 16) for n in re.findall(_COPY, self.ptx)})

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes from global memory, into registers or shared memory."""
        return len(re.findall(r"\bLDG(?:STS)?\.E[.\w]*\.128\b", self.sass))

    @property
    def usage(self) -> dict[str, Any]:
        """What a budget limits, and what else a test judges, as JSON takes it."""
        names = ("registers", "spills", "shared", "mma", "copies", "wide_loads", "loop", "loop_products")
        return {name: getattr(self, name) for name in names}


class Launch(NamedTuple):
    """One kernel launch as its launcher makes it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, int]


@contextmanager
def recorded(*modules: Any) -> Iterator[list[Launch]]:
    """Record the launches of these modules' kernels, which do not take place; tensors may be on the meta device."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: launches.append(Launch(self.kernel, args, options))

    originals = [(m, name, value) for m in modules for name, value in vars(m).items() if name.endswith("_kernel")]
    for module, name, value in originals:
        setattr(module, name, Recorder(value))
    try:
        yield launches
    finally:
        for module, name, value in originals:
            setattr(module, name, value)


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile as Triton specialises a launch: tensors are aligned, numbers are 1, multiples of 16, or neither."""
    signature, constants, divisible = {}, {}, []
    for parameter, value in zip(launch.kernel.params, launch.arguments, strict=True):
        name = parameter.name
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(name)
        else:
            signature[name] = "i32" if value < 1 << 31 else "i64"
            divisible += [name] if value % 16 == 0 else []
    return compile_kernel(launch.kernel, signature, constants, arch, **launch.options, divisible=divisible)


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Collection[str] = (),
) -> Compiled:
    """Compile a `triton.jit` function.

    Args:
        signature: Triton's type of every argument that is not a constant, such as ``*fp16`` or ``i32``.
        constexprs: values of the others.
        arch: 80 or 90.
        divisible: arguments that are multiples of 16.
    """
    import triton

    names = fn.arg_names
    source = triton.compiler.ASTSource(
        fn=fn,
        signature={name: "constexpr" if name in constexprs else signature[name] for name in names},
        constexprs=dict(constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in divisible},
    )
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    made = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return Compiled(made.asm["ptx"], sass, registers, stack + local, made.metadata.shared, num_warps)


def check_budget(case: str, found: Mapping[str, Any]) -> None:
    """Demand no spills, and no more registers, shared memory and instructions per weight than `BUDGETS` allows a case.

    Args:
        found: ``registers``, ``spills``, ``shared`` and, where the budget has it, ``per_weight``.
    """
    budget = json.loads(BUDGETS.read_text(encoding="utf-8"))[case]
    assert found["spills"] == 0, case
    assert found["registers"] <= budget["max_registers"], (case, found)
    assert found["shared"] <= budget["max_shared"], (case, found)
    if "max_per_weight" in budget:
        assert found["per_weight"] <= budget["max_per_weight"], (case, found)
