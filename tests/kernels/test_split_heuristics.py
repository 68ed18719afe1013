"""Block sizes are powers of two, cover the shape, and stay inside the tile and buffer budgets."""

from itertools import product

import pytest

from redpp_serve.kernels.split.heuristics import (
    GATHER_TILE,
    MAX_POSITION_BLOCK,
    MULTIPLY_TILE,
    PRODUCT_BUDGET,
    GatherBlocks,
    MultiplyBlocks,
    gather_blocks,
    multiply_blocks,
    positions_per_launch,
)

SIZES = [0, 1, 2, 3, 7, 64, 127, 129, 1000, 10**6, 2**33]


@pytest.mark.parametrize("positions", SIZES)
def test_multiply_tile_is_a_power_of_two_within_its_budget(positions: int) -> None:
    for rows in SIZES:
        blocks = multiply_blocks(rows, positions)
        for size in (blocks.rows, blocks.positions):
            assert size >= 1 and size & (size - 1) == 0
        assert blocks.rows * blocks.positions <= MULTIPLY_TILE


@pytest.mark.parametrize("positions", SIZES)
def test_gather_tile_is_a_power_of_two_within_its_budget(positions: int) -> None:
    for outputs, inputs in product(SIZES, SIZES):
        blocks = gather_blocks(outputs, inputs, positions)
        for size in (blocks.outputs, blocks.inputs, blocks.positions):
            assert size >= 1 and size & (size - 1) == 0
        assert blocks.outputs * blocks.inputs * blocks.positions <= GATHER_TILE


def test_typical_shapes() -> None:
    assert multiply_blocks(256, 56 * 56) == MultiplyBlocks(rows=4, positions=128)
    assert multiply_blocks(60000, 1) == MultiplyBlocks(rows=512, positions=1)
    assert gather_blocks(64, 64, 56 * 56) == GatherBlocks(outputs=8, inputs=1, positions=128)
    assert gather_blocks(4096, 4096, 1) == GatherBlocks(outputs=8, inputs=128, positions=1)
    assert gather_blocks(7, 1, 5) == GatherBlocks(outputs=8, inputs=1, positions=8)


@pytest.mark.parametrize("rows", [0, 1, 100, 4096, 10**5, 10**7, 10**8])
@pytest.mark.parametrize("positions", [1, 130, 10**6, 2**33])
def test_products_of_one_launch_fit_the_buffer(rows: int, positions: int) -> None:
    width = positions_per_launch(rows, positions)
    assert 1 <= width <= positions
    assert width == 1 or rows * width <= PRODUCT_BUDGET
    assert width == positions or width % MAX_POSITION_BLOCK == 0 or width < MAX_POSITION_BLOCK
