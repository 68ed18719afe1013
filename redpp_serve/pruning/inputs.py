"""Make the inputs of a run without data: structured ones of the network's kind, or noise matched to its batch norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from redpp_serve.graph.class_scores import class_value
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import mac_count
from redpp_serve.graph.ranges import unknown_integers
from redpp_serve.pruning.families import IMAGE, TABLE, UNKNOWN, Scale, drawn_numbers, families_of, kind_of, structured
from redpp_serve.pruning.matching import Matcher, SynthesisBudget, has_floats, synthesize
from redpp_serve.pruning.read_by_norms import as_read_by_norms, known_statistics, trained_norms
from redpp_serve.pruning.scales import Scales, read_scales
from redpp_serve.runtime.moments import Moments

_MOST_STEPS = 24  # of batch-norm matching from noise
# Numbers of inputs by the network's multiply-accumulates: what the unknowns of late layers need, as far as time allows.
_FITTED = ((2e7, 512), (2e8, 192), (1e9, 256), (math.inf, 96))
_JUDGED = ((2e8, 48), (1e9, 24), (math.inf, 12))  # of each family
_FORWARD_AND_BACKWARD = 3
_MATCHED_STEPS = 8  # from structured inputs
_FITTED_FAMILIES, _JUDGING_FAMILIES = 4, 3  # at most
_REAL_JUDGED = 0.2
_LEAST_FAMILIES = 2  # unfitted ones that judge alone
_NEAR = 4.0  # times as far as the nearest family: farther ones tell nothing of the network
_CONTRAST = 0.7
_RANKED, _RANKED_NUMBERS = 32, 10**7  # inputs of each family to rank it by; fewer where all would have more numbers
_LEAST_DRAWN = 8  # of each family, however little time there is
_SECONDS_PER_DRAWN_NUMBER = 8e-7


def synthesis_budget(
    graph: Graph, seconds: float = math.inf, pace: float = 0.0, drawing: float = math.inf
) -> SynthesisBudget:
    """Return the budget of a network.

    Args:
        graph: the network.
        seconds: for matching inputs to batch norms.
        pace: seconds of the network for one input, see `effort.pace`.
        drawing: seconds for drawing inputs, or for matching noise where they are of an unknown kind; a few are made
            however little that is.
    """
    macs = mac_count(graph)
    images, judged = (next(n for most, n in table if macs <= most) for table in (_FITTED, _JUDGED))
    batch = 32 if macs < 1e9 else 8
    ranked = _ranked_of_each(graph)
    full = SynthesisBudget(images, batch, _MOST_STEPS, judged, ranked=ranked)
    share = drawing / max(drawing_seconds(graph, full), 1e-9)
    if share < 1:
        images = max(batch, int(share * images) // batch * batch)
        judged, ranked = (max(_LEAST_DRAWN, int(share * n)) for n in (judged, ranked))
    if any(kind_of(spec) == UNKNOWN for spec in graph.inputs):
        step = max(_FORWARD_AND_BACKWARD * _MOST_STEPS * pace, 1e-9)
        left = drawing / step - _whole(judged, batch)
        images = max(batch, int(min(images, left)) // batch * batch)
    affordable = seconds / max(_FORWARD_AND_BACKWARD * _MATCHED_STEPS * pace, 1e-9)
    matched = int(min(images, affordable) // batch * batch) if trained_norms(graph)[0] and has_floats(graph) else 0
    return SynthesisBudget(images, batch, _MOST_STEPS, judged, matched, ranked)


def _whole(judged: int, batch: int) -> int:
    """Return how many inputs are made where so many are judged: noise is matched in batches."""
    return -(-judged // batch) * batch


def drawing_seconds(graph: Graph, budget: SynthesisBudget) -> float:
    """Predict the seconds of `effort.spent` that drawing the structured inputs of a budget takes."""
    each = sum(drawn_numbers(spec) for spec in graph.inputs)
    ranked = budget.ranked * len(families_of(_leading(graph)))
    return (budget.images + _JUDGING_FAMILIES * budget.judged + ranked) * each * _SECONDS_PER_DRAWN_NUMBER


def _ranked_of_each(graph: Graph) -> int:
    """Return how many inputs of each family may rank it."""
    numbers = max(1, len(families_of(_leading(graph)))) * sum(math.prod(spec.shape) for spec in graph.inputs)
    return max(_LEAST_DRAWN, min(_RANKED, _RANKED_NUMBERS // max(1, numbers)))


@dataclass(frozen=True)
class Sources:
    """What is known beyond the network itself.

    Attributes:
        inputs: real unlabelled inputs, (images, ...) for each network input; empty without.
        scale: the value range of images; None to estimate it.
        moments: second moments of what a serving original reads.
        widths: of each channel set, where an earlier run has found them, see `Options.keep_point`.
    """

    inputs: tuple[Tensor, ...] = ()
    scale: Scale | None = None
    moments: Moments | None = None
    widths: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Prepared:
    """Inputs to fit to and to judge by.

    Attributes:
        fit: (images, ...) for each network input.
        families: inputs that nothing is fitted to, by the name of their family.
        note: how they were made, in words.
        kind_known: whether they are of the kind that the network reads, or tied to it by its batch norms.
        unread: inputs of which nobody knows what they hold, so that the others tell nothing either: integers without a
            range, rows of a table whose columns have no scale, and signals whose amplitude is unknown.
    """

    fit: tuple[Tensor, ...]
    families: Mapping[str, tuple[Tensor, ...]]
    note: str
    kind_known: bool
    unread: tuple[InputSpec, ...] = ()


def prepare(
    graph: Graph,
    sources: Sources,
    budget: SynthesisBudget,
    *,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Make, or divide, the inputs of a run; the same for the same arguments.

    Inputs of a known kind are structured: the families nearest to the network to fit to, others to judge by. Inputs of
    an unknown kind are noise that is matched to the batch norms. Real inputs join the fitted ones, but for a fifth that
    judges, and give the ranges of integers that are not known otherwise. Columns of a table may hold 0.1 or 10,000:
    only a batch norm that reads them tells, constants before the first layer, or real inputs; for signals see
    `scales.read_scales`.
    """
    graph = replace(graph, inputs=_seen(graph.inputs, sources.inputs))
    told = bool(sources.inputs) or sources.moments is not None
    ranges = read_scales(graph, sources.scale, sources.inputs, seed)
    scales, every = ranges.scales, (ranges.scales, *ranges.others)
    unread = unknown_integers(graph.inputs) + (() if told else (*_rows_without_scale(graph), *ranges.untold))
    known = all(kind_of(spec) != UNKNOWN for spec in graph.inputs)
    if known:
        names = _ranked(graph, scales, seed, budget.ranked)
        fitted = names[: min(_FITTED_FAMILIES, max(1, len(names) // 2))]
        each = -(-budget.images // (len(fitted) * len(every)))
        parts = [_structured(graph, name, each, seed, one) for one in every for name in fitted]
        fit = tuple(torch.stack(xs, 1).flatten(0, 1)[: budget.images] for xs in zip(*parts, strict=True))
        note = f"structured inputs ({', '.join(fitted)})"
        if budget.matched:
            few = replace(budget, images=budget.matched, steps=_MATCHED_STEPS)
            made = synthesize(graph, few, fit, seed=seed, device=device, checkpoint=checkpoint, progress=progress)
            fit = tuple(torch.cat([x, y[len(x) :]]) for x, y in zip(made.inputs, fit, strict=True))
            first, last = made.losses
            note += f", {len(made.inputs[0])} of them matched to batch norms, mismatch {first:.2g} -> {last:.2g}"
        others = names[len(fitted) :][:_JUDGING_FAMILIES]
        judged: dict[str, tuple[Tensor, ...]] = {}
        for k, one in enumerate(every):
            judged |= _judging(graph, names, others, (budget.judged, seed + 1), one, " as bytes" if k else "")
        note += f"; judged by {', '.join(judged)}"
        note += (
            "; nothing tells whether pictures are 0..1 or 0..255: --preprocess or --inputs does"
            if ranges.others
            else ""
        )
    else:
        made = synthesize(
            graph, budget, seed=seed, scales=scales, device=device, checkpoint=checkpoint, progress=progress
        )
        second = synthesize(
            graph,
            replace(budget, images=_whole(budget.judged, budget.batch)),
            seed=seed + 1,
            scales=scales,
            device=device,
        )
        fit, other = made.inputs, tuple(x[: budget.judged] for x in second.inputs)
        judged = {"another start": other, "scaled": _scaled(other, 0.7), "louder": _scaled(other, 1.3)}
        note = made.note or "inputs matched to batch-norm statistics, mismatch {:.3g} -> {:.3g}".format(*made.losses)
    real = len(sources.inputs[0]) if sources.inputs else 0
    if real:
        held = min(real, max(4, round(_REAL_JUDGED * real)))
        fit = tuple(torch.cat([x[:-held], y]) for x, y in zip(sources.inputs, fit, strict=True))
        judged = {"real": tuple(x[-held:] for x in sources.inputs), **judged}
        note = f"{real - held} real inputs and {note}; {held} real ones judge"
    tied = known or bool(real) or sources.moments is not None or bool(trained_norms(graph)[0])
    return Prepared(fit, judged, note, tied and not unread, unread)


def _judging(
    graph: Graph, names: Sequence[str], others: Sequence[str], draw: tuple[int, int], scales: Scales, label: str
) -> dict[str, tuple[Tensor, ...]]:
    """Make the families that judge, and more of the nearest one where they are few.

    Args:
        graph: the network.
        names: of all families, the nearest first.
        others: those of them that nothing is fitted to.
        draw: how many inputs of each, and the seed.
        scales: the ranges to make them in.
        label: what their names end with.
    """
    made = {name + label: _structured(graph, name, *draw, scales) for name in others}
    if len(others) < _LEAST_FAMILIES:
        again = _structured(graph, names[0], *draw, scales)
        made[f"other {names[0]}{label}"] = again
        if any(kind_of(spec) == IMAGE or not spec.holds_integers for spec in graph.inputs):
            made[f"faded {names[0]}{label}"] = _faded(graph.inputs, again)
    return made


def _rows_without_scale(graph: Graph) -> tuple[InputSpec, ...]:
    """Return the tables of floats of which neither a batch norm nor a constant tells."""
    told = known_statistics(graph)
    return tuple(spec for spec in graph.inputs if kind_of(spec) == TABLE and spec.name not in told)


def _seen(specs: tuple[InputSpec, ...], real: tuple[Tensor, ...]) -> tuple[InputSpec, ...]:
    """Give inputs of integers whose range is unknown that of the user's own inputs, where there are any."""
    if not real:
        return specs
    seen = [replace(spec, ranges=((int(x.min()), int(x.max())),)) for spec, x in zip(specs, real, strict=True)]
    return tuple(new if old.holds_integers and not old.ranges else old for old, new in zip(specs, seen, strict=True))


def _leading(graph: Graph) -> InputSpec:
    """Return the input that gives the families their names: the first of those of most families."""
    return max(graph.inputs, key=lambda spec: len(families_of(spec)))


def _structured(graph: Graph, family: str, count: int, seed: int, scales: Scales) -> tuple[Tensor, ...]:
    """Make inputs of a family of the leading network input; other inputs take the family of the same place."""
    place = families_of(_leading(graph)).index(family)
    made = []
    for k, spec in enumerate(graph.inputs):
        names = families_of(spec)
        made.append(structured(spec, count, seed + 7919 * k, names[place % len(names)], scales.get(spec.name)))
    return as_read_by_norms(graph, tuple(made))


def _ranked(graph: Graph, scales: Scales, seed: int, most: int = _RANKED) -> list[str]:
    """Return the families of the leading input that a network takes for its own kind, the nearest first.

    Near are those whose batch-norm statistics are the stored ones. Without batch norm they are the ones of which a
    classifier is surest while it gives them many different classes: the mutual information of input and class.
    """
    names = list(families_of(_leading(graph)))
    norms, _ = trained_norms(graph)
    classes = class_value(graph)
    if not norms and classes is None:
        return names
    matcher = Matcher(graph, norms, "cpu", use_classes=False)
    program = Program(graph, [classes or graph.outputs[0]])
    count = min(most, _ranked_of_each(graph))
    found = {}
    with torch.no_grad():
        for name in names:
            inputs = _structured(graph, name, count, seed + 2, scales)
            far = matcher.losses(inputs, torch.empty(0))[0] if norms else 1 / _information(program(*inputs)[0])
            found[name] = float(far) if math.isfinite(far) else math.inf
    near = _NEAR * min(found.values())
    return sorted((name for name in names if found[name] <= near), key=found.__getitem__)


def _information(scores: Tensor) -> float:
    """Return the mutual information of input and class, in nats, for scores (n, classes) or their softmax."""
    given = bool((scores >= 0).all()) and torch.allclose(scores.sum(1), scores.new_ones(len(scores)), atol=1e-3)
    shares = (scores if given else scores.softmax(1)).double()
    mean = shares.mean(0)
    information = -torch.special.xlogy(mean, mean).sum() + torch.special.xlogy(shares, shares).sum(1).mean()
    return max(float(information), 1e-6)


def _faded(specs: tuple[InputSpec, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Take three tenths of the contrast of each input away, but for tokens and masks."""
    made = []
    for spec, x in zip(specs, inputs, strict=True):
        mean = x.flatten(1).double().mean(1).view(-1, *[1] * (x.dim() - 1)).to(x)
        if x.is_floating_point():
            made.append(_CONTRAST * x + (1 - _CONTRAST) * mean)
        elif kind_of(spec) == IMAGE:
            made.append((_CONTRAST * x + (1 - _CONTRAST) * mean).round().to(x.dtype))
        else:
            made.append(x)
    return tuple(made)


def _scaled(inputs: tuple[Tensor, ...], factor: float) -> tuple[Tensor, ...]:
    return tuple(x * factor if x.is_floating_point() else x for x in inputs)
