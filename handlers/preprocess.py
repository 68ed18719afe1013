"""Turn PNG or JPEG bytes into the tensor that a network was trained on, as the artifact declares it."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.errors import RedppError

MAX_PIXELS = 50_000_000
_CHANNELS = {"L": 1, "RGB": 3}


class ImageRefused(ValueError):
    """An image cannot be used; the message says what was found and what was expected."""


@dataclass(frozen=True)
class Preprocess:
    """Decode, convert to ``mode``, resize bilinearly to ``height`` x ``width``, divide by 255, normalise.

    Attributes:
        mode: ``L`` (one channel) or ``RGB`` (three).
        height: the height of the network's input, pixels.
        width: its width, pixels.
        mean: the mean of each channel, on the scale 0 to 1.
        std: the standard deviation of each channel, on the same scale.
    """

    mode: str
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        channels = _CHANNELS.get(self.mode)
        valid = channels and len(self.mean) == len(self.std) == channels and min(self.height, self.width) > 0
        if not valid or min(self.std) <= 0:
            raise RedppError(
                f"a preprocessing {asdict(self)} that cannot be applied",
                "mode L or RGB, a positive size, and one mean and one positive std for each channel",
                "correct the preprocessing options and package the model again",
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what `image` returns."""
        return _CHANNELS[self.mode], self.height, self.width

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Preprocess:
        """Read what `to_json` wrote.

        Raises:
            RedppError: missing keys or values out of range.
        """
        try:
            mean, std = (tuple(float(v) for v in document[key]) for key in ("mean", "std"))
            return cls(str(document["mode"]), int(document["height"]), int(document["width"]), mean, std)
        except (KeyError, TypeError, ValueError) as error:
            raise RedppError(
                f"a preprocessing description that cannot be read: {error!r}",
                "the keys mode, height, width, mean, std",
                "package the model again",
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def image(self, data: bytes) -> Tensor:
        """Return the image as a float32 tensor (channels, height, width).

        Raises:
            ImageRefused: undecodable, more than 8 bits a channel, or more than `MAX_PIXELS` pixels.
        """
        from PIL import Image  # noqa: PLC0415  only networks of images need Pillow

        try:
            # Opening reads the header alone; the size is checked before any pixel is decoded.
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as source:
                if source.width * source.height > MAX_PIXELS:
                    raise ImageRefused(
                        f"an image of {source.width} x {source.height} pixels, expected at most {MAX_PIXELS} pixels"
                    )
                if source.mode.startswith(("I", "F")):  # converting would clip instead of scale
                    raise ImageRefused("an image with more than 8 bits a channel, expected 8 bits a channel")
                image = source.convert(self.mode)
        except ImageRefused:
            raise
        except Exception as error:  # decoders raise a dozen unrelated types on damaged files
            raise ImageRefused(f"an image that cannot be decoded ({error}), expected a whole PNG or JPEG") from error
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        scale, shift = _affine(self.mean, self.std)
        pixels = np.asarray(image).reshape(self.height, self.width, -1).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels * scale + shift))


@lru_cache(maxsize=8)
def _affine(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the scale and shift (channels, 1, 1), float32, that take a byte to its normalised value."""
    wide = [np.array(v, dtype=np.float64).reshape(-1, 1, 1) for v in (mean, std)]
    return (1 / (255 * wide[1])).astype(np.float32), (-wide[0] / wide[1]).astype(np.float32)
