"""Image files of strangers: every kind of pixel as people see it, and refusals."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from redpp_serve.handlers.image_files import MAX_PIXELS, ImageRefused, decode, is_image
from tests.support.served import picture


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def rgb(data: bytes, background: tuple[int, ...] | None = None, upright: bool = True) -> np.ndarray:
    image = decode(data, grey=False, upright=upright, background=background)
    assert image.mode == "RGB"
    return np.asarray(image)


def colours(width: int = 24, height: int = 16) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 10, y * 15, 255 - x * 5 - y * 5], -1).astype(np.uint8))


KINDS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", *(["WEBP"] if features.check("webp") else []))


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_recognised_and_decoded(kind: str) -> None:
    data = encoded(colours(), kind)
    assert is_image(data) and is_image(bytearray(data))
    far = np.abs(rgb(data).astype(int) - np.asarray(colours())).mean()
    assert far <= {"JPEG": 8, "GIF": 12, "WEBP": 12}.get(kind, 0)


def test_other_files_are_no_images() -> None:
    for data in (b"", b"[1, 2]", b"PK\x03\x04", b"\x93NUMPY", b"RIFF....WAVE", b"<svg>", b"%PDF-1.7", b"{}"):
        assert not is_image(data), data


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_converted_as_pillow_does(mode: str) -> None:
    kind = "TIFF" if mode == "YCbCr" else "PNG" if mode != "CMYK" else "JPEG"
    image = colours().convert(mode)
    data = encoded(image, kind)
    assert (rgb(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    grey = decode(data, grey=True, upright=True, background=None)
    assert grey.mode == "L" and grey.size == (24, 16)


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    pixels = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        got = decode(encoded(Image.fromarray(pixels), kind), grey=True, upright=True, background=None)
        assert np.abs(np.asarray(got).astype(float) - pixels / 257).max() <= 1, kind
    for dtype in (np.int32, np.float32):
        with pytest.raises(ImageRefused, match="more than 16 bits a channel"):
            rgb(encoded(Image.fromarray(pixels.astype(dtype)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_applied(kind: str, orientation: int) -> None:
    if kind not in KINDS:
        pytest.skip("Pillow was built without WebP")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(colours(), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (rgb(data) == np.asarray(upright.convert("RGB"))).all()
    if kind == "JPEG":
        assert rgb(data, upright=False).shape == (16, 24, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing() -> None:
    for exif in (
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\1\0\0\0x\0\0\0",
    ):
        assert rgb(encoded(colours(), "JPEG", exif=exif)).shape == (16, 24, 3)


def test_transparent_pixels_show_the_background() -> None:
    clear = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    half = Image.new("RGBA", (4, 4), (200, 100, 50, 128))
    assert (rgb(encoded(clear)) == (200, 100, 50)).all()  # the alpha channel is dropped
    assert (rgb(encoded(clear), (9, 8, 7)) == (9, 8, 7)).all()
    assert np.abs(rgb(encoded(half), (0, 0, 0)).astype(int) - (100, 50, 25)).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (rgb(encoded(palette, transparency=1), (9, 8, 7)) == (9, 8, 7)).all()
    assert (rgb(encoded(Image.new("LA", (4, 4), (10, 0))), (9, 8, 7)) == (9, 8, 7)).all()
    assert (rgb(encoded(colours()), (9, 8, 7)) == np.asarray(colours())).all()


def test_of_several_frames_the_first_is_taken() -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for kind in ("GIF", "TIFF"):
        assert (rgb(encoded(red, kind, save_all=True, append_images=[blue])) == (255, 0, 0)).all(), kind


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(ImageRefused, match="8000 x 8000 pixels"):
        rgb(png_header(8000, 8000) + picture()[33:])
    with pytest.raises(ImageRefused, match="cannot be decoded"):  # as large as it may be, so its pixels are looked for
        rgb(png_header(10_000, MAX_PIXELS // 10_000) + picture()[33:])
    for kind in ("GIF", "BMP", "TIFF"):
        with pytest.raises(ImageRefused, match="10000 x 8000 pixels"):
            rgb(encoded(Image.new("1", (10_000, 8_000)), kind))


@pytest.mark.filterwarnings("ignore:Truncated File")
def test_damaged_images_are_refused() -> None:
    damaged = [picture()[:60], picture(kind="JPEG")[:100], b"\x89PNG\r\n\x1a\n" + b"\0" * 50]
    damaged += [data[: len(data) // 2] for data in (encoded(colours(), kind) for kind in KINDS)]
    for data in damaged:
        with pytest.raises(ImageRefused, match="cannot be decoded") as caught:
            rgb(data)
        assert "0x" not in str(caught.value)


def test_other_formats_are_refused_even_behind_the_name_of_an_image() -> None:
    for kind in ("PPM", "ICO", "TGA", "PCX"):
        with pytest.raises(ImageRefused, match="cannot be decoded"):
            rgb(encoded(colours(), kind))
