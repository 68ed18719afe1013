"""Train reference networks: ``python -m redpp_serve.reference.train NAME...`` (a GPU where there is one, else the CPU).

Seeded: the same machine and versions give the same file. The digits need scikit-learn, the letters the file that
``python -m redpp_serve.reference.fonts`` draws. A checkpoint holds float16 weights; its batch-norm statistics are
measured again, in float32, on unchanged training images and with those weights. The held-out accuracy of what was
written is added to the results.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from redpp_serve.reference import catalog, digits, fonts
from redpp_serve.reference.catalog import NETWORKS, Network, Task


@dataclass(frozen=True)
class Recipe:
    """One-cycle learning rate up to ``rate``; ``adam`` for networks without batch norm, else SGD with momentum;
    ``half``: bfloat16 where it is faster, which it is not on a CPU for what is mostly depthwise filters."""

    epochs: int
    batch: int
    rate: float = 0.1
    decay: float = 5e-4
    adam: bool = False
    half: bool = True


RECIPES = {
    "digits_resnet20": Recipe(30, 64),
    "digits_mobilenetv2": Recipe(30, 64, decay=1e-4, half=False),
    "digits_vgg": Recipe(16, 64, rate=0.05),
    "fonts_resnet20": Recipe(10, 128),
    "fonts_resnet18": Recipe(7, 128),
    "fonts_efficientnet": Recipe(8, 128, decay=1e-4, half=False),
    "fonts_densenet": Recipe(8, 128),
    "fonts_convnext": Recipe(6, 128, rate=2e-3, decay=0.05, adam=True),
}
SMOOTHING = 0.05


def training_images(task: Task) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 1, 32, 32) and int64 labels (N,)."""
    if task is catalog.DIGITS:
        return digits.load_digits()[:2]
    if not fonts.TRAINING_FILE.exists():
        raise SystemExit("the letters are not drawn yet: run python -m redpp_serve.reference.fonts")
    with np.load(fonts.TRAINING_FILE) as file:
        return torch.from_numpy(file["inputs"]), torch.from_numpy(file["labels"])


def augment(x: Tensor) -> Tensor:
    """A random rotation (up to 11 degrees), scale (10 %) and shift (2.5 pixels) for each image."""
    n = len(x)
    angle = (torch.rand(n) - 0.5) * 0.4
    scale = 1 + (torch.rand(n) - 0.5) * 0.2
    shift = (torch.rand(n, 2) - 0.5) * 0.3
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3).to(x.device)
    return F.grid_sample(
        x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False, padding_mode="border"
    )


def optimiser(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Norms, biases and scales do not decay."""
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": recipe.decay},
        {"params": [p for p in net.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if recipe.adam:
        return torch.optim.AdamW(groups, recipe.rate)
    return torch.optim.SGD(groups, recipe.rate, momentum=0.9, nesterov=True)


def fit(network: Network, recipe: Recipe, images: Tensor, labels: Tensor) -> nn.Module:
    """Train a network on uint8 images (N, 1, 32, 32) on their device; return it in eval mode."""
    torch.manual_seed(0)
    device = images.device
    held, held_labels = (t.to(device) for t in catalog.held_out(network.task.name))
    net: nn.Module = network.factory().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = len(images) // recipe.batch
    optimise = optimiser(net, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimise, recipe.rate, total_steps=recipe.epochs * steps, pct_start=0.2
    )
    start = time.perf_counter()
    for epoch in range(recipe.epochs):
        net.train()
        for chosen in torch.split(torch.randperm(len(images))[: steps * recipe.batch], recipe.batch):
            x = augment(network.task.normalise(images[chosen]))
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.half):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=SMOOTHING)
            optimise.zero_grad()
            torch.autograd.backward(loss)
            optimise.step()
            schedule.step()
        net.eval()
        print(
            f"{network.name} epoch {epoch + 1}: loss {loss.item():.3f}  "
            f"held out {accuracy(net, held[:500], held_labels[:500]):.2%}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return net


@torch.no_grad()
def finish(net: nn.Module, images: Tensor) -> None:
    """Round the weights to float16 and measure the batch-norm statistics again, on inputs (N, 1, 32, 32)."""
    for p in net.parameters():
        p.copy_(p.half().float())
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
        norm.train()
    for batch in torch.split(images, 256):
        net(batch)
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    right = [net(x).argmax(1) == y for x, y in zip(torch.split(inputs, 250), torch.split(labels, 250), strict=True)]
    return torch.cat(right).float().mean().item()


def measure(network: Network) -> dict[str, object]:
    """Of the checkpoint as it loads: task, parameters, multiply-accumulates of one image, held-out accuracy."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    net = catalog.load(network.name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *network.input_shape))
    return {
        "task": network.task.name,
        "parameters": sum(p.numel() for p in net.parameters()),
        "macs": counter.get_total_flops() // 2,
        "held_out_accuracy": round(accuracy(net, *catalog.held_out(network.task.name)), 4),
    }


def train(network: Network, device: torch.device) -> dict[str, object]:
    """Train and write one checkpoint; its entry of the results."""
    recipe, start = RECIPES[network.name], time.perf_counter()
    images, labels = (t.to(device) for t in training_images(network.task))
    net = fit(network, recipe, images, labels)
    finish(net, network.task.normalise(images[:8192]))
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in net.cpu().state_dict().items()}
    save_file(state, network.checkpoint)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        **measure(network),
        "epochs": recipe.epochs,
        "training_seconds": round(time.perf_counter() - start),
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record(path: Path, name: str, entry: dict[str, object]) -> None:
    """Put figures of one network into the file of results."""
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[name] = {**entries.get(name, {}), **entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({k: entries[k] for k in NETWORKS if k in entries}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=list(NETWORKS), help=", ".join(NETWORKS))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/reference.json"))
    parser.add_argument("--evaluate", action="store_true", help="train nothing, measure the checkpoints that are there")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in options.names:
        entry = measure(NETWORKS[name]) if options.evaluate else train(NETWORKS[name], device)
        record(options.results, name, entry)
        print(f"{name}: {entry}", flush=True)


if __name__ == "__main__":
    main()
