"""What an architecture or a file beside the weights declares about pictures; nothing is downloaded and no code runs.

Read are the transforms of torchvision's default weights (``torchvision.transforms._presets``), timm's
``pretrained_cfg`` (``timm.data.transforms_factory.transforms_imagenet_eval``), and the ``preprocessor_config.json`` of
Hugging Face's image processors. All become the keys of `preprocessing.KEYS`, and ``size``: (height, width) of the
input that ``resize`` belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redpp_serve.capture.arch import import_library
from redpp_serve.capture.sniff import first_line
from redpp_serve.errors import RedppError, printable
from redpp_serve.handlers.preprocess import INTERPOLATIONS

Declared = dict[str, Any]

PROCESSOR, TIMM_CONFIG = "preprocessor_config.json", "config.json"
_OF_PICTURES = {"size", "image_mean", "crop_size", "do_resize", "do_rescale", "do_pad"}
_MOST_BYTES = 1 << 20
_FITS = {"center": "crop", "squash": "squash", "border": "pad"}  # timm's crop_mode
_RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
# Processors that take a single number in "size" for the shorter side; the others take it for both sides.
_SHORTER_SIDE = ("clip", "chineseclip", "convnext", "bit", "levit", "poolformer", "mobilenet", "mobilevit", "videomae")
_NOT_APPLIED = ("do_align_long_axis", "do_color_quantize", "do_crop_margin", "do_split_image")
# Processors that put an image into the upper left corner of what its batch, or the file, makes the size: by the
# beginning of their names, the multiple that sides are rounded down to.
_EDGES = {"detr": 1, "conditionaldetr": 1, "deformabledetr": 1, "groundingdino": 1, "yolos": 16}
_DETR_EDGES = ("shortest_edge", "longest_edge")
# Processors that resize in ways of their own, which their files do not tell.
_OWN_WAYS = ("aria", "deepseek", "janus", "minicpm", "owlv2", "zoedepth")


def preprocess_hints(network: object, arch: str | None, path: Path, messages: list[str]) -> Declared | None:
    """Return what is declared of the network, the source nearest to the weights first, or None.

    Args:
        network: whose ``pretrained_cfg`` counts, if it has one.
        arch: ``torchvision:NAME`` asks torchvision; other forms do not.
        path: the file of the weights, or its folder; a processor's file may lie beside it.
        messages: gains a line where such a file cannot be followed.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / PROCESSOR).is_file():
        try:
            return read_file(folder / PROCESSOR)
        except RedppError as error:
            messages.append(f"images are refused: {error.found}")
            return None
    config = getattr(network, "pretrained_cfg", None)
    if isinstance(config, Mapping):
        return timm_hints(config)
    library, _, name = (arch or "").partition(":")
    return _torchvision(name) if library == "torchvision" else None


def read_file(path: Path) -> Declared:
    """Read a processor's file of Hugging Face, or a ``config.json`` of timm.

    Raises:
        RedppError: neither, or it asks for what is not supported.
    """
    expected = f"a {PROCESSOR} of Hugging Face, or a {TIMM_CONFIG} of timm"
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise RedppError(f"{path} cannot be read: {first_line(error)}", expected, "give such a file") from error
    try:
        if isinstance(document, dict) and isinstance(config := document.get("pretrained_cfg"), dict):
            found = timm_hints(config)
        elif isinstance(document, dict) and document.keys() & _OF_PICTURES:
            found = _processor(document)
        else:
            raise RedppError(f"{path} describes no pictures", expected, "give such a file")
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
        raise RedppError(
            f"{path} holds values that make no sense: {first_line(error)}", expected, "correct it"
        ) from error
    if found is None:
        raise RedppError(f"{path} leaves out mean, std or input_size", expected, "give such a file")
    return found


def timm_hints(config: Mapping[str, Any]) -> Declared | None:
    """Return what timm's ``pretrained_cfg`` declares, None where it leaves out mean, std or input_size."""
    if not all(config.get(key) for key in ("mean", "std", "input_size")):
        return None
    fit, interpolation = (
        _FITS.get(config.get("crop_mode") or "center", "crop"),
        config.get("interpolation") or "bicubic",
    )
    mean = [float(v) for v in config["mean"]]
    return {
        "mean": mean,
        "std": [float(v) for v in config["std"]],
        "size": [int(v) for v in config["input_size"][1:]],
        "fit": fit,
        "crop_pct": float(config.get("crop_pct") or 0.875),
        "interpolation": interpolation if interpolation in INTERPOLATIONS else "bilinear",
        **({"fill": [round(255 * v) for v in mean]} if fit == "pad" else {}),
    }


def _torchvision(name: str) -> Declared | None:
    """Return the transforms of the default weights; of networks for segmentation the values alone."""
    default = getattr(import_library("torchvision").models.get_model_weights(name), "DEFAULT", None)
    if default is None:
        return None
    transforms = default.transforms()
    kind = type(transforms).__name__
    if kind not in ("ImageClassification", "SemanticSegmentation"):
        return None
    found = {"mean": list(transforms.mean), "std": list(transforms.std), "fit": "crop"}
    found["interpolation"] = transforms.interpolation.value
    if kind == "ImageClassification":
        found |= {"resize": transforms.resize_size[0], "size": [transforms.crop_size[0]] * 2}
    return found


def _processor(document: Mapping[str, Any]) -> Declared:
    """Return what an image processor declares; of its steps those are left out that are switched off."""
    kind = str(document.get("image_processor_type") or document.get("feature_extractor_type") or "").lower()
    mirrors, to_corner = kind.startswith("swin2sr"), kind.startswith((*_EDGES, "samimage"))
    others = (*_NOT_APPLIED, *(() if to_corner or mirrors else ("pad_size",)), *(() if mirrors else ("size_divisor",)))
    if asked := [key for key in others if document.get(key)]:
        raise _unsupported(asked[0])
    if kind.startswith(_OWN_WAYS):
        raise _unsupported(f"what {printable(document.get('image_processor_type') or kind)[:40]} does")
    factor = float(document.get("rescale_factor") or 1 / 255) if document.get("do_rescale", True) else 1.0
    offset = 1.0 if document.get("rescale_offset") else 0.0
    normalised = document.get("do_normalize", "image_mean" in document and not kind.startswith("mobilevit"))
    deviations = _floats(document["image_std"] if normalised else 1.0)
    if document.get("include_top"):  # EfficientNet's divides by them once more
        deviations = [v * w for v, w in zip(deviations, _floats(document["image_std"]), strict=False)]
    found: Declared = {
        "mean": [(v + offset) / (255 * factor) for v in _floats(document["image_mean"] if normalised else 0.0)],
        "std": [v / (255 * factor) for v in deviations],
        "interpolation": _RESAMPLES[int(document.get("resample", 2))],
        **(_mirror(document) if mirrors else _geometry(document, kind)),
        "down": True,
    }
    if to_corner:  # with zeros behind the normalisation
        found["fill"] = [min(255, max(0, round(255 * v))) for v in found["mean"]]
    return {**found, "mode": "BGR"} if document.get("do_flip_channel_order") else found


def _mirror(document: Mapping[str, Any]) -> Declared:
    """Return what Swin2SR's processor does to sizes (transformers/models/swin2sr/image_processing_swin2sr.py)."""
    if not document.get("do_pad", True):
        raise _unsupported("pictures of any size as they are")
    return {"fit": "mirror", "multiple": int(document.get("size_divisor") or document.get("pad_size") or 8)}


def _edges(size: Any, document: Mapping[str, Any], kind: str) -> Declared | None:
    """Return the geometry of a processor that keeps proportions and fills up at the right and below; None for others.

    Sources: transformers/models/detr, yolos and sam, image_processing_*.py.
    """
    if kind.startswith("samimage"):
        if not isinstance(size, Mapping) or size.keys() != {"longest_edge"}:
            return None
        edge = int(size["longest_edge"])
        return {"fit": "longest", "resize": edge, "size": _sides(document.get("pad_size") or edge)}
    multiple = next((n for name, n in _EDGES.items() if kind.startswith(name)), None)
    if multiple is None:
        return None
    if not isinstance(size, Mapping):  # files of older releases
        size = {"shortest_edge": size or 800, "longest_edge": document.get("max_size") or 1333}
    if size.keys() != set(_DETR_EDGES):
        return None
    edges = [int(size[key]) for key in _DETR_EDGES]
    longest = edges[1] // multiple * multiple
    declared = _sides(document["pad_size"]) if document.get("pad_size") else [longest, longest]
    return {"fit": "edges", "resize": edges, "multiple": multiple, "size": declared}


def _geometry(document: Mapping[str, Any], kind: str) -> Declared:
    size, crop = document.get("size"), document.get("crop_size") if document.get("do_center_crop") else None
    if not document.get("do_resize", True):
        raise _unsupported("do_resize false")
    if (found := _edges(size, document, kind)) is not None:
        return found
    if not isinstance(size, Mapping):
        side = int(size) if size is not None else 224
        size = {"shortest_edge": side} if kind.startswith(_SHORTER_SIDE) else {"height": side, "width": side}
    if kind.startswith("perceiver") and crop:
        raise _unsupported("a crop before the resize")
    if size.keys() == {"height", "width"}:
        target = [int(size["height"]), int(size["width"])]
        fit = "pad" if document.get("do_pad") and document.get("do_thumbnail") else "squash"
        return {"fit": fit, "resize": target, "size": _sides(crop) if crop else target}
    if size.keys() != {"shortest_edge"}:
        raise _unsupported(f"size with {', '.join(sorted(map(str, size)))}")
    edge = int(size["shortest_edge"])
    if kind.startswith("convnext"):  # transformers/models/convnext/image_processing_convnext.py
        if edge >= 384:
            return {"fit": "squash", "resize": edge, "size": [edge, edge]}
        return {"fit": "crop", "resize": int(edge / float(document.get("crop_pct") or 0.875)), "size": [edge, edge]}
    if kind.startswith("levit"):
        edge = int(256 / 224 * edge)
    elif document.get("crop_pct"):
        edge = int(edge / float(document["crop_pct"]))
    return {"fit": "crop", "resize": edge, "size": _sides(crop) if crop else [edge, edge]}


def _floats(values: Any) -> list[float]:
    return [float(v) for v in (values if isinstance(values, (list, tuple)) else [values])]


def _sides(size: Any) -> list[int]:
    if isinstance(size, Mapping):
        return [int(size["height"]), int(size["width"])]
    return [int(size)] * 2


def _unsupported(what: str) -> RedppError:
    return RedppError(
        f"{PROCESSOR} asks for {what}",
        "a resize to a shorter side or to height and width and a crop of the centre, or what the processors of DETR, "
        "YOLOS, Segment Anything and Swin2SR do",
        "describe the pictures with --preprocess JSON, or send arrays",
    )
