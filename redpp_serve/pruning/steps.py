"""The stages of a pruning run, each a function from one state to the next; `pipeline.prune` gives their order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from redpp_serve.channels.coupling import Coupling, couple
from redpp_serve.errors import GateFailed
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import Layer, find_layers
from redpp_serve.graph.ranges import unknown_integers
from redpp_serve.graph.weights import split_weight
from redpp_serve.options import NO_HASH, RED, Options
from redpp_serve.pruning.checkpoint import frontier_of
from redpp_serve.pruning.choose import Narrower, choose, save_frontier
from redpp_serve.pruning.distillation import Lesson, schedule
from redpp_serve.pruning.distillation import distil as train
from redpp_serve.pruning.effort import spent
from redpp_serve.pruning.families import SIGNAL, kind_of
from redpp_serve.pruning.final_codebooks import METHOD, hash_within
from redpp_serve.pruning.hashing import Hashed, hash_weight, retuned
from redpp_serve.pruning.inputs import Prepared, prepare
from redpp_serve.pruning.judge import Reference
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.merging import merge_exact
from redpp_serve.pruning.repair import repair_batch_norm
from redpp_serve.pruning.state import Channels, Inputs, Job, State
from redpp_serve.pruning.verification import exact_error, relative_error, require_exact, split_error
from redpp_serve.stages import Stage

CODEBOOK_SHARE = 0.2  # of the error so far: what final codebooks may add, in squares, where no budget says
CODEBOOK_BUDGET = 0.3  # of the error budget, in squares a tenth: what they may add where there is one
LEAST_CODEBOOK_ERROR = 0.01
_UNREAD = "the integers that {names} holds are unknown, so nothing lossy can be judged: give {flags}"
_NO_SCALE = (
    "the scale of the columns that {names} holds is unknown, so nothing lossy can be judged: give --inputs or "
    "--moments, or --accept-unmeasured where each column has been brought to mean 0 and deviation 1"
)
_NO_AMPLITUDE = (
    "nothing in the network tells how loud the signals in {names} are, so nothing lossy can be judged: give --inputs "
    "or --moments, or --accept-unmeasured where their loudest samples are about 1"
)
_UNMEASURED = (
    "inputs of the network's kind can be neither made nor were given, so the error would be unknown: give --inputs or "
    "--moments, or --accept-unmeasured"
)
CODEBOOK_DISTIL_SHARE = 0.25  # of the distillation's seconds, for the values of the final codebooks
_FRONTIER_END = 0.7  # of the time budget; the rest is for distillation, codebooks and verification
_DISTIL_END = 0.9


def hash_weights(job: Job) -> State:
    """Replace the weights of each layer by few values."""
    state = State(job.original)
    with job.stages.run("hash") as stage:
        layers = job.hashable(state.graph)
        unread = () if job.options.accept_unmeasured else unknown_integers(job.original.inputs)
        if job.options.hash == NO_HASH:
            stage.skip("--hash none")
        elif job.options.method != RED:
            stage.skip("the fitted weights are hashed")
        elif unread:
            stage.skip(_why_unread(unread))
        elif not layers:
            stage.skip(
                "no stored weight of a convolution, Linear, embedding or recurrent layer"
                + (" that is not excluded" if find_layers(state.graph) else "")
            )
        else:
            graph, hashed = _hash_layers(state.graph, layers, job.options, stage)
            stage.reason = f"{_sizes(hashed)} ({job.options.hash}, {job.options.hash_target})"
            how = job.options.hash, str(job.options.hash_target)
            state = replace(state, graph=graph, hashed=hashed, hash_how=how)
    return state


def _why_unread(unread: Sequence[InputSpec]) -> str:
    """Say of which inputs nobody knows what they hold, and how to tell it."""
    integers = unknown_integers(unread)
    if not integers:
        signals = [spec for spec in unread if kind_of(spec) == SIGNAL]
        why = _NO_AMPLITUDE if signals else _NO_SCALE
        return why.format(names=", ".join(spec.name for spec in signals or unread))
    flags = [f"--input {'x'.join(map(str, spec.shape))}:{spec.dtype}:LOW..HIGH" for spec in integers]
    return _UNREAD.format(names=", ".join(spec.name for spec in integers), flags=" ".join(flags))


def _hash_layers(graph: Graph, layers: list[Layer], options: Options, stage: Stage) -> tuple[Graph, dict[str, Hashed]]:
    hashed = {}
    for k, layer in enumerate(layers):
        hashed[layer.name] = hash_weight(graph.tensors[layer.weight], options.hash, options.hash_target)
        stage.progress(k + 1, len(layers))
    return graph.with_tensors({layer.weight: hashed[layer.name].weight for layer in layers}), hashed


def _sizes(hashed: Mapping[str, Hashed]) -> str:
    sizes = sorted(h.codebook.size for h in hashed.values())
    return f"{len(hashed)} layers, {sizes[0]} to {sizes[-1]} values each"


def merge_duplicates(job: Job, state: State) -> tuple[State, Channels]:
    """Merge equal channels, done and checked in float64, then back in the network's precision."""
    options, graph, checks = job.options, state.graph, {}
    with job.stages.run("merge") as stage:
        coupling = couple(graph, options.exclude)
        precise = coupling.with_tensors(graph.to(torch.float64).tensors)
        if coupling.open:
            checks["narrow_exact"] = _narrowing_error(precise, graph, options.seed)
            require_exact("taking out channels that nothing reads", checks["narrow_exact"])
        merged = merge_exact(precise, options.step)
        sets = len(coupling.open)
        if not sets:
            stage.reason = "no open channel set"
        elif not merged.removed:
            stage.reason = f"no two of the channels in {sets} channel sets are equal"
        channels = Channels.of(coupling)
        widths = channels.widths(merged.kept)
        if merged.removed:
            checks["merge_exact"] = error = exact_error(precise.graph, merged.graph, graph, options.seed)
            require_exact("exact merging", error)
            constant = f"{merged.constant} constant channels left out, " if merged.constant else ""
            duplicates = f"{merged.removed - merged.constant} duplicate channels merged"
            stage.reason = f"{constant}{duplicates}; differs by {error:.1e} in float64"
            types = {name: t.dtype for name, t in graph.tensors.items()}
            users = merged.graph.users()
            new = {name for name, t in merged.graph.tensors.items() if name not in types and t.is_floating_point()}
            types |= {bias: types[users[bias][0].args[1].name] for bias in new}
            back = {name: t.to(types.get(name, t.dtype)) for name, t in merged.graph.tensors.items()}
            graph = replace(merged.graph, tensors=back, inputs=graph.inputs)
            state = replace(state, graph=graph, kept=coupling.kept(merged.kept))
            channels = replace(channels, coupling=couple(graph, options.exclude))
        return replace(state, widths=widths, checks=checks), channels


def _narrowing_error(precise: Coupling, graph: Graph, seed: int) -> float:
    """Leave out every other channel of all sets at once, and compare with a network that does not read them."""
    kept = {s.name: torch.arange(s.channels)[::2] for s in precise.open}
    unread = dict(precise.graph.tensors)
    for reader in (reader for s in precise.open for reader in s.readers):
        unread[reader.tensor] = unread[reader.tensor].index_fill(reader.dim, reader.positions[1::2].flatten(), 0.0)
    return exact_error(precise.graph.with_tensors(unread), precise.narrow(kept), graph, seed)


def make_inputs(job: Job) -> Inputs:
    """Make the inputs to fit to and to judge by; noise where nothing is fitted."""
    options = job.options
    with job.stages.run("inputs") as stage:
        if options.method == RED:
            noise, unread = smooth_noise(job.original.inputs, 16, options.seed), unknown_integers(job.original.inputs)
            found = Prepared((), {"noise": noise}, "smooth noise", not unread, unread)
            stage.reason = "16 inputs of smooth noise (nothing is fitted to them)"
        else:
            found = prepare(
                job.original,
                job.sources,
                job.synthesis_budget(),
                seed=options.seed,
                device=options.device,
                checkpoint=job.checkpoint,
                progress=stage.progress,
            )
            if options.accept_unmeasured:
                found = replace(found, unread=unknown_integers(found.unread))
            judging = sum(len(x[0]) for x in found.families.values())
            stage.reason = f"{len(found.fit[0])} to fit and {judging} held out, {found.note}"
        reference = Reference(job.original, found.families)
        reference.require_finite("synthetic inputs")
    return Inputs(found.fit, reference, found.note, found.kind_known, found.unread)


def make_judging_inputs(job: Job) -> Inputs:
    """Make the families of inputs that a run of pruning would be judged by; the user's own inputs judge as well."""
    with job.stages.run("inputs") as stage:
        budget = job.synthesis_budget()
        few = replace(budget, images=budget.batch, matched=0)  # to fit to, which nothing is
        own = job.sources.inputs
        sources = replace(job.sources, inputs=())
        found = prepare(job.original, sources, few, seed=job.options.seed, device=job.options.device)
        families = {"real": own, **found.families} if own else found.families
        unread = unknown_integers(found.unread) if own or job.options.accept_unmeasured else found.unread
        note = f"judged by {', '.join(families)}"
        reference = Reference(job.original, families)
        stage.reason = f"{reference.images} inputs, {note}"
        reference.require_finite("synthetic inputs")
    return Inputs(found.fit, reference, note, found.kind_known, unread)


def measure_exact_stages(job: Job, inputs: Inputs, hashed: State, merged: State) -> State:
    """Measure the stages that ran before there were inputs to measure on."""
    state = merged
    if job.stages.named("hash").status == "done":
        added = relative_error(job.original, hashed.graph, inputs.reference.inputs)
        state = replace(state.measured(job, inputs, "hash", hashed.graph), hash_error=added)
    return state.measured(job, inputs, "merge") if merged.merged else state


def narrow(job: Job, inputs: Inputs, channels: Channels, state: State) -> State:
    """Choose widths, narrow and fit."""
    options, coupling = job.options, channels.coupling
    with job.stages.run("reconstruct") as stage:
        if options.method == RED:
            stage.skip("--method red++")
            return state
        if not coupling.open:
            _require_no_target(options)
            stage.skip("no open channel set")
            return state
        if not (inputs.kind_known or options.accept_unmeasured):
            why = _why_unread(inputs.unread) if inputs.unread else _UNMEASURED
            _require_no_target(options, why)
            stage.skip(why)
            return state
        fit = tuple(x.to(options.device) for x in inputs.fit)
        frozen, moments = job.frozen(state.graph), job.sources.moments
        narrower = Narrower(inputs.reference, coupling, state.kept, fit, stage.progress, frozen, moments)
        choice = choose(narrower, options, job.effort, lambda: job.left(_FRONTIER_END), job.sources.widths)
        state = replace(state, choice=choice)
        if job.checkpoint and choice.points:
            save_frontier(frontier_of(job.checkpoint), job.original, choice.points)
        if choice.cut_short:
            late = "the search for widths was cut short by --time-budget, so it is not reproducible to the byte"
            state = replace(state, notes=(*state.notes, late))
        if choice.narrowed is None:
            stage.reason = choice.reason
            return state
        widths = dict(state.widths)
        for record in choice.narrowed.records:
            widths[record.layer] = replace(record, channels=widths[record.layer].channels)
        state = replace(state, graph=choice.narrowed.graph, kept=choice.narrowed.kept, widths=widths)
        kept = sum(record.kept for record in choice.narrowed.records)
        of = sum(record.channels for record in choice.narrowed.records)
        left = f"; {len(choice.left)} too small to narrow" if choice.left else ""
        sets = len(choice.narrowed.records)
        stage.reason = f"{choice.reason}: {kept} of {of} channels kept in {sets} channel sets{left}"
    return state.measured(job, inputs, "reconstruct")


def _require_no_target(options: Options, why: str = "no channel set is open") -> None:
    """Refuse a target for the cost where all channels have to stay."""
    for what, share in (("macs", options.target_macs), ("latency", options.target_latency)):
        if share is not None and share < 1.0:
            raise GateFailed(
                f"--target {what}={share:g} cannot be reached: {why}",
                "a network that can be narrowed",
                "see inspect --channels for the channel sets, and --exclude",
            )


def distil(job: Job, inputs: Inputs, state: State) -> State:
    """Train the narrowed network to give the original's outputs."""
    with job.stages.run("distil") as stage:
        if state.choice.narrowed is None:
            stage.skip("nothing was narrowed")
            return state
        if not job.options.distil:
            stage.skip("--distil 0")
            return state
        share = 1.0 if job.options.hash == NO_HASH else 1.0 - CODEBOOK_DISTIL_SHARE
        state = _train(job, inputs, state, stage, share)
    return state.measured(job, inputs, "distil")


def _train(job: Job, inputs: Inputs, state: State, stage: Stage, share: float, codebooks: Iterable[str] = ()) -> State:
    """Spend a share of the distillation's seconds; the equal values of the tensors in ``codebooks`` stay equal."""
    options = job.options
    seconds = max(0.0, min(share * options.distil, job.left(_DISTIL_END)))
    frozen = job.frozen(state.graph)
    found = train(
        Lesson(state.graph, inputs.reference, inputs.fit, state.kept, frozenset(codebooks), frozen),
        schedule(state.graph, job.original, seconds, job.pace, inputs.reference.images),
        seed=options.seed,
        device=options.device,
        deadline=spent() + job.effort.distillation_patience * seconds,
        checkpoint=job.checkpoint and job.checkpoint.with_name(f"{job.checkpoint.name}.{stage.name}"),
        progress=stage.progress,
    )
    stage.reason = f"{found.steps} steps, held-out error {found.error[0]:.4f} -> {found.error[1]:.4f}"
    stage.reason += f"; {found.note}" if found.note else ""
    notes = state.notes if found.reproducible else (*state.notes, f"{stage.name}: {found.note}")
    return replace(state, graph=found.graph, notes=notes)


def hash_fitted(job: Job, inputs: Inputs, state: State) -> State:
    """Hash the final weights: what was fitted and learnt lies outside the first codebooks."""
    options, before = job.options, state.graph
    with job.stages.run("codebooks") as stage:
        layers = job.hashable(before)
        if options.hash == NO_HASH:
            stage.skip("--hash none")
            return state
        if options.method == RED or not layers:
            stage.skip("the weights are those of the first hashing")
            return state
        if inputs.unread and not options.accept_unmeasured:
            stage.skip(_why_unread(inputs.unread))
            return state
        if options.hash_error is None and options.hash_values is None:
            budget = _codebook_budget(options, inputs.reference.error(before))
            found = hash_within(before, layers, inputs.reference.inputs, budget, stage.progress)
            graph, hashed = found.graph, found.hashed
            how = METHOD, f"at most {budget:.3f} of output error"
        else:
            graph, hashed = _hash_layers(before, layers, options, stage)
            how = options.hash, str(options.hash_target)
        added = relative_error(before, graph, inputs.reference.inputs)
        if any(graph.tensors[layer.weight] is not before.tensors[layer.weight] for layer in layers):
            repaired = repair_batch_norm(graph, job.original, inputs.fit, state.kept)
            if inputs.reference.error(repaired) <= inputs.reference.error(graph):
                graph = repaired
        stage.reason = f"{_sizes(hashed)} ({how[0]}, {how[1]}; adds {added:.3f})"
        state = replace(state, graph=graph, hashed=hashed, hash_how=how, hash_error=added)
    return state.measured(job, inputs, "codebooks")


def _codebook_budget(options: Options, before: float) -> float:
    """Return the output error that final codebooks may add: what the user's budget leaves, or a share of ``before``."""
    if options.error_budget is not None:
        left = math.sqrt(max(options.error_budget**2 - before**2, 0.0))
        return min(CODEBOOK_BUDGET * options.error_budget, left)
    return max(CODEBOOK_SHARE * before, LEAST_CODEBOOK_ERROR)


def tune(job: Job, inputs: Inputs, state: State) -> State:
    """Train the values of the final codebooks, where the network was distilled before."""
    if state.choice.narrowed is None or not job.options.distil or not state.hashed:
        return state
    weights = {layer.name: layer.weight for layer in find_layers(state.graph) if layer.name in state.hashed}
    with job.stages.run("tune") as stage:
        state = _train(job, inputs, state, stage, CODEBOOK_DISTIL_SHARE, weights.values())
        hashed = {name: retuned(h, state.graph.tensors[weights[name]]) for name, h in state.hashed.items()}
        state = replace(state, hashed=hashed)
    return state.measured(job, inputs, "tune")


def split(job: Job, state: State) -> State:
    """Split each hashed weight into its unique kernels, exactly."""
    splits, worst = {}, 0.0
    with job.stages.run("split") as stage:
        layers = [x for x in find_layers(state.graph) if x.name in state.hashed and not x.is_embedding]
        if not layers:
            stage.skip("no hashed layer")
            return state
        for k, layer in enumerate(layers):
            weight = layer.by_output(state.graph.tensors[layer.weight])
            splits[layer.name] = split_weight(weight, layer.groups)
            worst = max(worst, split_error(layer, weight, splits[layer.name], job.options.seed))
            stage.progress(k + 1, len(layers))
        require_exact("input-wise splitting", worst)
        unique, kernels = sum(len(s.kernels) for s in splits.values()), sum(s.index.numel() for s in splits.values())
        stage.reason = f"{unique} unique kernels of {kernels}; differs by {worst:.1e} in float64"
    return replace(state, splits=splits, checks={**state.checks, "split_exact": worst})
