"""What the stages of a pruning run read and hand on."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from redpp_serve.channels.coupling import Coupling, matches
from redpp_serve.channels.narrowing import Kept
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import Layer, find_layers, mac_count
from redpp_serve.graph.weights import KernelSplit
from redpp_serve.options import Options
from redpp_serve.pruning.choose import WidthChoice
from redpp_serve.pruning.effort import Effort, pace, spent
from redpp_serve.pruning.fit import Reconstruction
from redpp_serve.pruning.hashing import Hashed
from redpp_serve.pruning.inputs import Sources, synthesis_budget
from redpp_serve.pruning.judge import Reference
from redpp_serve.pruning.matching import SynthesisBudget
from redpp_serve.pruning.records import Share
from redpp_serve.pruning.verification import VerifyData
from redpp_serve.stages import Stages

# Of the time budget: raw structured inputs are near already where matching is dear.
_MATCHING_SHARE, _DRAWING_SHARE = 0.04, 0.3


@dataclass(frozen=True)
class Job:
    """What a run is asked to do; all stages read it.

    Attributes:
        original: the network as it came.
        options: the user's options.
        stages: collects (and prints) the steps.
        data: labelled inputs, only to measure accuracy with.
        checkpoint: file that keeps synthetic inputs; ones beside it keep the state of the distillation.
        effort: how much work to spend.
        sources: what is known beyond the network.
        started: seconds of `spent` at the start.
    """

    original: Graph
    options: Options
    stages: Stages
    data: VerifyData | None
    checkpoint: Path | None
    effort: Effort
    sources: Sources = field(default_factory=Sources)
    started: float = field(default_factory=spent)

    def left(self, share: float = 1.0) -> float:
        """Return how many seconds are left of that share of the time budget, by `spent`."""
        return self.started + share * self.options.time_budget - spent()

    @functools.cached_property
    def pace(self) -> float:
        """The seconds of the original for one input, see `effort.pace`."""
        return self.effort.pace or pace(self.original, self.options.device)

    def synthesis_budget(self) -> SynthesisBudget:
        """Return how many inputs to make."""
        seconds = self.options.time_budget
        matching, drawing = _MATCHING_SHARE * seconds, _DRAWING_SHARE * seconds
        return self.effort.synthesis or synthesis_budget(self.original, matching, self.pace, drawing)

    def hashable(self, graph: Graph) -> list[Layer]:
        """Return the layers of a graph that the user has not excluded."""
        return [layer for layer in find_layers(graph) if not matches(layer.name, self.options.exclude)]

    def frozen(self, graph: Graph) -> frozenset[str]:
        """Return the weights and biases of the layers that the user has excluded."""
        layers = [layer for layer in find_layers(graph) if matches(layer.name, self.options.exclude)]
        return frozenset(name for layer in layers for name in (layer.weight, layer.bias) if name)


@dataclass(frozen=True)
class State:
    """The network between two stages, and what the stages before have found.

    Attributes:
        graph: the network.
        kept: maps a value's name to the positions that it still has of the original's.
        hashed: the codebooks of ``graph`` by layer.
        hash_how: method and aim of the codebooks, in words.
        hash_error: what hashing alone does to the outputs: the norm of the difference over theirs, not centred.
        splits: the split weights of ``graph`` by layer.
        widths: what merging and fitting did, by channel set.
        choice: the widths chosen.
        checks: errors of the exact steps in float64, by their field of `Verification`.
        shares: the state of the network behind each stage.
        notes: what a reader of the result should know about how it was made.
    """

    graph: Graph
    kept: Kept = lambda name: {}
    hashed: Mapping[str, Hashed] = field(default_factory=dict)
    hash_how: tuple[str, str] = ("", "")
    hash_error: float = 0.0
    splits: Mapping[str, KernelSplit] = field(default_factory=dict)
    widths: Mapping[str, Reconstruction] = field(default_factory=dict)
    choice: WidthChoice = field(default_factory=WidthChoice)
    checks: Mapping[str, float] = field(default_factory=dict)
    shares: tuple[Share, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def merged(self) -> bool:
        """Whether exact merging took channels out."""
        return "merge_exact" in self.checks

    def measured(self, job: Job, inputs: Inputs, stage: str, graph: Graph | None = None) -> State:
        """Note what a stage has come to, for ``graph`` where a later stage has changed the network since.

        Nothing is noted where the inputs tell no error.
        """
        if inputs.unread:
            return self
        graph = graph or self.graph
        difference = inputs.reference.compare(graph)
        accuracy = job.data.accuracy(graph) if job.data else None
        seconds = job.stages.named(stage).seconds
        share = Share(stage, difference.error, difference.agreement, mac_count(graph), seconds, accuracy)
        return replace(self, shares=(*self.shares, share))


@dataclass(frozen=True)
class Channels:
    """The channel sets of the network.

    Attributes:
        coupling: those of the network behind exact merging.
        sets: the open set that each layer produces, by layer.
        closed: why the output channels of the other layers stay, by layer.
    """

    coupling: Coupling
    sets: Mapping[str, str]
    closed: Mapping[str, str]

    @classmethod
    def of(cls, coupling: Coupling) -> Channels:
        """Describe coupled channels by the layers that produce them."""
        return cls(coupling, {layer: s.name for s in coupling.open for layer in s.producers}, coupling.closed_layers)

    def widths(self, kept: Mapping[str, Sized] | None = None) -> dict[str, Reconstruction]:
        """Return for each open set the channels that are ``kept`` in it, by default all, without an error."""
        return {
            s.name: Reconstruction(s.name, s.channels, len((kept or {}).get(s.name, range(s.channels))), 0.0)
            for s in self.coupling.open
        }


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run.

    Attributes:
        fit: (images, ...) for each network input, to fit and learn on.
        reference: the original network on inputs that nothing is fitted to, the judge of all stages.
        note: how they were made, in words.
        kind_known: whether they are of the kind that the network reads.
        unread: inputs of which nobody knows what they hold; without them nothing is judged.
    """

    fit: tuple[Tensor, ...]
    reference: Reference
    note: str
    kind_known: bool = True
    unread: tuple[InputSpec, ...] = ()
