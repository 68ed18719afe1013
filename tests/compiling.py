"""Kernels compiled ahead of time, without a GPU, by the ptxas that comes with Triton; and what it made of them."""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

BUDGETS = Path(__file__).parent / "golden" / "kernel_budgets.json"
ARCHITECTURES = (80, 90)
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.uint8: "*u8",
    torch.int64: "*i64", torch.int8: "*i8",
}  # fmt: skip
_COPY = r"cp\.async\.c[ag]\.shared\.global.*?, 0x([0-9a-f]+)"  # bytes, in hexadecimal


class Compiled(NamedTuple):
    """One kernel for one architecture. `spills`: bytes of registers per thread that went to memory; `shared`: bytes;
    `loop`: instructions of the machine's own language in the longest loop, 0 without one."""

    ptx: str
    registers: int
    spills: int
    shared: int
    loop: int

    @property
    def mma(self) -> bool:
        """Whether it runs on tensor cores."""
        return "mma.sync" in self.ptx or "wgmma" in self.ptx

    @property
    def copies(self) -> list[int]:
        """Bytes of the asynchronous copies from global to shared memory."""
        return sorted({int(n, 16) for n in re.findall(_COPY, self.ptx)})


class Launch(NamedTuple):
    """One kernel launch as its launcher makes it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, int]


@contextmanager
def recorded(*modules: Any) -> Iterator[list[Launch]]:
    """The launches of these modules' kernels, which do not take place; tensors may be on the meta device."""
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
    """As Triton specialises a launch: tensors are aligned, numbers are 1, multiples of 16, or neither."""
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
    """Compiles a `triton.jit` function.

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
    return Compiled(made.asm["ptx"], registers, stack + local, made.metadata.shared, longest_loop(sass))


def longest_loop(sass: str) -> int:
    """Instructions between the target of a backward branch and the branch, for the branch that spans most."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", sass)]
    addresses = [address for address, _ in lines]
    lengths = [0]
    for address, text in lines:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            lengths.append(sum(int(branch[1], 16) <= a <= address for a in addresses))
    return max(lengths)


def check_budget(case: str, found: Mapping[str, Any]) -> None:
    """No spills, and no more registers, shared memory and instructions per weight than `BUDGETS` allows a case.

    Args:
        found: ``registers``, ``spills``, ``shared`` and, where the budget has it, ``per_weight``.
    """
    budget = json.loads(BUDGETS.read_text(encoding="utf-8"))[case]
    assert found["spills"] == 0, case
    assert found["registers"] <= budget["max_registers"], (case, found)
    assert found["shared"] <= budget["max_shared"], (case, found)
    if "max_per_weight" in budget:
        assert found["per_weight"] <= budget["max_per_weight"], (case, found)
