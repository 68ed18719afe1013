"""The offline passes in order: hash, merge exactly, make inputs, narrow and fit, distil, final codebooks, split, verify."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redpp_serve.channels.coupling import Coupling, couple, matches
from redpp_serve.channels.narrowing import Kept
from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import Layer, find_layers, mac_count
from redpp_serve.options import NO_HASH, Options
from redpp_serve.pruning.accounting import (
    KernelSplit,
    both_readings,
    count_dense,
    count_kernels,
    hash_summary,
    layer_record,
    split_weight,
)
from redpp_serve.pruning.choose import Choice, Narrower, choose, frontier_record
from redpp_serve.pruning.distillation import distil
from redpp_serve.pruning.final_codebooks import METHOD, hash_within
from redpp_serve.pruning.fit import Reconstruction
from redpp_serve.pruning.hashing import Hashed, hash_weight, retuned
from redpp_serve.pruning.inputs import smooth_noise, synthesis_budget, synthesize
from redpp_serve.pruning.merging import merge_exact
from redpp_serve.pruning.repair import repair_batch_norm
from redpp_serve.pruning.verification import (
    EXACT,
    Difference,
    VerifyData,
    check_gate,
    compare_outputs,
    layer_errors,
    split_error,
)
from redpp_serve.stages import Stage, Stages

_MATCHING_SHARE = 0.5  # of the time budget; the rest is for fitting
_FIT_END, _FRONTIER_END = 0.8, 0.95  # of the time budget
_SAMPLES = 16
CODEBOOK_SHARE = 0.45  # of the error so far, that final codebooks may add in squares, where no budget says
LEAST_CODEBOOK_ERROR = 0.02
CODEBOOK_DISTIL_SHARE = 0.25  # of the distillation's seconds, for the values of the final codebooks


@dataclass
class Pruned:
    """The result of a run: both graphs and everything the report says about them."""

    original: Graph
    pruned: Graph
    layers: list[dict[str, Any]]
    hash: dict[str, Any]
    counting: dict[str, Any]
    counts: dict[str, list[Any]]  # original and pruned: Counts of each layer
    verify: dict[str, Any]
    accuracy: tuple[float, float] | None
    samples: tuple[Tensor, ...]  # some held-out inputs, (n, ...) each
    shares: list[dict[str, Any]]  # for each stage the error, agreement and cost behind it
    choice: Choice

    def frontier(self, device: str, machine: str) -> dict[str, Any]:
        """The frontier for the report; measures latencies, which takes some seconds."""
        return frontier_record(self.choice.points, self.original, device, machine)


@dataclass
class _Run:
    """State that the stages hand on."""

    original: Graph
    options: Options
    stages: Stages
    graph: Graph
    hash_only: Graph
    data: VerifyData | None
    first_hashed: dict[str, Hashed] = field(default_factory=dict)  # of the network as it came
    hashed: dict[str, Hashed] = field(default_factory=dict)  # of the present graph
    widths: dict[str, Reconstruction] = field(default_factory=dict)  # by channel set
    coupling: Coupling | None = None  # of the graph behind exact merging
    merged: Kept = lambda name: {}  # what that graph still has of the original's values
    places: Kept = lambda name: {}  # what the present graph still has of the original's values
    producers: dict[str, str] = field(default_factory=dict)  # layer to class
    closed: dict[str, str] = field(default_factory=dict)
    splits: dict[str, KernelSplit] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    fit_inputs: tuple[Tensor, ...] = ()
    held_out: tuple[Tensor, ...] = ()
    inputs_note: str = ""
    shares: list[dict[str, Any]] = field(default_factory=list)
    choice: Choice = field(default_factory=lambda: Choice(None, ""))


def prune(
    graph: Graph,
    options: Options = Options(),
    *,
    stages: Stages | None = None,
    data: VerifyData | None = None,
    checkpoint: Path | None = None,
) -> Pruned:
    """Prune a captured network without data.

    Args:
        graph: from `redpp_serve.capture`.
        options: what to do and how far to go.
        stages: collects (and prints) the steps.
        data: labelled inputs, only to measure accuracy with.
        checkpoint: file that keeps synthetic inputs, so that an interrupted run goes on; a second one beside it keeps
            the state of the distillation.

    Raises:
        GateFailed: an exact stage was not exact, or a number or target of the user's was missed.
        RedppError: an accuracy limit without data to measure the accuracy with.
    """
    if options.max_accuracy_drop is not None and data is None:
        raise RedppError(
            f"--max-accuracy-drop is {options.max_accuracy_drop:g}, but there is no data",
            "labelled inputs to measure accuracy with",
            "add --verify-data, or gate on --min-agreement",
        )
    run = _Run(graph, options, stages or Stages(quiet=True), graph, graph, data)
    started = time.monotonic()
    _hash(run)
    _merge(run)
    _make_inputs(run, started, checkpoint)
    _require_finite(run)
    _record_exact_stages(run)
    _narrow(run, started)
    _distil(run, checkpoint)
    _codebooks(run, checkpoint)
    _split(run)
    return _verify(run)


def _hash(run: _Run) -> None:
    with run.stages.run("hash") as stage:
        if run.options.hash == NO_HASH:
            return stage.skip("--hash none")
        layers = _hashable(run)
        if not layers:
            stage.skip("no convolution or Linear to hash" + (" that is not excluded" if run.options.exclude else ""))
            return
        run.graph, run.hashed = _hash_layers(run.graph, layers, run.options, stage)
        run.hash_only, run.first_hashed = run.graph, run.hashed
        stage.reason = f"{_sizes(run.hashed)} ({run.options.hash}, {run.options.hash_target})"


def _hashable(run: _Run) -> list[Layer]:
    return [layer for layer in find_layers(run.graph) if not matches(layer.name, run.options.exclude)]


def _hash_layers(graph: Graph, layers: list[Layer], options: Options, stage: Stage) -> tuple[Graph, dict[str, Hashed]]:
    hashed = {}
    for k, layer in enumerate(layers):
        hashed[layer.name] = hash_weight(graph.tensors[layer.weight], options.hash, options.hash_target)
        stage.progress(k + 1, len(layers))
    return graph.with_tensors({layer.weight: hashed[layer.name].weight for layer in layers}), hashed


def _sizes(hashed: Mapping[str, Hashed]) -> str:
    sizes = sorted(h.codebook.size for h in hashed.values())
    return f"{len(hashed)} layers, {sizes[0]} to {sizes[-1]} values each"


def _merge(run: _Run) -> None:
    """Exact merging, done and checked in float64, then back in the network's precision."""
    with run.stages.run("merge") as stage:
        coupling = couple(run.graph, run.options.exclude)
        run.closed, run.coupling = coupling.closed_layers, coupling
        for channel_set in coupling.sets:
            run.producers.update({layer: channel_set.name for layer in channel_set.producers if not channel_set.closed})
        _check_narrowing(run, coupling)
        precise = coupling.with_tensors(run.graph.to(torch.float64).tensors)
        merged = merge_exact(precise, run.options.round_to)
        for channel_set in coupling.open:
            kept = len(merged.kept.get(channel_set.name, range(channel_set.channels)))
            run.widths[channel_set.name] = Reconstruction(channel_set.name, channel_set.channels, kept, 0.0)
        if not merged.removed:
            sets = len(coupling.open)
            stage.reason = f"no two of the channels in {sets} channel sets are equal" if sets else "no open channel set"
            return
        error = _precise_error(precise.graph, merged.graph, run.graph, run.options.seed)
        run.checks["merge_exact"] = error
        _require_exact("exact merging", error)
        types = {name: t.dtype for name, t in run.graph.tensors.items()}
        back = {name: t.to(types.get(name, t.dtype)) for name, t in merged.graph.tensors.items()}
        run.graph = replace(merged.graph, tensors=back, inputs=run.graph.inputs)
        run.merged = run.places = coupling.kept(merged.kept)
        run.coupling = couple(run.graph, run.options.exclude)
        stage.reason = f"{merged.removed} duplicate channels merged; differs by {error:.1e} in float64"


def _check_narrowing(run: _Run, coupling: Coupling) -> None:
    """Leaving out channels must be the same as having nobody read them: checked for all channel sets at once, in float64."""
    if not coupling.open:
        return
    kept = {channel_set.name: torch.arange(channel_set.channels)[::2] for channel_set in coupling.open}
    precise = coupling.with_tensors(run.graph.to(torch.float64).tensors)
    unread = dict(precise.graph.tensors)
    for channel_set in coupling.open:
        for reader in channel_set.readers:
            unread[reader.tensor] = unread[reader.tensor].index_fill(reader.dim, reader.positions[1::2].flatten(), 0.0)
    error = _precise_error(precise.graph.with_tensors(unread), precise.narrow(kept), run.graph, run.options.seed)
    run.checks["narrow_exact"] = error
    _require_exact("taking out channels that nothing reads", error)


def _precise_error(before: Graph, after: Graph, graph: Graph, seed: int) -> float:
    """Relative difference of two float64 networks on two inputs of noise."""
    probe = tuple(x.double() if x.is_floating_point() else x for x in smooth_noise(graph.inputs, 2, seed))
    with _default_dtype(torch.float64):  # also for tensors that forward makes without naming a type
        return compare_outputs(_casting_to_double(before), _casting_to_double(after), probe).error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _casting_to_double(graph: Graph) -> Graph:
    """The same float64 network, also where it casts to a floating type of its own."""

    def wide(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    nodes = (
        replace(node, args=tuple(map(wide, node.args)), kwargs={k: wide(v) for k, v in node.kwargs.items()})
        for node in graph.nodes
    )
    return replace(graph, nodes=tuple(nodes))


def _make_inputs(run: _Run, started: float, checkpoint: Path | None) -> None:
    with run.stages.run("inputs") as stage:
        options = run.options
        if options.merge == "exact":
            run.held_out = smooth_noise(run.original.inputs, 16, options.seed)
            run.inputs_note = "smooth noise (inputs are matched to batch norm for reconstruction only)"
            stage.reason = f"16 inputs of {run.inputs_note}"
            return
        how = synthesis_budget(run.original, _MATCHING_SHARE * options.time_budget, options.device)
        made = synthesize(
            run.original,
            how,
            seed=options.seed,
            device=options.device,
            checkpoint=checkpoint,
            deadline=started + 0.7 * options.time_budget,
            progress=stage.progress,
        )
        run.fit_inputs, run.held_out = made.divide(how.held_out)
        run.inputs_note = made.note or (
            f"matched to batch-norm statistics in {how.steps} steps, mismatch {made.losses[0]:.3g} -> {made.losses[1]:.3g}"
        )
        stage.reason = f"{len(run.fit_inputs[0])} to fit and {len(run.held_out[0])} held out, {run.inputs_note}"


def _require_finite(run: _Run) -> None:
    """Errors and fits mean nothing where the original network itself gives NaN or infinity."""
    with torch.no_grad():
        for y in Program(run.original)(*(x[:4].cpu() for x in run.held_out)):
            if y.is_floating_point() and not bool(y.isfinite().all()):
                raise _not_finite("synthetic inputs")


def _not_finite(inputs: str) -> RedppError:
    return RedppError(
        f"the network's own output is NaN or infinite on {inputs}",
        "finite outputs",
        "check its weights and statistics; a negative running variance is one cause",
    )


def _share(run: _Run, stage: Stage, graph: Graph | None = None) -> None:
    """Note what a stage has come to: output error and agreement on held-out inputs, cost, accuracy where there is data."""
    graph = run.graph if graph is None else graph
    difference = compare_outputs(run.original, graph, run.held_out)
    record = {
        "stage": stage.name,
        "error": difference.error,
        "agreement": difference.agreement,
        "macs": mac_count(graph),
        "seconds": stage.seconds,
    }
    if run.data:
        record["accuracy"] = run.data.accuracy(graph)
    run.shares.append(record)


def _record_exact_stages(run: _Run) -> None:
    """The shares of hashing and exact merging, which ran before there were inputs to measure on."""
    done = {stage.name: stage for stage in run.stages.stages}
    if done["hash"].status == "done":
        _share(run, done["hash"], run.hash_only)
    if "merge_exact" in run.checks:
        _share(run, done["merge"])


def _narrow(run: _Run, started: float) -> None:
    """Choose widths, narrow and fit. Where exact merging took nothing, this starts from the unhashed weights."""
    options = run.options
    with run.stages.run("reconstruct") as stage:
        coupling = run.coupling
        assert coupling is not None
        if options.merge == "exact":
            return stage.skip("--merge exact")
        if not coupling.open:
            _require_no_target(options)
            return stage.skip("no open channel set")
        if "merge_exact" not in run.checks:
            coupling = coupling.with_tensors(run.original.tensors)
        inputs = tuple(x.to(options.device) for x in run.fit_inputs)
        held_out = tuple(x.to(options.device) for x in run.held_out)
        narrower = Narrower(
            run.original, coupling, run.merged, inputs, held_out, stage.progress, _excluded_tensors(run)
        )
        budget = options.time_budget
        run.choice = choose(narrower, options, started + _FIT_END * budget, started + _FRONTIER_END * budget)
        if run.choice.cut_short:
            run.inputs_note += (
                "; the search for widths was cut short by --time-budget, so it is not reproducible to the byte"
            )
        narrowed = run.choice.narrowed
        run.graph, run.hashed = coupling.graph, run.hashed if "merge_exact" in run.checks else {}
        if narrowed is None:
            stage.reason = run.choice.reason
            return
        run.graph, run.places = narrowed.graph, narrowed.places
        for record in narrowed.records:
            run.widths[record.layer] = replace(record, channels=run.widths[record.layer].channels)
        kept = sum(run.widths[record.layer].kept for record in narrowed.records)
        of = sum(record.channels for record in narrowed.records)
        left = f"; {len(run.choice.left)} channel sets too small to narrow" if run.choice.left else ""
        stage.reason = (
            f"{run.choice.reason}: {kept} of {of} channels kept in {len(narrowed.records)} channel sets{left}"
        )
    if narrowed is not None:
        _share(run, stage)


def _require_no_target(options: Options) -> None:
    """A share of the cost that should go cannot go where every channel set has to stay."""
    for what, share in (("macs", options.target_macs), ("latency", options.target_latency)):
        if share is not None and share < 1.0:
            raise GateFailed(
                f"--target {what}={share:g} cannot be reached: no channel set is open",
                "a layer that can be narrowed",
                "see inspect --channels for the reasons, and --exclude",
            )


def _distil(run: _Run, checkpoint: Path | None, codebooks: frozenset[str] = frozenset()) -> None:
    options, name = run.options, "tune" if codebooks else "distil"
    with run.stages.run(name) as stage:
        if run.choice.narrowed is None:
            return stage.skip("nothing was narrowed")
        if not options.distil:
            return stage.skip("--distil 0")
        seconds = options.distil * (
            CODEBOOK_DISTIL_SHARE if codebooks else 1 - CODEBOOK_DISTIL_SHARE * (options.hash != NO_HASH)
        )
        state = checkpoint.with_name(f"{checkpoint.name}.{name}") if checkpoint else None
        found = distil(
            run.graph,
            run.original,
            run.fit_inputs,
            run.held_out,
            run.places,
            seconds=seconds,
            seed=options.seed,
            device=options.device,
            deadline=time.monotonic() + 3 * seconds,
            checkpoint=state,
            progress=stage.progress,
            codebooks=codebooks,
            frozen=_excluded_tensors(run),
        )
        run.graph = found.graph
        if not found.reproducible:
            run.inputs_note += f"; {name}: {found.note}"
        stage.reason = f"{found.steps} steps, held-out error {found.error[0]:.4f} -> {found.error[1]:.4f}"
        stage.reason += f"; {found.note}" if found.note else ""
    _share(run, stage)


def _excluded_tensors(run: _Run) -> frozenset[str]:
    """Weights and biases of the layers that must not change."""
    found = set()
    for layer in find_layers(run.graph):
        if matches(layer.name, run.options.exclude):
            found |= {layer.weight, *([layer.bias] if layer.bias else [])}
    return frozenset(found)


def _codebooks(run: _Run, checkpoint: Path | None) -> None:
    """Hash the final weights: what was fitted and learnt lies outside the first codebooks."""
    options = run.options
    with run.stages.run("codebooks") as stage:
        layers = _hashable(run)
        if options.hash == NO_HASH or options.merge == "exact" or not layers:
            return stage.skip(
                "--hash none" if options.hash == NO_HASH else "the weights are those of the first hashing"
            )
        before, weights = compare_outputs(run.original, run.graph, run.held_out).error, run.graph.tensors
        if options.hash_error is None and options.hash_values is None:
            budget = _codebook_budget(options, before)
            found = hash_within(run.graph, layers, run.held_out, budget, stage.progress)
            run.graph, run.hashed = found.graph, found.hashed
            how = f"{METHOD}, at most {budget:.3f} of output error; adds {found.added**0.5:.3f}"
        else:
            run.graph, run.hashed = _hash_layers(run.graph, layers, options, stage)
            how = f"{options.hash}, {options.hash_target}"
        if any(run.graph.tensors[layer.weight] is not weights[layer.weight] for layer in layers):
            run.graph = repair_batch_norm(run.graph, run.original, run.fit_inputs, run.places)
        stage.reason = f"{_sizes(run.hashed)} ({how})"
    _share(run, stage)
    if run.choice.narrowed is not None and options.distil:
        weights = {layer.name: layer.weight for layer in layers}
        _distil(run, checkpoint, frozenset(weights[name] for name in run.hashed))
        run.hashed = {name: retuned(h, run.graph.tensors[weights[name]]) for name, h in run.hashed.items()}


def _codebook_budget(options: Options, before: float) -> float:
    """How much relative output error final codebooks may add: what the user's budget leaves, or in proportion."""
    if options.error_budget is not None:
        return max(options.error_budget**2 - before**2, 0.0) ** 0.5
    return max(CODEBOOK_SHARE * before, LEAST_CODEBOOK_ERROR)


def _split(run: _Run) -> None:
    with run.stages.run("split") as stage:
        layers = [layer for layer in find_layers(run.graph) if layer.name in run.hashed]
        worst = 0.0
        for k, layer in enumerate(layers):
            weight = run.graph.tensors[layer.weight]
            split = split_weight(weight, layer.groups)
            run.splits[layer.name] = split
            worst = max(worst, split_error(layer, weight, split, run.options.seed))
            stage.progress(k + 1, len(layers))
        if not layers:
            return stage.skip("no hashed layer")
        run.checks["split_exact"] = worst
        _require_exact("input-wise splitting", worst)
        unique, kernels = (
            sum(len(s.kernels) for s in run.splits.values()),
            sum(s.index.numel() for s in run.splits.values()),
        )
        stage.reason = f"{unique} unique kernels of {kernels}; differs by {worst:.1e} in float64"


def _require_exact(what: str, error: float) -> None:
    if error != error:  # NaN
        raise _not_finite("noise")
    if not error <= EXACT:
        raise GateFailed(
            f"{what} changed the network's function by {error:.2e} (relative, float64)",
            f"at most {EXACT:g}, re-association error",
            "report this with the model; use --exclude meanwhile",
        )


def _verify(run: _Run) -> Pruned:
    options, data = run.options, run.data
    with run.stages.run("verify") as stage:
        before = {layer.name: layer for layer in find_layers(run.original)}
        after = {layer.name: layer for layer in find_layers(run.graph)}
        difference = compare_outputs(run.original, run.graph, run.held_out)
        hash_error = compare_outputs(run.original, run.hash_only, run.held_out).error
        errors = layer_errors(run.original, run.graph, list(after.values()), run.held_out)
        accuracy = (data.accuracy(run.original), data.accuracy(run.graph)) if data else None
        stage.reason = _verdict(difference, accuracy)
        try:
            check_gate(options, difference, accuracy)
        except GateFailed as missed:
            raise GateFailed(f"{missed.found} (measured: {stage.reason})", missed.expected, missed.do) from None
    widths = {layer: run.widths[name] for layer, name in run.producers.items() if name in run.widths}
    reasons = {
        **{layer: run.choice.left[name] for layer, name in run.producers.items() if name in run.choice.left},
        **run.closed,
    }
    layers = [
        layer_record(
            run.original,
            layer,
            after[name],
            run.hashed.get(name),
            run.splits.get(name),
            widths.get(name),
            reasons.get(name, ""),
            errors.get(name),
        )
        for name, layer in before.items()
    ]
    return Pruned(
        run.original,
        run.graph,
        layers,
        hash_summary(
            after, run.first_hashed, run.hashed, run.splits, options.hash, str(options.hash_target), hash_error
        ),
        both_readings(before, after, run.graph, run.splits),
        {
            "original": [count_dense(layer) for layer in before.values()],
            "pruned": [
                count_kernels(layer, run.splits[n]) if n in run.splits else count_dense(layer)
                for n, layer in after.items()
            ],
        },
        {
            "merge_exact": None,
            "split_exact": None,
            **run.checks,
            "output_error": difference.error,
            "agreement": difference.agreement,
            "images": difference.images,
            "inputs": run.inputs_note,
        },
        accuracy,
        tuple(x[:_SAMPLES].cpu() for x in run.held_out),
        run.shares,
        run.choice,
    )


def _verdict(difference: Difference, accuracy: tuple[float, float] | None) -> str:
    text = f"output error {difference.error:.4f}"
    if difference.agreement is not None:
        text += f", top-1 agreement {difference.agreement:.1%}"
    text += f" on {difference.images} held-out inputs"
    return text + (f"; accuracy {accuracy[0]:.2%} -> {accuracy[1]:.2%}" if accuracy else "")
