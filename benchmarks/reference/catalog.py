"""The reference networks and their tasks: what a benchmark loads, without scikit-learn, Pillow or any font.

A network has one name: that of its factory and, with a suffix, of its checkpoint beside this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from redpp_serve.reference import FOLDER, convnext, densenet, digits, fonts, mobilenet, resnet, vgg


@dataclass(frozen=True)
class Task:
    """Grey images of 32x32 in ``classes`` classes; ``mean`` and ``std`` are of an image in 0..1.

    ``held_out`` and ``sample`` (images from the training set) are npz files of uint8 ``inputs`` (N, 1, 32, 32) and
    int64 ``labels`` (N,).
    """

    name: str
    classes: int
    mean: float
    std: float

    @property
    def held_out(self) -> Path:
        return FOLDER / f"{self.name}_held_out.npz"

    @property
    def sample(self) -> Path:
        return FOLDER / f"{self.name}_sample.npz"

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images to a network's float32 inputs, of the same shape."""
        return (images.float() / 255 - self.mean) / self.std


@dataclass(frozen=True)
class Network:
    """A reference network; ``factory`` takes no argument and gives it with random weights."""

    factory: Callable[[], nn.Module]
    task: Task
    input_shape: tuple[int, ...] = (1, 32, 32)

    @property
    def name(self) -> str:
        return self.factory.__name__

    @property
    def checkpoint(self) -> Path:
        return FOLDER / f"{self.name}.safetensors"

    @property
    def arch(self) -> str:
        """What ``--arch`` takes."""
        return f"{FOLDER / self.factory.__module__.rpartition('.')[2]}.py:{self.name}"


DIGITS = Task("digits", 10, digits.MEAN, digits.STD)
FONTS = Task("fonts", len(fonts.CLASSES), fonts.MEAN, fonts.STD)
TASKS = {task.name: task for task in (DIGITS, FONTS)}
NETWORKS = {
    network.name: network
    for network in (
        Network(resnet.digits_resnet20, DIGITS),
        Network(mobilenet.digits_mobilenetv2, DIGITS),
        Network(vgg.digits_vgg, DIGITS),
        Network(resnet.fonts_resnet20, FONTS),
        Network(mobilenet.fonts_efficientnet, FONTS),
        Network(densenet.fonts_densenet, FONTS),
        Network(convnext.fonts_convnext, FONTS),
        Network(resnet.fonts_resnet18, FONTS),
    )
}


def load(name: str) -> nn.Module:
    """A trained network in eval mode with float32 weights; KeyError where no network has that name."""
    network = NETWORKS[name].factory()
    network.load_state_dict(load_file(NETWORKS[name].checkpoint))
    return network.float().eval()


def held_out(task: str) -> tuple[Tensor, Tensor]:
    """Normalised inputs (N, 1, 32, 32) and labels (N,) that no training saw: 500 digits, 2000 letters and digits."""
    return _read(TASKS[task].held_out, TASKS[task])


def real_sample(task: str) -> Tensor:
    """Normalised inputs (512, 1, 32, 32) of the training set, for baselines that may see real images."""
    return _read(TASKS[task].sample, TASKS[task])[0]


def _read(path: Path, task: Task) -> tuple[Tensor, Tensor]:
    with np.load(path) as file:
        return task.normalise(torch.from_numpy(file["inputs"])), torch.from_numpy(file["labels"]).long()
