"""Tiles of all kernels over the layers of real networks, and over odd, empty and huge shapes."""

from itertools import product

import pytest

from redpp_serve.kernels.checks import check_extent, check_programs
from redpp_serve.kernels.codebook_linear.heuristics import codebook_blocks
from redpp_serve.kernels.depthwise_conv2d import heuristics as depthwise
from redpp_serve.kernels.depthwise_conv2d.heuristics import DepthwiseBlocks, depthwise_blocks
from redpp_serve.kernels.fused_conv2d import heuristics as conv
from redpp_serve.kernels.fused_conv2d.heuristics import FusedConv2dBlocks, fused_conv2d_blocks, reduction_steps
from redpp_serve.kernels.shapes import alignment
from redpp_serve.kernels.split import heuristics as split
from redpp_serve.kernels.split.heuristics import gather_blocks, multiply_blocks, positions_per_launch

H100 = 132  # multiprocessors
# (side of the output, n_in, n_out, side of the kernel)
RESNET50 = [
    *[(112, 3, 64, 7), (56, 64, 64, 1), (56, 64, 64, 3), (56, 64, 256, 1), (56, 256, 64, 1), (56, 256, 128, 1)],
    *[(28, 128, 128, 3), (28, 128, 512, 1), (28, 256, 512, 1), (28, 512, 128, 1), (28, 512, 256, 1)],
    *[(14, 256, 256, 3), (14, 256, 1024, 1), (14, 512, 1024, 1), (14, 1024, 256, 1), (14, 1024, 512, 1)],
    *[(7, 512, 512, 3), (7, 512, 2048, 1), (7, 1024, 2048, 1), (7, 2048, 512, 1)],
]
MOBILENET_V2 = [
    *[(112, 3, 32, 3), (112, 32, 16, 1), (112, 16, 96, 1), (56, 96, 24, 1), (56, 24, 144, 1), (56, 144, 24, 1)],
    *[(28, 144, 32, 1), (28, 32, 192, 1), (28, 192, 32, 1), (14, 192, 64, 1), (14, 64, 384, 1), (14, 384, 64, 1)],
    *[(14, 384, 96, 1), (14, 96, 576, 1), (14, 576, 96, 1), (7, 576, 160, 1), (7, 160, 960, 1), (7, 960, 160, 1)],
    *[(7, 960, 320, 1), (7, 320, 1280, 1)],
]
ODD = [(1, 1, 1, 1), (5, 9, 7, 3), (13, 37, 101, 5), (1, 480, 20, 1), (7, 100, 50, 3)]
EXTREME = [(1, 0, 8, 3), (3, 8, 1, 1), (1 << 14, 1, 1, 1), (1, 1 << 17, 1 << 17, 1), (1 << 20, 64, 64, 3)]
# (side of the output, channels, side of the kernel)
DEPTHWISE = [
    *[(112, 32, 3), (56, 96, 3), (56, 144, 3), (28, 144, 3), (28, 192, 3), (14, 192, 3), (14, 384, 3), (14, 576, 3)],
    *[(7, 576, 3), (7, 960, 3), (28, 144, 5), (28, 240, 5), (14, 480, 5), (14, 672, 5), (7, 672, 5), (7, 1152, 5)],
]
DEPTHWISE_EXTREME = [(1, 1, 1), (1, 8, 3), (5, 7, 7), (3, 1, 31), (2000, 3, 3), (1, 1 << 20, 3)]
SIZES = [0, 1, 2, 3, 7, 64, 127, 129, 1000, 10**6, 2**33]


def power_of_two(*sizes: int) -> bool:
    return all(size >= 1 and size & (size - 1) == 0 for size in sizes)


def conv_blocks(positions: int, n_out: int, n_in: int, taps: int, itemsize: int = 2) -> FusedConv2dBlocks:
    """Choose, and check the limits."""
    blocks = fused_conv2d_blocks(positions, n_out, n_in, taps, itemsize, H100)
    case = positions, n_out, n_in, taps, itemsize, blocks
    assert power_of_two(blocks.rows, blocks.columns, blocks.depth), case
    assert min(blocks.rows, blocks.columns, blocks.depth) >= 16, case
    vector = 1 if blocks.flat else min(alignment(n_in), conv.VECTOR // itemsize)
    assert max(blocks.rows, blocks.columns) * blocks.depth <= conv.MAX_LOADS * 32 * blocks.warps * vector, case
    if itemsize == 4 or n_in % 8 or n_out % 8:
        assert blocks.rows * blocks.columns <= conv.NARROW_TILE, case
    assert blocks.warps <= 4, "eight warps give wrong results in a loop that is not unrolled"
    # A block of sm_80 has 163 KiB of shared memory; two of them should fit beside each other.
    assert blocks.stages * (blocks.rows + blocks.columns) * blocks.depth * itemsize <= 80 * 1024, case
    steps = reduction_steps(n_in, taps, blocks.depth, blocks.flat)
    assert steps * blocks.depth >= n_in * taps, case
    assert 1 <= blocks.split <= conv.MAX_SPLIT, case
    assert blocks.split == 1 or steps >= blocks.split * conv.STEPS_PER_SPLIT, case
    return blocks


def test_tiles_of_convolutions_stay_within_the_limits() -> None:
    for side, n_in, n_out, kernel in RESNET50 + MOBILENET_V2 + ODD + EXTREME:
        for batch, itemsize in product((0, 1, 2, 8, 32, 128), (2, 4)):
            conv_blocks(batch * side * side, n_out, n_in, kernel * kernel, itemsize)


def test_a_convolution_with_enough_work_fills_the_device() -> None:
    """Nearly half of the multiprocessors at least: the smallest layers would not gain from more programs."""
    for (side, n_in, n_out, kernel), batch in product(RESNET50 + MOBILENET_V2, (8, 32, 128)):
        positions = batch * side * side
        blocks = conv_blocks(positions, n_out, n_in, kernel * kernel)
        programs = -(-positions // blocks.rows) * -(-n_out // blocks.columns) * blocks.split
        assert programs >= H100 * 0.45, (side, n_in, n_out, kernel, batch)


def test_small_planes_at_batch_one_share_the_reduction() -> None:
    assert conv_blocks(49, 512, 512, 9).split > 4
    assert conv_blocks(56 * 56, 64, 64, 9).split == 1
    assert conv_blocks(128 * 56 * 56, 64, 64, 9).split == 1


def test_few_inputs_make_one_flat_reduction() -> None:
    assert conv_blocks(112 * 112, 64, 3, 49).flat
    assert not conv_blocks(112 * 112, 64, 3, 1).flat
    assert not conv_blocks(112 * 112, 64, 8, 49).flat


def test_the_depth_of_a_step_follows_the_inputs() -> None:
    found = {n_in: conv_blocks(10**6, 64, n_in, 1).depth for n_in in (16, 24, 96, 144, 160, 512)}
    assert found == {16: 16, 24: 32, 96: 32, 144: 64, 160: 64, 512: 64}


def test_alignment_is_the_width_of_loads() -> None:
    expected = {0: 16, 1: 1, 6: 2, 20: 4, 24: 8, 48: 16, 512: 16}
    assert {channels: alignment(channels) for channels in expected} == expected


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


def window_blocks(
    images: int, layer: tuple[int, int, int], stride: int = 1, dilation: int = 1, itemsize: int = 2
) -> DepthwiseBlocks:
    """Choose, and check the limits."""
    side, channels, kernel = layer
    blocks = depthwise_blocks(images, channels, (side, side), (kernel, kernel), stride, dilation, itemsize, H100)
    case = images, layer, stride, dilation, itemsize, blocks
    assert power_of_two(blocks.columns, blocks.channels, blocks.warps), case
    assert blocks.rows in (1, depthwise.SHARED_ROWS) and blocks.channels <= depthwise.MAX_CHANNELS, case
    assert blocks.warps <= depthwise.MAX_WARPS, case
    lanes = max(1, blocks.columns * blocks.channels // (blocks.warps * depthwise.WARP))
    assert lanes * itemsize <= 16, case
    if blocks.rows > 1:
        assert dilation == 1 and stride < kernel, "only then do rows share what they read"
        assert kernel * kernel <= depthwise.MAX_UNROLLED_TAPS, case
        assert lanes * kernel * kernel <= max(depthwise.TAP_REGISTERS, kernel * kernel), case
    return blocks


def test_tiles_of_depthwise_convolutions_stay_within_the_limits() -> None:
    for layer in DEPTHWISE + DEPTHWISE_EXTREME:
        for images, *rest in product((0, 1, 2, 8, 32, 128, 1 << 20), (1, 3), (1, 2), (2, 4)):
            window_blocks(images, layer, *rest)


def test_a_batch_of_depthwise_convolutions_fills_the_device() -> None:
    for layer in DEPTHWISE:
        side, channels, _ = layer
        blocks = window_blocks(32, layer)
        programs = 32 * -(-side // blocks.rows) * -(-side // blocks.columns) * -(-channels // blocks.channels)
        assert programs >= H100, layer


def test_depthwise_rows_share_inputs_and_few_programs_have_few_warps() -> None:
    assert window_blocks(128, (112, 32, 3)).rows == depthwise.SHARED_ROWS
    assert window_blocks(1, (7, 960, 3), dilation=2).rows == 1
    assert window_blocks(1, (7, 64, 3)).warps == 1
    assert window_blocks(128, (56, 144, 3)).warps == depthwise.MAX_WARPS


def test_tiles_of_codebook_linears_stay_within_the_limits_and_fill_the_device() -> None:
    shapes = [(4096, 4096), (4096, 25088), (1000, 2048), (1, 1), (16, 128), (31, 5), (70000, 64)]
    for rows, (n_out, n_in), itemsize in product((1, 8, 9, 16, 17, 33, 64, 65, 257, 1 << 22), shapes, (2, 4)):
        packed = 64 * -(-n_in // 128)
        blocks = codebook_blocks(rows, n_out, packed, 16, itemsize, "auto", H100)
        case = rows, n_out, n_in, itemsize, blocks
        assert power_of_two(blocks.rows, blocks.outputs, blocks.groups, blocks.split), case
        assert blocks.outputs >= 16 and blocks.rows <= 64, case
        steps = -(-packed // (64 * blocks.groups))
        assert blocks.split == 1 or (steps >= 2 * blocks.split and blocks.split <= 16), case
        programs = -(-rows // blocks.rows) * -(-n_out // blocks.outputs) * blocks.split
        assert n_out != 4096 or rows > 64 or programs >= H100, case


def test_tiles_of_the_split_stay_within_their_budgets() -> None:
    for positions, rows in product(SIZES, SIZES):
        multiply = multiply_blocks(rows, positions)
        assert power_of_two(multiply.rows, multiply.positions), (rows, positions)
        assert multiply.rows * multiply.positions <= split.MULTIPLY_TILE, (rows, positions)
        for inputs in SIZES:
            gather = gather_blocks(rows, inputs, positions)
            assert power_of_two(gather.outputs, gather.inputs, gather.positions), (rows, inputs, positions)
            assert gather.outputs * gather.inputs * gather.positions <= split.GATHER_TILE, (rows, inputs, positions)


def test_tiles_of_the_split_take_positions_first_and_share_inputs_of_single_rows() -> None:
    assert multiply_blocks(256, 56 * 56).positions == gather_blocks(64, 64, 56 * 56).positions == 128
    assert multiply_blocks(60000, 1).rows == split.MULTIPLY_TILE
    assert gather_blocks(64, 64, 56 * 56).inputs == gather_blocks(7, 1, 5).inputs == 1
    assert gather_blocks(4096, 4096, 1).inputs == 128


def test_products_of_one_launch_fit_the_buffer() -> None:
    for rows, positions in product((0, 1, 100, 4096, 10**5, 10**7, 10**8), (1, 130, 10**6, 2**33)):
        width = positions_per_launch(rows, positions)
        assert 1 <= width <= positions, (rows, positions)
        assert width == 1 or rows * width <= split.PRODUCT_BUDGET, (rows, positions)
        block = split.MAX_POSITION_BLOCK
        assert width == positions or width % block == 0 or width < block, (rows, positions)
