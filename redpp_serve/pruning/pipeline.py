"""The offline passes in order: hash, merge exactly, make inputs, reconstruct, split, verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GateFailed, RedppError
from ..graph.channels import excluded, find_inner_channels
from ..graph.layers import Layer, find_layers
from ..runtime.graph import Graph
from ..runtime.program import Program
from .accounting import both_readings, hash_summary, layer_record
from .hashing import Hashed, hash_weight
from .merging import merge_exact
from .options import NO_HASH, Options
from .reconstruct import Reconstruction, Width, keep_ratio, reconstruct, within
from .splitting import Split, count_dense, count_kernels, split_weight
from .stages import Stage, Stages
from .synthetic import Synthetic, plan, smooth_noise, synthesize
from .verify import EXACT, Difference, VerifyData, check_gate, compare_outputs, layer_errors, split_error

_MATCHING_SHARE = 0.6  # of the time budget; the rest is for fitting
_BUDGET_ROUNDS = 5
_SAMPLES = 16


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


@dataclass
class _Run:
    """State that the stages hand on."""

    original: Graph
    options: Options
    stages: Stages
    graph: Graph
    hash_only: Graph
    hashed: dict[str, Hashed] = field(default_factory=dict)
    widths: dict[str, Reconstruction] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)  # by producer, the channels that exact merging left
    splits: dict[str, Split] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    fit_inputs: tuple[Tensor, ...] = ()
    held_out: tuple[Tensor, ...] = ()
    inputs_note: str = ""


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
        checkpoint: file that keeps synthetic inputs, so that an interrupted run goes on.

    Raises:
        GateFailed: an exact stage was not exact, or a number of the user's was missed.
        RedppError: an accuracy limit without data to measure the accuracy with.
    """
    if options.max_accuracy_drop is not None and data is None:
        raise RedppError(f"--max-accuracy-drop is {options.max_accuracy_drop:g}, but there is no data",
                         "labelled inputs to measure accuracy with", "add --verify-data, or gate on --min-agreement")  # fmt: skip
    run = _Run(graph, options, stages or Stages(quiet=True), graph, graph)
    started = time.monotonic()
    _hash(run)
    _merge(run)
    _make_inputs(run, started, checkpoint)
    _require_finite(run)
    _reconstruct(run, started)
    _split(run)
    return _verify(run, data)


def _hash_layers(
    graph: Graph, layers: list[Layer], options: Options, stage: Stage | None = None
) -> tuple[Graph, dict[str, Hashed]]:
    hashed = {}
    layers = [] if options.hash == NO_HASH else layers
    for k, layer in enumerate(layers):
        hashed[layer.name] = hash_weight(graph.tensors[layer.weight], options.hash, options.hash_target)
        if stage:
            stage.progress(k + 1, len(layers))
    return graph.with_tensors({layer.weight: hashed[layer.name].weight for layer in layers}), hashed


def _hash(run: _Run) -> None:
    with run.stages.run("hash") as stage:
        if run.options.hash == NO_HASH:
            return stage.skip("--hash none")
        layers = [layer for layer in find_layers(run.graph) if not excluded(layer, run.options.exclude)]
        if not layers:
            stage.skip("no convolution or Linear to hash" + (" that is not excluded" if run.options.exclude else ""))
            return
        run.graph, run.hashed = _hash_layers(run.graph, layers, run.options, stage)
        run.hash_only = run.graph
        sizes = sorted(h.codebook.size for h in run.hashed.values())
        stage.reason = f"{len(layers)} layers, {sizes[0]} to {sizes[-1]} values each ({run.options.hash}, {run.options.hash_target})"


def _merge(run: _Run) -> None:
    """Exact merging, done and checked in float64, then back in the network's precision."""
    with run.stages.run("merge") as stage:
        sets, _ = find_inner_channels(run.graph, run.options.exclude)
        precise = run.graph.to(torch.float64)
        merged, removed = precise, 0
        for k, inner in enumerate(sets):
            merged, record = merge_exact(merged, inner, run.options.round_to)
            removed += record.channels - record.kept
            run.rows[record.layer] = record.rows
            run.widths[record.layer] = Reconstruction(record.layer, record.channels, record.kept, 0.0)
            stage.progress(k + 1, len(sets))
        if not removed:
            stage.reason = f"no two of the channels in {len(sets)} sets are equal" if sets else "no inner channels"
            return
        probe = tuple(
            x.double() if x.is_floating_point() else x for x in smooth_noise(run.graph.inputs, 2, run.options.seed)
        )
        with _default_dtype(torch.float64):  # also for tensors that forward makes without naming a type
            error = compare_outputs(_casting_to_double(precise), _casting_to_double(merged), probe).error
        run.checks["merge_exact"] = error
        _require_exact("exact merging", error)
        types = {name: t.dtype for name, t in run.graph.tensors.items()}
        back = {name: t.to(types.get(name, t.dtype)) for name, t in merged.tensors.items()}
        run.graph = replace(merged, tensors=back, inputs=run.graph.inputs)
        stage.reason = f"{removed} duplicate channels merged; differs by {error:.1e} in float64"


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

    nodes = (replace(node, args=tuple(map(wide, node.args)), kwargs={k: wide(v) for k, v in node.kwargs.items()})
             for node in graph.nodes)  # fmt: skip
    return replace(graph, nodes=tuple(nodes))


def _make_inputs(run: _Run, started: float, checkpoint: Path | None) -> None:
    with run.stages.run("inputs") as stage:
        options = run.options
        if options.merge == "exact":
            run.held_out = smooth_noise(run.original.inputs, 16, options.seed)
            run.inputs_note = "smooth noise (inputs are matched to batch norm for reconstruction only)"
            stage.reason = f"16 inputs of {run.inputs_note}"
            return
        how = plan(run.original, _MATCHING_SHARE * options.time_budget, options.device)
        made: Synthetic = synthesize(run.original, how, seed=options.seed, device=options.device, checkpoint=checkpoint,
                                     deadline=started + 0.8 * options.time_budget, progress=stage.progress)  # fmt: skip
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
                raise RedppError("the network's own output is NaN or infinite on synthetic inputs", "finite outputs",
                                 "check its weights and statistics; a negative running variance is one cause")  # fmt: skip


def _reconstruct(run: _Run, started: float) -> None:
    options = run.options
    with run.stages.run("reconstruct") as stage:
        sets, _ = find_inner_channels(run.graph, options.exclude)
        if options.merge == "exact":
            return stage.skip("--merge exact")
        if not sets:
            return stage.skip("no inner channels that may be narrowed")
        inputs = tuple(x.to(options.device) for x in run.fit_inputs)
        exact = run.graph

        def narrow(width: Width) -> _Narrowed:
            graph, records = reconstruct(
                exact, run.original, sets, inputs, width, options.round_to, stage.progress, run.rows
            )
            # the producers keep whole rows, whose values stay in their codebooks; only the fitted readers are hashed again
            narrowed = {record.layer for record in records if record.kept < record.channels}
            readers = {layer.name for inner in sets if inner.producer.name in narrowed for layer, _ in inner.consumers}
            return _Narrowed(
                *_hash_layers(graph, [x for x in find_layers(graph) if x.name in readers], options), records
            )

        best = narrow(keep_ratio(options.keep)) if options.keep is not None else _within_budget(run, narrow, started)
        if best is None:
            stage.reason = f"no narrower network stays within the error budget of {options.error_budget:g}"
            return
        run.graph = best.graph
        run.hashed.update(best.hashed)
        for record in best.records:
            run.widths[record.layer] = replace(record, channels=run.widths[record.layer].channels)
        kept, of = sum(r.kept for r in best.records), sum(r.channels for r in best.records)
        stage.reason = (
            f"{kept} of {of} channels kept in {len(sets)} sets, {len(best.hashed)} fitted layers hashed again"
        )


@dataclass(frozen=True)
class _Narrowed:
    """A narrowed graph, its fitted layers hashed again, and what was done to each set of channels."""

    graph: Graph
    hashed: dict[str, Hashed]
    records: list[Reconstruction]


def _within_budget(run: _Run, narrow: Callable[[Width], _Narrowed], started: float) -> _Narrowed | None:
    """The narrowest network whose held-out error stays within the budget, by bisection on the tolerance of each set."""
    limit = run.options.error_budget
    assert limit is not None
    best, low, high, tolerance = None, 0.0, None, limit
    for _ in range(_BUDGET_ROUNDS):
        candidate = narrow(within(tolerance))
        if compare_outputs(run.original, candidate.graph, run.held_out).error <= limit:
            low, best = tolerance, candidate
        else:
            high = tolerance
        tolerance = 2 * tolerance if high is None else (low + high) / 2
        if time.monotonic() - started > 0.9 * run.options.time_budget:
            run.inputs_note += "; the search for widths was cut short by --time-budget, so it is not reproducible to the byte"
            break
    return best


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
    if not error <= EXACT:
        raise GateFailed(f"{what} changed the network's function by {error:.2e} (relative, float64)",
                         f"at most {EXACT:g}, re-association error", "report this with the model; use --exclude meanwhile")  # fmt: skip


def _verify(run: _Run, data: VerifyData | None) -> Pruned:
    options = run.options
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
    _, closed = find_inner_channels(run.original, options.exclude)
    layers = [layer_record(run.original, layer, after[name], run.hashed.get(name), run.splits.get(name), run.widths.get(name),
                           closed.get(name, ""), errors.get(name)) for name, layer in before.items()]  # fmt: skip
    return Pruned(
        run.original, run.graph, layers,
        hash_summary(after, run.hashed, run.splits, options.hash, str(options.hash_target), hash_error),
        both_readings(before, after, run.graph, run.splits),
        {"original": [count_dense(layer) for layer in before.values()],
         "pruned": [count_kernels(layer, run.splits[n]) if n in run.splits else count_dense(layer) for n, layer in after.items()]},
        {"merge_exact": None, "split_exact": None, **run.checks, "output_error": difference.error,
         "agreement": difference.agreement, "images": difference.images, "inputs": run.inputs_note}, accuracy,
        tuple(x[:_SAMPLES].cpu() for x in run.held_out),
    )  # fmt: skip


def _verdict(difference: Difference, accuracy: tuple[float, float] | None) -> str:
    text = f"output error {difference.error:.4f}"
    if difference.agreement is not None:
        text += f", top-1 agreement {difference.agreement:.1%}"
    text += f" on {difference.images} held-out inputs"
    return text + (f"; accuracy {accuracy[0]:.2%} -> {accuracy[1]:.2%}" if accuracy else "")
