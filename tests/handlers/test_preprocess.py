"""Images as a network reads them: the arithmetic against torch, pixels against torchvision, timm and Hugging Face."""

import importlib
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from redpp_serve.capture.arch import import_library
from redpp_serve.capture.preprocess_hints import read_file, timm_hints
from redpp_serve.capture.preprocessing import choose_preprocess
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec, Size
from redpp_serve.graph.sizes import nearest
from redpp_serve.handlers.image_files import ImageRefused
from redpp_serve.handlers.preprocess import BYTES, Preprocess
from redpp_serve.packaging.samples import example_image
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
    full = Preprocess("BGR", 8, 6, (0.1,) * 3, (0.5,) * 3, "pad", (9, 7), "lanczos", (1, 2, 3), (9, 8, 7), True, "HWC")
    for preprocess in (PREPROCESS, full):
        assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


def test_a_description_of_release_0_1_keeps_its_meaning() -> None:
    """It squeezes images bilinearly and knows no orientation."""
    document = {"mode": "L", "height": 4, "width": 6, "mean": [0.0], "std": [1.0]}
    assert Preprocess.from_json(document) == Preprocess("L", 4, 6, (0.0,), (1.0,))
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    wanted = np.asarray(Image.fromarray(pixels).resize((6, 4), Image.Resampling.BILINEAR))
    assert np.allclose(Preprocess.from_json(document).image(stream.getvalue()).numpy() * 255, wanted, atol=1e-3)


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
        {"std": [float("nan")] * 3},
        {"fit": "stretch"},
        {"interpolation": "sinc"},
        {"resize": [0, 8]},
        {"resize": [8]},
        {"resize": [10_000, 10_000]},
        {"fill": [256]},
        {"fill": [1, 2]},
        {"background": [255]},
        {"layout": "WHC"},
        {"layout": "HW"},
        {"multiple": 0},
        {"multiple": 9},
    ):
        with pytest.raises(RedppError, match="preprocessing"):
            Preprocess.from_json({**PREPROCESS.to_json(), **change})
            pytest.fail(f"{change} was taken")


# --- geometry ---


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours with edges and a little noise, so that every filter and offset shows."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / (3 + 4 * k) + k) + np.cos(y / (5 + 3 * k)) for k in range(3)]
    waves.append((x // 7 + y // 11) % 2)
    noise = np.random.default_rng(width * 7919 + height).normal(0, 6, (height, width, 3))
    return Image.fromarray(
        (110 + 50 * np.stack(waves[:3], -1) + 30 * waves[3][:, :, None] + noise).clip(0, 255).astype("uint8")
    )


SIZES = ((64, 48), (47, 81), (300, 40), (33, 33), (32, 200), (1, 40), (40, 1), (5, 3), (640, 479), (28, 35))


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def plain(**changes: object) -> Preprocess:
    return Preprocess(**{"mode": "RGB", "height": 28, "width": 28, "mean": (0.0,) * 3, "std": (1.0,) * 3, **changes})  # type: ignore[arg-type]


def levels(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max()) * 255


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_the_pixels_are_those_of_torchvision(interpolation: str) -> None:
    import_library("torchvision")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    theirs = ImageClassification(crop_size=28, resize_size=32, interpolation=InterpolationMode(interpolation))
    mean, std = tuple(theirs.mean), tuple(theirs.std)
    mine = plain(fit="crop", resize=(32, 32), interpolation=interpolation, mean=mean, std=std)
    for size in SIZES:
        image = photograph(*size)
        assert levels(mine.image(encoded(image)) * 0.225, theirs(image) * 0.225) < 0.01, size


def timm_cases() -> Iterator[tuple[str, float, tuple[int, int], str]]:
    for mode, pct in (
        ("center", 0.875),
        ("center", 1.0),
        ("squash", 0.9),
        ("squash", 1.0),
        ("border", 0.95),
        ("border", 1.0),
    ):
        for size in ((28, 28), (20, 36)):
            yield mode, pct, size, "bicubic" if pct < 1 else "bilinear"


@pytest.mark.parametrize("case", list(timm_cases()), ids=str)
def test_the_pixels_are_those_of_timm(case: tuple[str, float, tuple[int, int], str]) -> None:
    mode, pct, (height, width), interpolation = case
    create_transform = pytest.importorskip("timm.data").create_transform
    config = {"mean": (0.5, 0.4, 0.3), "std": (1.0,) * 3, "interpolation": interpolation}
    theirs = create_transform((3, height, width), False, crop_pct=pct, crop_mode=mode, **config)
    hints = timm_hints({**config, "crop_pct": pct, "crop_mode": mode, "input_size": (3, height, width)})
    mine, _ = choose_preprocess(None, hints, [InputSpec("x", (3, height, width))])
    assert mine is not None
    for size in SIZES:
        image = photograph(*size)
        if mode == "border" and 1 in size:  # timm makes an empty image of it
            continue
        assert levels(mine.image(encoded(image)), theirs(image)) < 0.01, size


HUGGING_FACE = {
    "levit.LevitImageProcessorPil": {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    "mobilenet_v2.MobileNetV2ImageProcessorPil": {
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 28, "width": 28},
    },
    "mobilevit.MobileViTImageProcessorPil": {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}},
    "clip.CLIPImageProcessorPil": {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    "poolformer.PoolFormerImageProcessorPil": {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    "vit.ViTImageProcessorPil": {"size": {"height": 28, "width": 28}},
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_the_pixels_are_those_of_hugging_face(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import_library("torchvision")
    module, kind = name.split(".")
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    theirs = getattr(found, kind)(**HUGGING_FACE[name])
    document = {"image_processor_type": kind.removesuffix("Pil"), **json.loads(theirs.to_json_string())}
    (tmp_path / "p.json").write_text(json.dumps(document))
    mine, _ = choose_preprocess(None, read_file(tmp_path / "p.json"), [InputSpec("x", (3, 28, 28))])
    assert mine is not None
    for size in ((64, 48), (47, 81), (33, 33), (41, 28), (29, 43), (300, 40), (640, 479)):
        image = photograph(*size)
        expected = torch.from_numpy(np.asarray(theirs(image, return_tensors="np")["pixel_values"]))[0].float()
        assert levels(mine.image(encoded(image)) * min(mine.std), expected * min(mine.std)) < 0.01, size


TO_CORNER = {
    "detr.DetrImageProcessor": ({"size": {"shortest_edge": 40, "longest_edge": 66}}, (66, 66)),
    "conditional_detr.ConditionalDetrImageProcessor": ({"size": {"shortest_edge": 40, "longest_edge": 66}}, (70, 66)),
    "deformable_detr.DeformableDetrImageProcessor": ({"size": {"shortest_edge": 64, "longest_edge": 64}}, (64, 64)),
    "grounding_dino.GroundingDinoImageProcessor": ({"size": {"shortest_edge": 40, "longest_edge": 66}}, (66, 80)),
    "yolos.YolosImageProcessor": ({"size": {"shortest_edge": 40, "longest_edge": 70}}, (64, 80)),
    "sam.SamImageProcessor": ({"size": {"longest_edge": 50}, "pad_size": {"height": 50, "width": 50}}, (50, 50)),
}


@pytest.mark.parametrize("backend", ["Pil", ""])
@pytest.mark.parametrize("name", TO_CORNER)
def test_the_pixels_are_those_of_processors_that_fill_up_at_the_right_and_below(
    name: str, backend: str, tmp_path: Path
) -> None:
    """Both of the library's backends; the colour of the mean, in whole levels, is their zeros behind normalisation."""
    pytest.importorskip("transformers")
    import_library("torchvision")
    (module, kind), (settings, (height, width)) = name.split("."), TO_CORNER[name]
    suffix = "pil_" if backend else ""
    found = importlib.import_module(f"transformers.models.{module}.image_processing_{suffix}{module}")
    theirs = getattr(found, kind + backend)(**{**settings, "pad_size": {"height": height, "width": width}})
    document = {"image_processor_type": kind, **json.loads(theirs.to_json_string())}
    (tmp_path / "p.json").write_text(json.dumps(document))
    mine, _ = choose_preprocess(None, read_file(tmp_path / "p.json"), [InputSpec("x", (3, height, width))])
    assert mine is not None
    for size in ((64, 48), (47, 81), (40, 40), (41, 40), (29, 43), (300, 40), (641, 479), (200, 333)):
        if module == "yolos" and size == (300, 40):  # 66 x 8 pixels, of which the library leaves none
            continue
        image = photograph(*size)
        expected = torch.as_tensor(np.asarray(theirs(image, return_tensors="pt")["pixel_values"]))[0].float()
        deviation = torch.tensor(mine.std).view(3, 1, 1)
        assert levels(mine.image(encoded(image)) * deviation, expected * deviation) <= 1.01, size


@pytest.mark.parametrize("backend", ["Pil", ""])
def test_the_pixels_are_those_of_swin2sr(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    import_library("torchvision")
    module = f"transformers.models.swin2sr.image_processing_{'pil_' if backend else ''}swin2sr"
    theirs = getattr(importlib.import_module(module), f"Swin2SRImageProcessor{backend}")()
    document = {"image_processor_type": "Swin2SRImageProcessor", **json.loads(theirs.to_json_string())}
    (tmp_path / "p.json").write_text(json.dumps(document))
    spec = InputSpec("x", (3, 40, 48), varying=((1, Size("H", 8, 80, 8)), (2, Size("W", 8, 80, 8))))
    mine, _ = choose_preprocess(None, read_file(tmp_path / "p.json"), [spec])
    assert mine is not None
    for size in ((47, 33), (40, 32), (16, 25), (41, 39), (8, 8), (7, 79)):
        expected = torch.as_tensor(np.asarray(theirs(photograph(*size), return_tensors="pt")["pixel_values"]))[0]
        got = mine.image(encoded(photograph(*size)), partial(nearest, spec))
        assert levels(got, expected.float()) < 0.01, size
    with pytest.raises(ImageRefused, match="96 x 96 pixels once it is filled up, expected 80 x 80"):
        mine.image(encoded(photograph(88, 90)), partial(nearest, spec))
    for image in (encoded(photograph(47, 33)), example_image(mine)):
        assert mine.image(image).shape == (3, 40, 48)
    with pytest.raises(ImageRefused, match="56 x 48 pixels once it is filled up, expected 48 x 40"):
        mine.image(encoded(photograph(48, 40)))


def test_a_detector_of_several_sizes_gets_the_smallest_that_holds_the_picture() -> None:
    spec = InputSpec("x", (3, 32, 64), varying=((1, Size("H", 16, 64, 16)), (2, Size("W", 16, 64, 16))))
    mine = plain(fit="edges", resize=(30, 60), height=32, width=64, fill=(9,))
    got = mine.image(encoded(Image.new("RGB", (90, 60), (200, 100, 50))), partial(nearest, spec)) * 255
    assert got.shape == (3, 32, 48)  # 45 x 30 pixels
    assert torch.allclose(got[:, :30, :45], torch.tensor([200.0, 100, 50]).view(3, 1, 1).expand(3, 30, 45), atol=1e-3)
    assert torch.allclose(got[:, 30:], torch.tensor(9.0), atol=1e-3) and float(got[0, 0, 45]) == pytest.approx(9)
    with pytest.raises(ImageRefused, match="75 x 30 pixels once it is resized, expected at most 64 x 32"):
        plain(fit="edges", resize=(30, 80), height=32, width=64).image(encoded(Image.new("RGB", (100, 40))))


def test_halves_of_a_pixel_are_rounded_down_where_that_is_declared() -> None:
    """Of 15 columns, 8 are kept from the middle: from the fourth on, or from the fifth as torchvision does."""
    columns = Image.fromarray(np.arange(15, dtype=np.uint8)[None].repeat(8, 0))
    for down, first in ((True, 3), (False, 4)):
        grey = Preprocess("L", 8, 8, (0.0,), (1.0,), "crop", (8, 8), down=down)
        assert (grey.image(encoded(columns))[0, 0] * 255).round().tolist() == list(range(first, first + 8))
    wide = Image.new("L", (100, 33), 255)  # 29 x 9.57 within 29 x 20
    rows = [Preprocess("L", 20, 29, (0.0,), (1.0,), "pad", down=down).image(encoded(wide)) for down in (True, False)]
    assert [int((picture[0, :, 0] > 0.9).sum()) for picture in rows] == [9, 10]


def test_pad_keeps_the_whole_image_and_fills_the_rest() -> None:
    image = Image.new("RGB", (56, 28), (200, 100, 50))
    got = plain(fit="pad", fill=(10, 20, 30)).image(encoded(image)) * 255
    assert torch.allclose(got[:, 7:21], torch.tensor([200.0, 100.0, 50.0]).view(3, 1, 1), atol=1e-3)
    for rows in (got[:, :7], got[:, 21:]):
        assert torch.allclose(rows, torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1), atol=1e-3)
    assert plain(fit="pad", mode="L", mean=(0.0,), std=(1.0,)).image(encoded(Image.new("L", (1, 900)))).shape == (
        1,
        28,
        28,
    )


def test_an_image_that_becomes_too_large_is_refused() -> None:
    with pytest.raises(ImageRefused, match="1 x 60000 pixels, resized to one of 32 x 1920000 pixels"):
        plain(fit="crop", resize=(32, 32)).image(encoded(Image.new("L", (1, 60_000))))


# --- order of channels and dimensions, bytes ---


def test_bgr_reverses_the_channels_and_normalises_them_in_that_order() -> None:
    image = Image.new("RGB", (28, 28), (10, 20, 30))
    got = plain(mode="BGR", mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)).image(encoded(image))[:, 0, 0]
    wanted = [(30 / 255 - 0.1) / 0.5, 20 / 255 - 0.2, (10 / 255 - 0.3) / 2]
    assert got.tolist() == pytest.approx(wanted, abs=1e-6)


def test_layouts_hold_the_same_pixels() -> None:
    data = encoded(photograph(40, 30))
    first = plain(mean=(0.1, 0.2, 0.3)).image(data)
    last = plain(mean=(0.1, 0.2, 0.3), layout="HWC").image(data)
    assert last.shape == (28, 28, 3) and torch.equal(first, last.permute(2, 0, 1)) and last.is_contiguous()
    grey = plain(mode="L", mean=(0.2,), std=(0.3,))
    flat = plain(mode="L", mean=(0.2,), std=(0.3,), layout="HW").image(data)
    assert flat.shape == (28, 28) and torch.equal(flat, grey.image(data)[0])


def test_bytes_stay_bytes() -> None:
    image = photograph(28, 28)
    for layout in ("CHW", "HWC"):
        preprocess = plain(std=(BYTES,) * 3, layout=layout)
        got = preprocess.image(encoded(image))
        pixels = np.asarray(image)
        assert preprocess.keeps_bytes and got.dtype == torch.uint8
        assert (got.numpy() == (pixels if layout == "HWC" else pixels.transpose(2, 0, 1))).all()


def test_arrays_of_bytes_become_what_an_image_of_their_size_becomes() -> None:
    image = photograph(28, 28)
    for layout in ("CHW", "HWC"):
        preprocess = plain(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0), layout=layout)
        pixels = np.asarray(image) if layout == "HWC" else np.asarray(image).transpose(2, 0, 1)
        assert torch.equal(torch.from_numpy(preprocess.values(pixels[None]))[0], preprocess.image(encoded(image)))


def test_a_preprocessing_is_put_into_words() -> None:
    assert PREPROCESS.in_words() == (
        "converted to mode RGB, resized to 8x8 (bilinear), normalised with mean (0.5, 0.4, 0.3) and std (0.2, 0.3, 0.4)"
    )
    words = plain(fit="crop", resize=(32, 32), std=(BYTES,) * 3, upright=True).in_words()
    assert words == (
        "converted to mode RGB, turned upright as EXIF says, resized to cover 32x32 (bilinear), centre 28x28, "
        "bytes as they are"
    )
