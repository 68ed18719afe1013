"""Find the range of floats that a network reads, from what it holds: batch norms, constants, scores.

The same picture is 0..1 for one network and 0..255 for another, and a sound's loudest sample is 1 for one and 32767 for
the next. A network that is fitted in the wrong range looks right there and is wrong where it serves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node
from redpp_serve.graph.passes import is_inference_norm
from redpp_serve.graph.ranges import blank
from redpp_serve.pruning.families import (
    IMAGE,
    SIGNAL,
    UNKNOWN,
    Scale,
    as_read,
    channels_first,
    families_of,
    kind_of,
    shows_marks,
    structured,
)
from redpp_serve.pruning.matching import smooth_noise
from redpp_serve.pruning.picture_ranges import AS_UNIT, possible_ranges, proportional
from redpp_serve.pruning.read_by_constants import Affine, read_by_constants
from redpp_serve.pruning.read_by_norms import trained_norms

Scales = Mapping[str, Scale]
"""The range of each input of floats that is an image, a signal or of an unknown kind, by name."""

# What the loudest sample of a signal may be, to be compared with constants: of floats, 8, 16, 24 and 32 bits.
_AMPLITUDES = (1.0, 2.0**7, 2.0**15, 2.0**23, 2.0**31)
_LOUDNESS = (1.0, *(4.0**k for k in range(-3, 17) if k))  # to be compared with batch norms
_SIGNALS_TO_MATCH, _UNLIKE = 4, 2.0  # signals of a family; a mismatch that tells nothing
_NOISE_DOUBT = 3.0  # how much better another amplitude than 1 must be for noise of an unknown kind
_PEAK, _MOST = 0.999, 1 << 24  # quantile of real inputs; numbers that torch takes one of


@dataclass(frozen=True)
class Found:
    """What is known of the ranges of a network's inputs of floats.

    Attributes:
        scales: the range of each, the likeliest one where there are several.
        others: the same, with other ranges of images that are possible too.
        untold: signals whose amplitude nothing tells.
    """

    scales: Scales
    others: tuple[Scales, ...] = ()
    untold: tuple[InputSpec, ...] = ()


def read_scales(graph: Graph, declared: Scale | None = None, real: Sequence[Tensor] = (), seed: int = 0) -> Found:
    """Find the range of each input, and the signals whose amplitude nothing tells.

    Images have the declared range or that of `estimate_scale`, and where that has nothing to go by, those of
    `possible_ranges`. Signals are -1..1 in one network and whole numbers of 16 bits in the next: constants before the
    first layer tell, then batch norms, else real inputs do. Where outputs follow the amplitude, or do not depend on it,
    any will do.
    """
    found: dict[str, Scale] = {}
    others: dict[str, Scale] = {}
    untold = []
    constants = read_by_constants(graph)
    for k, spec in enumerate(graph.inputs):
        kind = kind_of(spec)
        if not getattr(torch, spec.dtype).is_floating_point or kind not in (IMAGE, SIGNAL, UNKNOWN):
            continue
        if kind == IMAGE and declared is None and not _has_range(graph, spec):
            first, *more = possible_ranges(graph, spec, seed, real[k] if real else None)
            found[spec.name] = estimate_scale(graph, seed, spec) if first == AS_UNIT else first
            if more:
                others[spec.name] = more[0]
        elif kind == IMAGE:
            found[spec.name] = declared or estimate_scale(graph, seed, spec)
        elif spec.name in constants:
            found[spec.name] = _by_amplitude(constants[spec.name])
        elif real:
            found[spec.name] = _of_real(real[k], kind)
        elif (loudness := _loudness_by_norms(graph, spec, seed)) is not None:
            found[spec.name] = _amplitude(loudness)
        elif kind == SIGNAL and not _any_amplitude(graph, spec, seed):
            untold.append(spec)
    return Found(found, ({**found, **others},) if others else (), tuple(untold))


def _has_range(graph: Graph, spec: InputSpec) -> bool:
    """Return whether batch norms of a single input, or constants, tell the range of images."""
    return spec.name in read_by_constants(graph) or (
        len(graph.inputs) == 1 and any(map(is_inference_norm, graph.nodes))
    )


def _amplitude(loudest: float) -> Scale:
    return Scale((0.0,), (1 / loudest,))


def _of_real(inputs: Tensor, kind: str) -> Scale:
    """Return the range of real inputs (n, ...): the amplitude of signals, else mean and deviation."""
    numbers = inputs.double().flatten()[:_MOST]
    if kind == SIGNAL:
        return _amplitude(float(numbers.abs().quantile(_PEAK)) or 1.0)
    deviation, mean = (float(x) for x in torch.std_mean(numbers, correction=0))
    return Scale((-mean / (deviation or 1.0),), (1 / (deviation or 1.0),))


def _by_amplitude(affine: Affine) -> Scale:
    """Return the range of a signal that constants bring to about -1..1."""
    scale, shift = float(affine.scale.abs().median()), float((affine.shift / affine.scale).median())
    nearest = min(_AMPLITUDES, key=lambda loudest: abs(math.log(loudest * scale)))
    # A signal without a sign has its centre away from 0, and a scale of its own.
    return Scale((shift * scale,), (scale,)) if shift * scale < -0.5 else _amplitude(nearest)


@torch.no_grad()
def _loudness_by_norms(graph: Graph, spec: InputSpec, seed: int) -> float | None:
    """Return the amplitude under which the first batch norms see what they have stored, if they tell."""
    norms, _ = trained_norms(graph)
    if not norms or len(graph.inputs) != 1:
        return None
    program, stored = _first_norms(graph, norms)
    made = [structured(spec, _SIGNALS_TO_MATCH, seed, name) for name in families_of(spec)]
    # Noise is matched to the norms afterwards, which mends small differences.
    doubt, made = (_DOUBT, made) if made else (_NOISE_DOUBT, list(smooth_noise(graph.inputs, _SIGNALS_TO_MATCH, seed)))

    def miss(loudness: float) -> float:
        return max(_mismatch(program(x * loudness), stored) for x in made) * (1 if loudness == 1 else doubt)

    best = min(_LOUDNESS, key=miss)
    best = min((best, best / 2, best * 2), key=miss)
    return best if miss(best) < _UNLIKE else None


@torch.no_grad()
def _any_amplitude(graph: Graph, spec: InputSpec, seed: int) -> bool:
    """Return whether the outputs keep their proportions when a signal gets louder."""
    program, others = Program(graph), {each.name: blank(each, _SIGNALS_TO_MATCH) for each in graph.inputs}
    signals = structured(spec, _SIGNALS_TO_MATCH, seed)
    runs = [program(*{**others, spec.name: signals * loudest}.values()) for loudest in _AMPLITUDES[:3]]
    return proportional(runs)


# Usual ranges of images as (mean, std) on the scale 0 to 1: 0..1, -1..1, ImageNet's, MNIST's, 0..255, bytes without
# their mean.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_RANGES = (
    Scale(),
    Scale((0.5,), (0.5,)),
    Scale(*_IMAGENET),
    Scale((0.1307,), (0.3081,)),
    Scale((0.0,), (1 / 255,)),
    Scale(_IMAGENET[0], (1 / 255,)),
)
# Of grey images also the inverse, and means and deviations of standardised data sets. One of these must be better than
# the usual ranges by a tenth: pictures and their negatives differ little in their statistics.
_INVERSE = Scale((1.0,), (-1.0,))
_GREY_MEANS, _GREY_STDS, _DOUBT = (0.1, 0.2, 0.3, 0.4, 0.5), (0.2, 0.25, 0.3, 0.35, 0.4), 1.1
# Ends of ranges that images come in, the usual ones first, and of those that layers read.
_DECLARED = ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (0.0, 65535.0))
_READ = ((0.0, 1.0), (-1.0, 1.0), (-2.1, 2.4), (-0.42, 2.82), (-0.5, 0.5), (0.0, 255.0), (-123.0, 132.0))
_JUDGES = ("mixed", "leaves", "warps", "glyphs")
_MARKS_TO_TELL, _NEAR_THE_BEST = 64, 0.85
_NORMS_TO_MATCH, _IMAGES_TO_MATCH, _MISMATCH_OF_ONE = 6, 6, 3.0


@torch.no_grad()
def estimate_scale(graph: Graph, seed: int = 0, spec: InputSpec | None = None) -> Scale:
    """Return the range of images under which a network's first batch norms see what they have stored.

    Raw pictures of a few families are sent through the first layers in each usual range, grey ones also in those of
    standardised data sets. The range counts whose means and deviations before the first batch norms are nearest to the
    stored ones for the family that is farthest from them, as none of the families is the data that the network was
    trained on. Without batch norm, or beside other inputs, constants before the first layer tell, and a classifier of
    small grey images tells by its scores for digits and letters. The range is 0..1 where nothing tells, or the input is
    no image of floats. A range that the user or the architecture declares is better than this estimate.

    Args:
        graph: the network.
        seed: of the pictures.
        spec: the input, by default the first.
    """
    norms = [node for node in graph.nodes if is_inference_norm(node)]
    spec = spec or graph.inputs[0]
    if kind_of(spec) != IMAGE or spec.holds_integers:
        return Scale()
    channels, *_ = shape = channels_first(spec.shape)
    if not norms or len(graph.inputs) != 1:
        if spec.name in (constants := read_by_constants(graph)):
            return _by_constants(constants[spec.name])
        return _scale_by_classes(graph, seed) if shows_marks(shape) and len(graph.inputs) == 1 else Scale()
    program, stored = _first_norms(graph, norms)
    ranges = [_for_channels(scale, channels) for scale in _RANGES]
    usual = len(ranges)
    if channels == 1:
        ranges += [_INVERSE] + [Scale((mean,), (std,)) for mean in _GREY_MEANS for std in _GREY_STDS]
    worst = np.zeros(len(ranges))
    dtype = getattr(torch, spec.dtype)
    for family in _JUDGES:
        pictures = structured(InputSpec(spec.name, shape), _IMAGES_TO_MATCH, seed, family)
        misses = [_mismatch(program(as_read(pictures, spec, scale).to(dtype)), stored) for scale in ranges]
        worst = np.maximum(worst, misses)
    worst[usual:] *= _DOUBT
    return ranges[int(np.argmin(worst))]


def _first_norms(graph: Graph, norms: Sequence[Node]) -> tuple[Program, list[list[Tensor]]]:
    """Return what the first batch norms read, and the means and variances that they have stored."""
    first = norms[:_NORMS_TO_MATCH]
    stored = [[graph.tensors[norm.args[k].name].double() for k in (3, 4)] for norm in first]
    return Program(graph, [norm.args[0].name for norm in first]), stored


def _by_constants(affine: Affine) -> Scale:
    """Return the usual range of images that constants bring nearest to one that layers read."""
    scale, shift = float(affine.scale.median()), float(affine.shift.median())

    def distance(ends: tuple[float, float]) -> float:
        low, high = sorted(scale * end + shift for end in ends)
        return min((abs(low - a) + abs(high - b)) / (b - a) for a, b in _READ)

    low, high = min(_DECLARED, key=distance)
    return Scale((-low / (high - low),), (1 / (high - low),))


def _scale_by_classes(graph: Graph, seed: int) -> Scale:
    """Return the range in which a classifier tells marks from each other: 0..1, its inverse, -1..1 or MNIST's.

    The mutual information of class and mark is measured in each. It grows with the contrast of the input, so the range
    of the least contrast counts that comes near the best one.
    """
    (spec,) = graph.inputs
    pictures = structured(InputSpec(spec.name, channels_first(spec.shape)), _MARKS_TO_TELL, seed, "glyphs")
    information = []
    ranges = (Scale(), _INVERSE, Scale((0.5,), (0.5,)), Scale((0.1307,), (0.3081,)))
    program = Program(graph, graph.outputs[:1])
    for scale in ranges:
        (scores,) = program(as_read(pictures, spec, scale).to(getattr(torch, spec.dtype)))
        if scores.dim() != 2 or scores.shape[1] < 2:
            return Scale()
        shares = scores.double().softmax(dim=1)
        information.append(float(torch.special.entr(shares.mean(0)).sum() - torch.special.entr(shares).sum(1).mean()))
    near = _NEAR_THE_BEST * max(information)
    return next((scale for scale, found in zip(ranges, information, strict=True) if found >= near), Scale())


def _for_channels(scale: Scale, channels: int) -> Scale:
    """Return a range of three channels as one of any number: other numbers take the means over the channels."""
    if channels == 3:
        return scale
    return Scale((float(np.mean(scale.mean)),), (float(np.mean(scale.std)),))


def _mismatch(values: tuple[Tensor, ...], stored: list[list[Tensor]]) -> float:
    """Return how far the statistics of values (N, channels, ...) are from stored means and variances, on average."""
    total = 0.0
    for value, (mean, variance) in zip(values, stored, strict=True):
        found, centre = torch.var_mean(value.double(), dim=[d for d in range(value.dim()) if d != 1], correction=0)
        deviation = (variance + 1e-5).sqrt()
        ratio = ((found + 1e-5).sqrt() / deviation).log().abs() + (centre - mean).abs() / deviation
        total += float(ratio.nan_to_num(_MISMATCH_OF_ONE).clamp(max=_MISMATCH_OF_ONE).mean())
    return total / len(values)
