"""What the report says about a pruning run: its layers, its hashing, each stage and the verification."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from redpp_serve.graph.class_scores import class_outputs
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import Layer
from redpp_serve.graph.weights import KernelSplit
from redpp_serve.pruning.accounting import count_dense, count_kernels, expected_kernels
from redpp_serve.pruning.density import Array, density
from redpp_serve.pruning.fit import Reconstruction
from redpp_serve.pruning.hashing import Codebook, Hashed
from redpp_serve.pruning.judge import Difference, Head

_CURVE_POINTS, _MOST_MARKS = 200, 400  # of a density that is drawn
_NEAR_ZERO = 0.01  # of the kernels' RMS norm


@dataclass(frozen=True)
class CodebookRecord:
    """Size and cost of one codebook: values in use, bits a weight, and relative RMS error of the weights."""

    values: int
    entropy: float
    error: float


@dataclass(frozen=True)
class DensityRecord:
    """The kernel density of a layer's weights as a curve, with the borders (edges) and values (modes) of its cells."""

    x: list[float]
    y: list[float]
    edges: list[float]
    modes: list[float]


@dataclass(frozen=True)
class HashRecord:
    """The hashing of one layer.

    Attributes:
        values: number of distinct values in use.
        entropy: bits a weight.
        error: relative RMS error of the weights.
        zero_kernels: share of the kernels that are near zero.
        bandwidth: of the density, for the method ``kde``.
        alternatives: the other methods' codebooks at equal entropy, by method.
        density: the weights' distribution and the cells.
    """

    values: int
    entropy: float
    error: float
    zero_kernels: float
    bandwidth: float | None
    alternatives: dict[str, CodebookRecord]
    density: DensityRecord

    @classmethod
    def of(cls, hashed: Hashed) -> HashRecord:
        """Describe a hashed weight."""
        book, weight = hashed.codebook, hashed.weight
        kernels = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
        norms = torch.linalg.vector_norm(kernels, dim=2, dtype=torch.float64)
        return cls(
            book.size,
            book.entropy,
            book.error,
            float((norms <= _NEAR_ZERO * norms.square().mean().sqrt()).double().mean()),
            book.bandwidth,
            {name: CodebookRecord(b.size, b.entropy, b.error) for name, b in sorted(hashed.alternatives.items())},
            _density(hashed, book),
        )


def _density(hashed: Hashed, book: Codebook) -> DensityRecord:
    """Sample the density over the middle 99.8 % of the weights."""
    grid = hashed.grid
    points = grid.points()
    middle = np.searchsorted(grid.count, [0.001 * grid.weights, 0.999 * grid.weights])
    ends = max(middle[0] - 1, 0), min(middle[1] + 1, grid.bins)
    shown = np.unique(np.linspace(*ends, _CURVE_POINTS).astype(int))
    low, high = points[shown[0]], points[shown[-1]]

    def within(values: Array) -> list[float]:
        return _rounded(values[(low <= values) & (values <= high)][:_MOST_MARKS])

    curve = density(grid, book.bandwidth or 0.02 * grid.rms)
    return DensityRecord(
        _rounded(points[shown]), _rounded(curve[shown]), within(points[book.borders]), within(book.values)
    )


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{v:.4g}") for v in values]


@dataclass(frozen=True)
class MergeRecord:
    """What became of a layer's output channels.

    Attributes:
        channels: number before.
        kept: number after.
        error: relative RMS error of the outputs of their readers, where some went.
        reason: why all had to stay; empty where they could be narrowed.
    """

    channels: int
    kept: int
    error: float | None
    reason: str


@dataclass(frozen=True)
class SplitRecord:
    """The input-wise split of one layer; pairs are (dense, split)."""

    unique_kernels: int
    kernels: int
    multiplications: list[int]
    additions: list[int]

    @classmethod
    def of(cls, layer: Layer, split: KernelSplit) -> SplitRecord:
        """Count the split of a layer."""
        dense, counts = count_dense(layer), count_kernels(layer, split)
        return cls(
            len(split.kernels),
            split.index.numel(),
            [dense.multiplications, counts.multiplications],
            [dense.additions, counts.additions],
        )


@dataclass(frozen=True)
class LayerRecord:
    """One layer before and after pruning; ``error`` is that of its output, relative, where the shape is the same."""

    name: str
    op: str
    shape: list[int]
    pruned_shape: list[int]
    parameters: int
    macs: int
    hash: HashRecord | None
    merge: MergeRecord
    split: SplitRecord | None
    error: float | None

    @classmethod
    def of(cls, original: Graph, before: Layer, after: Layer, **found: Any) -> LayerRecord:
        """Describe a layer of the original graph; ``found`` holds the other fields."""
        parameters = original.tensors[before.weight].numel() + (before.outputs if before.bias else 0)
        op = before.node.op.split(".")[1]
        return cls(before.name, op, list(before.shape), list(after.shape), parameters, before.macs, **found)


def merge_record(before: Layer, after: Layer, narrowed: Reconstruction | None, reason: str) -> MergeRecord:
    """Describe a layer's output channels; ``reason`` says why they had to stay."""
    error = narrowed.error if narrowed and narrowed.kept < narrowed.channels else None
    return MergeRecord(before.outputs, after.outputs, error, reason or ("" if narrowed else "not narrowed"))


@dataclass(frozen=True)
class HashSummary:
    """The hashing of the whole network: what it was predicted to cost and to save, beside what it did.

    Attributes:
        method: of the codebooks.
        target: of the codebooks, in words.
        predicted_error_typical: output error of the hashing alone if the layers' errors are independent.
        predicted_error_bound: that error if they all add up.
        measured_error: that error on held-out inputs, not centred.
        predicted_ratio: share of the split layers' multiplications that the values' frequencies promise to save.
        measured_ratio: that share, counted.
    """

    method: str
    target: str
    predicted_error_typical: float
    predicted_error_bound: float
    measured_error: float
    predicted_ratio: float
    measured_ratio: float

    @classmethod
    def of(
        cls,
        method: str,
        target: str,
        measured_error: float,
        split_layers: Mapping[str, Layer],
        hashed: Mapping[str, Hashed],
        splits: Mapping[str, KernelSplit],
    ) -> HashSummary:
        """Predict from the errors and frequencies of the codebooks (``hashed``), and count the ``splits``."""
        relative = torch.tensor([each.codebook.error for each in hashed.values()], dtype=torch.float64)
        dense = got = 0
        expected = 0.0
        for name, split in splits.items():
            layer, book = split_layers[name], hashed[name].codebook
            dense += count_dense(layer).multiplications
            got += count_kernels(layer, split).multiplications
            unique = expected_kernels(layer, torch.from_numpy(book.frequencies), torch.from_numpy(book.values))
            expected += layer.positions * layer.taps * unique
        return cls(
            method,
            target,
            float(relative.square().sum().sqrt()),
            float((1 + relative).prod() - 1),
            measured_error,
            1 - expected / dense if dense else 0.0,
            1 - got / dense if dense else 0.0,
        )


@dataclass(frozen=True)
class Share:
    """The state of the network behind one stage.

    Attributes:
        stage: name of the stage.
        error: relative output error on held-out inputs.
        agreement: share of these inputs with the same top-1 class, where there are classes.
        macs: multiply-accumulates for one input.
        seconds: what the stage took.
        accuracy: on the user's data, where there is any.
    """

    stage: str
    error: float
    agreement: float | None
    macs: int
    seconds: float
    accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields; ``accuracy`` only where it was measured."""
        return {key: value for key, value in asdict(self).items() if key != "accuracy" or value is not None}


@dataclass(frozen=True)
class FamilyRecord:
    """One output of the pruned network against the original's, on one family of inputs.

    Attributes:
        output: name of the output.
        family: name of the family.
        error: relative, centred over the inputs.
        same: number of inputs with the same top-1 class, where the output is a classification.
        of: number of inputs that were compared so.
        low: lower end of the 95 % interval of the agreement.
        high: upper end.
    """

    output: str
    family: str
    error: float
    same: int | None = None
    of: int | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of_head(cls, head: Head, family: str) -> FamilyRecord:
        """Describe one family of a compared output."""
        agreement = head.agreement.get(family)
        if agreement is None:
            return cls(head.output, family, head.errors[family])
        return cls(head.output, family, head.errors[family], agreement.same, agreement.of, *agreement.interval)


@dataclass(frozen=True)
class OutputRecord:
    """One output of the pruned network against the original's, on its worst family of inputs.

    Attributes:
        output: its name.
        classes: whether it holds class scores.
        error: relative, centred over the inputs; None where it is not of floating point.
        agreement: share of inputs with the same top-1 class, where it holds class scores.
    """

    output: str
    classes: bool
    error: float | None = None
    agreement: float | None = None

    @classmethod
    def of(cls, graph: Graph, difference: Difference) -> tuple[OutputRecord, ...]:
        """Describe all outputs of a network that was compared."""
        heads = {head.output: head for head in difference.heads}
        return tuple(
            cls(name, scores, heads[name].error, heads[name].worst_agreement) if name in heads else cls(name, scores)
            for name, scores in class_outputs(graph).items()
        )


@dataclass(frozen=True)
class Verification:
    """The numbers that a run is judged by.

    Attributes:
        merge_exact: relative error of exact merging in float64; None where nothing was merged.
        split_exact: relative error of input-wise splitting in float64; None where nothing was split.
        narrow_exact: relative error of leaving out unread channels in float64; None where all channels must stay.
        output_error: relative output error on the worst family of held-out inputs, of the worst output; None where no
            inputs tell it, as the integers that the network reads are unknown.
        agreement: share of a family's inputs with the same top-1 class, the worst one, where there are classes.
        images: number of all these inputs.
        families: the error of each output on each family.
        outputs: the error of each output on its worst family.
        known: whether the families agree on the error within a factor of two; else the error on real inputs is unknown.
        inputs: how they were made, in words.
    """

    merge_exact: float | None
    split_exact: float | None
    narrow_exact: float | None
    output_error: float | None
    agreement: float | None
    images: int
    families: tuple[FamilyRecord, ...]
    outputs: tuple[OutputRecord, ...]
    known: bool
    inputs: str
