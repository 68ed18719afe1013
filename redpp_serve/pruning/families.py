"""Make structured inputs without data: of the kind that a network reads, in several families, in its value range.

What a network does on smooth noise says nothing about photographs. Pictures with edges, textures, shading and objects
come much closer, and families that a fit has not used judge it nearly as real inputs would. Input k of a family at a
seed is the same whatever the count.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from redpp_serve.capture.ranges import LEAST_PICTURE, is_picture
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.graph.ranges import BOTH, spread
from redpp_serve.pruning import objects, pictures, signals, surfaces
from redpp_serve.pruning.glyphs import handwriting, writing
from redpp_serve.pruning.textures import Array, Random, develop, shrink

IMAGE, SIGNAL, TABLE, TOKENS, MASK, UNKNOWN = "image", "signal", "table", "tokens", "mask", "unknown"

_LEAST_SIGNAL = 256
_LEVELS = tuple(2**bits - 1 for bits in (8, 10, 12, 16))  # the highest values of images of integers
_SMALLEST_CANVAS = 64  # smaller pictures are drawn larger and reduced, as photographs would be
_MARK_SIZE = 64  # grey pictures up to this size show one digit or letter
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)

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
_MASKS = {"padded": signals.padded_mask, "short": signals.short_mask, "scattered": signals.scattered_mask}
_FAMILIES: dict[str, tuple[str, ...]] = {
    IMAGE: tuple(_PICTURES),
    SIGNAL: tuple(_SIGNALS),
    TABLE: tuple(_TABLES),
    TOKENS: tuple(_TOKENS),
    MASK: tuple(_MASKS),
    UNKNOWN: (),
}


@dataclass(frozen=True)
class Scale:
    """The value range that a network reads: an input is (x - mean) / std of an x in 0..1, or -1..1 of a signal.

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
    """Return what an input is taken for: ``image``, ``signal``, ``table``, ``tokens``, ``mask`` or ``unknown``.

    An image has the shape (1, 3 or 4, height, width) or (height, width, 1, 3 or 4) with sides of at least 8, and holds
    floats, or integers of all levels of some bits; a signal is float of shape (n,) or (1, n) with n of at least 256; a
    table float of shape (n,) or (1, n) with fewer, or () for one number. Other integers are tokens, those of 0 and 1
    and booleans a mask; they are unknown where their range is.
    """
    shape = spec.shape
    if not getattr(torch, spec.dtype).is_floating_point:
        if not spec.ranges and spec.holds_integers:
            return UNKNOWN
        if (spec.ranges or BOTH) == BOTH:
            return MASK
        ((low, high), *others) = spec.ranges
        levels = not others and low == 0 and high in _LEVELS
        return IMAGE if levels and is_picture(shape) else TOKENS
    if is_picture(shape):
        return IMAGE
    if len(shape) < 2 or (len(shape) == 2 and shape[0] == 1):
        return SIGNAL if _length(shape) >= _LEAST_SIGNAL else TABLE
    return UNKNOWN


def families_of(spec: InputSpec) -> tuple[str, ...]:
    """Return the names of the families for an input, the one nearest to real inputs first; none for an unknown kind."""
    kind = kind_of(spec)
    if kind == IMAGE and shows_marks(channels_first(spec.shape)):
        return ("glyphs", *(name for name in _FAMILIES[kind] if name != "glyphs"))
    return _FAMILIES[kind]


def drawn_numbers(spec: InputSpec) -> int:
    """Return how many numbers are drawn for one input; small pictures are drawn larger."""
    if kind_of(spec) != IMAGE:
        return math.prod(spec.shape)
    channels, *sides = channels_first(spec.shape)
    return channels * math.prod(max(side, _SMALLEST_CANVAS) for side in sides)


def structured(spec: InputSpec, count: int, seed: int, family: str | None = None, scale: Scale | None = None) -> Tensor:
    """Return structured inputs (count, *spec.shape) of one family.

    Args:
        spec: the input.
        count: how many.
        seed: other seeds give other inputs.
        family: one of `families_of`; by default the first.
        scale: for images of floats and signals the range that the network reads, by default 0..1 and -1..1; ignored for
            other kinds.

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
        made = [_picture(rng, channels_first(spec.shape), family) for rng in streams]
    elif kind == SIGNAL:
        made = [_SIGNALS[family](rng, spec.shape[-1]) for rng in streams]
    elif kind == TABLE:
        common = _key(family, seed, -1)
        made = [_TABLES[family](rng, np.random.default_rng(common), _length(spec.shape)) for rng in streams]
    else:
        made = [_integers(rng, spec, family) for rng in streams]
    dtype = getattr(torch, spec.dtype)
    if not made:
        return torch.zeros(0, *spec.shape, dtype=dtype)
    inputs = torch.from_numpy(np.stack(made))
    if kind == IMAGE:
        inputs = as_read(inputs, spec, scale)
    elif kind == SIGNAL and scale is not None:
        inputs = scale.apply(inputs)
    return inputs.reshape(count, *spec.shape).to(dtype)


def _length(shape: tuple[int, ...]) -> int:
    """Return the size of the last dimension, 1 where there is none."""
    return shape[-1] if shape else 1


def _integers(rng: Random, spec: InputSpec, family: str) -> Array:
    """Return the tokens (numbers,) or the mask (numbers,) of one input; each row of a mask is the same."""
    if family in _MASKS:
        return np.broadcast_to(_MASKS[family](rng, _length(spec.shape)), spec.shape or (1,)).reshape(-1)
    low, high = (ends.flatten().numpy() for ends in spread(spec.ranges, spec.shape))
    return _TOKENS[family](rng, low, high)


def as_read(pictures: Tensor, spec: InputSpec, scale: Scale | None) -> Tensor:
    """Return pictures (N, channels, height, width) in 0..1 in the range and layout that an input has."""
    if spec.ranges:
        pictures = (pictures * spec.ranges[0][1]).round()
    elif scale is not None:
        pictures = scale.apply(pictures)
    return pictures if channels_first(spec.shape) == spec.shape else pictures.movedim(1, -1)


def channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a picture as (channels, height, width)."""
    first = shape[0] in (1, 3, 4) and min(shape[1:]) >= LEAST_PICTURE
    return shape if first else (shape[2], *shape[:2])


def _key(family: str, seed: int, index: int) -> list[int]:
    """Return what seeds the generator of one input."""
    return [zlib.crc32(family.encode()), seed % 2**63, index + 1]


def _picture(rng: Random, shape: tuple[int, ...], family: str) -> Array:
    """Return one picture (channels, height, width) in 0..1."""
    channels, height, width = shape
    factor = max(1, -(-_SMALLEST_CANVAS // min(height, width)))
    if family == "glyphs" and shows_marks(shape):
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


def shows_marks(shape: tuple[int, ...]) -> bool:
    """Return whether images are grey and so small that they show a single digit or letter."""
    return shape[0] == 1 and max(shape[1:]) <= _MARK_SIZE
