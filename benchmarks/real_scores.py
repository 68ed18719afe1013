"""How far a pruned network is from the original, on inputs that nothing was ever fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.real_data import EvaluationSet, evaluation_set, stored
from benchmarks.real_networks import NETWORKS, load_graph
from redpp_serve.graph.artifact import load
from redpp_serve.graph.graph import Graph
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.runtime.serving_graph import serving_program
from redpp_serve.statistics.binomial import clopper_pearson

_CHUNK = 8


@dataclass(frozen=True)
class Score:
    """The distance of a network from the original on one set.

    Attributes:
        images: number of inputs.
        agreement: share of inputs with the same largest output.
        low: lower end of the 95 % Clopper-Pearson interval of the agreement. It takes inputs for independent; crops of
            one photograph are not quite.
        high: upper end of that interval.
        error: norm of the difference of the centred outputs, relative to the norm of the original's.
        labelled: number of inputs with a label.
        right: number of them whose largest output is a right class; None where none has a label.
        right_in_five: number of them with a right class among the five largest outputs; None likewise.
    """

    images: int
    agreement: float
    low: float
    high: float
    error: float
    labelled: int
    right: int | None
    right_in_five: int | None


def centred_error(outputs: Tensor, expected: Tensor) -> float:
    """Return |(y - mean y) - (o - mean o)| / |o - mean o| for outputs y and expected o (n, classes).

    Means are over the n inputs, for each class by itself, so a constant that all inputs share counts neither way.
    """
    got, wanted = (x.double() - x.double().mean(0) for x in (outputs, expected))
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-300))


def score(outputs: Tensor, expected: Tensor, labels: Sequence[Sequence[int]]) -> Score:
    """Compare outputs with those of the original, both (n, classes); ``labels`` are the right classes of each input."""
    same = int((outputs.argmax(1) == expected.argmax(1)).sum())
    low, high = clopper_pearson(same, len(outputs))
    known = [(row, set(right)) for row, right in zip(outputs, labels, strict=True) if right]
    first, five = (
        sum(bool(right & set(row.topk(min(k, len(row))).indices.tolist())) for row, right in known) if known else None
        for k in (1, 5)
    )
    error = centred_error(outputs, expected)
    return Score(len(outputs), same / len(outputs), low, high, error, len(known), first, five)


@torch.no_grad()
def run(network: Graph | nn.Module, inputs: Tensor) -> Tensor:
    """Return the first output (n, classes) on all inputs; a graph runs as it is served, which is faster."""
    module = serving_program(network, torch.device("cpu")) if isinstance(network, Graph) else network
    found = [module(chunk) for chunk in inputs.split(_CHUNK)]
    return torch.cat([y if isinstance(y, Tensor) else y[0] for y in found])


@cache
def original_outputs(network: str, which: str) -> tuple[EvaluationSet, Tensor]:
    """Return an evaluation set and the original's outputs on it, which stay in the cache."""
    found = evaluation_set(which)
    name = f"served-{network}-{which}-{found.digest}"
    return found, torch.from_numpy(stored(name, lambda: run(load_graph(network), found.inputs).numpy()))


def evaluate(
    pruned: Graph | nn.Module, network: str, which: Sequence[str] | None = None, every: int = 1
) -> dict[str, dict[str, Any]]:
    """Hold a pruned network against the original that it came from.

    Args:
        pruned: takes what the original takes.
        network: name of the original in `real_networks.NETWORKS`.
        which: names of evaluation sets; by default all of the network's.
        every: score every n-th input alone, for a rough figure at a share of the time.

    Returns:
        The fields of `Score` by the set's name.
    """
    scores = {}
    for name in NETWORKS[network].sets if which is None else which:
        found, expected = original_outputs(network, name)
        outputs = run(pruned, found.inputs[::every])
        scores[name] = asdict(score(outputs, expected[::every], found.labels[::every]))
    return scores


def read_pruned(path: Path) -> Graph:
    """Read the graph of a ``.redpp`` artifact or of the artifact in a ``.mar`` archive."""
    return (read_artifact(path) if path.suffix == ".mar" else load(path)).graph
