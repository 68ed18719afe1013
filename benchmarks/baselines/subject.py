"""One reference network, made ready for every method: module, graph, images, and what its open sets cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import mac_count
from redpp_serve.pruning.effort import pace
from redpp_serve.pruning.inputs import Prepared, Sources, prepare, synthesis_budget
from redpp_serve.reference import catalog
from redpp_serve.runtime.serving_graph import serving_program

from .coupled import CoupledNetwork
from .widths import CostModel, cost_model

_CHUNK = 125
_TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order
_SYNTHESIS_SECONDS = 75.0  # the product's default share for matching inputs


@dataclass(frozen=True, eq=False)
class Subject:
    """``inputs`` (N, ...) and ``labels`` (N,) are held out; ``real`` (n, ...) are of the training set, for the ceiling.

    ``scratch`` keeps synthetic inputs between runs.
    """

    name: str
    task: str
    module: nn.Module
    inputs: Tensor
    labels: Tensor
    real: Tensor
    scratch: Path

    @property
    def example(self) -> Tensor:
        """One batched input (1, ...)."""
        return self.inputs[:1]

    @cached_property
    def graph(self) -> Graph:
        return self.capture(self.module)

    @cached_property
    def cost(self) -> CostModel:
        return cost_model(CoupledNetwork(self.module, self.example), self.example)

    @cached_property
    def pace(self) -> float:
        """Seconds of the original for one image."""
        return pace(self.graph)

    @cached_property
    def prepared(self) -> Prepared:
        """Images that the product makes without data, to fit to and to judge by."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        how = synthesis_budget(self.graph, _SYNTHESIS_SECONDS, self.pace)
        return prepare(self.graph, Sources(), how, checkpoint=self.scratch / f"{self.name}.inputs")

    @property
    def synthetic(self) -> Tensor:
        """The images (n, ...) to fit to."""
        return self.prepared.fit[0]

    @cached_property
    def macs(self) -> int:
        return mac_count(self.graph)

    def target_macs(self, ratio: float) -> int:
        """Multiply-accumulates of the whole network when ``ratio`` of those of its open sets are gone."""
        return round(self.macs - ratio * self.cost.open_macs)

    def removed(self, macs: int) -> float:
        """Which share of the open sets' multiply-accumulates is gone when the whole network has ``macs``."""
        return (self.macs - macs) / self.cost.open_macs

    def capture(self, module: nn.Module) -> Graph:
        """The module's graph, which capture holds against the module."""
        return capture(module, (InputSpec("x", tuple(self.inputs.shape[1:])),), [])

    @torch.no_grad()
    def module_accuracy(self, module: nn.Module) -> float:
        """Percent right on the held-out inputs."""
        return self._accuracy(torch.cat([module(chunk) for chunk in self.inputs.split(_CHUNK)]))

    @torch.no_grad()
    def accuracy(self, graph: Graph) -> float:
        """Percent right on the held-out inputs, through the runtime that serves.

        Raises:
            SystemExit: the runtime does not compute what the graph says, so no figure of it would mean anything.
        """
        served, plain = serving_program(graph, torch.device("cpu")), Program(graph)
        got, expected = served(self.inputs[:8])[0], plain(self.inputs[:8])[0]
        difference = float((got - expected).abs().max())
        if not difference <= _TOLERANCE * float(expected.abs().max()):
            raise SystemExit(f"{self.name}: the serving runtime differs from the graph by {difference}")
        return self._accuracy(torch.cat([served(chunk)[0] for chunk in self.inputs.split(_CHUNK)]))

    def _accuracy(self, logits: Tensor) -> float:
        return 100 * float((logits.argmax(1) == self.labels).double().mean())


def load_subject(name: str, scratch: Path) -> Subject:
    """A reference network by its name in the catalog.

    Raises:
        SystemExit: its graph is not as accurate as the module, which would make every comparison void.
    """
    network = catalog.NETWORKS[name]
    task = network.task.name
    inputs, labels = catalog.held_out(task)
    subject = Subject(name, task, catalog.load(name), inputs, labels, catalog.real_sample(task), scratch)
    module, graph = subject.module_accuracy(subject.module), subject.accuracy(subject.graph)
    if abs(module - graph) > 0.2:
        raise SystemExit(f"{name}: the module has {module:.2f} % and its graph {graph:.2f} %")
    return subject
