"""Distillation without data: a pruned network learns its original's outputs and block outputs on synthetic inputs.

Pairs of synthetic inputs are mixed, shifted and blurred by a little noise, so that few of them go a long way; batch
norms keep their statistics. What comes back is never worse on held-out inputs than what came in.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from redpp_serve.channels.narrowing import Kept
from redpp_serve.files import write_atomically
from redpp_serve.graph.executor import Program, value_shapes
from redpp_serve.graph.graph import Graph, Node
from redpp_serve.graph.layers import mac_count
from redpp_serve.pruning.student import Student, update_macs

# What one second is assumed to buy, and what each input and each step cost beside their layers, in
# multiply-accumulates. Constants, not measurements, so that the number of steps, and with it the result, is the same
# on every machine of a kind.
_MACS_PER_SECOND = {"cpu": 20e9, "cuda": 2e12}
_INPUT_MACS = 10**7
_STEP_MACS = {"cpu": 2e8, "cuda": 3e10}
_BATCHES = (64, 32, 16)  # small ones learn more in the same time, down to what keeps a gradient steady
_ENOUGH_STEPS = 1000  # from here on the time goes into larger batches
_BATCH_BYTES = 2**31  # of all values of a batch together
_FEWEST_STEPS = 10
_MOST_VALUES = 16
_EVALUATIONS = 8
_EXAMINED_AT_ONCE = 16
_SECONDS_BETWEEN_CHECKPOINTS = 10.0

# Of the root mean square of a tensor's values, for one step, where the output error is 1. It falls with that
# error: the more there is to repair, the farther the weights have to go.
_RATE = 0.02
_LEAST_DAMAGE = 0.05
_WARM_UP = 0.05  # of all steps

_ACTIVATIONS = frozenset(
    f"aten.{name}.default"
    for name in ("relu", "relu6", "hardtanh", "silu", "gelu", "hardswish", "leaky_relu", "elu", "selu", "mish")
)
_JOINS = frozenset({"aten.add.Tensor", "aten.cat.default", "aten.concat.default"})
_STEPS_OF_A_CHAIN = _ACTIVATIONS | frozenset(
    f"aten.{name}.default" for name in ("batch_norm", "max_pool2d", "avg_pool2d", "layer_norm", "group_norm")
)


@dataclass(frozen=True)
class Distilled:
    """The better of what came in and what was learnt, the steps taken, and the relative output error on the held-out
    inputs before and after. ``note`` is not empty where something other than the plan happened; ``reproducible`` says
    whether the same call gives the same bytes on a machine of the same kind.
    """

    graph: Graph
    steps: int
    error: tuple[float, float]
    note: str
    reproducible: bool


@dataclass(frozen=True)
class Schedule:
    """How many steps to take, each on ``batch`` inputs."""

    steps: int
    batch: int


def schedule(pruned: Graph, original: Graph, seconds: float, device: str = "cpu") -> Schedule:
    """What fits into ``seconds``: a pure function of both networks' cost, the budget and the kind of device."""
    kind = device.split(":")[0]
    macs = 3 * mac_count(pruned) + mac_count(original) + _INPUT_MACS
    fixed = update_macs(pruned) + _STEP_MACS[kind]

    def affordable(batch: int) -> int:
        return int(seconds * _MACS_PER_SECOND[kind] / (macs * batch + fixed))

    batch = next((batch for batch in _BATCHES if affordable(batch) >= _ENOUGH_STEPS), _BATCHES[-1])
    values = sum(math.prod(shape) for graph in (pruned, original) for shape in value_shapes(graph).values())
    while batch > 4 and batch * values * 4 > _BATCH_BYTES:
        batch //= 2
    return Schedule(affordable(batch), batch)


def distil(
    pruned: Graph,
    original: Graph,
    inputs: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    kept: Kept,
    *,
    seconds: float,
    seed: int = 0,
    device: str = "cpu",
    deadline: float = math.inf,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    codebooks: frozenset[str] = frozenset(),
    frozen: frozenset[str] = frozenset(),
) -> Distilled:
    """Train weights, biases and the affine part of norms. Deterministic for a seed, unless ``deadline`` cuts it short.

    Args:
        pruned: the network to train; its nodes have the names of those of ``original``.
        original: the network to learn from.
        inputs: synthetic inputs to learn on, (images, ...) for each network input.
        held_out: inputs that decide which weights are kept.
        kept: for a value's name the positions of the original's value that the pruned network still has, by axis.
        seconds: budget, from which the number of steps follows; the clock is not read for it.
        deadline: time.monotonic() at which to stop.
        checkpoint: a file that keeps the state, so that an interrupted run goes on from there.
        progress: called with steps done and in all.
        codebooks: tensors whose equal values stay equal and whose zeros stay zero; only the values move.
        frozen: tensors that stay as they are.
    """
    plan = schedule(pruned, original, seconds, device)
    examination = _Examination(original, held_out, device)
    before = examination.error(Program(pruned).to(device))
    if plan.steps < _FEWEST_STEPS:
        note = f"{seconds:g} s buy {plan.steps} steps of at least {_FEWEST_STEPS}: the weights stay" if seconds else ""
        return Distilled(pruned, 0, (before, before), note, True)
    student = Student(pruned, codebooks, device, frozen)
    names = [*pruned.outputs, *matched_values(pruned, original, kept)]
    lesson = _Lesson(student, original, names, len(pruned.outputs), kept, device)
    key = _key(
        (pruned, original),
        (*inputs, *held_out),
        [kept(name) for name in names],
        names,
        plan,
        seed,
        device.split(":")[0],
        sorted(codebooks),
        sorted(frozen),
    )
    examined = student.program(pruned.outputs)
    start = before if math.isfinite(before) else math.inf
    rate = _RATE * min(max(before, _LEAST_DAMAGE), 1.0) if math.isfinite(before) else _RATE
    state = _restore(checkpoint, key, student) or _State(0, start, student.copy())
    data = tuple(x.to(device) for x in inputs)

    def learn() -> bool:
        loss = lesson.loss(mixed(data, plan.batch, seed * 1_000_003 + state.step))
        return student.learn(loss, rate * share_of_rate((state.step + 1) / plan.steps), state.step)

    def judge() -> None:
        error = examination.error(examined)
        if error < state.error:
            state.error, state.best = error, student.copy()

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        end = _train(plan, state, learn, judge, lambda: _keep(checkpoint, key, student, state), deadline, progress)
    notes = [_ENDS[end].format(done=state.step, total=plan.steps)]
    if state.error < start:
        return Distilled(student.graph(state.best), state.step, (before, state.error), notes[0], end != "late")
    notes.append("no better on held-out inputs: the earlier weights stay")
    return Distilled(pruned, state.step, (before, before), "; ".join(filter(None, notes)), end != "late")


_ENDS = {
    "done": "",
    "late": "cut short by the time budget after {done} of {total} steps: not reproducible to the byte",
    "diverged": "the loss became NaN or infinite after {done} of {total} steps: the best weights until then count",
}


def _train(
    plan: Schedule,
    state: _State,
    learn: Callable[[], bool],
    judge: Callable[[], None],
    keep: Callable[[], None],
    deadline: float,
    progress: Callable[[int, int], None],
) -> str:
    """Take the steps that ``state`` lacks, look at the held-out inputs now and then; how it ended, of `_ENDS`."""
    every, kept_at = -(-plan.steps // _EVALUATIONS), time.monotonic()
    while state.step < plan.steps:
        if not learn():
            return "diverged"
        state.step += 1
        progress(state.step, plan.steps)
        late = time.monotonic() > deadline and state.step < plan.steps
        if state.step % every == 0 or state.step == plan.steps or late:
            judge()
        if late:
            return "late"
        if time.monotonic() - kept_at > _SECONDS_BETWEEN_CHECKPOINTS or state.step == plan.steps:
            keep()
            kept_at = time.monotonic()
    return "done"


def share_of_rate(progress: float) -> float:
    """The share of the full learning rate: a short linear rise, then half a cosine down to nothing."""
    if progress < _WARM_UP:
        return progress / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def matched_values(pruned: Graph, original: Graph, kept: Kept, most: int = _MOST_VALUES) -> list[str]:
    """At most ``most`` values, evenly spread, that both networks have and that are worth comparing: ends of blocks.

    Where two streams join (a residual add, a concat), after the activation that alone reads the join; where a network
    has none of these, behind its norms, activations and poolings.
    """
    sizes, old = value_shapes(pruned), value_shapes(original)
    users = pruned.users()
    stored = {*pruned.tensors, *(spec.name for spec in pruned.inputs)}
    joins, chain = [], []
    for node in pruned.nodes:
        if node.name in pruned.outputs or not _comparable(node.name, sizes, old, kept):
            continue
        if node.op in _JOINS and sum(name not in stored for name in node.refs()) > 1:
            joins.append(_behind_activation(node, users, sizes, old, kept))
        elif node.op in _STEPS_OF_A_CHAIN and _behind_activation(node, users, sizes, old, kept) == node.name:
            chain.append(node.name)
    found = joins if len(joins) > 1 else chain
    found = [name for name in dict.fromkeys(found) if name not in pruned.outputs]
    if len(found) <= most:
        return found
    return [found[round((k + 1) * len(found) / most) - 1] for k in range(most)]


def _behind_activation(node: Node, users: dict[str, list[Node]], sizes: dict, old: dict, kept: Kept) -> str:
    readers = users.get(node.name, [])
    if len(readers) == 1 and readers[0].op in _ACTIVATIONS and _comparable(readers[0].name, sizes, old, kept):
        return readers[0].name
    return node.name


def _comparable(name: str, sizes: dict, old: dict, kept: Kept) -> bool:
    if name not in sizes or name not in old:
        return False
    positions = kept(name)
    return sizes[name] == tuple(len(positions[d]) if d in positions else n for d, n in enumerate(old[name]))


def mixed(inputs: tuple[Tensor, ...], count: int, seed: int) -> tuple[Tensor, ...]:
    """A batch (count, ...) for each network input: convex mixtures of two inputs each, shifted, with a little noise.

    Integer inputs are drawn, never changed; the same draw serves all inputs of a network.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, len(inputs[0]), (2, count), generator=generator)
    share = torch.rand(count, generator=generator)
    share = torch.where(torch.rand(count, generator=generator) < 0.5, share, torch.ones(()))
    made = []
    for x in inputs:
        a = x[first.to(x.device)]
        if not x.is_floating_point():
            made.append(a)
            continue
        weight = share.to(x).view(-1, *[1] * (x.dim() - 1))
        batch = weight * a + (1 - weight) * x[second.to(x.device)]
        if x.dim() == 4:
            batch = _shifted(batch, generator)
        noise = torch.randn(batch.shape, generator=generator).to(x)
        made.append(batch + 0.05 * x.std() * noise)
    return tuple(made)


def _shifted(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its size; borders are repeated."""
    most = [max(1, size // 8) for size in batch.shape[2:]]
    moves = [torch.randint(-m, m + 1, (len(batch),), generator=generator).tolist() for m in most]
    moved = []
    for image, *by in zip(batch, *moves):
        for axis, (shift, size) in enumerate(zip(by, batch.shape[2:]), start=1):
            places = (torch.arange(size) + shift).clamp(0, size - 1)
            image = image.index_select(axis, places.to(batch.device))
        moved.append(image)
    return torch.stack(moved)


class _Lesson:
    """The loss of a batch: how far the student's values are from the original's."""

    def __init__(
        self, student: Student, original: Graph, names: list[str], outputs: int, kept: Kept, device: str
    ) -> None:
        self.student = student.program(names)
        self.teacher = Program(original, names).to(device)
        self.outputs = outputs
        self.kept = [{axis: where.to(device) for axis, where in kept(name).items()} for name in names]

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            targets = [_at(value, where) for value, where in zip(self.teacher(*batch), self.kept)]
        terms = [_distance(value, target) for value, target in zip(self.student(*batch), targets)]
        blocks = terms[self.outputs :]
        total = torch.stack(terms[: self.outputs]).mean()
        if blocks:
            total = total + torch.stack(blocks).mean()
        return total


def _at(value: Tensor, kept: dict[int, Tensor]) -> Tensor:
    for axis, where in kept.items():
        value = value.index_select(axis, where)
    return value


def _distance(value: Tensor, target: Tensor) -> Tensor:
    """Relative squared error, over the whole batch."""
    return (value - target).square().mean() / target.square().mean().clamp_min(1e-12)


class _Examination:
    """The relative output error on held-out inputs, as `verify.compare_outputs` defines it, on any device; the
    original runs once.
    """

    def __init__(self, original: Graph, held_out: tuple[Tensor, ...], device: str) -> None:
        chunks = zip(*(x.to(device).split(_EXAMINED_AT_ONCE) for x in held_out))
        program = Program(original).to(device)
        with torch.no_grad():
            self._cases = [(chunk, [y.double() for y in program(*chunk)]) for chunk in chunks]
        self._norm = sum(float(y.square().sum()) for _, outputs in self._cases for y in outputs)

    @torch.no_grad()
    def error(self, program: Program) -> float:
        lost = 0.0
        for chunk, outputs in self._cases:
            lost += sum(float((x.double() - y).square().sum()) for x, y in zip(program(*chunk), outputs))
        return (lost / max(self._norm, 1e-300)) ** 0.5


@dataclass
class _State:
    """Where a run stands: steps done, the best held-out error and the trained tensors that gave it."""

    step: int
    error: float
    best: list[Tensor]


def _key(graphs: Sequence[Graph], data: Sequence[Tensor], kept: Sequence[dict[int, Tensor]], *rest: object) -> str:
    """A digest of everything that decides the result."""
    digest = hashlib.sha256(repr(rest).encode())
    tensors = list(data) + [t for places in kept for _, t in sorted(places.items())]
    for graph in graphs:
        digest.update(repr((graph.inputs, graph.nodes, graph.outputs)).encode())
        tensors += [t for _, t in sorted(graph.tensors.items())]
    for tensor in tensors:
        digest.update(repr((tensor.shape, tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _restore(checkpoint: Path | None, key: str, student: Student) -> _State | None:
    """The state that `_keep` left, put into the student; None if the file is another run's or damaged."""
    from safetensors import SafetensorError, safe_open

    if checkpoint is None or not checkpoint.exists():
        return None
    try:
        with safe_open(checkpoint, "pt") as file:
            meta = file.metadata() or {}
            if meta.get("key") != key:
                return None
            stored = {name: file.get_tensor(name) for name in file.keys()}
            state = _State(int(meta["step"]), float.fromhex(meta["error"]), [])
            state.best = [stored[f"best{k}"].to(leaf.device) for k, leaf in enumerate(student.leaves)]
            student.load({name: stored[name] for name in student.state()})
    except (SafetensorError, OSError, KeyError, ValueError):
        return None  # a checkpoint only saves time: a damaged one is made again
    return state


def _keep(checkpoint: Path | None, key: str, student: Student, state: _State) -> None:
    from safetensors.torch import save

    if checkpoint is None:
        return
    best = {f"best{k}": tensor for k, tensor in enumerate(state.best)}
    tensors = {name: t.cpu().contiguous() for name, t in {**student.state(), **best}.items()}
    meta = {"key": key, "step": str(state.step), "error": state.error.hex()}
    write_atomically(checkpoint, save(tensors, metadata=meta))
