"""Images: the arithmetic against torch, and refusals."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from redpp_serve.errors import RedppError
from redpp_serve.handlers.preprocess import MAX_PIXELS, ImageRefused, Preprocess
from tests.support.served import PREPROCESS, picture


def test_pixels_are_scaled_and_normalised_for_each_channel() -> None:
    data = picture()
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
    tensor = PREPROCESS.image(data)
    assert tensor.dtype == torch.float32 and tuple(tensor.shape) == PREPROCESS.shape == (3, 8, 8)
    torch.testing.assert_close(tensor.double(), (pixels - mean) / std, rtol=1e-5, atol=1e-5)


def test_resizing_keeps_height_and_width_apart() -> None:
    """Left half black, right half white: the halves stay left and right."""
    pixels = np.zeros((20, 40), dtype=np.uint8)
    pixels[:, 20:] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    tensor = Preprocess("L", 4, 6, (0.0,), (1.0,)).image(stream.getvalue())
    assert tuple(tensor.shape) == (1, 4, 6)
    assert tensor[0, :, 0].max() < 0.01 and tensor[0, :, -1].min() > 0.99


def test_resizing_is_bilinear_over_all_pixels_both_ways() -> None:
    for size in ((20, 12), (5, 6)):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        tensor = Preprocess("RGB", 8, 8, (0.0,) * 3, (1.0,) * 3).image(stream.getvalue())
        plain = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        wanted = torch.nn.functional.interpolate(plain, (8, 8), mode="bilinear", antialias=True)[0]
        assert (tensor - wanted).abs().max() < 1.5 / 255, size  # Pillow rounds between its two passes


def test_any_8_bit_image_is_converted() -> None:
    for mode in ("L", "RGB", "RGBA"):
        assert tuple(PREPROCESS.image(picture(mode, size=(5, 9))).shape) == (3, 8, 8), mode
    grey, data = Preprocess("L", 8, 8, (0.0,), (1.0,)), picture("L")
    pixels = np.array(Image.open(io.BytesIO(data)), dtype=np.float32)
    assert np.allclose(grey.image(data)[0] * 255, pixels, atol=1e-3)


def test_json_round_trip() -> None:
    assert Preprocess.from_json(PREPROCESS.to_json()) == PREPROCESS


def test_an_impossible_description_is_refused() -> None:
    for change in (
        {"mode": "CMYK"},
        {"mode": "L"},
        {"height": 0},
        {"width": -1},
        {"width": "wide"},
        {"mean": [0.5]},
        {"std": [0.1, 0.1, 0.0]},
        {"std": [-0.1, 0.1, 0.1]},
        {"std": None},
    ):
        with pytest.raises(RedppError, match="preprocessing"):
            Preprocess.from_json({**PREPROCESS.to_json(), **change})
            pytest.fail(f"{change} was taken")


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(ImageRefused, match="8000 x 8000 pixels"):
        PREPROCESS.image(png_header(8000, 8000) + picture()[33:])
    with pytest.raises(ImageRefused, match="cannot be decoded"):  # as large as it may be, so its pixels are looked for
        PREPROCESS.image(png_header(10_000, MAX_PIXELS // 10_000) + picture()[33:])


def test_sixteen_bits_are_refused_instead_of_clipped() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(stream, "PNG")
    with pytest.raises(ImageRefused, match="8 bits"):
        PREPROCESS.image(stream.getvalue())


def test_damaged_images_are_refused() -> None:
    for data in (picture()[:60], picture(kind="JPEG")[:100], b"\x89PNG\r\n\x1a\n" + b"\0" * 50):
        with pytest.raises(ImageRefused, match="cannot be decoded"):
            PREPROCESS.image(data)


def test_other_formats_are_refused_even_behind_the_name_of_an_image() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(stream, "GIF")
    with pytest.raises(ImageRefused):
        PREPROCESS.image(stream.getvalue())
