"""Distil without data: a pruned network learns its original's outputs and block outputs on synthetic inputs.

Pairs of synthetic inputs are mixed, shifted and disturbed by a little noise, so that few of them go a long way; batch
norms keep their statistics. The result is never worse on held-out inputs than the network that came in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from redpp_serve.channels.narrowing import Kept
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, Node
from redpp_serve.graph.layers import mac_count
from redpp_serve.pruning.checkpoint import Checkpoint, fingerprint
from redpp_serve.pruning.effort import spent
from redpp_serve.pruning.judge import Reference
from redpp_serve.pruning.student import Student, update_macs

_UPDATE_MACS_PER_SECOND = 20e9  # of the step that follows a gradient, which is matrix products alone
_STEP_SECONDS = 0.01
_BACKWARD = 3.0  # cost of a forward and backward pass, in forward passes
_BATCHES = (64, 32, 16)  # small ones learn more in the same time, down to what keeps a gradient steady
_ENOUGH_STEPS = 1000  # from here on, time goes into larger batches
_BATCH_BYTES = 2**31  # limit for all values of a batch together
_FEWEST_STEPS, _MOST_STEPS = 10, 4000
_MOST_VALUES = 16
_EVALUATIONS = 8
_EXAMINED_AT_ONCE = 16
SECONDS_BETWEEN_CHECKPOINTS = 10.0

_LEAST_DAMAGE = 0.05  # error below which the learning rate falls no further
_WARM_UP = 0.05  # share of all steps

_ACTIVATIONS = frozenset(
    f"aten.{name}.default"
    for name in ("relu", "relu6", "hardtanh", "silu", "gelu", "hardswish", "leaky_relu", "elu", "selu", "mish")
)
_JOINS = frozenset({"aten.add.Tensor", "aten.cat.default", "aten.concat.default"})
_STEPS_OF_A_CHAIN = _ACTIVATIONS | frozenset(
    f"aten.{name}.default" for name in ("batch_norm", "max_pool2d", "avg_pool2d", "layer_norm", "group_norm")
)

_ENDS = {
    "done": "",
    "late": "cut short by the time budget after {done} of {total} steps: not reproducible to the byte",
    "diverged": "the loss became NaN or infinite after {done} of {total} steps: the best weights until then count",
}


@dataclass(frozen=True)
class Lesson:
    """A network to train, and what it learns from.

    Attributes:
        pruned: network to train; its node names are those of the original.
        reference: original network, with the held-out inputs that decide which weights are kept.
        inputs: synthetic inputs to learn on, (images, ...) for each network input.
        kept: positions of the original's values that the pruned network still has.
        codebooks: tensors whose equal values stay equal and whose zeros stay zero; only the values move.
        frozen: tensors that must not change.
    """

    pruned: Graph
    reference: Reference
    inputs: tuple[Tensor, ...]
    kept: Kept
    codebooks: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: number of steps.
        batch: number of inputs of each.
        rate: learning rate for an output error of 1, in units of the root mean square of a tensor's values. It falls
            with the error: the more there is to repair, the farther the weights have to go.
    """

    steps: int
    batch: int
    rate: float = 0.02


@dataclass(frozen=True)
class Distilled:
    """Outcome of a distillation.

    Attributes:
        graph: the better of the network that came in and the one that was trained.
        steps: number of steps taken.
        error: relative output error on the held-out inputs, before and after.
        note: says what differs from the schedule; empty where nothing does.
        reproducible: whether the same call gives the same bytes on a machine of the same kind.
    """

    graph: Graph
    steps: int
    error: tuple[float, float]
    note: str
    reproducible: bool


def schedule(pruned: Graph, original: Graph, seconds: float, pace: float, examined: int = 0) -> Schedule:
    """Return the steps that fit into a time; a pure function of its arguments.

    Args:
        pruned: the network to train.
        original: the network that it learns from.
        seconds: the time.
        pace: seconds of the original for one input, see `effort.pace`.
        examined: number of inputs of each examination.
    """
    share = mac_count(pruned) / max(mac_count(original), 1)
    image = pace * (1 + _BACKWARD * share)
    fixed = update_macs(pruned) / _UPDATE_MACS_PER_SECOND + _STEP_SECONDS
    left = seconds - _EVALUATIONS * examined * pace * share

    def affordable(batch: int) -> int:
        return max(0, int(left / (image * batch + fixed)))

    batch = next((batch for batch in _BATCHES if affordable(batch) >= _ENOUGH_STEPS), _BATCHES[-1])
    values = sum(math.prod(shape) for graph in (pruned, original) for shape in value_shapes(graph).values())
    while batch > 4 and batch * values * 4 > _BATCH_BYTES:
        batch //= 2
    return Schedule(min(affordable(batch), _MOST_STEPS), batch)


def distil(
    lesson: Lesson,
    schedule: Schedule,
    *,
    seed: int = 0,
    device: str = "cpu",
    deadline: float = math.inf,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Distilled:
    """Train weights, biases and the affine part of norms; deterministic for a seed, unless the deadline cuts it short.

    Args:
        lesson: networks and inputs.
        schedule: number of steps and inputs per step.
        seed: of the mixtures of inputs.
        device: where to train.
        deadline: value of `effort.spent` at which to stop.
        checkpoint: file that keeps the state, so that an interrupted run goes on from there.
        progress: called with the number of steps done and in all.
    """
    reference = lesson.reference.on(device, _EXAMINED_AT_ONCE)
    before = reference.error(lesson.pruned)
    if schedule.steps < _FEWEST_STEPS:
        note = f"the time budget allows {schedule.steps} steps of at least {_FEWEST_STEPS}: the weights stay"
        return Distilled(lesson.pruned, 0, (before, before), note, True)
    training = _Training(lesson, schedule, reference, seed, before)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        end = training.run(Checkpoint(checkpoint, training.key()), deadline, progress)
    resumed = f"the first {training.resumed} by a run that was interrupted" if training.resumed else ""
    note = "; ".join(filter(None, [resumed, _ENDS[end].format(done=training.step, total=schedule.steps)]))
    if training.improved:
        error = (before, training.error)
        return Distilled(training.student.graph(training.best), training.step, error, note, end != "late")
    note = "; ".join(filter(None, [note, "no better on held-out inputs: the earlier weights stay"]))
    return Distilled(lesson.pruned, training.step, (before, before), note, end != "late")


class _Training:
    """A student on its way: steps done, the lowest error on held-out inputs so far, and the weights that gave it."""

    def __init__(self, lesson: Lesson, schedule: Schedule, reference: Reference, seed: int, before: float) -> None:
        device = reference.device
        self._lesson, self._schedule, self._reference, self._seed = lesson, schedule, reference, seed
        self._names = [*lesson.pruned.outputs, *matched_values(lesson.pruned, reference.original, lesson.kept)]
        self.student = Student(lesson.pruned, lesson.codebooks, device, lesson.frozen)
        self._loss = OutputLoss(self.student, reference.original, self._names, len(lesson.pruned.outputs), lesson.kept)
        self._examined = self.student.program(lesson.pruned.outputs)
        self._inputs = tuple(x.to(device) for x in lesson.inputs)
        self._rate = schedule.rate * (min(max(before, _LEAST_DAMAGE), 1.0) if math.isfinite(before) else 1.0)
        self._start = before if math.isfinite(before) else math.inf
        self.step, self.error, self.best = 0, self._start, self.student.copy()
        self.resumed = 0  # steps of an interrupted run

    @property
    def improved(self) -> bool:
        return self.error < self._start

    def key(self) -> str:
        """Return the fingerprint of everything that decides the result."""
        lesson, reference = self._lesson, self._reference
        where = [self._lesson.kept(name) for name in self._names]
        positions = [at for kept in where for _, at in sorted(kept.items())]
        return fingerprint(
            (lesson.pruned, reference.original),
            (*lesson.inputs, *reference.inputs, *positions),
            self._names,
            [sorted(kept) for kept in where],
            self._schedule,
            self._seed,
            reference.device.split(":")[0],
            sorted(lesson.codebooks),
            sorted(lesson.frozen),
        )

    def run(self, checkpoint: Checkpoint, deadline: float, progress: Callable[[int, int], None]) -> str:
        """Take the steps that are left, with an examination now and then; return how it ended, a key of `_ENDS`."""
        self._restore(checkpoint)
        total, every = self._schedule.steps, -(-self._schedule.steps // _EVALUATIONS)
        kept_at = time.monotonic()
        while self.step < total:
            if not self._learn():
                return "diverged"
            self.step += 1
            progress(self.step, total)
            late = spent() > deadline and self.step < total
            if self.step % every == 0 or self.step == total or late:
                self._examine()
            if late:
                return "late"
            if time.monotonic() - kept_at > SECONDS_BETWEEN_CHECKPOINTS or self.step == total:
                best = {f"best{k}": tensor for k, tensor in enumerate(self.best)}
                checkpoint.keep({**self.student.state(), **best}, {"step": self.step, "error": self.error})
                kept_at = time.monotonic()
        return "done"

    def _learn(self) -> bool:
        batch = mixed(self._inputs, self._schedule.batch, self._seed * 1_000_003 + self.step)
        rate = self._rate * share_of_rate((self.step + 1) / self._schedule.steps)
        return self.student.learn(self._loss(batch), rate, self.step)

    def _examine(self) -> None:
        error = self._reference.error(self._examined)
        if error < self.error:
            self.error, self.best = error, self.student.copy()

    def _restore(self, checkpoint: Checkpoint) -> None:
        found = checkpoint.restore()
        if found:
            tensors, values = found
            self.student.load(tensors)
            self.step, self.error = values["step"], values["error"]
            self.resumed = self.step
            self.best = [tensors[f"best{k}"].to(tensor.device) for k, tensor in enumerate(self.best)]


class OutputLoss:
    """How far a student's outputs and block outputs are from the original's, on a batch."""

    def __init__(self, student: Student, original: Graph, names: Sequence[str], outputs: int, kept: Kept) -> None:
        self.student, self.outputs = student.program(names), outputs
        self.original = Program(original, names).to(student.device)
        self.kept = [{axis: at.to(student.device) for axis, at in kept(name).items()} for name in names]

    def __call__(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the mean relative squared error of the outputs, plus that of the block outputs if there are any."""
        with torch.no_grad():
            targets = [_at(value, kept) for value, kept in zip(self.original(*batch), self.kept, strict=True)]
        terms = [_distance(value, target) for value, target in zip(self.student(*batch), targets, strict=True)]
        total = torch.stack(terms[: self.outputs]).mean()
        blocks = terms[self.outputs :]
        return total + torch.stack(blocks).mean() if blocks else total


def _at(value: Tensor, kept: dict[int, Tensor]) -> Tensor:
    for axis, positions in kept.items():
        value = value.index_select(axis, positions)
    return value


def _distance(value: Tensor, target: Tensor) -> Tensor:
    """Relative squared error over the whole batch."""
    return (value - target).square().mean() / target.square().mean().clamp_min(1e-12)


def share_of_rate(progress: float) -> float:
    """Return the share of the full learning rate: a short linear rise, then half a cosine down to nothing."""
    if progress < _WARM_UP:
        return progress / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def matched_values(pruned: Graph, original: Graph, kept: Kept, most: int = _MOST_VALUES) -> list[str]:
    """Name at most ``most`` values, evenly spread, that both networks have and that are worth comparing.

    These are the ends of blocks: where two streams join (a residual add, a concat), after the activation that alone
    reads the join. A network without joins is compared behind its norms, activations and poolings.
    """
    sizes, original_sizes, users = value_shapes(pruned), value_shapes(original), pruned.users()
    stored = {*pruned.tensors, *(spec.name for spec in pruned.inputs)}

    def comparable(name: str) -> bool:
        if name not in sizes or name not in original_sizes:
            return False
        at = kept(name)
        return sizes[name] == tuple(len(at[d]) if d in at else n for d, n in enumerate(original_sizes[name]))

    def behind_activation(node: Node) -> str:
        readers = users.get(node.name, [])
        activated = len(readers) == 1 and readers[0].op in _ACTIVATIONS and comparable(readers[0].name)
        return readers[0].name if activated else node.name

    joins, chain = [], []
    for node in pruned.nodes:
        if node.name in pruned.outputs or not comparable(node.name):
            continue
        if node.op in _JOINS and sum(name not in stored for name in node.refs()) > 1:
            joins.append(behind_activation(node))
        elif node.op in _STEPS_OF_A_CHAIN and behind_activation(node) == node.name:
            chain.append(node.name)
    found = [name for name in dict.fromkeys(joins if len(joins) > 1 else chain) if name not in pruned.outputs]
    if len(found) <= most:
        return found
    return [found[round((k + 1) * len(found) / most) - 1] for k in range(most)]


def mixed(inputs: tuple[Tensor, ...], count: int, seed: int) -> tuple[Tensor, ...]:
    """Return a batch (count, ...) for each network input: mixtures of two inputs each, shifted, with a little noise.

    Integer inputs are drawn, never changed; the same draw serves all inputs of a network.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, len(inputs[0]), (2, count), generator=generator)
    share = torch.rand(count, generator=generator)
    share = torch.where(torch.rand(count, generator=generator) < 0.5, share, torch.ones(()))
    made = []
    for x in inputs:
        batch = x[first.to(x.device)]
        if x.is_floating_point():
            weight = share.to(x).view(-1, *[1] * (x.dim() - 1))
            batch = weight * batch + (1 - weight) * x[second.to(x.device)]
            batch = _shifted(batch, generator) if x.dim() == 4 else batch
            noise = torch.randn(batch.shape, generator=generator).to(x)
            batch = batch + 0.05 * x.std() * noise
        made.append(batch)
    return tuple(made)


def _shifted(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to an eighth of its size; borders are repeated."""
    most = [max(1, size // 8) for size in batch.shape[2:]]
    moves = [torch.randint(-m, m + 1, (len(batch),), generator=generator).tolist() for m in most]
    images = []
    for image, *shifts in zip(batch, *moves, strict=True):
        moved = image
        for axis, (shift, size) in enumerate(zip(shifts, batch.shape[2:], strict=True), start=1):
            positions = (torch.arange(size) + shift).clamp(0, size - 1)
            moved = moved.index_select(axis, positions.to(batch.device))
        images.append(moved)
    return torch.stack(images)
