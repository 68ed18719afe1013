"""Inputs that a batch norm reads have its statistics, however the network lays them out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.pruning.inputs import Sources, prepare
from redpp_serve.pruning.matching import SynthesisBudget
from redpp_serve.pruning.read_by_norms import read_by_norms, trained_norms

MEAN, DEVIATION = torch.tensor([5000.0, 0.5, -40.0, 0.0]), torch.tensor([1000.0, 0.01, 10.0, 1.0])
SHAPES = {
    "plain": (4,),
    "series": (4, 12),
    "time first": (12, 4),
    "beside an embedding": (4,),
    "relu": (4,),
    "halved": (4,),
    "part": (5,),
}


class Table(nn.Module):
    """A batch norm of four features, and what comes before it."""

    def __init__(self, before: str) -> None:
        super().__init__()
        self.before, self.embedding = before, nn.Embedding(9, 3)
        self.norm, self.head = nn.BatchNorm1d(7 if "embedding" in before else 4), nn.LazyLinear(2)
        self.norm.running_mean[:4], self.norm.running_var[:4] = MEAN, DEVIATION.square()

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        embedded = self.embedding(code[:, 0])
        if self.before == "time first":
            x = x.transpose(1, 2)
        elif self.before == "beside an embedding":
            x = torch.cat([x, embedded], 1)
        elif self.before == "relu":
            x = x.relu()
        elif self.before == "halved":
            x = x / 2
        elif self.before == "part":
            x = x[:, :4]
        return self.head(self.norm(x).flatten(1)) + embedded[:, :2]


def graph_of(before: str) -> Graph:
    module, shape = Table(before).eval(), SHAPES[before]
    module(torch.zeros(1, *shape), torch.zeros(1, 1, dtype=torch.int64))
    return capture(module, [InputSpec("x", shape), InputSpec("code", (1,), "int64")], [])


@pytest.mark.parametrize("before", SHAPES)
def test_inputs_that_are_made_have_the_statistics_that_the_first_norm_stores(before: str):
    graph = graph_of(before)
    known = read_by_norms(graph, trained_norms(graph)[0])
    if before in ("relu", "halved", "part"):
        assert not known
        return
    made = prepare(graph, Sources(), SynthesisBudget(64, 32, 2, 32))
    for inputs in (made.fit, *made.families.values()):
        if before not in ("plain", "beside an embedding") and inputs is not made.fit:
            continue  # the kind is unknown: others are scaled on purpose
        features = inputs[0].movedim(2, 1) if before == "time first" else inputs[0]
        features = features.transpose(0, 1).flatten(1)
        assert torch.allclose(features.mean(1), MEAN, rtol=0.1, atol=0.1)
        assert torch.allclose(features.std(1), DEVIATION, rtol=0.2)
