"""The digits task: scikit-learn's 1797 handwritten digits (UCI), 8x8, enlarged to 32x32 and kept as bytes, so that a
PNG of an image holds exactly what a network was trained on. 1297 images train, 500 are held out.

``python -m redpp_serve.reference.digits`` writes the two files that ship: the held-out images and a sample of 512
training images.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.reference import FOLDER

MEAN, STD = 0.3, 0.35
TRAINING, SAMPLE = 1297, 512


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 images (N, 1, 32, 32) and int64 labels (N,): train images, train labels, held-out both."""
    from sklearn import datasets

    data = datasets.load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = (large * 255).round().clamp(0, 255).to(torch.uint8)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held = order[:TRAINING], order[TRAINING:]
    return images[train], labels[train], images[held], labels[held]


def main() -> None:
    images, labels, held_images, held_labels = load_digits()
    files = {"held_out": (held_images, held_labels), "sample": (images[:SAMPLE], labels[:SAMPLE])}
    for name, (x, y) in files.items():
        np.savez_compressed(FOLDER / f"digits_{name}.npz", inputs=x.numpy(), labels=y.numpy())


if __name__ == "__main__":
    main()
