"""Strategies that turn packed 4-bit indices into values in registers. Imported for CUDA tensors only.

Each takes a block of bytes and returns two blocks of the same shape: the values of the low and of the high nibbles. All
are elementwise, so they do not depend on which thread holds what. `prmt8` and `prmt16` look bytes up with PTX's byte
permutation: its selector has four nibbles, so two packed bytes select four values' bytes as they are.
"""

import triton
import triton.language as tl

# Operands: $0, $1 values of the low nibbles of four bytes; $2, $3 of the high ones; $4 the four bytes. Every table word
# comes once for each of the four: low bytes of values 0-3, 4-7 in $5, $9; high bytes in $13, $17.
PRMT8 = tl.constexpr("""{
.reg .b32 h, a, b, c, d;
shr.u32 h, $4, 16;
prmt.b32 a, $5, $9, $4;
prmt.b32 b, $5, $9, h;
prmt.b32 c, $13, $17, $4;
prmt.b32 d, $13, $17, h;
prmt.b32 $0, a, c, 0x6240;
prmt.b32 $1, b, d, 0x6240;
prmt.b32 $2, a, c, 0x7351;
prmt.b32 $3, b, d, 0x7351;
}""")
PRMT8_OPERANDS = tl.constexpr("=r,=r,=r,=r" + ",r" * 17)

# The same with low bytes of values 0-3, 4-7, 8-11, 12-15 in $5, $9, $13, $17 and high bytes in $21, $25, $29, $33. An
# index's low three bits select from both halves of the table, its highest bit, spread over a byte (the permutation's
# sign mode), picks one of the two.
PRMT16 = tl.constexpr("""{
.reg .b32 s, h, m, u, v, a, b, c, d, e, f, g, i;
and.b32 s, $4, 0x77777777;
shr.u32 h, s, 16;
shl.b32 m, $4, 4;
prmt.b32 u, m, $4, 0xd9c8;
prmt.b32 v, m, $4, 0xfbea;
prmt.b32 a, $5, $9, s;
prmt.b32 e, $13, $17, s;
lop3.b32 a, u, e, a, 0xca;
prmt.b32 b, $5, $9, h;
prmt.b32 f, $13, $17, h;
lop3.b32 b, v, f, b, 0xca;
prmt.b32 c, $21, $25, s;
prmt.b32 g, $29, $33, s;
lop3.b32 c, u, g, c, 0xca;
prmt.b32 d, $21, $25, h;
prmt.b32 i, $29, $33, h;
lop3.b32 d, v, i, d, 0xca;
prmt.b32 $0, a, c, 0x6240;
prmt.b32 $1, b, d, 0x6240;
prmt.b32 $2, a, c, 0x7351;
prmt.b32 $3, b, d, 0x7351;
}""")
PRMT16_OPERANDS = tl.constexpr("=r,=r,=r,=r" + ",r" * 33)


@triton.jit
def decode(packed, words, table, codebook, DECODE: tl.constexpr):
    """Return the values of the low and of the high nibbles of a block of bytes (R, C).

    Args:
        packed: the bytes.
        words: the eight words of the table that the permutations read, each (R, 1): in a thread's own registers, for
            scalars would be copied from uniform ones at each use.
        table: for ``pair``, the two values of every byte in 4 bytes.
        codebook: for ``pointer``, the values.
        DECODE: the strategy.
    """
    if DECODE == "prmt8":
        few = (packed, words[0], words[1], words[4], words[5])
        if codebook.dtype.element_ty == tl.float16:
            low, high = tl.inline_asm_elementwise(PRMT8, PRMT8_OPERANDS, few, (tl.float16, tl.float16), True, 4)
        else:
            low, high = tl.inline_asm_elementwise(PRMT8, PRMT8_OPERANDS, few, (tl.bfloat16, tl.bfloat16), True, 4)
    elif DECODE == "prmt16":
        a, b, c, d, e, f, g, h = words
        all_words = (packed, a, b, c, d, e, f, g, h)
        if codebook.dtype.element_ty == tl.float16:
            low, high = tl.inline_asm_elementwise(PRMT16, PRMT16_OPERANDS, all_words, (tl.float16, tl.float16), True, 4)
        else:
            low, high = tl.inline_asm_elementwise(
                PRMT16, PRMT16_OPERANDS, all_words, (tl.bfloat16, tl.bfloat16), True, 4
            )
    elif DECODE == "pair":
        both = tl.load(table + packed.to(tl.int32))
        low = both.to(tl.int16).to(codebook.dtype.element_ty, bitcast=True)
        high = (both >> 16).to(tl.int16).to(codebook.dtype.element_ty, bitcast=True)
    else:
        tl.static_assert(DECODE == "pointer")
        low = tl.load(codebook + (packed & 15).to(tl.int32))
        high = tl.load(codebook + (packed >> 4).to(tl.int32))
    return low, high


@triton.jit
def load_words(table, row, ROWS: tl.constexpr):
    """Load the eight words of the table (8, ROWS) for the permutations, each as (R, 1) for the rows ``row`` (R,)."""
    at = table + (row % ROWS)[:, None]
    return (
        tl.load(at),
        tl.load(at + ROWS),
        tl.load(at + 2 * ROWS),
        tl.load(at + 3 * ROWS),
        tl.load(at + 4 * ROWS),
        tl.load(at + 5 * ROWS),
        tl.load(at + 6 * ROWS),
        tl.load(at + 7 * ROWS),
    )
