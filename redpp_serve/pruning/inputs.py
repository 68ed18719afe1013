"""Make inputs without data: images whose batch-norm statistics match those that the network has stored.

After DeepInversion (Yin et al., arXiv 1912.08795) and ZeroQ (Cai et al., arXiv 2001.00281): smooth noise is optimised
until the mean and variance that each batch norm sees are its running statistics. Where the network gives class scores,
each input is also optimised towards a class that was drawn for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, InputSpec, Node
from redpp_serve.graph.layers import mac_count
from redpp_serve.graph.passes import is_inference_norm
from redpp_serve.pruning.checkpoint import Checkpoint, fingerprint

# Assumed speed in multiply-accumulates. A constant, not a measurement: the number of inputs and steps, and with them
# the result, must be the same on every machine of a kind.
_MATCHING_MACS_PER_SECOND = {"cpu": 25e9, "cuda": 2e12}
_FORWARD_AND_BACKWARD = 3
_OVERHEAD_MACS = 10**7  # per input: what a small network spends on everything but its layers
_MOST_IMAGES, _MOST_STEPS = 512, 24  # more inputs improve the result more than more steps do
_STEPS_PER_IMAGE = 40  # an image costs as much as these: its own optimisation, and fitting to it later
CLASS_WEIGHT = 0.1  # of the cross-entropy, relative to the mismatch of the statistics


@dataclass(frozen=True)
class SynthesisBudget:
    """How many inputs to make, and how.

    Attributes:
        images: number of inputs.
        batch: number of inputs that are optimised together.
        steps: optimisation steps of each batch.
    """

    images: int
    batch: int
    steps: int

    @property
    def held_out(self) -> int:
        """Number of inputs that no fit sees: a fifth, in whole batches, and at least one batch."""
        return max(1, self.images // self.batch // 5) * self.batch


def synthesis_budget(graph: Graph, seconds: float, device: str = "cpu") -> SynthesisBudget:
    """Return the budget for ``seconds``: a pure function of the network's cost, the time and the kind of device."""
    macs = mac_count(graph) + _OVERHEAD_MACS
    affordable = seconds * _MATCHING_MACS_PER_SECOND[device.split(":")[0]] / (_FORWARD_AND_BACKWARD * macs)
    batch = 32 if affordable >= 1280 and macs < 1e9 else 16 if affordable >= 640 and macs < 1e9 else 8
    images = int(min(_MOST_IMAGES, max(2 * batch, affordable / _STEPS_PER_IMAGE // batch * batch)))
    return SynthesisBudget(images, batch, int(min(_MOST_STEPS, max(4, affordable // images))))


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

    def divide(self, held_out: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Split into inputs to fit to and the last ``held_out`` (at most half), to measure on."""
        held_out = min(held_out, len(self.inputs[0]) // 2)
        return tuple(x[:-held_out] for x in self.inputs), tuple(x[-held_out:] for x in self.inputs)


def synthesize(
    graph: Graph,
    budget: SynthesisBudget,
    *,
    seed: int = 0,
    device: str = "cpu",
    deadline: float = math.inf,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Synthetic:
    """Make inputs for a network; deterministic for a seed, unless the deadline cuts it short.

    Args:
        graph: network to make inputs for.
        budget: number of inputs and steps.
        seed: of the noise and the classes.
        device: where to optimise.
        deadline: value of time.monotonic() at which to stop.
        checkpoint: file that keeps finished batches, so that an interrupted run goes on from there.
        progress: called with the number of steps done and in all.
    """
    norms, doubt = trained_norms(graph)
    floats = all(getattr(torch, spec.dtype).is_floating_point for spec in graph.inputs)
    if not norms or not floats:
        kind = "smooth noise" if floats else "random integers"
        note = f"{doubt or 'no batch norm to match'}: {kind} was used as inputs, and the result depends on that"
        return Synthetic(smooth_noise(graph.inputs, budget.images, seed), (math.nan, math.nan), note)
    matcher = Matcher(graph, norms, device, use_classes=not doubt)
    kept = Checkpoint(checkpoint, fingerprint([graph], (), budget, seed))
    batches, losses = _restored(kept, budget.batch)
    count, notes = budget.images // budget.batch, [f"{doubt}: they are not matched"] if doubt else []

    def count_steps(before: int, done: int) -> None:
        progress(before + done, count * budget.steps)

    for k in range(len(batches), count):
        start = tuple(x.to(device) for x in smooth_noise(graph.inputs, budget.batch, seed * 7919 + k))
        classes = matcher.draw(budget.batch, seed * 7919 + k).to(device)
        count_step = partial(count_steps, k * budget.steps)
        batch, loss, finished = matcher.optimise(start, classes, budget.steps, deadline, count_step)
        batches.append(batch)
        losses.append(loss)
        if not finished:
            notes.append(
                f"cut short by --time-budget in batch {k + 1} of {count}: a larger budget fits better, "
                "and only a finished run is reproducible to the byte"
            )
            break
        tensors = {f"input{i}": torch.cat(parts) for i, parts in enumerate(zip(*batches, strict=True))}
        kept.keep(tensors, {"losses": losses})
    inputs = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    first, last = (sum(values) / len(values) for values in zip(*losses, strict=True))
    return Synthetic(inputs, (first, last), "; ".join(notes))


def _restored(checkpoint: Checkpoint, batch: int) -> tuple[list[tuple[Tensor, ...]], list[tuple[float, float]]]:
    """Return finished batches and their losses."""
    tensors, values = checkpoint.restore() or ({}, {"losses": []})
    parts = [torch.split(tensors[f"input{i}"], batch) for i in range(len(tensors))]
    return list(zip(*parts, strict=True)), [(first, last) for first, last in values["losses"]]


def trained_norms(graph: Graph) -> tuple[list[Node], str]:
    """Return the batch norms whose stored statistics tell something about the inputs, and what is wrong with the rest.

    Left out are norms that still have the mean 0 and variance 1 they were made with, and those with NaN or infinity:
    inputs matched to these would suit no network.
    """
    norms = [node for node in graph.nodes if is_inference_norm(node)]
    statistics = {node.name: [graph.tensors[node.args[k].name] for k in (3, 4)] for node in norms}
    broken = {name for name, pair in statistics.items() if not all(bool(t.isfinite().all()) for t in pair)}
    untrained = {name for name, (mean, var) in statistics.items() if bool((mean == 0).all() & (var == 1).all())}
    found = [(untrained, "look untrained (mean 0, variance 1)"), (broken, "are NaN or infinite")]
    doubts = [f"the statistics of {len(names)} of {len(norms)} batch norms {what}" for names, what in found if names]
    return [node for node in norms if node.name not in broken | untrained], " and ".join(doubts)


def smooth_noise(inputs: tuple[InputSpec, ...], count: int, seed: int) -> tuple[Tensor, ...]:
    """Return noise (count, ...) of unit power for each input, images at several spatial scales; integers are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in inputs:
        dtype = getattr(torch, spec.dtype)
        if not dtype.is_floating_point:
            made.append(torch.randint(0, 2, (count, *spec.shape), generator=generator).to(dtype))
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
        scores = value_shapes(graph).get(graph.outputs[0], ())
        self.classes = scores[1] if len(scores) == 2 and use_classes else 0  # fewer than two classes count as none
        wanted = [norm.args[0].name for norm in norms]
        self.program = Program(graph, wanted + list(graph.outputs[:1]) * (self.classes > 1)).to(device)
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
        self, start: tuple[Tensor, ...], classes: Tensor, steps: int, deadline: float, progress: Callable[[int], None]
    ) -> tuple[tuple[Tensor, ...], tuple[float, float], bool]:
        """Return the batch of the lowest loss, the mismatch before and there, and whether all steps were taken."""
        batch = [x.clone().requires_grad_() for x in start]
        optimiser = torch.optim.Adam(batch, lr=0.1, betas=(0.8, 0.99))
        first = last = math.nan
        best, best_batch = math.inf, start
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = 0.1 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
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
            if time.monotonic() > deadline:
                return tuple(x.cpu() for x in best_batch), (first, last), False
        return tuple(x.cpu() for x in best_batch), (first, last), True
