"""Tiles of the depthwise convolution over the layers of MobileNetV2 and EfficientNet, and over extreme shapes."""

from itertools import product

import pytest

from redpp_serve.kernels.depthwise_conv2d.heuristics import (
    MAX_CHANNELS,
    MAX_UNROLLED_TAPS,
    MAX_WARPS,
    SHARED_ROWS,
    TAP_REGISTERS,
    WARP,
    DepthwiseBlocks,
    depthwise_blocks,
)

H100 = 132
# (side of the output, channels, side of the kernel)
MOBILENET_V2 = [
    (112, 32, 3),
    (56, 96, 3),
    (56, 144, 3),
    (28, 144, 3),
    (28, 192, 3),
    (14, 192, 3),
    (14, 384, 3),
    (14, 576, 3),
    (7, 576, 3),
    (7, 960, 3),
]
EFFICIENTNET_B0 = [(28, 144, 5), (28, 240, 5), (14, 480, 5), (14, 672, 5), (7, 672, 5), (7, 1152, 5)]
EXTREME = [(1, 1, 1), (1, 8, 3), (5, 7, 7), (3, 1, 31), (2000, 3, 3), (1, 1 << 20, 3)]


def judge(
    images: int, side: int, channels: int, kernel: int, stride: int, dilation: int, itemsize: int
) -> DepthwiseBlocks:
    window = (kernel, kernel)
    blocks = depthwise_blocks(images, channels, (side, side), window, stride, dilation, itemsize, H100)
    for size in (blocks.columns, blocks.channels, blocks.warps):
        assert size >= 1 and size & (size - 1) == 0
    assert blocks.rows in (1, SHARED_ROWS) and blocks.channels <= MAX_CHANNELS and blocks.warps <= MAX_WARPS
    lanes = max(1, blocks.columns * blocks.channels // (blocks.warps * WARP))
    assert lanes * itemsize <= 16
    if blocks.rows > 1:
        assert dilation == 1 and stride < kernel, "only then do rows share what they read"
        assert kernel * kernel <= MAX_UNROLLED_TAPS and lanes * kernel * kernel <= max(TAP_REGISTERS, kernel * kernel)
    return blocks


@pytest.mark.parametrize("layer", MOBILENET_V2 + EFFICIENTNET_B0 + EXTREME, ids=str)
def test_blocks_stay_within_the_limits(layer: tuple[int, int, int]) -> None:
    side, channels, kernel = layer
    for images, stride, dilation, itemsize in product((0, 1, 2, 8, 32, 128, 1 << 20), (1, 3), (1, 2), (2, 4)):
        judge(images, side, channels, kernel, stride, dilation, itemsize)


@pytest.mark.parametrize("layer", MOBILENET_V2 + EFFICIENTNET_B0, ids=str)
def test_a_batch_fills_the_device(layer: tuple[int, int, int]) -> None:
    side, channels, kernel = layer
    blocks = judge(32, side, channels, kernel, 1, 1, 2)
    programs = 32 * -(-side // blocks.rows) * -(-side // blocks.columns) * -(-channels // blocks.channels)
    assert programs >= H100


def test_typical_shapes() -> None:
    assert judge(128, 112, 32, 3, 1, 1, 2) == DepthwiseBlocks(rows=4, columns=32, channels=32, warps=4)
    assert judge(128, 14, 576, 3, 1, 1, 2) == DepthwiseBlocks(rows=4, columns=16, channels=64, warps=4)
    assert judge(128, 14, 672, 5, 1, 1, 2) == DepthwiseBlocks(rows=4, columns=4, channels=64, warps=4)
    assert judge(1, 7, 960, 3, 1, 1, 2) == DepthwiseBlocks(rows=4, columns=4, channels=64, warps=1)
    assert judge(1, 7, 960, 3, 1, 2, 2) == DepthwiseBlocks(rows=1, columns=4, channels=64, warps=1)


def test_few_programs_have_few_warps() -> None:
    assert judge(1, 7, 64, 3, 1, 1, 2).warps == 1
    assert judge(128, 56, 144, 3, 1, 1, 2).warps == MAX_WARPS
