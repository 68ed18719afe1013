"""Block sizes of the split kernels: pure functions of the shape, the same on every device."""

from dataclasses import dataclass

from redpp_serve.kernels.shapes import power_of_two

# Elements of one program's tile: 512 fp32 sums over 128 threads leave registers for the addresses.
MULTIPLY_TILE = 512
GATHER_TILE = 1024
MAX_POSITION_BLOCK = 128
# fp32 elements of the product buffer (256 MiB); products of more positions are made in several launches.
PRODUCT_BUDGET = 1 << 26


@dataclass(frozen=True)
class MultiplyBlocks:
    """Tile of the product kernel: unique kernels x output positions. All powers of two."""

    rows: int
    positions: int
    warps: int = 4


@dataclass(frozen=True)
class GatherBlocks:
    """Tile of the gather-sum kernel: outputs x inputs read together x output positions. All powers of two."""

    outputs: int
    inputs: int
    positions: int
    warps: int = 4


def multiply_blocks(rows: int, positions: int) -> MultiplyBlocks:
    """Choose positions first, because they are neighbours in memory; the rest of the tile takes rows."""
    block_positions = power_of_two(positions, MAX_POSITION_BLOCK)
    return MultiplyBlocks(power_of_two(rows, MULTIPLY_TILE // block_positions), block_positions)


def gather_blocks(outputs: int, inputs: int, positions: int) -> GatherBlocks:
    """Choose positions first; with few of them (a linear layer at batch 1) threads share an output's inputs."""
    block_positions = power_of_two(positions, MAX_POSITION_BLOCK)
    block_inputs = power_of_two(inputs, max(1, MAX_POSITION_BLOCK // block_positions))
    block_outputs = power_of_two(outputs, GATHER_TILE // (block_positions * block_inputs))
    return GatherBlocks(block_outputs, block_inputs, block_positions)


def positions_per_launch(rows: int, positions: int) -> int:
    """Return the number of output positions whose products fit the buffer together, at least one.

    A cut is a multiple of `MAX_POSITION_BLOCK` where that fits, so no launch but the last has a partial block.
    """
    fitting = PRODUCT_BUDGET // max(1, rows)
    if fitting >= positions:
        return positions
    return max(1, fitting // MAX_POSITION_BLOCK * MAX_POSITION_BLOCK or fitting)
