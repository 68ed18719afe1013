"""Prune hard without data, then fine-tune with data: ``python -m benchmarks.fine_tuning``, about a minute.

The shipped digits network loses most of its multiply-accumulates and some accuracy; `redpp_serve.load` gives the
pruned network back as an ordinary module; an ordinary loop trains it on the task's training images; ``package --like``
packages it beside the same original. The held-out images are only used to measure. Needs ``scikit-learn``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import redpp_serve
from redpp_serve.exporting.tuned import Packaged, package_tuned, read_tuned
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.machine import describe_machine
from redpp_serve.options import Options
from redpp_serve.reference import catalog, digits, train
from redpp_serve.stages import Stages

TARGET = 0.06  # of the multiply-accumulates; at a quarter of them this network has lost nothing to win back
EPOCHS, BATCH, RATE = 4, 64, 0.01
NETWORK = "digits_resnet20"


@dataclass(frozen=True)
class Recovery:
    """Held-out accuracy of the three networks, the share of multiply-accumulates that is left, and seconds."""

    original: float
    pruned: float
    tuned: float
    macs: float
    training_seconds: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.macs:.1%} of the multiply-accumulates: accuracy {self.original:.2%} -> {self.pruned:.2%} pruned "
            f"without data -> {self.tuned:.2%} after {self.training_seconds:.0f} s of training ({self.seconds:.0f} s "
            "in all)"
        )


def fine_tune(network: nn.Module, inputs: Tensor, labels: Tensor, epochs: int = EPOCHS) -> None:
    """Train as anybody would; the network ends in eval mode."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(inputs))[: len(inputs) // BATCH * BATCH]
        for chosen in torch.split(order, BATCH):
            loss = F.cross_entropy(network(train.augment(inputs[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def recover(folder: Path, target: float = TARGET, epochs: int = EPOCHS) -> Recovery:
    """Run all of it in a folder, which gains the packages ``pruned`` and ``tuned``."""
    start = time.perf_counter()
    reference, task = catalog.NETWORKS[NETWORK], catalog.DIGITS
    captured = redpp_serve.capture_file(
        reference.checkpoint, [redpp_serve.InputSpec("image", reference.input_shape)], arch=reference.arch
    )
    preprocess = Preprocess("L", 32, 32, (task.mean,), (task.std,))
    options = Options(target_macs=target, max_error=10.0, hash="none", distil=0.0, time_budget=20.0, round_to=8)
    before = redpp_serve.package(
        captured,
        folder / "pruned",
        name="digits",
        options=options,
        preprocess=preprocess,
        verify_data=task.held_out,
        stages=Stages(),
    )
    network = redpp_serve.load(folder / "pruned")
    images, labels, *_ = digits.load_digits()
    training = time.perf_counter()
    fine_tune(network, task.normalise(images), labels, epochs)
    training = time.perf_counter() - training
    torch.save(network.state_dict(), folder / "tuned.pt")
    like = Packaged.read(folder / "pruned")
    tuned = read_tuned(folder / "tuned.pt", like)
    after = package_tuned(tuned, like, folder / "tuned", verify_data=task.held_out, stages=Stages())
    found = before.original.accuracy, before.pruned.accuracy, after.pruned.accuracy
    assert all(accuracy is not None for accuracy in found) and before.pruned.macs and before.original.macs
    macs = before.pruned.macs / before.original.macs
    return Recovery(*map(float, found), macs, training, time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=TARGET, help="share of the multiply-accumulates to keep")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--folder", type=Path, help="where to leave both packages (default: nowhere)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        found = recover(options.folder or Path(scratch), options.target, options.epochs)
    print(found)
    if options.out:
        options.out.write_text(json.dumps({**asdict(found), **describe_machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
