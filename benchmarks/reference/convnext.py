"""ConvNeXt (arXiv 2201.03545): depthwise 7x7 filters and MLPs under LayerNorm; no batch norm anywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm over channels, an MLP of ``ratio`` times the width with GELU, a scaled shortcut."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.filter = nn.Conv2d(width, width, 7, 1, 3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, ratio * width)
        self.act = nn.GELU()
        self.down = nn.Linear(ratio * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.filter(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(self.act(self.up(y)))
        result: Tensor = x + y.permute(0, 3, 1, 2)
        return result


class Downsample(nn.Module):
    """LayerNorm over channels, then a patch of ``stride`` x ``stride`` becomes one position."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_in)
        self.conv = nn.Conv2d(n_in, n_out, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return result


class ConvNeXt(nn.Module):
    """A patch stem and stages that halve the size: images (N, 1, H, W) to logits (N, classes)."""

    def __init__(self, patch: int, widths: tuple[int, ...], depths: tuple[int, ...], ratio: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, widths[0], patch, patch)]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                layers.append(Downsample(widths[stage - 1], width, 2))
            layers += [Block(width, ratio) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.features(x).mean((2, 3))))
        return result


def fonts_convnext() -> ConvNeXt:
    """Widths 32/64/128, MLPs of 128/256/512, for 1x32x32 letters and digits, 47 classes."""
    return ConvNeXt(2, (32, 64, 128), (2, 2, 4), 4, 47)
