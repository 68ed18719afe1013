"""Inputs without data: images whose batch-norm statistics match those the network has stored.

After DeepInversion (Yin et al., arXiv 1912.08795) and ZeroQ (Cai et al., arXiv 2001.00281): smooth noise is
optimised until the mean and variance that each batch norm sees are its running statistics, and, where the network
gives scores of classes, until it takes each input for a class drawn for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.files import write_atomically
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, InputSpec, Node
from redpp_serve.graph.layers import mac_count
from redpp_serve.graph.passes import is_inference_norm

# What one second is assumed to buy, in multiply-accumulates. A constant, not a measurement, so that the number of
# inputs and steps, and with them the result, are the same on every machine of a kind.
_MACS_PER_SECOND = {"cpu": 25e9, "cuda": 2e12}
_FORWARD_AND_BACKWARD = 3
_OVERHEAD_MACS = 10**7  # for one input: what a small network spends on everything but its layers
_MOST_IMAGES, _MOST_STEPS = 512, 24  # more inputs buy more than more steps
_STEPS_AN_IMAGE = 40  # those of its optimisation, and what fitting to it later takes
_CLASS_WEIGHT = 0.1  # of the cross-entropy of the drawn classes, beside the mismatch of the statistics


@dataclass(frozen=True)
class SynthesisBudget:
    """How many inputs to make, in batches of ``batch``, with ``steps`` of optimisation each. The last batch (a fifth
    of the inputs where there are more than five) is held out from all fitting.
    """

    images: int
    batch: int
    steps: int

    @property
    def held_out(self) -> int:
        return max(1, self.images // self.batch // 5) * self.batch


def synthesis_budget(graph: Graph, seconds: float, device: str = "cpu") -> SynthesisBudget:
    """The plan that fits into ``seconds``: a pure function of the network's cost, the budget and the kind of device."""
    macs = mac_count(graph) + _OVERHEAD_MACS
    affordable = seconds * _MACS_PER_SECOND[device.split(":")[0]] / (_FORWARD_AND_BACKWARD * macs)  # inputs times steps
    batch = 32 if affordable >= 1280 and macs < 1e9 else 16 if affordable >= 640 and macs < 1e9 else 8
    images = int(min(_MOST_IMAGES, max(2 * batch, affordable / _STEPS_AN_IMAGE // batch * batch)))
    return SynthesisBudget(images, batch, int(min(_MOST_STEPS, max(4, affordable // images))))


@dataclass(frozen=True)
class Synthetic:
    """``inputs``: one tensor (images, ...) for each network input. ``losses``: mismatch of the statistics before and
    after. ``note`` is not empty where something other than the plan happened.
    """

    inputs: tuple[Tensor, ...]
    losses: tuple[float, float]
    note: str

    def divide(self, held_out: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Inputs to fit on, and the last ``held_out`` (at most half) to measure on."""
        held_out = min(held_out, len(self.inputs[0]) // 2)
        return tuple(x[:-held_out] for x in self.inputs), tuple(x[-held_out:] for x in self.inputs)


def synthesize(
    graph: Graph,
    how: SynthesisBudget,
    *,
    seed: int = 0,
    device: str = "cpu",
    deadline: float = math.inf,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Synthetic:
    """Make inputs for a network. Deterministic for a seed, unless the ``deadline`` (time.monotonic) cuts it short.

    Args:
        checkpoint: a file that keeps finished batches, so that an interrupted run goes on from there.
        progress: called with steps done and in all.
    """
    norms, doubt = trained_norms(graph)
    floats = all(getattr(torch, spec.dtype).is_floating_point for spec in graph.inputs)
    if not norms or not floats:
        kind = "smooth noise" if floats else "random integers"
        note = f"{doubt or 'no batch norm to match'}: {kind} stands in for inputs, and the result rests on that"
        return Synthetic(smooth_noise(graph.inputs, how.images, seed), (math.nan, math.nan), note)
    matcher = _Matcher(graph, norms, device, sure=not doubt)
    key = _key(graph, how, seed)
    batches, losses = _restore(checkpoint, key)
    total, notes = how.images // how.batch * how.steps, [f"{doubt}: they are not matched"] if doubt else []
    for k in range(len(batches), how.images // how.batch):
        batch_seed = seed * 7919 + k
        start = tuple(x.to(device) for x in smooth_noise(graph.inputs, how.batch, batch_seed))
        batch, loss, finished = matcher.optimise(
            start, batch_seed, how.steps, deadline, lambda done: progress(k * how.steps + done, total)
        )
        batches.append(batch)
        losses.append(loss)
        if not finished:
            place = f"batch {k + 1} of {how.images // how.batch}"
            notes.append(
                f"cut short by --time-budget in {place}: a larger budget fits better, "
                "and only a finished plan is reproducible to the byte"
            )
            break
        _keep(checkpoint, key, batches, losses)
    inputs = tuple(torch.cat(parts) for parts in zip(*batches))
    first, last = (sum(values) / len(values) for values in zip(*losses))
    return Synthetic(inputs, (first, last), "; ".join(notes))


def trained_norms(graph: Graph) -> tuple[list[Node], str]:
    """The batch norms whose stored statistics say something about the inputs, and what is wrong with the others.

    Left out are those that still have the mean 0 and variance 1 they were made with, and those with NaN or infinity:
    inputs matched to these would be inputs of no network.
    """
    norms = [node for node in graph.nodes if is_inference_norm(node)]
    statistics = {node.name: [graph.tensors[node.args[k].name] for k in (3, 4)] for node in norms}
    broken = {name for name, pair in statistics.items() if not all(bool(t.isfinite().all()) for t in pair)}
    untrained = {name for name, (mean, var) in statistics.items() if bool((mean == 0).all() & (var == 1).all())}
    found = [(untrained, "look untrained (mean 0, variance 1)"), (broken, "are NaN or infinite")]
    doubts = [f"the statistics of {len(names)} of {len(norms)} batch norms {what}" for names, what in found if names]
    return [node for node in norms if node.name not in broken | untrained], " and ".join(doubts)


def smooth_noise(inputs: tuple[InputSpec, ...], count: int, seed: int) -> tuple[Tensor, ...]:
    """Noise of unit power for each input (count, ...); images get several spatial scales, integers only 0 and 1."""
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


class _Matcher:
    """The loss of a batch: how far its statistics are from those stored, over all batch norms, and its scores from
    the classes drawn for it. Scores of a network with norms that are left out say nothing: not ``sure``.
    """

    def __init__(self, graph: Graph, norms: list[Node], device: str, sure: bool = True) -> None:
        scores = value_shapes(graph).get(graph.outputs[0], ())
        self.classes = scores[1] if len(scores) == 2 and sure else 0  # fewer than two are none
        wanted = [norm.args[0].name for norm in norms]
        self.program = Program(graph, wanted + list(graph.outputs[:1]) * (self.classes > 1)).to(device)
        self.targets = []
        for norm in norms:
            mean, variance = (graph.tensors[norm.args[k].name].to(device) for k in (3, 4))
            self.targets.append((mean, (variance + norm.args[7]).sqrt()))

    def draw(self, count: int, seed: int) -> Tensor:
        """Classes (count,), each as often as another where there are enough inputs."""
        generator = torch.Generator().manual_seed(seed)
        order = [torch.randperm(self.classes, generator=generator) for _ in range(-(-count // max(self.classes, 1)))]
        return torch.cat(order)[:count] if self.classes > 1 else torch.zeros(count, dtype=torch.int64)

    def losses(self, batch: tuple[Tensor, ...], classes: Tensor) -> tuple[Tensor, Tensor]:
        """The mismatch of the statistics, and what is to be lowered: it and the classes' cross-entropy."""
        values = self.program(*batch)
        total = torch.zeros((), device=batch[0].device)
        for value, (mean, deviation) in zip(values, self.targets):
            dims = [d for d in range(value.dim()) if d != 1]
            variance, centre = torch.var_mean(value, dim=dims, correction=0)
            total = total + (((centre - mean) / deviation) ** 2).mean()
            total = total + (((variance + 1e-6).sqrt() / deviation - 1) ** 2).mean()
        mismatch = total / len(self.targets)
        if self.classes < 2:
            return mismatch, mismatch
        return mismatch, mismatch + _CLASS_WEIGHT * F.cross_entropy(values[-1], classes)

    def optimise(
        self, start: tuple[Tensor, ...], seed: int, steps: int, deadline: float, progress: Callable[[int], None]
    ) -> tuple[tuple[Tensor, ...], tuple[float, float], bool]:
        batch = [x.clone().requires_grad_() for x in start]
        classes = self.draw(len(batch[0]), seed).to(batch[0].device)
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
            loss.backward()
            optimiser.step()
            progress(step + 1)
            if time.monotonic() > deadline:
                return tuple(x.cpu() for x in best_batch), (first, last), False
        return tuple(x.cpu() for x in best_batch), (first, last), True


def _key(graph: Graph, how: SynthesisBudget, seed: int) -> str:
    digest = hashlib.sha256(f"{how} {seed} {graph.inputs} {graph.nodes}".encode())
    for name, tensor in sorted(graph.tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"")
    return digest.hexdigest()


def _restore(checkpoint: Path | None, key: str) -> tuple[list[tuple[Tensor, ...]], list[tuple[float, float]]]:
    """Finished batches and their losses, as `_keep` left them; none if the file is another run's or damaged."""
    from safetensors import SafetensorError, safe_open

    if checkpoint is None or not checkpoint.exists():
        return [], []
    try:
        with safe_open(checkpoint, "pt") as file:
            meta = file.metadata() or {}
            if meta.get("key") != key:
                return [], []
            losses = [(first, last) for first, last in json.loads(meta["losses"])]
            parts = [file.get_tensor(f"input{k}").split(int(meta["batch"])) for k in range(int(meta["inputs"]))]
    except (SafetensorError, OSError, KeyError, ValueError):
        return [], []  # a checkpoint only saves time: a damaged one is made again
    return list(zip(*parts)), losses


def _keep(
    checkpoint: Path | None, key: str, batches: list[tuple[Tensor, ...]], losses: list[tuple[float, float]]
) -> None:
    from safetensors.torch import save

    if checkpoint is None:
        return
    tensors = {f"input{k}": torch.cat(parts) for k, parts in enumerate(zip(*batches))}
    meta = {"key": key, "batch": str(len(batches[0][0])), "inputs": str(len(tensors)), "losses": json.dumps(losses)}
    write_atomically(checkpoint, save(tensors, metadata=meta))
