"""Two small kernels with faults to choose from, for the tests of the harness."""

import triton
import triton.language as tl


@triton.jit
def neighbours_kernel(x, out, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = x[i] + x[i + 1], the last one alone; FAULT names what it does wrong."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0)
    last = n if FAULT == "reads beyond" else n - 1
    value += tl.load(x + at + 1, mask=at < last, other=0.0)
    stored = at < n
    if FAULT == "forgets":
        stored = stored & (at != 5)
    if FAULT == "writes beyond":
        stored = at <= n
    if FAULT == "writes before":
        tl.store(out + at - 1, value, mask=at == 0)
    tl.store(out + at, value, mask=stored)


@triton.jit
def product_kernel(a, b, out, depth, PRECISION: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr):
    """out = a (SIDE, depth) times b (depth, SIDE), STEP of the reduction at a time."""
    lane, step = tl.arange(0, SIDE), tl.arange(0, STEP)
    total = tl.zeros([SIDE, SIDE], dtype=tl.float32)
    for first in range(0, depth, STEP):
        left = tl.load(a + lane[:, None] * depth + (first + step)[None, :])
        right = tl.load(b + (first + step)[:, None] * SIDE + lane[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(out + lane[:, None] * SIDE + lane[None, :], total)
