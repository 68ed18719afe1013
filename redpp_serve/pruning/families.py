"""Make structured inputs without data: of the kind that a network reads, in several families, in its value range.

What a network does on smooth noise says nothing about photographs. Pictures with edges, textures, shading and objects
come much closer, and families that a fit has not used judge it nearly as real inputs would. Input k of a family at a
seed is the same whatever the count.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.passes import is_inference_norm
from redpp_serve.pruning import objects, pictures, signals, surfaces
from redpp_serve.pruning.glyphs import handwriting, writing
from redpp_serve.pruning.textures import Array, Random, develop, shrink

IMAGE, SIGNAL, TABLE, TOKENS, UNKNOWN = "image", "signal", "table", "tokens", "unknown"

_LEAST_PICTURE, _LEAST_SIGNAL, _MOST_COLUMNS = 8, 256, 255
_SMALLEST_CANVAS = 64  # smaller pictures are drawn larger and reduced, as photographs would be
_MARK_SIZE = 64  # grey pictures up to this size show one digit or letter
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_DEFAULT_TOKENS = 1  # the largest token that every network with integer inputs accepts

_PICTURES: dict[str, Callable[[Random, int, int], Array]] = {
    "mixed": pictures.mixed,
    "things": objects.things,
    "surfaces": surfaces.surfaces,
    "leaves": pictures.leaves,
    "scenes": pictures.scenes,
    "warps": pictures.warps,
    "fractals": pictures.fractals,
    "glyphs": writing,
}
_SIGNALS: dict[str, Callable[[Random, int], Array]] = {
    "speech": signals.speech,
    "tones": signals.tones,
    "chirps": signals.chirps,
    "noises": signals.noises,
}
_TABLES: dict[str, Callable[[Random, Random, int], Array]] = {
    "correlated": signals.correlated,
    "heavy_tailed": signals.heavy_tailed,
    "clustered": signals.clustered,
}
_TOKENS = {"uniform": signals.uniform_tokens, "frequent": signals.frequent_tokens, "repeated": signals.repeated_tokens}
_FAMILIES: dict[str, tuple[str, ...]] = {
    IMAGE: tuple(_PICTURES),
    SIGNAL: tuple(_SIGNALS),
    TABLE: tuple(_TABLES),
    TOKENS: tuple(_TOKENS),
    UNKNOWN: (),
}


@dataclass(frozen=True)
class Scale:
    """The value range that a network reads: an input is (x - mean) / std of an x in 0..1.

    Attributes:
        mean: the mean of each channel, or one for all, on the scale 0 to 1.
        std: the standard deviation of each channel, or one for all, on the same scale; negative for inverted grey.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def apply(self, inputs: Tensor) -> Tensor:
        """Return inputs (N, channels, ...) in 0..1 as the network reads them."""
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        mean, std = (torch.tensor(v, dtype=inputs.dtype).reshape(shape) for v in (self.mean, self.std))
        return (inputs - mean) / std


def kind_of(spec: InputSpec) -> str:
    """Return what an input is taken for: ``image``, ``signal``, ``table``, ``tokens`` or ``unknown``.

    An image is float of shape (1, 3 or 4, height, width) with sides of at least 8; a signal float of shape (n,) or
    (1, n) with n of at least 256; a table float of shape (n,) or (1, n) with fewer; tokens are integers.
    """
    if not getattr(torch, spec.dtype).is_floating_point:
        return TOKENS if spec.dtype in ("int32", "int64") else UNKNOWN
    shape = spec.shape
    if len(shape) == 3 and shape[0] in (1, 3, 4) and min(shape[1:]) >= _LEAST_PICTURE:
        return IMAGE
    if len(shape) == 1 or (len(shape) == 2 and shape[0] == 1):
        return SIGNAL if shape[-1] >= _LEAST_SIGNAL else TABLE
    return UNKNOWN


def families_of(spec: InputSpec) -> tuple[str, ...]:
    """Return the names of the families for an input, the one nearest to real inputs first; none for an unknown kind."""
    kind = kind_of(spec)
    if kind == IMAGE and _shows_marks(spec.shape):
        return ("glyphs", *(name for name in _FAMILIES[kind] if name != "glyphs"))
    return _FAMILIES[kind]


def structured(spec: InputSpec, count: int, seed: int, family: str | None = None, scale: Scale | None = None) -> Tensor:
    """Return structured inputs (count, *spec.shape) of one family.

    Args:
        spec: the input.
        count: how many.
        seed: other seeds give other inputs.
        family: one of `families_of`; by default the first.
        scale: for images the range that the network reads, by default 0..1; ignored for other kinds.

    Raises:
        RedppError: the kind of the input is unknown, or it has no such family.
    """
    names = families_of(spec)
    family = family or next(iter(names), "")
    if family not in names:
        raise RedppError(
            f"input {spec.name} of shape {spec.shape} and dtype {spec.dtype} has no family of inputs {family!r}",
            f"one of {', '.join(names)}" if names else "an image, a signal, a row of a table or integer tokens",
            "give real inputs with --inputs",
        )
    streams = [np.random.default_rng(_key(family, seed, k)) for k in range(count)]
    kind = kind_of(spec)
    if kind == IMAGE:
        made = [_picture(rng, spec.shape, family) for rng in streams]
    elif kind == SIGNAL:
        made = [_SIGNALS[family](rng, spec.shape[-1]) for rng in streams]
    elif kind == TABLE:
        common = _key(family, seed, -1)
        made = [_TABLES[family](rng, np.random.default_rng(common), spec.shape[-1]) for rng in streams]
    else:
        length = int(np.prod(spec.shape))
        drawn = [_TOKENS[family](rng, length, _DEFAULT_TOKENS) for rng in streams]
        stacked = np.stack(drawn) if drawn else np.zeros((0, length))
        return torch.from_numpy(stacked).to(getattr(torch, spec.dtype)).reshape(count, *spec.shape)
    stacked = np.stack(made) if made else np.zeros((0, *spec.shape), dtype=np.float32)
    inputs = torch.from_numpy(stacked).reshape(count, *spec.shape)
    if scale is not None and kind == IMAGE:
        inputs = scale.apply(inputs)
    return inputs.to(getattr(torch, spec.dtype))


def _key(family: str, seed: int, index: int) -> list[int]:
    """Return what seeds the generator of one input."""
    return [zlib.crc32(family.encode()), seed % 2**63, index + 1]


def _picture(rng: Random, shape: tuple[int, ...], family: str) -> Array:
    """Return one picture (channels, height, width) in 0..1."""
    channels, height, width = shape
    factor = max(1, -(-_SMALLEST_CANVAS // min(height, width)))
    if family == "glyphs" and _shows_marks(shape):
        picture = handwriting(rng, height * factor, width * factor)
    else:
        picture = _PICTURES[family](rng, height * factor, width * factor)
        if family != "mixed":  # which has been through the camera
            picture = develop(rng, picture)
    picture = np.clip(shrink(picture, factor), 0, 1).transpose(2, 0, 1)
    if channels == 1:
        return np.asarray(np.tensordot(_GREY, picture, 1)[None], dtype=np.float32)
    if channels == 4:  # a fourth channel, such as near infrared or a mask: another mixture of the colours
        weights = rng.dirichlet((1, 1, 1)).astype(np.float32)
        fourth = np.tensordot(weights, picture, 1)[None]
        picture = np.concatenate([picture, 1 - fourth if rng.random() < 0.3 else fourth])
    return np.ascontiguousarray(picture, dtype=np.float32)


def _shows_marks(shape: tuple[int, ...]) -> bool:
    """Return whether images are grey and so small that they show a single digit or letter."""
    return shape[0] == 1 and max(shape[1:]) <= _MARK_SIZE


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
_JUDGES = ("mixed", "leaves", "warps", "glyphs")
_MARKS_TO_TELL, _NEAR_THE_BEST = 64, 0.85
_NORMS_TO_MATCH, _IMAGES_TO_MATCH, _MISMATCH_OF_ONE = 6, 6, 3.0


@torch.no_grad()
def estimate_scale(graph: Graph, seed: int = 0) -> Scale:
    """Return the range of images under which a network's first batch norms see what they have stored.

    Raw pictures of a few families are sent through the first layers in each usual range, grey ones also in those of
    standardised data sets. The range counts whose means and deviations before the first batch norms are nearest to the
    stored ones for the family that is farthest from them, as none of the families is the data that the network was
    trained on. Without batch norm, a classifier of small grey images tells by its scores for digits and letters. The
    range is 0..1 where nothing tells: other networks without batch norm, more than one input, or an input that is no
    image. A range that the user or the architecture declares is better than this estimate.
    """
    norms = [node for node in graph.nodes if is_inference_norm(node)][:_NORMS_TO_MATCH]
    if len(graph.inputs) != 1 or kind_of(graph.inputs[0]) != IMAGE:
        return Scale()
    (spec,) = graph.inputs
    if not norms:
        return _scale_by_classes(graph, seed) if _shows_marks(spec.shape) else Scale()
    program = Program(graph, [norm.args[0].name for norm in norms])
    stored = [[graph.tensors[norm.args[k].name].double() for k in (3, 4)] for norm in norms]
    ranges = [_for_channels(scale, spec.shape[0]) for scale in _RANGES]
    usual = len(ranges)
    if spec.shape[0] == 1:
        ranges += [_INVERSE] + [Scale((mean,), (std,)) for mean in _GREY_MEANS for std in _GREY_STDS]
    worst = np.zeros(len(ranges))
    dtype = getattr(torch, spec.dtype)
    for family in _JUDGES:
        pictures = structured(InputSpec(spec.name, spec.shape), _IMAGES_TO_MATCH, seed, family)
        misses = [_mismatch(program(scale.apply(pictures).to(dtype)), stored) for scale in ranges]
        worst = np.maximum(worst, misses)
    worst[usual:] *= _DOUBT
    return ranges[int(np.argmin(worst))]


def _scale_by_classes(graph: Graph, seed: int) -> Scale:
    """Return the range in which a classifier tells marks from each other: 0..1, its inverse, -1..1 or MNIST's.

    The mutual information of class and mark is measured in each. It grows with the contrast of the input, so the range
    of the least contrast counts that comes near the best one.
    """
    (spec,) = graph.inputs
    pictures = structured(InputSpec(spec.name, spec.shape), _MARKS_TO_TELL, seed, "glyphs")
    information = []
    ranges = (Scale(), _INVERSE, Scale((0.5,), (0.5,)), Scale((0.1307,), (0.3081,)))
    program = Program(graph, graph.outputs[:1])
    for scale in ranges:
        (scores,) = program(scale.apply(pictures).to(getattr(torch, spec.dtype)))
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
