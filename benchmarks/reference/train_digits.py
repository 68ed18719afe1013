"""Train the digits reference network: ``python -m redpp_serve.reference.train_digits`` (CPU, minutes).

scikit-learn's 1797 handwritten digits (UCI), 8x8, enlarged to 32x32 and kept as bytes, so that a PNG of an
image holds exactly what the network was trained on. 1297 images train, 500 are held out and ship with the
checkpoint. Seeded: the same machine and versions give the same file.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from redpp_serve.reference import FOLDER
from redpp_serve.reference.resnet import digits_resnet20

MEAN, STD = 0.3, 0.35


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """uint8 images (N, 1, 32, 32) and int64 labels (N,): train images, train labels, held-out both."""
    from sklearn import datasets

    data = datasets.load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = (large * 255).round().clamp(0, 255).to(torch.uint8)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held = order[:1297], order[1297:]
    return images[train], labels[train], images[held], labels[held]


def normalise(images: Tensor) -> Tensor:
    """uint8 to the network's float32 input."""
    return (images.float() / 255 - MEAN) / STD


def augment(x: Tensor) -> Tensor:
    """A random rotation (up to 11 degrees), scale (10 %) and shift (2.5 pixels) for each image."""
    n = len(x)
    angle = (torch.rand(n) - 0.5) * 0.4
    scale = 1 + (torch.rand(n) - 0.5) * 0.2
    shift = (torch.rand(n, 2) - 0.5) * 0.3
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False,
                         padding_mode="border")


def train(epochs: int, batch: int = 64) -> None:
    torch.manual_seed(0)
    images, labels, held_images, held_labels = load_digits()
    net = digits_resnet20().to(memory_format=torch.channels_last)
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(epochs):
        net.train()
        for chosen in torch.randperm(len(images))[: len(images) // batch * batch].split(batch):
            loss = F.cross_entropy(net(augment(normalise(images[chosen]))), labels[chosen], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            right = (net(normalise(held_images)).argmax(1) == held_labels).float().mean().item()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}  held out {right:.2%}  {time.perf_counter() - start:.0f} s",
              flush=True)
    save(net.state_dict(), held_images, held_labels, FOLDER)


def save(state: dict[str, Tensor], images: Tensor, labels: Tensor, folder: Path) -> None:
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, folder / "digits_resnet20.safetensors")
    np.savez_compressed(folder / "digits_held_out.npz", inputs=images.numpy(), labels=labels.numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    train(parser.parse_args().epochs)
