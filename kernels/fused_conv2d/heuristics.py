"""Tiles of the fused convolution: pure functions of the shape and of the number of multiprocessors."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from redpp_serve.kernels.shapes import alignment, power_of_two

# Output positions x output channels of one program; larger ones read each operand less often.
# 128 x 128 with four warps spills registers.
TILES = ((128, 64), (64, 64), (128, 32), (64, 32), (128, 16), (64, 16), (32, 32), (16, 64), (16, 32), (16, 16))
# Largest tile of narrow loads or stores, which need an address each, and of IEEE products in fp32, which need more
# registers.
NARROW_TILE = 64 * 64
MAX_LOADS = 16  # per thread, operand and step
VECTOR = 16  # bytes of the widest load
SMALLEST = 16  # the smallest side that tensor cores take
# With fewer inputs than this, the reduction runs over all taps' inputs as one flat range: less padding per step.
FLAT_BELOW = 8
FLAT_DEPTH = 32
STEP_OVERHEAD = 16  # a step of the loop costs about as much as this many further inputs
STEPS_PER_SPLIT = 4  # fewer do not fill the pipeline of loads
MAX_SPLIT = 32
# What a choice costs, roughly, from the data sheet of an H100; only the ratios matter. The least time of a step, one
# multiprocessor's bytes and products per ns, the second launch that adds shares, the device's bytes of sums per ns.
STEP_NS = 200
LOADED_PER_NS = 42
HALF_PRODUCTS_PER_NS = 1800
FP32_PRODUCTS_PER_NS = 225
SECOND_LAUNCH_NS = 2000
SUMS_PER_NS = 3000
WARPS = 4  # the loop over taps is not unrolled: eight warps have given wrong results with it


@dataclass(frozen=True)
class FusedConv2dBlocks:
    """Work of one program.

    Attributes:
        rows: output positions of its tile.
        columns: output channels of its tile.
        depth: inputs per step of its loop.
        flat: a step runs over taps and inputs as one range.
        split: programs that share one tile's reduction; each writes fp32 sums, which a second launch adds in a fixed
            order.
        stages: steps whose loads are in flight.
        warps: warps of the program.
    """

    rows: int
    columns: int
    depth: int
    flat: bool
    split: int
    stages: int
    warps: int = WARPS


@lru_cache(maxsize=4096)
def fused_conv2d_blocks(
    positions: int, n_out: int, n_in: int, taps: int, itemsize: int, processors: int
) -> FusedConv2dBlocks:
    """Return the tile and the number of programs sharing its reduction that cost least by a simple model.

    Large tiles read least, small ones keep every multiprocessor busy; where even those are too few (small planes at
    batch 1), sharing the reduction pays for a second launch.

    Args:
        positions: images x out_h x out_w.
        n_out: channels of the result.
        n_in: channels of the input.
        taps: kh x kw.
        itemsize: bytes of an element.
        processors: multiprocessors of the device.
    """
    flat = taps > 1 and 0 < n_in < FLAT_BELOW
    vector = 1 if flat else min(alignment(n_in), VECTOR // itemsize)
    depth = FLAT_DEPTH if flat else _depth(n_in, 16 * vector if itemsize == 2 else min(32, 16 * vector))
    steps = reduction_steps(n_in, taps, depth, flat)
    narrow = flat or itemsize > 2 or min(alignment(n_in), alignment(n_out)) < 8
    largest = NARROW_TILE if narrow else 1 << 30
    counted = [
        (tile, -(-positions // tile[0]) * -(-n_out // tile[1]))
        for tile in TILES
        if tile[0] <= max(SMALLEST, power_of_two(positions, 128))
        and tile[1] <= max(SMALLEST, power_of_two(n_out, 128))
        and tile[0] * tile[1] <= largest
        and max(tile) * depth <= MAX_LOADS * 32 * WARPS * vector
    ]
    shares = [1 << i for i in range(MAX_SPLIT.bit_length()) if i == 0 or steps >= STEPS_PER_SPLIT << i]

    def nanoseconds(choice: tuple[tuple[tuple[int, int], int], int]) -> float:
        ((rows, columns), programs), split = choice
        loads = (rows + columns) * depth * itemsize / LOADED_PER_NS
        products = rows * columns * depth / (HALF_PRODUCTS_PER_NS if itemsize == 2 else FP32_PRODUCTS_PER_NS)
        loop = -(-programs * split // processors) * -(-steps // split) * max(STEP_NS, loads, products)
        return loop + (SECOND_LAUNCH_NS + split * positions * n_out * 8 / SUMS_PER_NS if split > 1 else 0.0)

    (tile, _), split = min(product(counted, shares), key=nanoseconds)
    stages = 3 if tile[0] * tile[1] > NARROW_TILE or itemsize > 2 else 4
    return FusedConv2dBlocks(*tile, depth, flat, split, stages)


def reduction_steps(n_in: int, taps: int, depth: int, flat: bool) -> int:
    """Return the number of steps of the loop over the reduction; 0 without inputs."""
    return -(-taps * n_in // depth) if flat else taps * -(-n_in // depth)


def _depth(n_in: int, limit: int) -> int:
    """Return the inputs per step that cover `n_in` with little padding in few steps, at most `limit`."""
    candidates = [depth for depth in (64, 32, 16) if depth <= limit]
    return min(candidates, key=lambda depth: -(-n_in // depth) * (depth + STEP_OVERHEAD))
