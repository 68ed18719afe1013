"""Tiles of the fused convolution over the layers of real networks, and over odd, empty and huge shapes."""

from itertools import product

import pytest

from redpp_serve.kernels.checks import check_extent, check_programs
from redpp_serve.kernels.fused_conv2d.heuristics import (
    MAX_LOADS,
    MAX_SPLIT,
    NARROW_TILE,
    SCATTERED_TILE,
    STEPS_PER_SPLIT,
    VECTOR,
    FusedConv2dBlocks,
    alignment,
    fused_conv2d_blocks,
    reduction_steps,
)

H100 = 132
# (side of the output, n_in, n_out, side of the kernel)
RESNET50 = [
    (112, 3, 64, 7),
    (56, 64, 64, 1),
    (56, 64, 64, 3),
    (56, 64, 256, 1),
    (56, 256, 64, 1),
    (56, 256, 128, 1),
    (28, 128, 128, 3),
    (28, 128, 512, 1),
    (28, 256, 512, 1),
    (28, 512, 128, 1),
    (28, 512, 256, 1),
    (14, 256, 256, 3),
    (14, 256, 1024, 1),
    (14, 512, 1024, 1),
    (14, 1024, 256, 1),
    (14, 1024, 512, 1),
    (7, 512, 512, 3),
    (7, 512, 2048, 1),
    (7, 1024, 2048, 1),
    (7, 2048, 512, 1),
]
MOBILENET_V2 = [
    (112, 3, 32, 3),
    (112, 32, 16, 1),
    (112, 16, 96, 1),
    (56, 96, 24, 1),
    (56, 24, 144, 1),
    (56, 144, 24, 1),
    (28, 144, 32, 1),
    (28, 32, 192, 1),
    (28, 192, 32, 1),
    (14, 192, 64, 1),
    (14, 64, 384, 1),
    (14, 384, 64, 1),
    (14, 384, 96, 1),
    (14, 96, 576, 1),
    (14, 576, 96, 1),
    (7, 576, 160, 1),
    (7, 160, 960, 1),
    (7, 960, 160, 1),
    (7, 960, 320, 1),
    (7, 320, 1280, 1),
]
ODD = [(1, 1, 1, 1), (5, 9, 7, 3), (13, 37, 101, 5), (1, 480, 20, 1), (7, 100, 50, 3)]
EXTREME = [(1, 0, 8, 3), (3, 8, 1, 1), (1 << 14, 1, 1, 1), (1, 1 << 17, 1 << 17, 1), (1 << 20, 64, 64, 3)]


def judge(positions: int, n_out: int, n_in: int, taps: int, itemsize: int, scattered: bool) -> FusedConv2dBlocks:
    blocks = fused_conv2d_blocks(positions, n_out, n_in, taps, itemsize, scattered, H100)
    for side in (blocks.rows, blocks.columns, blocks.depth):
        assert side >= 16 and side & (side - 1) == 0
    vector = 1 if blocks.flat else min(alignment(n_in), VECTOR // itemsize)
    assert max(blocks.rows, blocks.columns) * blocks.depth <= MAX_LOADS * 32 * blocks.warps * vector
    if scattered:
        assert blocks.rows * blocks.columns <= SCATTERED_TILE
    if itemsize == 4 or n_in % 8 or n_out % 8:
        assert blocks.rows * blocks.columns <= NARROW_TILE
    assert blocks.warps <= 4, "eight warps give wrong results in a loop that is not unrolled"
    # A block of sm_80 has 163 KiB of shared memory; two of them should fit beside each other.
    assert blocks.stages * (blocks.rows + blocks.columns) * blocks.depth * itemsize <= 80 * 1024
    steps = reduction_steps(n_in, taps, blocks.depth, blocks.flat)
    assert steps * blocks.depth >= n_in * taps
    assert 1 <= blocks.split <= MAX_SPLIT
    if blocks.split > 1:
        assert steps >= blocks.split * STEPS_PER_SPLIT
    return blocks


@pytest.mark.parametrize("layer", RESNET50 + MOBILENET_V2 + ODD + EXTREME, ids=str)
def test_blocks_stay_within_the_limits(layer: tuple[int, int, int, int]) -> None:
    side, n_in, n_out, kernel = layer
    for batch, itemsize, scattered in product((0, 1, 2, 8, 32, 128), (2, 4), (False, True)):
        judge(batch * side * side, n_out, n_in, kernel * kernel, itemsize, scattered)


@pytest.mark.parametrize("layer", RESNET50 + MOBILENET_V2, ids=str)
@pytest.mark.parametrize("batch", [8, 32, 128])
def test_a_layer_with_enough_work_fills_the_device(layer: tuple[int, int, int, int], batch: int) -> None:
    """Nearly half of the multiprocessors at least: the smallest layers would not gain from more programs."""
    side, n_in, n_out, kernel = layer
    positions = batch * side * side
    blocks = judge(positions, n_out, n_in, kernel * kernel, 2, False)
    programs = -(-positions // blocks.rows) * -(-n_out // blocks.columns) * blocks.split
    assert programs >= H100 * 0.45


def test_small_planes_at_batch_one_share_the_reduction() -> None:
    blocks = judge(49, 512, 512, 9, 2, False)
    assert blocks == FusedConv2dBlocks(rows=64, columns=64, depth=64, flat=False, split=16, stages=4)
    assert judge(56 * 56, 64, 64, 9, 2, False).split == 1
    assert judge(128 * 56 * 56, 64, 64, 9, 2, False).split == 1


def test_few_inputs_make_one_flat_reduction() -> None:
    assert judge(112 * 112, 64, 3, 49, 2, False).flat
    assert not judge(112 * 112, 64, 3, 1, 2, False).flat
    assert not judge(112 * 112, 64, 8, 49, 2, False).flat


def test_depth_follows_the_inputs() -> None:
    found = {n_in: judge(10**6, 64, n_in, 1, 2, False).depth for n_in in (16, 24, 96, 144, 160, 512)}
    assert found == {16: 16, 24: 32, 96: 32, 144: 64, 160: 64, 512: 64}


@pytest.mark.parametrize(("channels", "expected"), [(0, 16), (1, 1), (6, 2), (20, 4), (24, 8), (48, 16), (512, 16)])
def test_alignment(channels: int, expected: int) -> None:
    assert alignment(channels) == expected


def test_images_and_launches_beyond_int32_are_refused() -> None:
    check_extent("op", (1 << 20, 1, 46340, 46340), (0, 0))
    text = r"op: x must have less than 2\^31 elements per padded image.*found 2147488281"
    with pytest.raises(ValueError, match=text):
        check_extent("op", (1, 1, 46341, 46341), (0, 0))
    with pytest.raises(ValueError, match=r"2\^31"):
        check_extent("op", (1, 64, 4000, 4000), (1000, 1000))
    check_programs("op", (1 << 31) - 1)
    with pytest.raises(ValueError, match=r"less than 2\^31 tiles"):
        check_programs("op", 1 << 31)
