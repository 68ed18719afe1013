"""In which ranges a network may read pictures where nothing in it tells: about 0..1, or 0..255 as bytes.

Without batch norm and constants the scores of a classifier tell the order of magnitude: training leaves them a spread
of a few units over pictures, which is 255 times as much or as little in the other range. Where they do not tell either,
both ranges are possible, and what is pruned is judged in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from redpp_serve.graph.class_scores import class_value
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.ranges import blank
from redpp_serve.pruning.families import Scale, structured

AS_UNIT, AS_BYTES = Scale(), Scale((0.0,), (1 / 255,))
_FAMILIES, _PICTURES, _NUMBERS = ("mixed", "leaves", "things"), 8, 10**7  # pictures of each, and numbers in all
# The spread of a trained classifier's scores over pictures, in nats.
_LEAST_SPREAD, _LARGEST_SPREAD = 0.3, 75.0
_ALIKE = 1e-4  # how far outputs may be from proportional where no amplitude matters
_UNDERFLOWN = -1000.0  # for the logarithm of a probability of 0: beyond those that float32 holds


@torch.no_grad()
def possible_ranges(graph: Graph, spec: InputSpec, seed: int, real: Tensor | None = None) -> tuple[Scale, ...]:
    """Return the ranges in which a network without batch norm may read the pictures of an input.

    Args:
        graph: the network.
        spec: the input, pictures of floats.
        seed: of the pictures that are tried.
        real: inputs (n, ...) of the user's, which tell.

    Returns:
        one range, or two where nothing tells which; that of 0..1 comes first.
    """
    if real is not None:
        return (AS_BYTES if float(real.double().std()) > math.sqrt(255) / 4 else AS_UNIT,)
    count = max(2, min(_PICTURES, _NUMBERS // (len(_FAMILIES) * math.prod(spec.shape))))
    pictures = torch.cat([structured(spec, count, seed, family) for family in _FAMILIES])
    classes = class_value(graph)
    program = Program(graph, [classes] if classes else None)
    others = {each.name: blank(each, len(pictures)) for each in graph.inputs}
    runs = [program(*{**others, spec.name: pictures * loudest}.values()) for loudest in (1.0, 255.0)]
    if proportional(runs):
        return (AS_UNIT,)
    if classes is None:
        return AS_UNIT, AS_BYTES
    spreads = [_spread(scores) for (scores,) in runs]
    likely = [
        scale
        for scale, spread in zip((AS_UNIT, AS_BYTES), spreads, strict=True)
        if _LEAST_SPREAD <= spread <= _LARGEST_SPREAD
    ]
    return tuple(likely) or (AS_UNIT, AS_BYTES)


def proportional(runs: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether outputs keep their proportions from one run to the others, so that no amplitude matters."""
    for first, *louder in zip(*runs, strict=True):
        if not first.is_floating_point():
            return False
        for y in louder:
            a, b = first.double().flatten(), y.double().flatten()
            if not float(a @ b) >= (1 - _ALIKE) * float(a.norm() * b.norm()):
                return False
    return True


def _spread(scores: Tensor) -> float:
    """Return the deviation over pictures of scores (n, classes), or of the logarithms of probabilities."""
    scores = scores.double()
    if bool((scores >= 0).all()) and torch.allclose(scores.sum(1), scores.new_ones(len(scores)), atol=1e-3):
        scores = torch.where(scores > 0, scores.log(), _UNDERFLOWN)
    return float((scores - scores.mean(1, keepdim=True)).var(0).mean().sqrt())
