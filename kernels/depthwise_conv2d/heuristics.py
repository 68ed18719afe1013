"""Tiles of the depthwise convolution: pure functions of the shape and of the number of multiprocessors."""

from dataclasses import dataclass
from functools import lru_cache

from redpp_serve.kernels.shapes import power_of_two

WARP = 32
MAX_WARPS = 4
MAX_CHANNELS = 64  # 128 bytes of half precision: one cache line
SHARED_ROWS = 4  # output rows that keep what they read of the same input rows in registers
# A thread holds the taps of its channels in registers, in fp32, beside its sums: more of them would spill.
TAP_REGISTERS = 72
# Kernels with more taps than this are looped over instead of unrolled.
MAX_UNROLLED_TAPS = 25


@dataclass(frozen=True)
class DepthwiseBlocks:
    """Work of one program: `rows` x `columns` output positions of one image x `channels`.

    Attributes:
        rows: with more than one, the taps are unrolled and each input row is read once for all output rows that need
            it; with one, the taps are loops, which serves any window.
        columns: output columns.
        channels: neighbouring channels.
        warps: warps of the program.
    """

    rows: int
    columns: int
    channels: int
    warps: int


@lru_cache(maxsize=4096)
def depthwise_blocks(
    images: int,
    channels: int,
    out_size: tuple[int, int],
    kernel: tuple[int, int],
    stride_h: int,
    dilation_h: int,
    itemsize: int,
    processors: int,
) -> DepthwiseBlocks:
    """Choose wide loads of neighbouring channels first, then as many shared rows as leave enough programs.

    Args:
        images: batch size.
        channels: channels of input and result.
        out_size: (out_h, out_w).
        kernel: (kh, kw).
        stride_h: vertical stride.
        dilation_h: vertical dilation.
        itemsize: bytes of an element.
        processors: multiprocessors of the device.
    """
    out_h, out_w = out_size
    taps = kernel[0] * kernel[1]
    reuse = out_h > 1 and kernel[0] > stride_h and dilation_h == 1 and taps <= MAX_UNROLLED_TAPS
    widest = 16 // itemsize
    lanes = min(widest, _floor_power_of_two(TAP_REGISTERS // taps)) if reuse else widest
    block_channels = power_of_two(channels, MAX_CHANNELS)
    warps = MAX_WARPS
    while True:
        columns = min(power_of_two(out_w, 64), max(1, warps * WARP * lanes // block_channels))
        rows = SHARED_ROWS if reuse else 1
        per_image = -(-out_h // rows) * -(-out_w // columns) * -(-channels // block_channels)
        if images * per_image >= 2 * processors or warps == 1:
            return DepthwiseBlocks(rows, columns, block_channels, warps)
        warps //= 2


def _floor_power_of_two(value: int) -> int:
    """Return the largest power of two <= value, at least 1."""
    return 1 << max(0, max(1, value).bit_length() - 1)
