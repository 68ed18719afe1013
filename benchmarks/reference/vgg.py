"""VGG (arXiv 1409.1556) with batch norm: plain convolutions, pooling, and two large Linear layers."""

from __future__ import annotations

from torch import Tensor, nn


class VGG(nn.Module):
    """A pool after every stage of 3x3 convolutions: images (N, 1, size, size) to logits (N, classes)."""

    def __init__(self, stages: tuple[tuple[int, ...], ...], size: int, hidden: tuple[int, int], classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_in = 1
        for widths in stages:
            for width in widths:
                layers += [nn.Conv2d(n_in, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                n_in = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        side = size >> len(stages)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(n_in * side * side, hidden[0]),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden[1], classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.features(x))
        return result


def digits_vgg() -> VGG:
    """Seven convolutions and Linear layers of 1024, 1024 and 512 inputs for 1x32x32 digits, 10 classes."""
    return VGG(((32,), (64, 64), (128, 128), (256, 256)), size=32, hidden=(1024, 512), classes=10)
