"""Kernels compiled ahead of time, without a GPU, by the ptxas that comes with Triton; and what it made of them."""

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Compiled(NamedTuple):
    """One kernel for one architecture. `spills`: bytes of registers per thread that went to memory; `shared`: bytes."""

    ptx: str
    registers: int
    spills: int
    shared: int

    @property
    def mma(self) -> bool:
        """Whether it runs on tensor cores."""
        return "mma.sync" in self.ptx or "wgmma" in self.ptx


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
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, local = map(int, found.groups())
    return Compiled(made.asm["ptx"], registers, stack + local, made.metadata.shared)
