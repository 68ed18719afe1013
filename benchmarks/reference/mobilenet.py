"""Inverted residuals: MobileNetV2 (arXiv 1801.04381) and, with squeeze-and-excitation and SiLU, EfficientNet
(arXiv 1905.11946), for one-channel images of 32x32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """``repeats`` blocks of ``width`` output channels; the first one has the stride, all widen by ``expand`` inside."""

    expand: int
    width: int
    repeats: int
    stride: int
    kernel: int = 3


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, where given, an activation; padded so that stride 1 keeps the size."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = None,
    ) -> None:
        conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(n_out), *([act()] if act else []))


class SqueezeExcite(nn.Module):
    """A gate in (0, 1) for each channel, from the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """1x1 to the hidden width, depthwise filter, gate where asked for, 1x1 back; a shortcut where the shapes agree."""

    def __init__(self, n_in: int, stage: Stage, stride: int, act: type[nn.Module], gated: bool) -> None:
        super().__init__()
        hidden = n_in * stage.expand
        layers: list[nn.Module] = []
        if stage.expand > 1:
            layers.append(ConvNorm(n_in, hidden, act=act))
        layers.append(ConvNorm(hidden, hidden, stage.kernel, stride, groups=hidden, act=act))
        if gated:
            layers.append(SqueezeExcite(hidden, max(8, n_in // 4)))
        layers.append(ConvNorm(hidden, stage.width))
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and n_in == stage.width

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x) if self.residual else self.body(x)
        return result


class InvertedResidualNet(nn.Module):
    """Stem, stages, a 1x1 convolution to ``features``, mean, Linear: images (N, 1, H, W) to logits (N, classes)."""

    def __init__(
        self,
        stem: int,
        stem_stride: int,
        stages: Sequence[Stage],
        features: int,
        classes: int,
        act: type[nn.Module] = nn.ReLU6,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.stem = ConvNorm(1, stem, 3, stem_stride, act=act)
        blocks, n_in = [], stem
        for stage in stages:
            for block in range(stage.repeats):
                blocks.append(InvertedResidual(n_in, stage, 1 if block else stage.stride, act, gated))
                n_in = stage.width
        self.blocks = nn.Sequential(*blocks)
        self.features = ConvNorm(n_in, features, act=act)
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.features(self.blocks(self.stem(x))).mean((2, 3)))
        return result


def digits_mobilenetv2() -> InvertedResidualNet:
    """MobileNetV2 for 1x32x32 digits, 10 classes."""
    stages = (Stage(1, 16, 1, 1), Stage(6, 24, 2, 2), Stage(6, 32, 3, 1), Stage(6, 64, 3, 2), Stage(6, 96, 2, 1))
    return InvertedResidualNet(16, 2, stages, 256, 10)


def fonts_efficientnet() -> InvertedResidualNet:
    """EfficientNet (gates, SiLU, 3x3 and 5x5 filters) for 1x32x32 letters and digits, 47 classes."""
    stages = (
        Stage(1, 16, 1, 1),
        Stage(6, 24, 2, 2),
        Stage(6, 40, 2, 1, kernel=5),
        Stage(6, 64, 2, 2),
        Stage(6, 80, 2, 1, kernel=5),
    )
    return InvertedResidualNet(16, 2, stages, 320, 47, act=nn.SiLU, gated=True)
