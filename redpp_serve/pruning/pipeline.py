"""The pruning run: `prune` lists its stages in order, and `verify` judges and reports the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from redpp_serve.channels.coupling import couple
from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.graph.executor import value_shapes
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import Layer, find_layers
from redpp_serve.options import RED, Options
from redpp_serve.pruning.accounting import Counting, count_network
from redpp_serve.pruning.choose import WidthChoice, frontier_record, frontier_text
from redpp_serve.pruning.effort import Effort
from redpp_serve.pruning.inputs import Sources, drawing_seconds
from redpp_serve.pruning.judge import Difference
from redpp_serve.pruning.records import (
    FamilyRecord,
    HashRecord,
    HashSummary,
    LayerRecord,
    OutputRecord,
    Share,
    SplitRecord,
    Verification,
    merge_record,
)
from redpp_serve.pruning.state import Channels, Inputs, Job, State
from redpp_serve.pruning.steps import (
    distil,
    hash_fitted,
    hash_weights,
    make_inputs,
    make_judging_inputs,
    measure_exact_stages,
    merge_duplicates,
    narrow,
    split,
    tune,
)
from redpp_serve.pruning.tiles import with_step
from redpp_serve.pruning.verification import VerifyData, check_gate, layer_errors
from redpp_serve.stages import Stages

STANDARD_EFFORT = Effort()
# For the prediction of a run's time.
_SEARCHED, _RUNS_OF_A_FIT, _DISTIL_SHARE = 4, 4, 0.3
_TRAIN_ON = "train the network further, or leave out the limit: a fine-tuned network may rightly differ"
_SAMPLES = 16  # held-out inputs that trial runs and examples use


@dataclass(frozen=True)
class Pruned:
    """The result of a run: both graphs, and what the report says about them.

    Attributes:
        original: the network as it came.
        pruned: the network after all stages.
        layers: one record for each layer.
        hash: the hashing of the whole network; None where nothing was hashed.
        counting: operations and bytes before and after.
        verify: the numbers that the run was judged by.
        shares: the state of the network behind each stage.
        accuracy: of both networks on the user's data, where there is any.
        samples: some held-out inputs, (n, ...) for each network input.
        inputs: all inputs that were fitted to and that judge.
        choice: the widths chosen, and the frontier around them.
        effort: how much work the run spent.
    """

    original: Graph
    pruned: Graph
    layers: list[LayerRecord]
    hash: HashSummary | None
    counting: Counting
    verify: Verification
    shares: tuple[Share, ...]
    accuracy: tuple[float, float] | None
    samples: tuple[Tensor, ...]
    inputs: Inputs
    choice: WidthChoice
    effort: Effort

    def to_json(self) -> dict[str, Any]:
        """Return the report's sections that follow from the run."""
        return {
            "counting": self.counting.to_json(),
            "hash": asdict(self.hash) if self.hash else None,
            "layers": [asdict(layer) for layer in self.layers],
            "verify": asdict(self.verify),
            "stages_share": [share.to_json() for share in self.shares],
        }

    def frontier(self, device: str, machine: str) -> dict[str, Any]:
        """Return the frontier for the report; measures latencies, which takes some seconds."""
        seconds = 2 * self.effort.latency_seconds
        return frontier_record(self.choice.points, self.original, device, machine, seconds)


def prune(
    graph: Graph,
    options: Options | None = None,
    *,
    stages: Stages | None = None,
    data: VerifyData | None = None,
    checkpoint: Path | None = None,
    effort: Effort | None = None,
    sources: Sources | None = None,
) -> Pruned:
    """Prune a captured network without data.

    Args:
        graph: a network from `redpp_serve.capture`.
        options: what to do and how far to go.
        stages: collects (and prints) the steps.
        data: labelled inputs, only to measure accuracy with.
        checkpoint: file that keeps synthetic inputs, so that an interrupted run goes on; others beside it keep the
            state of the distillation.
        effort: how much work to spend; by default `STANDARD_EFFORT`.
        sources: what else is known: unlabelled inputs, their value range, moments that a server observed, widths.

    Raises:
        GateFailed: an exact stage was not exact, or a number or target of the user's was missed.
        RedppError: an accuracy limit without data to measure the accuracy with.
    """
    options, stages = options or Options(), stages or Stages(quiet=True)
    _require_data(options, data)
    options = with_step(options, stages, graph)
    job = Job(graph, options, stages, data, checkpoint, effort or STANDARD_EFFORT, sources or Sources())
    hashed = hash_weights(job)
    merged, channels = merge_duplicates(job, hashed)
    if options.method != RED and channels.coupling.open:
        job.stages.say(f"  about {_in_words(expected_seconds(job, len(channels.coupling.open)))} on an idle machine")
    inputs = make_inputs(job)
    state = measure_exact_stages(job, inputs, hashed, merged)
    state = narrow(job, inputs, channels, state)
    state = distil(job, inputs, state)
    state = hash_fitted(job, inputs, state)
    state = tune(job, inputs, state)
    state = split(job, state)
    return verify(job, inputs, channels, state)


def judge(
    original: Graph,
    other: Graph,
    options: Options | None = None,
    *,
    stages: Stages | None = None,
    data: VerifyData | None = None,
    sources: Sources | None = None,
) -> Pruned:
    """Measure a network that was made elsewhere, such as by fine-tuning, as `prune` measures its own.

    Nothing is searched, fitted, hashed or narrowed, and only limits that the options name can refuse the network.

    Args:
        original: the network to compare with.
        other: a network with the same inputs and outputs.
        options: the limits, the seed of the inputs, and the device to make them on.
        stages: collects (and prints) the steps.
        data: labelled inputs, only to measure accuracy with.
        sources: unlabelled inputs, which judge beside the synthetic ones, and their value range.

    Raises:
        GateFailed: a number missed a limit of the user's.
        RedppError: an accuracy limit without data to measure the accuracy with.
    """
    options = options or Options()
    _require_data(options, data)
    job = Job(original, options, stages or Stages(quiet=True), data, None, STANDARD_EFFORT, sources or Sources())
    inputs, channels = make_judging_inputs(job), Channels.of(couple(original))
    return verify(job, inputs, channels, State(other, widths=channels.widths()), floors=False)


def _require_data(options: Options, data: VerifyData | None) -> None:
    if options.max_accuracy_drop is not None and data is None:
        raise RedppError(
            f"--max-accuracy-drop is {options.max_accuracy_drop:g}, but there is no data",
            "labelled inputs to measure accuracy with",
            "add --verify-data, or gate on --min-agreement",
        )


def expected_seconds(job: Job, sets: int) -> float:
    """Predict the seconds of a run from its operations, before it begins.

    Args:
        job: the run.
        sets: number of channel sets that may be narrowed.
    """
    options, budget = job.options, job.synthesis_budget()
    judged = 3 * budget.judged
    drawn = drawing_seconds(job.original, budget)
    networks = 1 if options.error_budget is None else _SEARCHED
    build = _RUNS_OF_A_FIT * (budget.images + 64) + 3 * judged
    runs = 24 * budget.matched + 2 * budget.images + 40 * sets + networks * build + 12 * judged
    found = drawn + runs * job.pace + min(options.distil, _DISTIL_SHARE * options.time_budget)
    return min(found, options.time_budget)


def _in_words(seconds: float) -> str:
    return f"{max(5, 5 * round(seconds / 5))} seconds" if seconds < 90 else f"{round(seconds / 60)} minutes"


def verify(job: Job, inputs: Inputs, channels: Channels, state: State, floors: bool = True) -> Pruned:
    """Measure the result, hold it against the user's limits (or the ``floors``), and put the report together."""
    original, options, data = job.original, job.options, job.data
    with job.stages.run("verify") as stage:
        before = find_layers(original)
        after = {layer.name: layer for layer in find_layers(state.graph)}
        difference = inputs.reference.compare(state.graph)
        values = value_shapes(original)  # a recurrent operator gives several
        known = {(layer.name, layer.node.name) for layer in before if layer.node.name in values}
        same = [layer for layer in after.values() if (layer.name, layer.node.name) in known]
        errors = layer_errors(inputs.reference, state.graph, same)
        accuracy = (data.accuracy(original), data.accuracy(state.graph)) if data else None
        stage.reason = _verdict(difference, accuracy, bool(inputs.unread))
        try:
            check_gate(options, difference, accuracy, floors)
        except GateFailed as missed:
            job.stages.say(frontier_text(state.choice.points) if floors else "")
            do = missed.do if floors else _TRAIN_ON
            raise GateFailed(f"{missed.found} (measured: {stage.reason})", missed.expected, do) from None
    checks = {name: state.checks.get(name) for name in ("merge_exact", "split_exact", "narrow_exact")}
    return Pruned(
        original=original,
        pruned=state.graph,
        layers=[
            _layer_record(original, layer, after[layer.name], channels, state, errors)
            for layer in before
            if layer.name in after
        ],
        hash=HashSummary.of(*state.hash_how, state.hash_error, after, state.hashed, state.splits)
        if state.hashed
        else None,
        counting=count_network(before, after, state.graph, state.splits),
        verify=Verification(
            **checks,
            output_error=None if inputs.unread else difference.error,
            agreement=None if inputs.unread else difference.agreement,
            images=difference.images,
            families=()
            if inputs.unread
            else tuple(FamilyRecord.of_head(head, family) for head in difference.heads for family in head.errors),
            outputs=() if inputs.unread else OutputRecord.of(original, difference),
            known=difference.known and not inputs.unread,
            inputs="; ".join((inputs.note, *state.notes)),
        ),
        shares=state.shares,
        accuracy=accuracy,
        samples=tuple(x[:_SAMPLES].cpu() for x in inputs.reference.inputs),
        inputs=inputs,
        choice=state.choice,
        effort=job.effort,
    )


def _layer_record(
    original: Graph, before: Layer, after: Layer, channels: Channels, state: State, errors: Mapping[str, float]
) -> LayerRecord:
    name = before.name
    channel_set = channels.sets.get(name, "")
    reason = channels.closed.get(name) or state.choice.left.get(channel_set, "")
    return LayerRecord.of(
        original,
        before,
        after,
        hash=HashRecord.of(state.hashed[name]) if name in state.hashed else None,
        merge=merge_record(before, after, state.widths.get(channel_set), reason),
        split=SplitRecord.of(after, state.splits[name]) if name in state.splits else None,
        error=errors.get(name),
    )


def _verdict(difference: Difference, accuracy: tuple[float, float] | None, unknown: bool) -> str:
    text = f"{difference} on {difference.images} held-out inputs" if not unknown else "output error unknown"
    return text + (f"; accuracy {accuracy[0]:.2%} -> {accuracy[1]:.2%}" if accuracy else "")
