"""Make inputs whose statistics are those that a network's batch norms have stored, from noise or from other inputs.

Matching is after DeepInversion (Yin et al., arXiv 1912.08795) and ZeroQ (Cai et al., arXiv 2001.00281): smooth noise
is optimised until the mean and variance that each batch norm sees are its running statistics. Where the network gives
class scores, each input is also optimised towards a class that was drawn for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.graph.class_scores import class_value
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, InputSpec, Node
from redpp_serve.graph.ranges import random_integers
from redpp_serve.pruning.checkpoint import Checkpoint, fingerprint
from redpp_serve.pruning.families import Scale
from redpp_serve.pruning.read_by_norms import as_read_by_norms, trained_norms

CLASS_WEIGHT = 0.1  # of the cross-entropy, relative to the mismatch of the statistics


@dataclass(frozen=True)
class SynthesisBudget:
    """How many inputs to make, and how.

    Attributes:
        images: number of inputs to fit to.
        batch: number of inputs that are optimised together, where any are.
        steps: optimisation steps of each batch.
        judged: number of inputs of each family that no fit sees.
        matched: how many of the structured inputs are optimised towards the batch norms.
        ranked: how many of each family tell, at most, how near it is to the network.
    """

    images: int
    batch: int
    steps: int
    judged: int = 16
    matched: int = 0
    ranked: int = 32


@dataclass(frozen=True)
class Synthetic:
    """Inputs that were made.

    Attributes:
        inputs: one tensor (images, ...) for each network input.
        losses: mismatch of the statistics before and after; NaN where nothing was matched.
        note: says what differs from the budget or the method; empty where nothing does.
    """

    inputs: tuple[Tensor, ...]
    losses: tuple[float, float]
    note: str


def synthesize(  # noqa: PLR0913 - all but two are given by keyword
    graph: Graph,
    budget: SynthesisBudget,
    start: tuple[Tensor, ...] = (),
    *,
    seed: int = 0,
    scales: Mapping[str, Scale] | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Synthetic:
    """Make inputs for a network; deterministic for a seed. Integers are drawn and stay as they are.

    Args:
        graph: network to make inputs for.
        budget: number of inputs and steps.
        start: inputs to start from, (images, ...) for each network input; smooth noise by default.
        seed: of the noise and the classes.
        scales: the range that noise has in an input, by name; by default that of unit power.
        device: where to optimise.
        checkpoint: file that keeps finished batches, so that an interrupted run goes on from there.
        progress: called with the number of steps done and in all.
    """
    norms, doubt = trained_norms(graph)
    floats = has_floats(graph)
    if not norms or not floats:
        kind = "smooth noise" if floats else "random integers"
        note = f"{doubt or 'no batch norm to match'}: {kind} was used as inputs, and the result depends on that"
        return Synthetic(_noise(graph, budget.images, seed, scales), (math.nan, math.nan), note)
    matcher = Matcher(graph, norms, device, use_classes=not doubt and not start)
    kept = Checkpoint(checkpoint, fingerprint([graph], start, budget, seed))
    batches, losses = _restored(kept, budget.batch)
    count, notes = budget.images // budget.batch, [f"{doubt}: they are not matched"] if doubt else []

    def count_steps(before: int, done: int) -> None:
        progress(before + done, count * budget.steps)

    for k in range(len(batches), count):
        noise = as_read_by_norms(graph, _noise(graph, budget.batch, seed * 7919 + k, scales))
        first = tuple(x[k * budget.batch : (k + 1) * budget.batch] for x in start) or noise
        classes = matcher.draw(budget.batch, seed * 7919 + k).to(device)
        count_step = partial(count_steps, k * budget.steps)
        batch, loss = matcher.optimise(tuple(x.to(device) for x in first), classes, budget.steps, count_step)
        batches.append(batch)
        losses.append(loss)
        tensors = {f"input{i}": torch.cat(parts) for i, parts in enumerate(zip(*batches, strict=True))}
        kept.keep(tensors, {"losses": losses})
    inputs = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    first, last = (sum(values) / len(values) for values in zip(*losses, strict=True))
    return Synthetic(inputs, (first, last), "; ".join(notes))


def _noise(graph: Graph, count: int, seed: int, scales: Mapping[str, Scale] | None) -> tuple[Tensor, ...]:
    known, pairs = scales or {}, zip(graph.inputs, smooth_noise(graph.inputs, count, seed), strict=True)
    return tuple(known[spec.name].apply(x) if spec.name in known else x for spec, x in pairs)


def _restored(checkpoint: Checkpoint, batch: int) -> tuple[list[tuple[Tensor, ...]], list[tuple[float, float]]]:
    """Return finished batches and their losses."""
    tensors, values = checkpoint.restore() or ({}, {"losses": []})
    parts = [torch.split(tensors[f"input{i}"], batch) for i in range(len(tensors))]
    return list(zip(*parts, strict=True)), [(first, last) for first, last in values["losses"]]


def smooth_noise(inputs: tuple[InputSpec, ...], count: int, seed: int) -> tuple[Tensor, ...]:
    """Return noise (count, ...) of unit power for each input, images at several spatial scales.

    Integers are uniform over their range.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in inputs:
        dtype = getattr(torch, spec.dtype)
        if not dtype.is_floating_point:
            made.append(random_integers(spec, count, generator))
            continue
        noise = torch.randn(count, *spec.shape, generator=generator)
        if len(spec.shape) == 3:
            height, width = spec.shape[1:]
            for scale in (2, 4, 8):
                coarse = torch.randn(count, spec.shape[0], -(-height // scale), -(-width // scale), generator=generator)
                noise = noise * 0.5 + F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
            noise = noise / noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        made.append(noise.to(dtype))
    return tuple(made)


class Matcher:
    """Optimises inputs of a network towards its stored statistics and towards classes drawn for them.

    Args:
        graph: the network.
        norms: batch norms whose statistics to match.
        device: where to optimise.
        use_classes: whether class scores mean anything; they do not in a network with norms that are left out.
    """

    def __init__(self, graph: Graph, norms: list[Node], device: str, use_classes: bool = True) -> None:
        scores = class_value(graph) if use_classes else None
        self.classes = value_shapes(graph).get(scores, (0, 0))[1] if scores else 0
        wanted = [norm.args[0].name for norm in norms]
        self.program = Program(graph, wanted + ([scores] if scores else [])).to(device)
        self.targets = []
        for norm in norms:
            mean, variance = (graph.tensors[norm.args[k].name].to(device) for k in (3, 4))
            self.targets.append((mean, (variance + norm.args[7]).sqrt()))

    def draw(self, count: int, seed: int) -> Tensor:
        """Draw classes (count,), all equally often where there are enough inputs."""
        generator = torch.Generator().manual_seed(seed)
        order = [torch.randperm(self.classes, generator=generator) for _ in range(-(-count // max(self.classes, 1)))]
        return torch.cat(order)[:count] if self.classes > 1 else torch.zeros(count, dtype=torch.int64)

    def losses(self, batch: tuple[Tensor, ...], classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mismatch of the statistics, and the loss to lower: with the cross-entropy of the classes added."""
        values = self.program(*batch)
        total = torch.zeros((), device=batch[0].device)
        for value, (mean, deviation) in zip(values, self.targets, strict=False):  # the last value may be class scores
            dims = [d for d in range(value.dim()) if d != 1]
            variance, centre = torch.var_mean(value, dim=dims, correction=0)
            total = total + (((centre - mean) / deviation) ** 2).mean()
            total = total + (((variance + 1e-6).sqrt() / deviation - 1) ** 2).mean()
        mismatch = total / len(self.targets)
        if self.classes < 2:
            return mismatch, mismatch
        return mismatch, mismatch + CLASS_WEIGHT * F.cross_entropy(values[-1], classes)

    def optimise(
        self, start: tuple[Tensor, ...], classes: Tensor, steps: int, progress: Callable[[int], None]
    ) -> tuple[tuple[Tensor, ...], tuple[float, float]]:
        """Return the batch of the lowest loss, and the mismatch before and there; integers stay as they are."""
        batch = [x.clone().requires_grad_(x.is_floating_point()) for x in start]
        moving = [x for x in batch if x.requires_grad]
        optimiser = torch.optim.Adam(moving, lr=0.1, betas=(0.8, 0.99))
        spread = float(torch.cat([x.detach().flatten() for x in moving]).std())
        first = last = math.nan
        best, best_batch = math.inf, start
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = 0.1 * spread * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            mismatch, loss = self.losses(tuple(batch), classes)
            value = float(loss.detach())
            if step == 0:
                first = last = float(mismatch.detach())
            if value < best:
                best, best_batch = value, tuple(x.detach().clone() for x in batch)
                last = float(mismatch.detach())
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            progress(step + 1)
        return tuple(x.cpu() for x in best_batch), (first, last)


def has_floats(graph: Graph) -> bool:
    """Return whether any input holds floats, which matching moves."""
    return any(getattr(torch, spec.dtype).is_floating_point for spec in graph.inputs)
