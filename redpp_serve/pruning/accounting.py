"""Operations and bytes of a network, dense and with its weights split input-wise (RED++, arXiv 2110.01397).

For each input channel the kernels that its outputs use are stored once; an output picks its kernel by index. All-zero
kernels are dropped and a kernel shares the storage of its negative (indices tell sign and zero apart). The method's
unit can be read in two ways, and both are counted: as the k x k kernel of one (output, input) pair, which
`split_weight` builds, and as the scalar weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import Layer, mac_count, parameter_count
from redpp_serve.graph.weights import SPLIT_CHUNK, KernelSplit

_DRAWS = 1 << 14


@dataclass(frozen=True)
class Counts:
    """Operations for one input, and stored bytes."""

    multiplications: int = 0
    additions: int = 0
    bytes: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.multiplications + other.multiplications, self.additions + other.additions, self.bytes + other.bytes
        )


@dataclass(frozen=True)
class Counting:
    """Cost of all layers before and after pruning; products of computed values are left out.

    Attributes:
        dense: the original network.
        kernel: the pruned network, whose hashed layers are split into kernels.
        weight: the pruned network, whose hashed layers are split into scalar weights.
    """

    dense: Counts
    kernel: Counts
    weight: Counts

    def to_json(self) -> dict[str, dict[str, list[int]]]:
        """Return pairs (before, after) by unit and figure."""
        return {
            unit: {
                figure: [getattr(self.dense, figure), getattr(after, figure)]
                for figure in ("multiplications", "additions", "bytes")
            }
            for unit, after in (("kernel", self.kernel), ("weight", self.weight))
        }


def count_network(
    before: Iterable[Layer], after: Mapping[str, Layer], graph: Graph, splits: Mapping[str, KernelSplit]
) -> Counting:
    """Count the layers of the original network, and those of the pruned ``graph`` by name with its split weights."""

    def total(counts: Iterable[Counts]) -> Counts:
        return sum(counts, Counts())

    dense = {name: count_dense(layer) for name, layer in after.items() if name not in splits}
    return Counting(
        total(count_dense(layer) for layer in before),
        total(dense.get(name) or count_kernels(layer, splits[name]) for name, layer in after.items()),
        total(dense.get(name) or count_scalars(layer, graph.tensors[layer.weight]) for name, layer in after.items()),
    )


def totals(graph: Graph, counts: Counts, stored_bytes: int) -> dict[str, int]:
    """Return the report's figures of one network; ``bytes`` is what its artifact stores."""
    return {
        "parameters": parameter_count(graph),
        "macs": mac_count(graph),
        "multiplications": counts.multiplications,
        "additions": counts.additions,
        "bytes": stored_bytes,
    }


def count_dense(layer: Layer, element_size: int = 4) -> Counts:
    """Count the layer as it is. Additions are those of the sum over inputs; a bias is left out everywhere."""
    size = math.prod(layer.shape)
    return Counts(layer.macs, layer.positions * (size - layer.outputs), size * element_size)


def count_kernels(layer: Layer, split: KernelSplit, element_size: int = 4) -> Counts:
    """Count the layer split into the kernels of (output, input) pairs."""
    taps = split.kernels[0].numel() if len(split.kernels) else 1
    unique = len(split.kernels)
    sums = int(((split.index >= 0).sum(1) - 1).clamp_min(0).sum())
    n_out = split.index.shape[0] // layer.groups
    used_as = (split.index.long() * 2 + (split.sign < 0)).view(layer.groups, n_out, -1)
    bits = n_out * sum(int(_index_bits(group).sum()) for group in used_as)
    return Counts(
        layer.positions * unique * taps,
        layer.positions * ((taps - 1) * unique + sums),
        unique * taps * element_size + -(-bits // 8),
    )


def count_scalars(layer: Layer, weight: Tensor, element_size: int = 4) -> Counts:
    """Count the layer split into scalars: unique magnitudes in each column of the im2col matrix."""
    n_out, weight = layer.outputs // layer.groups, layer.by_output(weight)
    columns = weight.reshape(layer.groups, n_out, -1).transpose(0, 1).reshape(n_out, -1)
    unique = bits = 0
    for block in torch.split(columns, max(1, SPLIT_CHUNK // n_out), 1):
        ordered = block.abs().sort(0).values
        unique += int(torch.cat([ordered[:1] != 0, (ordered[1:] != ordered[:-1])]).sum())
        bits += n_out * int(_index_bits(block).sum())
    used = (weight.flatten(1) != 0).sum(1)
    sums = int((used - 1).clamp_min(0).sum())
    return Counts(layer.positions * unique, layer.positions * sums, unique * element_size + -(-bits // 8))


def _index_bits(used: Tensor) -> Tensor:
    """Return the bits (columns,) of an index into the distinct values of each column of ``used`` (n_out, columns)."""
    ordered = used.sort(0).values
    choices = 1 + (ordered[1:] != ordered[:-1]).sum(0)
    return torch.log2(choices.double()).ceil().long()


def expected_kernels(layer: Layer, frequencies: Tensor, values: Tensor) -> float:
    """Predict a layer's unique kernels if its weights were drawn independently with these frequencies (K,).

    The result is the sum over kernels k, zero left out and k counted with -k, of 1 - (1 - p_k)^n_out. Over scalars
    (1 x 1) the sum is taken as it stands. There are too many k x k kernels for that, so it becomes the mean of
    (1 - (1 - p_k)^n_out) / p_k over kernels drawn with a fixed seed.
    """
    n_out, taps, inputs = layer.outputs // layer.groups, layer.taps, layer.inputs
    if taps == 1:
        magnitudes, place = torch.unique(values.abs(), return_inverse=True)
        p = torch.zeros(len(magnitudes), dtype=torch.float64).index_add_(0, place, frequencies.double())
        p = p[magnitudes != 0]
        return inputs * float((1 - (1 - p) ** n_out).sum())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(frequencies, _DRAWS * taps, True, generator=generator).view(_DRAWS, taps)
    negative = torch.where(values[:, None] == -values, frequencies, 0.0).sum(1)  # how likely each value's negative is
    p = (frequencies[drawn].prod(1) + negative[drawn].prod(1)).clamp_max(1.0)
    seen = -torch.expm1(n_out * torch.log1p(-p)) / p
    return inputs * float(torch.where((values[drawn] != 0).any(1), seen, 0.0).mean())
