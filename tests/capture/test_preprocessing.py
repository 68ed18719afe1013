"""What users, architectures and processors declare about images, and what becomes of it for an input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from redpp_serve.capture.arch import build, import_library
from redpp_serve.capture.preprocess_hints import preprocess_hints, read_file
from redpp_serve.capture.preprocessing import choose_preprocess, read_declared
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec, Size
from redpp_serve.handlers.preprocess import BYTES, Preprocess

IMAGE, GREY, FLOATS = InputSpec("x", (3, 64, 64)), InputSpec("x", (1, 32, 32)), (0.485, 0.456, 0.406)
TIMM = {
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "size": [64, 64],
    "fit": "crop",
    "crop_pct": 0.9,
    "interpolation": "bicubic",
}


def chosen(text: str | None, spec: InputSpec = IMAGE, hints: dict[str, Any] | None = None) -> Preprocess:
    found, _ = choose_preprocess(text, hints, (spec,))
    assert found is not None
    return found


def geometry(p: Preprocess) -> tuple[str, tuple[int, int], str]:
    return p.fit, p.target, p.interpolation


def test_words() -> None:
    assert chosen("imagenet") == Preprocess(
        "RGB", 64, 64, FLOATS, (0.229, 0.224, 0.225), "crop", (73, 73), "bilinear", upright=True
    )
    assert geometry(chosen("imagenet,squash,bicubic")) == ("squash", (64, 64), "bicubic")
    assert geometry(chosen("imagenet,pad")) == ("pad", (64, 64), "bilinear")
    assert chosen("bytes").keeps_bytes and chosen("bytes").fit == "crop" and chosen("bytes,bgr").mode == "BGR"
    assert chosen("Lanczos").interpolation == "lanczos" and chosen("crop").std == (1.0, 1.0, 1.0)


def test_none_switches_off_what_is_declared() -> None:
    assert choose_preprocess("none", TIMM, (IMAGE,)) == (None, [])
    assert choose_preprocess(None, None, (IMAGE,)) == (None, [])


def test_json() -> None:
    text = '{"mean": 0.5, "std": [0.25], "resize": [70, 80], "fit": "squash", "background": 255, "upright": false}'
    assert chosen(text) == Preprocess(
        "RGB", 64, 64, (0.5,) * 3, (0.25,) * 3, "squash", (70, 80), "bilinear", (0,), (255, 255, 255)
    )
    assert chosen('{"crop_pct": 0.5, "fit": "pad", "fill": [1, 2, 3]}').fill == (1, 2, 3)
    assert chosen('{"crop_pct": 0.5}').target == (128, 128) and chosen('{"resize": 72}').target == (72, 72)
    assert chosen('{"mean": [0.5], "std": [0.5]}', GREY).mode == "L"
    assert chosen('{"mode": "RGB", "mean": [0, 0, 0], "std": [1, 1, 1]}').upright


def test_what_is_given_replaces_what_is_declared() -> None:
    p = chosen('{"background": 255}', hints=TIMM)
    assert (p.mean, geometry(p), p.background) == ((0.5,) * 3, ("crop", (71, 71), "bicubic"), (255,) * 3)
    assert geometry(chosen("squash", hints=TIMM)) == ("squash", (64, 64), "bicubic")
    assert chosen("squash", hints=TIMM).std == (0.25,) * 3
    assert chosen("bytes", hints=TIMM).keeps_bytes and chosen('{"mean": 0.1}', hints=TIMM).std == (1.0,) * 3


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 8, 8), "CHW"), ((1, 8, 8), "CHW"), ((8, 9, 3), "HWC"), ((8, 9, 1), "HWC"), ((8, 9), "HW")],
)
def test_layouts(shape: tuple[int, ...], layout: str) -> None:
    for dtype in ("float32", "uint8"):
        p = chosen("bytes", InputSpec("x", shape, dtype))
        assert (p.layout, p.shape) == (layout, shape)


def test_an_input_of_bytes_takes_images_without_being_told() -> None:
    for shape in ((3, 16, 16), (16, 16, 3), (1, 16, 16)):
        p = chosen(None, InputSpec("x", shape, "uint8"))
        assert p.keeps_bytes and p.shape == shape
    assert chosen(None, InputSpec("x", (3, 64, 64), "uint8"), TIMM).interpolation == "bicubic"
    assert choose_preprocess(None, None, (InputSpec("x", (16, 16), "uint8"),)) == (None, [])


def test_an_input_of_integers_takes_bytes_or_is_refused() -> None:
    spec = InputSpec("x", (3, 16, 16), "uint8")
    for text in ("bytes", "crop", '{"mode": "RGB", "mean": [0, 0, 0], "std": [1, 1, 1]}', '{"mean": 0}'):
        assert chosen(text, spec).keeps_bytes, text
    for text in ("imagenet", '{"mean": 0.5}', '{"std": [1, 2, 1]}'):
        with pytest.raises(RedppError, match="reads uint8.*give --preprocess bytes"):
            chosen(text, spec)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image-net", "--preprocess is image-net"),
        ("imagenet,", "--preprocess is imagenet,"),
        ("absent/preprocessor_config.json", "--preprocess is absent"),
        ("{mean: 1}", "--preprocess is no JSON"),
        ("{" + '"a":{' * 100_000, "--preprocess is no JSON"),
        ('{"means": [0.5]}', "with the key 'means'"),
        ('{"mean": [1, 2]}', "3 of each"),
        ('{"mode": 7}', "mode '7'"),
        ('{"mode": "L"}', "gives images of shape|preprocessing"),
        ('{"std": 0}', "each std positive"),
        ('{"std": NaN}', "finite"),
        ('{"std": "0.5"}', "no number"),
        ('{"mean": null, "std": [true]}', "no number"),
        ('{"bytes": true, "mean": 0.5}', "bytes and mean"),
        ('{"crop_pct": 0}', "crop_pct 0"),
        ('{"crop_pct": 1.5}', "crop_pct 1.5"),
        ('{"resize": [1, 2, 3]}', "makes no sense"),
        ('{"resize": -5}', "positive, moderate sizes"),
        ('{"resize": 1e300}', "cannot be read|makes no sense|moderate"),
        ('{"fit": ["crop"]}', "fit"),
        ('{"fill": 300}', "fill"),
        ('{"background": [1, 2]}', "background"),
        ('{"upright": "no"}', "cannot be read"),
        ('{"interpolation": "cubic"}', "one of nearest"),
    ],
)
def test_declarations_that_make_no_sense_are_refused(text: str, says: str) -> None:
    with pytest.raises(RedppError, match=says):
        chosen(text)
        pytest.fail(f"{text[:40]} was taken")


def test_inputs_that_are_no_images_are_refused_only_where_the_user_asks() -> None:
    for spec in (InputSpec("x", (5,)), InputSpec("x", (4, 8, 8)), InputSpec("x", (3, 8, 8), "bool")):
        assert choose_preprocess(None, TIMM, (spec,)) == (None, []) or spec.dtype == "bool"
        with pytest.raises(RedppError, match="--preprocess for an input of shape"):
            chosen("crop", spec)
    with pytest.raises(RedppError, match="with inputs x, y"):
        choose_preprocess("crop", None, (IMAGE, InputSpec("y", (3,))))
    assert choose_preprocess(None, TIMM, (IMAGE, IMAGE)) == (None, [])


def test_hints_for_other_channels_or_far_larger_pictures_are_left_out() -> None:
    found, lines = choose_preprocess(None, TIMM, (InputSpec("x", (1, 64, 64)),))
    assert found is None and "for other channels" in lines[0]
    assert choose_preprocess(None, {**TIMM, "size": [224, 224]}, (IMAGE,)) == (None, [])
    found, lines = choose_preprocess(None, TIMM, (IMAGE,))
    assert found is not None and "cover 71x71 (bicubic), centre 64x64" in lines[0] and "--preprocess" in lines[0]


def test_torchvision_declares_the_transforms_of_its_default_weights(tmp_path: Path) -> None:
    for name in ("resnet50", "vit_b_16", "efficientnet_b4", "swin_t", "inception_v3"):
        hints = preprocess_hints(torch.nn.Identity(), f"torchvision:{name}", tmp_path / "m.pt", [])
        theirs = import_library("torchvision").models.get_model_weights(name).DEFAULT.transforms()
        side = theirs.crop_size[0]
        p = chosen(None, InputSpec("x", (3, side, side)), hints)
        assert (p.mean, p.std) == (tuple(theirs.mean), tuple(theirs.std))
        assert geometry(p) == ("crop", (theirs.resize_size[0],) * 2, theirs.interpolation.value), name
    half = chosen(None, InputSpec("x", (3, 112, 112)), preprocess_hints(None, "torchvision:resnet50", tmp_path, []))
    assert half.target == (116, 116)  # 232 for 224
    segmentation = preprocess_hints(None, "torchvision:lraspp_mobilenet_v3_large", tmp_path, [])
    assert geometry(chosen(None, IMAGE, segmentation)) == ("crop", (64, 64), "bilinear")
    for name in ("r3d_18", "raft_small", "fasterrcnn_resnet50_fpn"):
        assert preprocess_hints(None, f"torchvision:{name}", tmp_path, []) is None


def test_timm_declares_its_configuration(tmp_path: Path) -> None:
    import_library("timm")
    module = build("timm:resnet10t", {"num_classes": 3})
    hints = preprocess_hints(module, "timm:resnet10t", tmp_path / "m.pt", [])
    p = chosen(None, InputSpec("x", (3, 176, 176)), hints)
    config = module.pretrained_cfg
    assert p.mean == tuple(config["mean"]) and p.interpolation == config["interpolation"]  # type: ignore[index]
    assert p.target == (int(176 / config["crop_pct"]),) * 2  # type: ignore[index]


# --- processors of Hugging Face ---

NORM: dict[str, Any] = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
PROCESSORS: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[str, tuple[int, int], str]]] = {
    "vit": (
        {"do_resize": True, "size": {"height": 64, "width": 64}, "resample": 2},
        (64, 64),
        ("squash", (64, 64), "bilinear"),
    ),
    "vit, old": (
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 64},
        (64, 64),
        ("squash", (64, 64), "bilinear"),
    ),
    "deit": (
        {
            "size": {"height": 72, "width": 72},
            "do_center_crop": True,
            "crop_size": {"height": 64, "width": 64},
            "resample": 3,
        },
        (64, 64),
        ("squash", (72, 72), "bicubic"),
    ),
    "bit": (
        {
            "size": {"shortest_edge": 72},
            "do_center_crop": True,
            "crop_size": {"height": 64, "width": 64},
            "resample": 3,
        },
        (64, 64),
        ("crop", (72, 72), "bicubic"),
    ),
    "clip, old": (
        {
            "feature_extractor_type": "CLIPFeatureExtractor",
            "size": 64,
            "do_center_crop": True,
            "crop_size": 64,
            "resample": 3,
        },
        (64, 64),
        ("crop", (64, 64), "bicubic"),
    ),
    "convnext": (
        {
            "image_processor_type": "ConvNextImageProcessor",
            "size": {"shortest_edge": 224},
            "crop_pct": 0.875,
            "resample": 3,
        },
        (224, 224),
        ("crop", (256, 256), "bicubic"),
    ),
    "convnext, large": (
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "crop_pct": 0.875},
        (384, 384),
        ("squash", (384, 384), "bilinear"),
    ),
    "levit": (
        {
            "image_processor_type": "LevitImageProcessor",
            "size": {"shortest_edge": 224},
            "do_center_crop": True,
            "crop_size": 224,
        },
        (224, 224),
        ("crop", (256, 256), "bilinear"),
    ),
    "poolformer": (
        {"size": {"shortest_edge": 224}, "crop_pct": 0.9, "do_center_crop": True, "crop_size": 224, "resample": 1},
        (224, 224),
        ("crop", (248, 248), "lanczos"),
    ),
    "donut": (
        {"size": {"height": 80, "width": 60}, "do_thumbnail": True, "do_pad": True},
        (80, 60),
        ("pad", (80, 60), "bilinear"),
    ),
    "detr, old": (
        {"feature_extractor_type": "DetrFeatureExtractor", "size": 80, "max_size": 133, "format": "coco_detection"},
        (133, 133),
        ("edges", (80, 133), "bilinear"),
    ),
    "yolos": (
        {"image_processor_type": "YolosImageProcessor", "size": {"shortest_edge": 64, "longest_edge": 100}},
        (96, 128),
        ("edges", (64, 100), "bilinear"),
    ),
    "segment anything": (
        {
            "image_processor_type": "SamImageProcessor",
            "size": {"longest_edge": 64},
            "pad_size": {"height": 64, "width": 64},
        },
        (64, 64),
        ("longest", (64, 64), "bilinear"),
    ),
    "no crop": ({"size": {"shortest_edge": 64}}, (64, 64), ("crop", (64, 64), "bilinear")),
    "other input": ({"size": {"height": 64, "width": 64}}, (128, 96), ("squash", (128, 96), "bilinear")),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor(name: str, tmp_path: Path) -> None:
    document, sides, wanted = PROCESSORS[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**document, **NORM}))
    hints = preprocess_hints(None, "timm:unread", tmp_path / "model.safetensors", [])
    assert hints == read_declared(str(tmp_path / "preprocessor_config.json"))
    p = chosen(None, InputSpec("x", (3, *sides)), hints)
    assert geometry(p) == wanted and p.mode == "RGB" and p.down
    assert p.mean == pytest.approx((0.5, 0.4, 0.3)) and p.std == pytest.approx((0.2, 0.3, 0.4))


@pytest.mark.parametrize(
    ("document", "zero", "full"),
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_rescale": False, "do_normalize": False}, 0.0, 255.0),
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False}, -1.0, 1.0),
        ({"do_rescale": False, "image_mean": 127.5, "image_std": 127.5}, -1.0, 1.0),
        ({"include_top": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}, -8.0, 8.0),
        ({"rescale_factor": 0.00392156862745098, "image_mean": [0.5], "image_std": [0.5]}, -1.0, 1.0),
        ({"image_processor_type": "MobileViTImageProcessor", "image_mean": [0.5], "image_std": [0.5]}, 0.0, 1.0),
    ],
)
def test_values_of_a_processor(document: dict[str, Any], zero: float, full: float, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"size": 64, **document}))
    p = chosen(None, hints=read_file(tmp_path / "p.json"))
    assert [(0 - p.mean[0]) / p.std[0], (1 - p.mean[2]) / p.std[2]] == pytest.approx([zero, full])
    assert p.keeps_bytes == (full == 255.0) and (not p.keeps_bytes or set(p.std) == {BYTES})


def test_swin2sr_fills_up_with_the_mirror_image(tmp_path: Path) -> None:
    document = {"image_processor_type": "Swin2SRImageProcessor", "do_rescale": True, "rescale_factor": 1 / 255}
    for sizes in ({"do_pad": True, "pad_size": 8}, {"size_divisor": 8}, {}):
        (tmp_path / "p.json").write_text(json.dumps({**document, **sizes}))
        p = chosen(None, hints=read_file(tmp_path / "p.json"))
        assert (p.fit, p.multiple, p.mean, p.std) == ("mirror", 8, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(RedppError, match="filled up to multiples of 8.*3x60x64.*package it for sides"):
        chosen(str(tmp_path / "p.json"), InputSpec("x", (3, 60, 64)))


def test_a_picture_put_into_a_corner_needs_an_input_that_holds_it(tmp_path: Path) -> None:
    size = {"shortest_edge": 800, "longest_edge": 1333}
    for kind, longest in (("DetrImageProcessor", 1333), ("YolosImageProcessor", 1328)):
        (tmp_path / "p.json").write_text(json.dumps({"image_processor_type": kind, "size": size, **NORM}))
        hints = read_file(tmp_path / "p.json")
        for shape in ((3, 64, 64), (3, longest, longest - 1)):
            found, lines = choose_preprocess(None, hints, (InputSpec("x", shape),))
            assert found is None and f"--input 3x{longest}x{longest}" in lines[0] and "refused" in lines[0]
            with pytest.raises(RedppError, match=f"pictures of up to {longest} pixels.*--input 3x{longest}x{longest}"):
                chosen(str(tmp_path / "p.json"), InputSpec("x", shape))
        several = InputSpec("x", (3, 640, 640), varying=((1, Size("H", 320, 1344, 16)), (2, Size("W", 320, 1344, 16))))
        p = chosen(None, several, hints)
        assert (geometry(p), p.fill) == (("edges", (800, 1333), "bilinear"), (128, 102, 76))
        assert p.multiple == (16 if longest == 1328 else 1)
        assert "a shorter side of 800, or a longer one of 1333 if that is less (bilinear), in the upper" in p.in_words()


def test_a_processor_that_flips_channels(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"size": 64, "do_flip_channel_order": True}))
    assert chosen(str(tmp_path / "p.json")).mode == "BGR"


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}}, "size with longest_edge, shortest_edge"),
        ({"size": {"longest_edge": 384}}, "size with longest_edge"),
        (
            {"image_processor_type": "PerceiverImageProcessor", "size": 224, "crop_size": 256, "do_center_crop": True},
            "a crop before the resize",
        ),
        ({"size": 64, "do_resize": False}, "do_resize false"),
        ({"size": 64, "do_color_quantize": True}, "do_color_quantize"),
        ({"do_rescale": True, "do_pad": True, "size_divisor": 8}, "size_divisor"),
        ({"image_processor_type": "MaskFormerImageProcessor", "size": 64, "size_divisor": 32}, "size_divisor"),
        ({"image_processor_type": "TvpImageProcessor", "size": {"longest_edge": 64}, "pad_size": 64}, "pad_size"),
        ({"image_processor_type": "TvpImageProcessor", "size": {"longest_edge": 64}}, "size with longest_edge"),
        ({"image_processor_type": "SamImageProcessor", "size": {"height": 9, "longest_edge": 64}}, "size with height"),
        ({"image_processor_type": "DetrImageProcessor", "size": {"max_height": 9, "max_width": 9}}, "size with max_"),
        ({"image_processor_type": "Swin2SRImageProcessor", "do_pad": False}, "pictures of any size as they are"),
        ({"size": 64, "image_processor_type": "Owlv2ImageProcessor"}, "what Owlv2ImageProcessor does"),
        ({"size": 64, "resample": 9}, "make no sense"),
        ({"size": "large"}, "make no sense"),
        ({"size": 64, "image_mean": None, "do_normalize": True}, "make no sense"),
        ({"size": 64, "rescale_factor": "x"}, "make no sense"),
        ({"model_type": "bert"}, "describes no pictures"),
        ({"pretrained_cfg": {"mean": [0.5]}}, "leaves out mean, std or input_size"),
        ([], "describes no pictures"),
    ],
)
def test_processors_that_cannot_be_followed(document: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(document))
    with pytest.raises(RedppError, match=says):
        read_file(path)
    messages: list[str] = []
    assert preprocess_hints(None, None, tmp_path, messages) is None
    assert len(messages) == 1 and messages[0].startswith("images are refused")


def test_a_damaged_processor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b" " * (1 << 21)):
        path.write_bytes(content)
        with pytest.raises(RedppError, match="cannot be read"):
            read_file(path)


def test_a_configuration_of_timm_is_read(tmp_path: Path) -> None:
    config = {
        "mean": FLOATS,
        "std": [1, 1, 1],
        "input_size": [3, 64, 64],
        "crop_mode": "border",
        "interpolation": "bilinear",
    }
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": config}))
    p = chosen(str(tmp_path / "config.json"))
    assert geometry(p) == ("pad", (73, 73), "bilinear") and p.fill == (124, 116, 104)
