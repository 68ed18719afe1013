"""Decode an image file that a stranger sent: its size is checked first, and the result has 8 bits a channel."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 50_000_000
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's names; of several frames the first is taken
NAMES = "PNG, JPEG, WebP, BMP, GIF or TIFF"
_MAGICS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112  # the tag of EXIF, section 4.6.4 of its specification
_TURNS = {  # its value -> the transposition that turns the image upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class ImageRefused(ValueError):
    """An image cannot be used; the message says what was found and what was expected."""


def is_image(data: bytes | bytearray) -> bool:
    """Return whether bytes begin like a file of `FORMATS`."""
    return data.startswith(_MAGICS) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def decode(data: bytes, *, grey: bool, upright: bool, background: tuple[int, ...] | None) -> Image.Image:
    """Return an image of mode L or RGB.

    Args:
        data: the file.
        grey: convert to L, else to RGB.
        upright: turn the image as its EXIF orientation says.
        background: the colour, red, green, blue, beneath transparent pixels; None drops the alpha channel.

    Raises:
        ImageRefused: undecodable, more than 16 bits a channel, or more than `MAX_PIXELS` pixels.
    """
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415  only networks of images need Pillow

    try:
        # Opening reads the header alone; the size is checked before any pixel is decoded.
        with Image.open(io.BytesIO(data), formats=FORMATS) as source:
            check_pixels(source.width, source.height)
            source.load()
            image = _in_8_bits(source)
            if background is not None and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
                beneath = Image.new("RGBA", image.size, (*background, 255))
                beneath.alpha_composite(image.convert("RGBA"))
                image = beneath
            image = image.convert("L" if grey else "RGB")
            turn = _turn(source) if upright else None
            return image.transpose(Image.Transpose[turn]) if turn else image
    except ImageRefused:
        raise
    except Exception as error:  # decoders raise a dozen unrelated types on damaged files
        reason = "damaged at its start" if isinstance(error, UnidentifiedImageError) else error
        raise ImageRefused(f"an image that cannot be decoded ({reason}), expected a whole {NAMES}") from error


def check_pixels(width: int, height: int, what: str = "an image") -> None:
    """Refuse an image of more than `MAX_PIXELS` pixels.

    Raises:
        ImageRefused: it has more.
    """
    if width * height > MAX_PIXELS:
        raise ImageRefused(f"{what} of {width} x {height} pixels, expected at most {MAX_PIXELS} pixels")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Keep the high byte of 16-bit grey, as Pillow does of 16-bit colour; its own conversion would clip."""
    from PIL import Image  # noqa: PLC0415

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # I: Pillow before 11
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageRefused("an image with more than 16 bits a channel, expected 8 or 16 bits a channel")
    return image


def _turn(image: Image.Image) -> str | None:
    """Return the transposition that EXIF asks for; damaged EXIF asks for none."""
    with suppress(Exception):
        return _TURNS.get(int(image.getexif().get(_ORIENTATION, 1)))
    return None
