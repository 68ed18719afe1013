"""ResNet-50, MobileNetV2, EfficientNet-B0 and VGG-16 for 224 x 224 images, as their papers have them, in plain PyTorch.

Nothing but torch is needed where the GPU is. Sources: arXiv 1512.03385 (with the stride in the 3 x 3), 1801.04381,
1905.11946 and 1409.1556.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES, SIDE = 1000, 224
BRANCH = 0.25  # of a residual block's sum: random blocks of full weight would multiply every rounding


class Residual(nn.Module):
    """``activation(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class SqueezeExcite(nn.Module):
    """Each channel times a gate computed from all channels' means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.SiLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def _conv(
    n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] | None = nn.ReLU
) -> list[nn.Module]:
    """Convolution, batch norm and activation."""
    layers = [nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(n_out)]
    return [*layers, *([activation()] if activation else [])]


def _bottleneck(n_in: int, width: int, stride: int) -> nn.Module:
    n_out = 4 * width
    body = [*_conv(n_in, width, 1), *_conv(width, width, 3, stride), *_conv(width, n_out, 1, activation=None)]
    shortcut = nn.Identity() if n_in == n_out else nn.Sequential(*_conv(n_in, n_out, 1, stride, activation=None))
    return Residual(nn.Sequential(*body), shortcut, nn.ReLU())


def resnet50() -> nn.Module:
    layers, n_in = [*_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(_bottleneck(n_in, 64 << stage, 2 if stage and not block else 1))
            n_in = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, CLASSES))


def _inverted(
    n_in: int, n_out: int, ratio: int, kernel: int, stride: int, activation: type[nn.Module], squeeze: bool
) -> nn.Module:
    """Expansion, depthwise convolution, squeeze and excite, projection; with a shortcut where shapes allow it."""
    wide = n_in * ratio
    body = [
        *(_conv(n_in, wide, 1, activation=activation) if ratio > 1 else []),
        *_conv(wide, wide, kernel, stride, wide, activation),
        *([SqueezeExcite(wide, max(1, n_in // 4))] if squeeze else []),
        *_conv(wide, n_out, 1, activation=None),
    ]
    block = nn.Sequential(*body)
    return Residual(block, nn.Identity(), nn.Identity()) if stride == 1 and n_in == n_out else block


def _mobile(
    stages: tuple[tuple[int, int, int, int, int], ...], last: int, activation: type[nn.Module], squeeze: bool
) -> nn.Module:
    """``stages`` are (ratio, channels, blocks, stride of the first, kernel)."""
    layers, n_in = [*_conv(3, 32, 3, 2, activation=activation)], 32
    for ratio, channels, blocks, stride, kernel in stages:
        for block in range(blocks):
            layers.append(_inverted(n_in, channels, ratio, kernel, 1 if block else stride, activation, squeeze))
            n_in = channels
    head = [
        *_conv(n_in, last, 1, activation=activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, CLASSES),
    ]
    return nn.Sequential(*layers, *head)


def mobilenet_v2() -> nn.Module:
    stages = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 32, 3, 2, 3),
        (6, 64, 4, 2, 3),
        (6, 96, 3, 1, 3),
        (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    )
    return _mobile(stages, 1280, nn.ReLU6, squeeze=False)


def efficientnet_b0() -> nn.Module:
    stages = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )
    return _mobile(stages, 1280, nn.SiLU, squeeze=True)


def vgg16() -> nn.Module:
    layers, n_in = [], 3
    for channels, blocks in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(blocks):
            layers += [nn.Conv2d(n_in, channels, 3, padding=1), nn.ReLU()]
            n_in = channels
        layers.append(nn.MaxPool2d(2))
    head = [
        nn.Flatten(),
        nn.Linear(512 * 49, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, CLASSES),
    ]
    return nn.Sequential(*layers, *head)


def rehearsal() -> nn.Module:
    """A network of the same blocks that a CPU runs in no time."""
    blocks = [*_conv(3, 8, 3, 2), _bottleneck(8, 8, 1), _inverted(32, 16, 2, 3, 2, nn.ReLU6, True)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 24))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "vgg16": vgg16,
    "efficientnet_b0": efficientnet_b0,
    "rehearsal": rehearsal,
}


def randomised(module: nn.Module, x: Tensor) -> nn.Module:
    """The network in eval mode with random weights and the batch-norm statistics that it has on ``x`` (N, ...).

    So its activations stay of a size that half precision holds, as in a trained network.
    """
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            fan = part.weight[0].numel()
            part.weight.data.copy_((2 / fan) ** 0.5 * torch.randn(part.weight.shape, generator=generator))
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the average over all batches: here the one below
    for block in (part for part in module.modules() if isinstance(part, Residual)):
        norms = [part for part in block.body.modules() if isinstance(part, nn.BatchNorm2d)]
        norms[-1].weight.data.fill_(BRANCH)
    module.train()
    with torch.no_grad():
        module(x)
    return module.eval()
