"""Turn the bytes of an image file into the tensor that a network was trained on, as the artifact declares it.

The geometry is that of torchvision's ``ImageClassification`` and of timm's ``transforms_imagenet_eval`` on Pillow
images: resize, then cut out or pad the centre; or that of Hugging Face's processors of detectors, of Segment Anything
and of Swin2SR. Which pixels come out is tested against all of them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.handlers.image_files import MAX_PIXELS, ImageRefused, check_pixels, decode

if TYPE_CHECKING:
    from PIL import Image

MODES = {"L": 1, "RGB": 3, "BGR": 3}  # channels
FITS = ("squash", "crop", "pad", "edges", "longest", "mirror")
TO_CORNER = FITS[3:]  # what puts an image into the upper left corner, and fills the rest
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
LAYOUTS = ("CHW", "HWC", "HW")
BYTES = 1 / 255  # the standard deviation that, with a mean of 0, leaves bytes as they are


class Sized(Protocol):
    """Shapes of a network that takes several sizes."""

    def __call__(self, shape: tuple[int, ...], *, up: bool = False) -> tuple[int, ...]:
        """Return the shape that is nearest to one, or with ``up`` the smallest that holds it."""


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
            or ``pad`` (keep them and stay within it). Three keep them and put the image into the upper left corner:
            ``edges`` makes its shorter side the first number of ``resize``, or its longer one the second if that is
            less; ``longest`` makes its longer side the second; ``mirror`` takes it as it is, and fills up with its
            mirror image.
        resize: (height, width) before the centre of the network's size is cut out; None: the network's size.
        multiple: what sides are rounded down to a multiple of with ``edges``, and filled up to the next one of, never
            by nothing, with ``mirror``.
        interpolation: Pillow's filter, which averages over all source pixels where it shrinks.
        fill: the colour of what ``pad``, ``edges`` and ``longest`` add, L or red, green, blue, 0 to 255.
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
    multiple: int = 1

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
        if not 1 <= self.multiple <= min(self.height, self.width):
            return f"multiples of {self.multiple}", "at least 1, and at most the sides of the input"
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
            "edges": f"resized to a shorter side of {tall}, or a longer one of {wide} if that is less",
            "longest": f"resized to a longer side of {wide}",
            "mirror": f"kept at their size, which is filled up to multiples of {self.multiple} with their mirror image",
        }[self.fit]
        if self.fit == "mirror":
            cut = ""
        elif self.fit in TO_CORNER:
            cut = f", in the upper left of {size}"
        else:
            cut = "" if self.fit == "squash" and self.target == (self.height, self.width) else f", centre {size}"
        numbers = [", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std)]
        scaled = (
            "bytes as they are" if self.keeps_bytes else f"normalised with mean ({numbers[0]}) and std ({numbers[1]})"
        )
        filtered = "" if self.fit == "mirror" else f" ({self.interpolation})"
        turned = ", turned upright as EXIF says" if self.upright else ""
        return f"converted to mode {self.mode}{turned}, {how}{filtered}{cut}, {scaled}"

    def image(self, data: bytes, sized: Sized | None = None) -> Tensor:
        """Return the image as a tensor of `shape`: uint8 where the network reads bytes, else float32.

        Args:
            data: the bytes of the file.
            sized: returns the shape that an image of some shape is given, for a network that takes several sizes; with
                ``up`` one that holds it, if there is one. The proportions stay as they are where the shape allows it,
                and nothing else is cut off.

        Raises:
            ImageRefused: see `image_files.decode`; or it would be resized to more than `MAX_PIXELS` pixels, or put into
                the corner of an input that does not hold it.
        """
        image = decode(data, grey=self.mode == "L", upright=self.upright, background=self.background)
        if sized is None:
            return self._tensor(image)
        corner = self.fit in TO_CORNER
        width, height = self._filled(*self._resized(*image.size)) if corner else image.size
        sizes = {"C": MODES[self.mode], "H": height, "W": width}
        found = sized(tuple(sizes[letter] for letter in self.layout), up=corner)
        shape = dict(zip(self.layout, found, strict=True))
        return replace(self, height=shape["H"], width=shape["W"], resize=self.resize if corner else None)._tensor(image)

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
        """Resize, then cut out the centre or pad around it, as torchvision's ``center_crop`` does, or fill up."""
        from PIL import Image  # noqa: PLC0415

        size = self._resized(*image.size)
        check_pixels(*size, f"an image of {image.width} x {image.height} pixels, resized to one")
        if size != image.size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        if self.fit in TO_CORNER:
            self._check_held(*self._filled(*image.size))
        if image.size == (self.width, self.height):
            return image
        if self.fit == "mirror":
            return _mirrored(image, self.width, self.height)
        fill = self.fill * len(image.getbands()) if len(self.fill) == 1 else self.fill
        canvas = Image.new(image.mode, (self.width, self.height), fill)
        canvas.paste(image, (self._offset(image.width, self.width), self._offset(image.height, self.height)))
        return canvas

    def _offset(self, size: int, wanted: int) -> int:
        """Return where the first pixel of an image lies in the part that is wanted."""
        if self.fit in TO_CORNER:
            return 0
        if self.down and self.fit == "crop":
            return -((size - wanted) // 2)
        return (wanted - size) // 2 if size <= wanted else -round((size - wanted) / 2)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of an image of that size, once it is resized."""
        tall, wide = self.target
        if self.fit == "squash":
            return wide, tall
        if self.fit == "mirror":
            return width, height
        if self.fit == "longest":
            scale = wide / max(width, height)
            return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
        if self.fit == "edges":
            return _between(width, height, self.target, self.multiple)
        if self.fit == "crop" and tall == wide:  # torchvision's rule, which rounds down
            short = min(width, height)
            return int(tall * width / short), int(tall * height / short)
        if self.down and self.fit == "pad":
            fits = height * wide <= width * tall
            return (wide, max(1, height * wide // width)) if fits else (max(1, width * tall // height), tall)
        ratio = (min if self.fit == "crop" else max)(height / tall, width / wide)  # timm's rule, which rounds
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _filled(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) of a resized image once it is filled up to the next multiple, for ``mirror`` alone."""
        if self.fit != "mirror":
            return width, height
        return (width // self.multiple + 1) * self.multiple, (height // self.multiple + 1) * self.multiple

    def _check_held(self, width: int, height: int) -> None:
        """Refuse an image whose pixels would not be those of the processor.

        Raises:
            ImageRefused: larger than the input, or with ``mirror`` of another size.
        """
        mine, sizes = f"{self.width} x {self.height}", f"{width} x {height}"
        if self.fit == "mirror":
            if sizes != mine:
                raise ImageRefused(f"an image that is {sizes} pixels once it is filled up, expected {mine}")
        elif width > self.width or height > self.height:
            raise ImageRefused(f"an image that is {sizes} pixels once it is resized, expected at most {mine}")


def _between(width: int, height: int, edges: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return (width, height) of an image by the rule of DETR's processors, with its roundings."""
    shortest, longest = edges
    short, long = min(width, height), max(width, height)
    side: float = shortest
    if long / short * shortest > longest:
        side = longest * short / long
        shortest = round(side)
    if short == shortest:
        found = width, height
    elif width < height:
        found = shortest, int(side * height / width)
    else:
        found = int(side * width / height), shortest
    return max(multiple, found[0] // multiple * multiple), max(multiple, found[1] // multiple * multiple)


def _mirrored(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return a larger image that goes on with its mirror image to the right and below."""
    from PIL import Image  # noqa: PLC0415

    pixels = np.asarray(image)
    added = [(0, height - image.height), (0, width - image.width), (0, 0)][: pixels.ndim]
    return Image.fromarray(np.pad(pixels, added, mode="symmetric"))


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
    **dict.fromkeys(("height", "width", "multiple"), int),
    **dict.fromkeys(("mean", "std"), _tuple_of(float)),
    **dict.fromkeys(("resize", "fill", "background"), _tuple_of(int)),
    "upright": _flag,
    "down": _flag,
}
