"""Turn the bytes of an image file into the tensor that a network was trained on, as the artifact declares it.

The geometry is that of torchvision's ``ImageClassification`` and of timm's ``transforms_imagenet_eval`` on Pillow
images: resize, then cut out or pad the centre. Which pixels come out is tested against both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.handlers.image_files import MAX_PIXELS, check_pixels, decode

if TYPE_CHECKING:
    from PIL import Image

MODES = {"L": 1, "RGB": 3, "BGR": 3}  # channels
FITS = ("squash", "crop", "pad")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
LAYOUTS = ("CHW", "HWC", "HW")
BYTES = 1 / 255  # the standard deviation that, with a mean of 0, leaves bytes as they are


@dataclass(frozen=True)
class Preprocess:
    """Decode, turn upright, convert to ``mode``, resize, cut out the centre, divide by 255, normalise.

    The defaults are what a package of release 0.1 means by leaving them out.

    Attributes:
        mode: ``L`` (one channel), ``RGB`` or ``BGR`` (three, in the order that the network reads them).
        height: the height of the network's input, pixels.
        width: its width, pixels.
        mean: the mean of each channel of the network, on the scale 0 to 1.
        std: the standard deviation of each channel, on the same scale. A mean of 0 and a deviation of 1/255 leave
            bytes as they are.
        fit: how an image gets the size ``resize``: ``squash`` both sides, ``crop`` (keep the proportions and cover it)
            or ``pad`` (keep them and stay within it).
        resize: (height, width) before the centre of the network's size is cut out; None: the network's size.
        interpolation: Pillow's filter, which averages over all source pixels where it shrinks.
        fill: the colour of what ``pad`` adds, L or red, green, blue, 0 to 255.
        background: the colour beneath transparent pixels; None drops the alpha channel.
        upright: whether the EXIF orientation is applied.
        layout: the order of the network's dimensions.
        down: whether halves are rounded down, as Hugging Face's processors do, and not to an even number.
    """

    mode: str
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str = "squash"
    resize: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    fill: tuple[int, ...] = (0,)
    background: tuple[int, ...] | None = None
    upright: bool = False
    layout: str = "CHW"
    down: bool = False

    def __post_init__(self) -> None:
        if wrong := self._wrong():
            raise RedppError(
                f"a preprocessing that cannot be applied: {wrong[0]}",
                wrong[1],
                "correct --preprocess and package the model again",
            )

    def _wrong(self) -> tuple[str, str] | None:
        """Return what is wrong, and what was expected."""
        words = (("mode", MODES), ("fit", FITS), ("interpolation", INTERPOLATIONS), ("layout", LAYOUTS))
        for name, known in words:
            if getattr(self, name) not in known:
                return f"{name} {getattr(self, name)!r}", f"one of {', '.join(known)}"
        channels, (tall, wide) = MODES[self.mode], self.target
        sides = (self.height, self.width, tall, wide)
        if min(sides) <= 0 or max(self.height * self.width, tall * wide) > MAX_PIXELS:
            return f"a size of {self.height} x {self.width}, resized to {tall} x {wide}", "positive, moderate sizes"
        if self.layout == "HW" and channels != 1:
            return f"mode {self.mode} for an input of two dimensions", "mode L"
        if not len(self.mean) == len(self.std) == channels:
            return f"mean {self.mean} and std {self.std}", f"{channels} of each, one for each channel of {self.mode}"
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            return f"mean {self.mean} and std {self.std}", "finite numbers, and each std positive"
        for name, colour, sizes in (("fill", self.fill, (1, channels)), ("background", self.background, (3,))):
            if colour is not None and (len(colour) not in sizes or not all(0 <= c <= 255 for c in colour)):
                return f"{name} {colour}", "whole numbers from 0 to 255, one for each channel"
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what `image` returns."""
        sizes = {"C": MODES[self.mode], "H": self.height, "W": self.width}
        return tuple(sizes[letter] for letter in self.layout)

    @property
    def target(self) -> tuple[int, int]:
        """(height, width) that an image is resized to, before the centre is cut out."""
        return self.resize or (self.height, self.width)

    @property
    def keeps_bytes(self) -> bool:
        """Whether the network reads bytes, 0 to 255, that nothing normalises."""
        return set(self.mean) == {0.0} and set(self.std) == {BYTES}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Preprocess:
        """Read what `to_json` wrote, in this release or an earlier one.

        Raises:
            RedppError: missing keys or values out of range.
        """
        try:
            known = {key: read(document[key]) for key, read in _READERS.items() if document.get(key) is not None}
            return cls(**known)
        except (TypeError, ValueError, OverflowError) as error:
            raise RedppError(
                f"a preprocessing description that cannot be read: {error}",
                "the keys mode, height, width, mean, std",
                "package the model again",
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def in_words(self) -> str:
        """Say what happens to an image, for people."""
        (tall, wide), size = self.target, f"{self.height}x{self.width}"
        how = {
            "squash": f"resized to {tall}x{wide}",
            "crop": f"resized to cover {tall}x{wide}",
            "pad": f"resized to fit into {tall}x{wide}",
        }[self.fit]
        cut = "" if self.fit == "squash" and self.target == (self.height, self.width) else f", centre {size}"
        numbers = [", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std)]
        scaled = (
            "bytes as they are" if self.keeps_bytes else f"normalised with mean ({numbers[0]}) and std ({numbers[1]})"
        )
        turned = ", turned upright as EXIF says" if self.upright else ""
        return f"converted to mode {self.mode}{turned}, {how} ({self.interpolation}){cut}, {scaled}"

    def image(self, data: bytes, sized: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None) -> Tensor:
        """Return the image as a tensor of `shape`: uint8 where the network reads bytes, else float32.

        Args:
            data: the bytes of the file.
            sized: returns the shape that an image of some shape is given, for a network that takes several sizes. The
                proportions stay as they are where the shape allows it, and nothing else is cut off.

        Raises:
            ImageRefused: see `image_files.decode`; or it would be resized to more than `MAX_PIXELS` pixels.
        """
        image = decode(data, grey=self.mode == "L", upright=self.upright, background=self.background)
        if sized is not None:
            sizes = {"C": MODES[self.mode], "H": image.height, "W": image.width}
            shape = dict(zip(self.layout, sized(tuple(sizes[letter] for letter in self.layout)), strict=True))
            return replace(self, height=shape["H"], width=shape["W"], resize=None)._tensor(image)
        return self._tensor(image)

    def _tensor(self, image: Image.Image) -> Tensor:
        pixels = np.array(self._fitted(image)).reshape(self.height, self.width, -1)
        if self.mode == "BGR":
            pixels = pixels[:, :, ::-1]
        if self.layout == "CHW":
            pixels = pixels.transpose(2, 0, 1)
        return torch.from_numpy(self.values(np.ascontiguousarray(pixels).reshape(self.shape)))

    def values(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return bytes (..., `shape`), uint8, as the network reads them: uint8 or float32."""
        if self.keeps_bytes:
            return pixels
        scale, shift = _affine(self.mean, self.std, self.layout)
        normalised: np.ndarray[Any, Any] = pixels * scale + shift
        return normalised

    def as_picture(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Return bytes as the network reads them as a picture of any size, (height, width) or with red, green, blue.

        Args:
            array: uint8, with the dimensions of `layout`; of anything else None is returned.
        """
        if array.dtype != np.uint8 or array.ndim != len(self.layout):
            return None
        pixels = array.transpose(1, 2, 0) if self.layout == "CHW" else array
        if pixels.shape[2:] not in ((), (MODES[self.mode],)):
            return None
        if self.mode == "L":
            return pixels.reshape(pixels.shape[:2])
        return np.ascontiguousarray(pixels[:, :, ::-1] if self.mode == "BGR" else pixels)

    def _fitted(self, image: Image.Image) -> Image.Image:
        """Resize, then cut out the centre or pad around it: the pixels of torchvision's ``center_crop``."""
        from PIL import Image  # noqa: PLC0415

        size = self._resized(*image.size)
        check_pixels(*size, f"an image of {image.width} x {image.height} pixels, resized to one")
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        if image.size == (self.width, self.height):
            return image
        fill = self.fill * len(image.getbands()) if len(self.fill) == 1 else self.fill
        canvas = Image.new(image.mode, (self.width, self.height), fill)
        canvas.paste(image, (self._offset(image.width, self.width), self._offset(image.height, self.height)))
        return canvas

    def _offset(self, size: int, wanted: int) -> int:
        """Return where the first pixel of an image lies in the part that is wanted."""
        if self.down and self.fit == "crop":
            return -((size - wanted) // 2)
        return (wanted - size) // 2 if size <= wanted else -round((size - wanted) / 2)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of an image of that size, once it is resized."""
        tall, wide = self.target
        if self.fit == "squash":
            return wide, tall
        if self.fit == "crop" and tall == wide:  # torchvision's rule, which rounds down
            short = min(width, height)
            return int(tall * width / short), int(tall * height / short)
        if self.down and self.fit == "pad":
            fits = height * wide <= width * tall
            return (wide, max(1, height * wide // width)) if fits else (max(1, width * tall // height), tall)
        ratio = (min if self.fit == "crop" else max)(height / tall, width / wide)  # timm's rule, which rounds
        return max(1, round(width / ratio)), max(1, round(height / ratio))


@lru_cache(maxsize=8)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], layout: str) -> tuple[np.ndarray[Any, Any], ...]:
    """Return the scale and shift, float32, that take a byte to its normalised value, each (channels, 1, 1) or alike."""
    shape = (-1, 1, 1) if layout == "CHW" else (-1,)
    wide = [np.array(v, dtype=np.float64).reshape(shape) for v in (mean, std)]
    return (1 / (255 * wide[1])).astype(np.float32), (-wide[0] / wide[1]).astype(np.float32)


def _tuple_of(kind: type[int] | type[float]) -> Any:
    return lambda values: tuple(kind(value) for value in values)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


_READERS: dict[str, Any] = {
    **dict.fromkeys(("mode", "fit", "interpolation", "layout"), str),
    **dict.fromkeys(("height", "width"), int),
    **dict.fromkeys(("mean", "std"), _tuple_of(float)),
    **dict.fromkeys(("resize", "fill", "background"), _tuple_of(int)),
    "upright": _flag,
    "down": _flag,
}
