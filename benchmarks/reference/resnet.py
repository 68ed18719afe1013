"""Residual networks of basic blocks (arXiv 1512.03385, section 4.2): CIFAR-style stages with free widths."""

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; a strided or widening block projects its shortcut by 1x1."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A stage of ``blocks`` residual blocks for each width: images (N, channels, H, W) to logits (N, classes)."""

    def __init__(self, widths: tuple[int, ...], blocks: int, channels: int, classes: int, stem_stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages, n_in = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stages.append(BasicBlock(n_in, width, stride=2 if stage and not block else 1))
                n_in = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(n_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return result


def digits_resnet20() -> ResNet:
    """ResNet-20 of widths 32/64/128 for 1x32x32 digits, 10 classes, 1.1 million parameters."""
    return ResNet((32, 64, 128), blocks=3, channels=1, classes=10)


def fonts_resnet20() -> ResNet:
    """ResNet-20 of widths 24/48/96 behind a strided stem, for 1x32x32 letters and digits, 47 classes."""
    return ResNet((24, 48, 96), blocks=3, channels=1, classes=47, stem_stride=2)


def fonts_resnet18() -> ResNet:
    """ResNet-18, four stages of widths 32/64/96/128, strided stem, for 1x32x32 letters and digits, 47 classes."""
    return ResNet((32, 64, 96, 128), blocks=2, channels=1, classes=47, stem_stride=2)
