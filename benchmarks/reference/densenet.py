"""DenseNet-BC (arXiv 1608.06993): every layer reads the concatenation of all before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _conv(n_in: int, n_out: int, kernel: int) -> nn.Sequential:
    """Batch norm and ReLU come first in this family."""
    return nn.Sequential(nn.BatchNorm2d(n_in), nn.ReLU(), nn.Conv2d(n_in, n_out, kernel, 1, kernel // 2, bias=False))


class DenseLayer(nn.Module):
    """A 1x1 bottleneck of four times the growth, a 3x3 convolution, and its result appended to the input."""

    def __init__(self, n_in: int, growth: int) -> None:
        super().__init__()
        self.bottleneck = _conv(n_in, 4 * growth, 1)
        self.conv = _conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.bottleneck(x))], 1)


class DenseNet(nn.Module):
    """Blocks of dense layers with a halving transition between: images (N, 1, H, W) to logits (N, classes)."""

    def __init__(self, stem: int, stem_stride: int, growth: int, blocks: tuple[int, ...], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, stem, 3, stem_stride, 1, bias=False)]
        n_in = stem
        for block, depth in enumerate(blocks):
            if block:
                half = n_in // 16 * 8  # half of the channels, in multiples of 8
                layers += [_conv(n_in, half, 1), nn.AvgPool2d(2)]
                n_in = half
            for _ in range(depth):
                layers.append(DenseLayer(n_in, growth))
                n_in += growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(n_in), nn.ReLU())
        self.head = nn.Linear(n_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(x).mean((2, 3)))
        return result


def fonts_densenet() -> DenseNet:
    """Growth 16, blocks of 4, 6 and 8 layers, for 1x32x32 letters and digits, 47 classes."""
    return DenseNet(32, 2, 16, (4, 6, 8), 47)
