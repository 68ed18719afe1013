"""What a network costs, before and after, and the table of its layers.

Exact input-wise splitting (RED++, arXiv 2110.01397) and what it costs.

For each input channel the kernels that its outputs use are stored once; an output picks its kernel by index. All-zero
kernels are dropped and a kernel shares the storage of its negative (stored indices name sign and zero too). Two readings of the method's unit are counted:
the k x k kernel of one (output, input) pair, which `split_weight` builds, and the scalar weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import Layer, mac_count, parameter_count
from redpp_serve.graph.weights import SPLIT_CHUNK, KernelSplit, split_weight
from redpp_serve.pruning.density import density
from redpp_serve.pruning.fit import Reconstruction
from redpp_serve.pruning.hashing import Codebook, Hashed

__all__ = ["Counts", "KernelSplit", "count_dense", "count_kernels", "count_scalars", "expected_kernels", "split_weight"]
_DRAWS = 1 << 14


@dataclass(frozen=True)
class Counts:
    """Operations for one input and stored bytes."""

    multiplications: int
    additions: int
    bytes: int


def count_dense(layer: Layer, element_size: int = 4) -> Counts:
    """Cost of the layer as it is. Additions are those of the sum over inputs; a bias is left out everywhere."""
    size = math.prod(layer.shape)
    return Counts(layer.macs, layer.positions * (size - layer.shape[0]), size * element_size)


def count_kernels(layer: Layer, split: KernelSplit, element_size: int = 4) -> Counts:
    """Cost of the split whose unit is the kernel of a pair."""
    taps = split.kernels[0].numel() if len(split.kernels) else 1
    unique = len(split.kernels)
    used = (split.index >= 0).sum(1)
    sums = int((used - 1).clamp_min(0).sum())
    n_out = split.index.shape[0] // layer.groups
    used_as = (split.index.long() * 2 + (split.sign < 0)).view(layer.groups, n_out, -1)
    bits = n_out * sum(int(_bits(group).sum()) for group in used_as)
    return Counts(
        layer.positions * unique * taps,
        layer.positions * ((taps - 1) * unique + sums),
        unique * taps * element_size + -(-bits // 8),
    )


def count_scalars(layer: Layer, weight: Tensor, element_size: int = 4) -> Counts:
    """Cost of the split whose unit is the scalar weight: distinct magnitudes in each column of the im2col matrix."""
    n_out = layer.shape[0] // layer.groups
    columns = weight.reshape(layer.groups, n_out, -1).transpose(0, 1).reshape(n_out, -1)
    unique = 0
    bits = 0
    for block in columns.split(max(1, SPLIT_CHUNK // n_out), 1):
        ordered = block.abs().sort(0).values
        fresh = torch.cat([ordered[:1] != 0, (ordered[1:] != ordered[:-1])]).sum(0)
        unique += int(fresh.sum())
        bits += n_out * int(_bits(block).sum())
    used = (weight.reshape(layer.shape[0], -1) != 0).sum(1)
    sums = int((used - 1).clamp_min(0).sum())
    return Counts(layer.positions * unique, layer.positions * sums, unique * element_size + -(-bits // 8))


def expected_kernels(layer: Layer, frequencies: Tensor, values: Tensor) -> float:
    """Unique kernels to expect in one layer when its weights are drawn independently with these frequencies (K,).

    The sum over kernels k, up to sign and zero left out, of 1 - (1 - p_k)^n_out. Over scalars (1 x 1) it is taken as
    it stands; there are too many k x k kernels, so it is the mean of (1 - (1 - p_k)^n_out) / p_k over kernels drawn
    with a fixed seed.
    """
    n_out, taps = layer.shape[0] // layer.groups, math.prod(layer.shape[2:])
    inputs = layer.shape[1] * layer.groups
    magnitudes, group = torch.unique(values.abs(), return_inverse=True)
    p = torch.zeros(len(magnitudes), dtype=torch.float64).index_add_(0, group, frequencies.double())
    if taps == 1:
        p = p[magnitudes != 0]
        return inputs * float((1 - (1 - p) ** n_out).sum())
    drawn = torch.multinomial(frequencies, _DRAWS * taps, True, generator=torch.Generator().manual_seed(0)).view(
        _DRAWS, taps
    )
    negative = torch.where(values[:, None] == -values, frequencies, 0.0).sum(1)  # how likely each value's negative is
    p = (frequencies[drawn].prod(1) + negative[drawn].prod(1)).clamp_max(1.0)
    seen = -torch.expm1(n_out * torch.log1p(-p)) / p
    return inputs * float(torch.where((values[drawn] != 0).any(1), seen, 0.0).mean())


def _bits(used: Tensor) -> Tensor:
    """Bits (columns,) of an index into what each column of (n_out, columns) holds: sign and zero are told apart."""
    ordered = used.sort(0).values
    choices = 1 + (ordered[1:] != ordered[:-1]).sum(0)
    return torch.log2(choices.double()).ceil().long()


def totals(graph: Graph, counts: Iterable[Counts], stored_bytes: int) -> dict[str, int]:
    """The report's figures of one network; ``bytes`` is what its artifact stores."""
    every = list(counts)
    return {
        "parameters": parameter_count(graph),
        "macs": mac_count(graph),
        "multiplications": sum(c.multiplications for c in every),
        "additions": sum(c.additions for c in every),
        "bytes": stored_bytes,
    }


def both_readings(
    before: dict[str, Layer], after: dict[str, Layer], graph: Graph, splits: dict[str, KernelSplit]
) -> dict[str, dict[str, list[int]]]:
    """Multiplications, additions and bytes of all layers, dense before against split after, for both units."""
    dense = [count_dense(layer) for layer in before.values()]
    readings = {
        "kernel": [
            count_kernels(layer, splits[name]) if name in splits else count_dense(layer)
            for name, layer in after.items()
        ],
        "weight": [
            count_scalars(layer, graph.tensors[layer.weight]) if name in splits else count_dense(layer)
            for name, layer in after.items()
        ],
    }
    return {
        unit: {
            figure: [sum(getattr(c, figure) for c in dense), sum(getattr(c, figure) for c in counts)]
            for figure in ("multiplications", "additions", "bytes")
        }
        for unit, counts in readings.items()
    }


def hash_record(hashed: Hashed) -> dict[str, Any]:
    """One layer's hashing for the report: codebook, alternatives at equal entropy, and the density with its cells."""
    book = hashed.codebook
    kernels = torch.linalg.vector_norm(
        hashed.weight.flatten(2) if hashed.weight.dim() == 4 else hashed.weight[..., None], dim=2, dtype=torch.float64
    )
    near_zero = float((kernels <= 0.01 * kernels.square().mean().sqrt()).double().mean())
    return {
        "values": book.size,
        "entropy": book.entropy,
        "error": book.error,
        "zero_kernels": near_zero,
        "bandwidth": book.bandwidth,
        "alternatives": {
            name: {"values": b.size, "entropy": b.entropy, "error": b.error}
            for name, b in sorted(hashed.alternatives.items())
        },
        "density": _density_record(hashed, book),
    }


def _density_record(hashed: Hashed, book: Codebook) -> dict[str, list[float]]:
    grid = hashed.grid
    points = grid.points()
    middle = np.searchsorted(grid.count, [0.001 * grid.weights, 0.999 * grid.weights])
    shown = np.unique(np.linspace(max(middle[0] - 1, 0), min(middle[1] + 1, grid.bins), 200).astype(int))
    low, high = points[shown[0]], points[shown[-1]]
    curve = density(grid, book.bandwidth or 0.02 * grid.rms)
    edges = [float(points[b]) for b in book.borders if low <= points[b] <= high]
    modes = [float(v) for v in book.values if low <= v <= high]
    return {
        "x": _rounded(points[shown]),
        "y": _rounded(curve[shown]),
        "edges": _rounded(edges[:400]),
        "modes": _rounded(modes[:400]),
    }


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{v:.4g}") for v in values]


def split_record(layer: Layer, split: KernelSplit) -> dict[str, Any]:
    """One layer's split for the report."""
    dense, counts = count_dense(layer), count_kernels(layer, split)
    return {
        "unique_kernels": len(split.kernels),
        "kernels": split.index.numel(),
        "multiplications": [dense.multiplications, counts.multiplications],
        "additions": [dense.additions, counts.additions],
    }


def hash_summary(
    after: dict[str, Layer],
    first: dict[str, Hashed],
    hashed: dict[str, Hashed],
    splits: dict[str, KernelSplit],
    method: str,
    target: str,
    measured: float,
) -> dict[str, Any]:
    """The hashing of the whole network: what it was predicted to cost and to save, beside what it did.

    ``first`` is the hashing of the network as it came, ``measured`` the relative output error of that alone; ``hashed``
    the final codebooks. The ratios are shares of the multiplications of the
    split layers: from the frequencies of values, and counted.
    """
    errors = torch.tensor([h.codebook.error for h in first.values()], dtype=torch.float64)
    dense = sum(count_dense(after[n]).multiplications for n in splits)
    got = sum(count_kernels(after[n], s).multiplications for n, s in splits.items())
    expected = 0.0
    for name in splits:
        layer, book = after[name], hashed[name].codebook
        unique = expected_kernels(layer, torch.from_numpy(book.frequencies), torch.from_numpy(book.values))
        expected += layer.positions * math.prod(layer.shape[2:]) * unique
    return {
        "method": method,
        "target": target,
        "predicted_error_typical": float(errors.square().sum().sqrt()),
        "predicted_error_bound": float((1 + errors).prod() - 1),
        "measured_error": measured,
        "predicted_ratio": 1 - expected / dense if dense else 0.0,
        "measured_ratio": 1 - got / dense if dense else 0.0,
    }


def layer_record(
    original: Graph,
    before: Layer,
    after: Layer,
    hashed: Hashed | None,
    split: KernelSplit | None,
    width: Reconstruction | None,
    closed: str,
    error: float | None,
) -> dict[str, Any]:
    """One layer for the report. ``closed``: why its output channels stay; ``error``: of its output, relative."""
    return {
        "name": before.name,
        "op": before.node.op.split(".")[1],
        "shape": list(before.shape),
        "pruned_shape": list(after.shape),
        "parameters": original.tensors[before.weight].numel() + (before.shape[0] if before.bias else 0),
        "macs": before.macs,
        "hash": hash_record(hashed) if hashed else None,
        "merge": {
            "channels": before.shape[0],
            "kept": after.shape[0],
            "error": width.error if width and width.kept < width.channels else None,
            "reason": closed or ("" if width else "not narrowed"),
        },
        "split": split_record(after, split) if split else None,
        "error": error,
    }
