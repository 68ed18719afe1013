"""Make the inputs of a run without data: structured ones of the network's kind, or noise matched to its batch norms.

Matching is after DeepInversion (Yin et al., arXiv 1912.08795) and ZeroQ (Cai et al., arXiv 2001.00281): smooth noise
is optimised until the mean and variance that each batch norm sees are its running statistics. Where the network gives
class scores, each input is also optimised towards a class that was drawn for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from redpp_serve.pruning.families import IMAGE, SIGNAL, TABLE, Scale, estimate_scale, families_of, kind_of, structured
from redpp_serve.pruning.judge import class_outputs
from redpp_serve.runtime.moments import Moments

_MOST_STEPS = 24  # of batch-norm matching from noise
CLASS_WEIGHT = 0.1  # of the cross-entropy, relative to the mismatch of the statistics
# Numbers of inputs by the network's multiply-accumulates: what the unknowns of late layers need, as far as time allows.
_FITTED = ((2e7, 512), (2e8, 192), (1e9, 256), (math.inf, 96))
_JUDGED = ((2e8, 48), (1e9, 24), (math.inf, 12))  # of each family
_FORWARD_AND_BACKWARD = 3
_MATCHED_STEPS = 8  # from structured inputs
_FITTED_FAMILIES, _JUDGING_FAMILIES = 4, 3  # at most
_REAL_JUDGED = 0.2
_LEAST_FAMILIES = 2  # unfitted ones that judge alone
_NEAR = 4.0  # times as far as the nearest family: farther ones tell nothing of the network
_CONTRAST = 0.7
_RANKED, _RANKED_NUMBERS = 32, 10**7  # inputs of each family to rank it by; fewer where all would have more numbers


@dataclass(frozen=True)
class SynthesisBudget:
    """How many inputs to make, and how.

    Attributes:
        images: number of inputs to fit to.
        batch: number of inputs that are optimised together, where any are.
        steps: optimisation steps of each batch.
        judged: number of inputs of each family that no fit sees.
        matched: how many of the structured inputs are optimised towards the batch norms.
    """

    images: int
    batch: int
    steps: int
    judged: int = 16
    matched: int = 0


def synthesis_budget(graph: Graph, seconds: float = math.inf, pace: float = 0.0) -> SynthesisBudget:
    """Return the budget of a network.

    Args:
        graph: the network.
        seconds: for matching inputs to batch norms.
        pace: seconds of the network for one input, see `effort.pace`.
    """
    macs = mac_count(graph)
    images, judged = (next(n for most, n in table if macs <= most) for table in (_FITTED, _JUDGED))
    batch = 32 if macs < 1e9 else 8
    affordable = seconds / max(_FORWARD_AND_BACKWARD * _MATCHED_STEPS * pace, 1e-9)
    matched = int(min(images, affordable) // batch * batch) if trained_norms(graph)[0] else 0
    return SynthesisBudget(images, batch, _MOST_STEPS, judged, matched)


@dataclass(frozen=True)
class Sources:
    """What is known beyond the network itself.

    Attributes:
        inputs: real unlabelled inputs, (images, ...) for each network input; empty without.
        scale: the value range of images; None to estimate it.
        moments: second moments of what a serving original reads.
        widths: of each channel set, where an earlier run has found them, see `Options.keep_point`.
    """

    inputs: tuple[Tensor, ...] = ()
    scale: Scale | None = None
    moments: Moments | None = None
    widths: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Prepared:
    """Inputs to fit to and to judge by.

    Attributes:
        fit: (images, ...) for each network input.
        families: inputs that nothing is fitted to, by the name of their family.
        note: how they were made, in words.
        kind_known: whether they are of the kind that the network reads, or tied to it by its batch norms.
    """

    fit: tuple[Tensor, ...]
    families: Mapping[str, tuple[Tensor, ...]]
    note: str
    kind_known: bool


def prepare(
    graph: Graph,
    sources: Sources,
    budget: SynthesisBudget,
    *,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Make, or divide, the inputs of a run; the same for the same arguments.

    Inputs of a known kind are structured: the families nearest to the network to fit to, others to judge by. Inputs of
    an unknown kind are noise that is matched to the batch norms. Real inputs join the fitted ones, but for a fifth that
    judges.
    """
    known = all(kind_of(spec) in (IMAGE, SIGNAL, TABLE) for spec in graph.inputs)
    if known:
        scale = sources.scale or estimate_scale(graph, seed)
        names = _ranked(graph, scale, seed)
        fitted = names[: min(_FITTED_FAMILIES, max(1, len(names) // 2))]
        each = -(-budget.images // len(fitted))
        parts = [_structured(graph, name, each, seed, scale) for name in fitted]
        fit = tuple(torch.stack(xs, 1).flatten(0, 1)[: budget.images] for xs in zip(*parts, strict=True))
        note = f"structured inputs ({', '.join(fitted)})"
        if budget.matched:
            few = replace(budget, images=budget.matched, steps=_MATCHED_STEPS)
            made = synthesize(graph, few, fit, seed=seed, device=device, checkpoint=checkpoint, progress=progress)
            fit = tuple(torch.cat([x, y[len(x) :]]) for x, y in zip(made.inputs, fit, strict=True))
            first, last = made.losses
            note += f", {len(made.inputs[0])} of them matched to batch norms, mismatch {first:.2g} -> {last:.2g}"
        others = names[len(fitted) :][:_JUDGING_FAMILIES]
        judged = {name: _structured(graph, name, budget.judged, seed + 1, scale) for name in others}
        if len(others) < _LEAST_FAMILIES:
            again = _structured(graph, names[0], budget.judged, seed + 1, scale)
            judged |= {f"other {names[0]}": again, f"faded {names[0]}": _faded(again)}
        note += f"; judged by {', '.join(judged)}"
    else:
        whole = -(-budget.judged // budget.batch) * budget.batch  # inputs are made in batches
        made = synthesize(graph, budget, seed=seed, device=device, checkpoint=checkpoint, progress=progress)
        second = synthesize(graph, replace(budget, images=whole), seed=seed + 1, device=device)
        fit, other = made.inputs, tuple(x[: budget.judged] for x in second.inputs)
        judged = {"another start": other, "scaled": _scaled(other, 0.7), "louder": _scaled(other, 1.3)}
        note = made.note or "inputs matched to batch-norm statistics, mismatch {:.3g} -> {:.3g}".format(*made.losses)
    real = len(sources.inputs[0]) if sources.inputs else 0
    if real:
        held = min(real, max(4, round(_REAL_JUDGED * real)))
        fit = tuple(torch.cat([x[:-held], y]) for x, y in zip(sources.inputs, fit, strict=True))
        judged = {"real": tuple(x[-held:] for x in sources.inputs), **judged}
        note = f"{real - held} real inputs and {note}; {held} real ones judge"
    tied = known or bool(real) or sources.moments is not None or bool(trained_norms(graph)[0])
    return Prepared(fit, judged, note, tied)


def _structured(graph: Graph, family: str, count: int, seed: int, scale: Scale) -> tuple[Tensor, ...]:
    """Make inputs of a family of the first network input; other inputs take the family of the same place."""
    place = families_of(graph.inputs[0]).index(family)
    made = []
    for k, spec in enumerate(graph.inputs):
        names = families_of(spec)
        made.append(structured(spec, count, seed + 7919 * k, names[place % len(names)], scale))
    return tuple(made)


def _ranked(graph: Graph, scale: Scale, seed: int) -> list[str]:
    """Return the families of the first input that a network takes for its own kind, the nearest first.

    Near are those whose batch-norm statistics are the stored ones. Without batch norm they are the ones of which a
    classifier is surest while it gives them many different classes: the mutual information of input and class.
    """
    names = list(families_of(graph.inputs[0]))
    norms, _ = trained_norms(graph)
    classes = next((name for name, scores in class_outputs(graph).items() if scores), None)
    if not norms and classes is None:
        return names
    matcher = Matcher(graph, norms, "cpu", use_classes=False)
    program = Program(graph, [classes or graph.outputs[0]])
    numbers = len(names) * sum(math.prod(spec.shape) for spec in graph.inputs)
    count = max(8, min(_RANKED, _RANKED_NUMBERS // numbers))
    found = {}
    with torch.no_grad():
        for name in names:
            inputs = _structured(graph, name, count, seed + 2, scale)
            far = matcher.losses(inputs, torch.empty(0))[0] if norms else 1 / _information(program(*inputs)[0])
            found[name] = float(far) if math.isfinite(far) else math.inf
    near = _NEAR * min(found.values())
    return sorted((name for name in names if found[name] <= near), key=found.__getitem__)


def _information(scores: Tensor) -> float:
    """Return the mutual information of input and class, in nats, for scores (n, classes) or their softmax."""
    given = bool((scores >= 0).all()) and torch.allclose(scores.sum(1), scores.new_ones(len(scores)), atol=1e-3)
    shares = (scores if given else scores.softmax(1)).double()
    mean = shares.mean(0)
    information = -torch.special.xlogy(mean, mean).sum() + torch.special.xlogy(shares, shares).sum(1).mean()
    return max(float(information), 1e-6)


def _faded(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Take three tenths of each input's contrast away."""
    return tuple(_CONTRAST * x + (1 - _CONTRAST) * x.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1)) for x in inputs)


def _scaled(inputs: tuple[Tensor, ...], factor: float) -> tuple[Tensor, ...]:
    return tuple(x * factor if x.is_floating_point() else x for x in inputs)


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


def synthesize(
    graph: Graph,
    budget: SynthesisBudget,
    start: tuple[Tensor, ...] = (),
    *,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Synthetic:
    """Make inputs for a network; deterministic for a seed.

    Args:
        graph: network to make inputs for.
        budget: number of inputs and steps.
        start: inputs to start from, (images, ...) for each network input; smooth noise by default.
        seed: of the noise and the classes.
        device: where to optimise.
        checkpoint: file that keeps finished batches, so that an interrupted run goes on from there.
        progress: called with the number of steps done and in all.
    """
    norms, doubt = trained_norms(graph)
    floats = all(getattr(torch, spec.dtype).is_floating_point for spec in graph.inputs)
    if not norms or not floats:
        kind = "smooth noise" if floats else "random integers"
        note = f"{doubt or 'no batch norm to match'}: {kind} was used as inputs, and the result depends on that"
        return Synthetic(smooth_noise(graph.inputs, budget.images, seed), (math.nan, math.nan), note)
    matcher = Matcher(graph, norms, device, use_classes=not doubt and not start)
    kept = Checkpoint(checkpoint, fingerprint([graph], start, budget, seed))
    batches, losses = _restored(kept, budget.batch)
    count, notes = budget.images // budget.batch, [f"{doubt}: they are not matched"] if doubt else []

    def count_steps(before: int, done: int) -> None:
        progress(before + done, count * budget.steps)

    for k in range(len(batches), count):
        noise = smooth_noise(graph.inputs, budget.batch, seed * 7919 + k)
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
        self, start: tuple[Tensor, ...], classes: Tensor, steps: int, progress: Callable[[int], None]
    ) -> tuple[tuple[Tensor, ...], tuple[float, float]]:
        """Return the batch of the lowest loss, and the mismatch before and there."""
        batch = [x.clone().requires_grad_() for x in start]
        optimiser = torch.optim.Adam(batch, lr=0.1, betas=(0.8, 0.99))
        spread = float(torch.cat([x.flatten() for x in start]).std())
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
