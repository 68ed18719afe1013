"""Judge a network against the original, on inputs that were neither fitted nor optimised towards anything.

Inputs come in families that differ in kind; each output is compared on its own, centred over the inputs, since a large
common mean hides what is lost. The worst family decides. Where families disagree by more than a factor of two the error
on real inputs is unknown, and the result says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.class_scores import class_outputs
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.statistics.binomial import clopper_pearson

HELD_OUT = "held-out"  # the family of inputs that are given without a name
FACTOR = 2.0  # families whose errors differ by more do not tell the error
_SMALL = 0.01  # errors below this are small whatever their ratio
_CHUNK = 8


@dataclass(frozen=True)
class Agreement:
    """How many inputs get the original's top-1 class, with the exact 95 % interval of the share."""

    same: int
    of: int

    @property
    def share(self) -> float:
        """Share of the inputs."""
        return self.same / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """The Clopper-Pearson interval of the share."""
        return clopper_pearson(self.same, self.of)

    def __str__(self) -> str:
        if self.same == self.of:
            return f"{self.same} of {self.of}, so at least {self.interval[0]:.0%}"
        return "{:.1%} ({:.0%} to {:.0%})".format(self.share, *self.interval)


@dataclass(frozen=True)
class Head:
    """One output of two networks, compared.

    Attributes:
        output: its name.
        errors: by family, the norm of the difference over the norm of the original's output, both centred.
        agreement: by family, where the output is a classification.
    """

    output: str
    errors: Mapping[str, float]
    agreement: Mapping[str, Agreement] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The worst family's error."""
        return _worst(self.errors.values())

    @property
    def worst_agreement(self) -> float | None:
        """The agreement's share on the worst family; None where the output is no classification."""
        return min((agreement.share for agreement in self.agreement.values()), default=None)

    @property
    def known(self) -> bool:
        """Whether the families agree on the error within a factor of `FACTOR`."""
        return self.error <= max(_SMALL, FACTOR * min(self.errors.values()))


@dataclass(frozen=True)
class Difference:
    """The distance between two networks' outputs on the same inputs.

    Attributes:
        heads: one for each output of floating point.
        images: number of inputs, of all families.
    """

    heads: tuple[Head, ...]
    images: int

    @property
    def error(self) -> float:
        """The error of the worst head on its worst family."""
        return _worst(head.error for head in self.heads)

    @property
    def interval(self) -> tuple[float, float]:
        """The spread of the worst head's error over the families."""
        worst = self.worst
        return (min(worst.errors.values()), worst.error) if worst else (0.0, 0.0)

    @property
    def worst(self) -> Head | None:
        """The head of the largest error; None where no output is of floating point."""
        return max(self.heads, key=lambda head: head.error, default=None)

    @property
    def known(self) -> bool:
        """Whether the families of every head agree on its error."""
        return all(head.known for head in self.heads)

    @property
    def top1(self) -> Agreement | None:
        """The agreement of the worst head on its worst family; None where no output is a classification."""
        found = [agreement for head in self.heads for agreement in head.agreement.values()]
        return min(found, key=lambda agreement: agreement.share, default=None)

    @property
    def agreement(self) -> float | None:
        """The share behind `top1`."""
        return self.top1.share if self.top1 else None

    def __str__(self) -> str:
        low, high = self.interval
        several = len(self.heads) > 1
        text = f"output error {high:.4f}" + (f" of {self.worst.output}" if several and self.worst else "")
        text += f" ({low:.4f} on the best family)" if self.heads and len(self.heads[0].errors) > 1 else ""
        text += "" if self.known else ", unknown on real inputs: the families differ by more than a factor of two"
        return text + (f"; top-1 agreement {self.top1}" if self.top1 else "")


class Reference:
    """The original network's outputs on families of inputs; every later network is measured against them.

    The original runs once, when the reference is made.

    Args:
        original: the network to compare with.
        inputs: (images, ...) for each network input; or several families of them by name.
        device: where the networks run.
        chunk: number of inputs run at once; rounding depends on it.

    Attributes:
        families: the inputs by family.
    """

    def __init__(
        self,
        original: Graph,
        inputs: Sequence[Tensor] | Mapping[str, Sequence[Tensor]],
        device: str = "cpu",
        chunk: int = _CHUNK,
    ) -> None:
        families = inputs if isinstance(inputs, Mapping) else {HELD_OUT: inputs}
        self.original, self.device, self._chunk = original, device, chunk
        self.families = {name: tuple(x) for name, x in families.items()}
        self._chunks = {
            name: list(zip(*(torch.split(x.to(device), chunk) for x in family), strict=True))
            for name, family in self.families.items()
        }
        self._classes = class_outputs(original)
        program = Program(original).to(device)
        self._outputs = {name: list(_run(program, chunks)) for name, chunks in self._chunks.items()}

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs of all families in turns, (images, ...) for each network input."""
        every = list(self.families.values())
        few = min(len(family[0]) for family in every)
        turns = [torch.stack([x[:few] for x in xs], 1).flatten(0, 1) for xs in zip(*every, strict=True)]
        return tuple(turns)

    @property
    def images(self) -> int:
        """The number of inputs of all families."""
        return sum(len(family[0]) for family in self.families.values())

    def on(self, device: str, chunk: int) -> Reference:
        """Return a reference to the same network and inputs on another device or in chunks of another size."""
        same = (device, chunk) == (self.device, self._chunk)
        return self if same else Reference(self.original, self.families, device, chunk)

    def require_finite(self, inputs: str) -> None:
        """Check that the original gives numbers at all: without them neither errors nor fits mean anything.

        Raises:
            RedppError: it gives NaN or infinity; ``inputs`` says on what.
        """
        every = (y for chunks in self._outputs.values() for ys in chunks for y in ys)
        if not all(bool(y.isfinite().all()) for y in every if y.is_floating_point()):
            raise not_finite(inputs)

    def error(self, other: Graph | Program) -> float:
        """Return the error of a network, or of a program on this reference's device, as `Difference.error` has it."""
        return self.compare(other).error

    def compare(self, other: Graph | Program) -> Difference:
        """Compare a network, or a program on this reference's device, with the original."""
        program = (other if isinstance(other, Program) else Program(other)).to(self.device)
        sums = [_HeadSums(name, classes) for name, classes in self._classes.items()]
        for family, chunks in self._chunks.items():
            for expected, got in zip(self._outputs[family], _run(program, chunks), strict=True):
                for k, head in enumerate(sums):
                    head.add(family, expected[k], got[k])
        return Difference(tuple(head.result() for head in sums if head.errors), self.images)


@torch.no_grad()
def _run(program: Program, chunks: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    for chunk in chunks:
        yield program(*chunk)


class _HeadSums:
    """Sums over the inputs of one output of two networks, by family."""

    def __init__(self, output: str, classes: bool) -> None:
        self.output, self.classes = output, classes
        self.errors: dict[str, CentredError] = {}
        self.same: dict[str, list[int]] = {}

    def add(self, family: str, expected: Tensor, got: Tensor) -> None:
        if not expected.is_floating_point():
            return
        self.errors.setdefault(family, CentredError()).add(expected, got)
        if self.classes:
            same = self.same.setdefault(family, [0, 0])
            same[0] += int((expected.argmax(1) == got.argmax(1)).sum())
            same[1] += len(expected)

    def result(self) -> Head:
        errors = {family: sums.value() ** 0.5 for family, sums in self.errors.items()}
        return Head(self.output, errors, {family: Agreement(*counts) for family, counts in self.same.items()})


class CentredError:
    """Sums that give the squared error of one output, centred over the inputs and relative to the expected one."""

    def __init__(self) -> None:
        self._lost = self._norm = 0.0
        self._difference = self._expected = torch.zeros((), dtype=torch.float64)
        self._count = 0

    def add(self, expected: Tensor, got: Tensor) -> None:
        """Add the outputs (images, ...) of some inputs."""
        expected, difference = expected.double(), got.double() - expected.double()
        self._lost += float(difference.square().sum())
        self._norm += float(expected.square().sum())
        self._difference = self._difference + difference.sum(0)
        self._expected = self._expected + expected.sum(0)
        self._count += len(expected)

    def value(self) -> float:
        """Return the squared error; not centred where the expected output is the same for all inputs."""
        norm = self._norm - float(self._expected.square().sum()) / self._count
        if norm <= 1e-12 * self._norm:
            return self._lost / max(self._norm, 1e-300) if self._lost else 0.0
        lost = self._lost - float(self._difference.square().sum()) / self._count
        return float(max(lost, 0.0)) / norm if lost == lost else lost


def squared_error(pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> float:
    """Return the largest of the outputs' squared errors (see `CentredError`); pairs (expected, got) come by chunk."""
    sums: dict[int, CentredError] = {}
    for expected, got in pairs:
        for k, (x, y) in enumerate(zip(expected, got, strict=True)):
            if x.is_floating_point():
                sums.setdefault(k, CentredError()).add(x, y)
    return _worst(each.value() for each in sums.values())


def _worst(errors: Iterable[float]) -> float:
    """Return the largest error; NaN where one is NaN, 0 where there is none."""
    found = list(errors)
    return next((error for error in found if error != error), max(found, default=0.0))


def not_finite(inputs: str) -> RedppError:
    """Return the error for a network that gives no numbers on some kind of inputs."""
    return RedppError(
        f"the network's own output is NaN or infinite on {inputs}",
        "finite outputs",
        "check its weights and statistics; a negative running variance is one cause",
    )
