"""A model of the PTX instructions that the decoding of codebooks uses, over arrays of registers."""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]


def run_ptx(text: str, outputs: int, inputs: Sequence[Words]) -> list[Words]:
    """The output words $0.. of a block of instructions for the input words that follow them, elementwise.

    Knows prmt (default mode), lop3, shl, shr, and, mov, on .b32 and .u32 as their manual defines them.
    """
    shape = np.broadcast_shapes(*(np.shape(word) for word in inputs))
    registers = {f"${outputs + k}": np.broadcast_to(word, shape).astype(np.uint32) for k, word in enumerate(inputs)}

    def value(operand: str) -> Words:
        return registers[operand] if operand in registers else np.full(shape, int(operand, 0), np.uint32)

    for line in re.sub(r"[{}]", "", text).split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, operands = line.strip().split(None, 1)
        target, *rest = (operand.strip() for operand in operands.split(","))
        kind = name.split(".")[0]
        assert name in {"prmt.b32", "lop3.b32", "shl.b32", "shr.u32", "and.b32", "mov.b32"}, name
        registers[target] = _OPERATIONS[kind](*map(value, rest))
    return [registers[f"${k}"] for k in range(outputs)]


def _permute(a: Words, b: Words, selector: Words) -> Words:
    pool = np.stack([(word >> np.uint32(8 * k)) & np.uint32(255) for word in (a, b) for k in range(4)])
    result = np.zeros_like(a)
    for k in range(4):
        nibble = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = np.take_along_axis(pool, (nibble & np.uint32(7))[None].astype(np.int64), 0)[0]
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * k)
    return result


def _lookup(a: Words, b: Words, c: Words, table: Words) -> Words:
    result = np.zeros_like(a)
    for k in range(8):  # bit k of the table: the result where the bits of a, b, c spell k
        match = (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        result |= np.where(table >> np.uint32(k) & np.uint32(1), match, np.uint32(0))
    return result


_OPERATIONS = {
    "prmt": _permute,
    "lop3": _lookup,
    "shl": lambda a, n: a << n,
    "shr": lambda a, n: a >> n,
    "and": lambda a, b: a & b,
    "mov": lambda a: a,
}
