"""The README of a package: names, shapes and commands of this model."""

import re

from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.packaging.readme import readme

IMAGE = InputSpec("x", (3, 8, 9))
TWO = (InputSpec("tokens", (5,), "int64"), InputSpec("image", (1, 4, 4)))


def test_names_shapes_and_preprocessing() -> None:
    text = readme("resnet-50.v2", (IMAGE,), Preprocess("RGB", 8, 9, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)))
    assert text.startswith("# resnet-50.v2: original (1.0) and pruned (2.0)\n")
    assert "--models resnet-50.v2=original.mar resnet-50.v2=pruned.mar" in text
    assert "/v2/models/resnet-50.v2/versions/2/infer" in text
    assert "/predictions/resnet-50.v2/2.0" in text and "`x` 3x8x9 float32" in text
    assert "converted to mode RGB, resized to 8x9" in text and "mean (0.5, 0.4, 0.3) and std (0.25, 0.2, 0.1)" in text


def test_without_preprocessing_images_are_said_to_be_refused() -> None:
    assert "images are refused" in readme("m", (IMAGE,), None)
    assert "images are refused" not in readme("m", (IMAGE,), Preprocess("RGB", 8, 9, (0.0,) * 3, (1.0,) * 3))


def test_several_inputs_travel_as_npz_by_name() -> None:
    text = readme("m", TWO, None)
    assert "`tokens` 5 int64; `image` 1x4x4 float32" in text and "--data-binary @sample.npz" in text
    assert ".npz` or JSON with the inputs by name" in text


def test_the_request_to_triton_names_inputs_and_types() -> None:
    one, two = readme("m", (IMAGE,), None), readme("m", TWO, None)
    assert 'sample = {"x": numpy.load("sample.npy")}' in one and '{"x": "FP32"}.items()' in one
    assert 'sample = numpy.load("sample.npz")' in two and '{"tokens": "INT64", "image": "FP32"}.items()' in two
    for text in (one, two):
        compile(text.split("```python\n")[1].split("```")[0], "readme", "exec")
        assert "`triton/m/config.pbtxt`" in text and 'client.infer("m", inputs, model_version="2")' in text


def test_no_place_holder_is_left() -> None:
    for inputs in ((IMAGE,), TWO):
        assert not re.search(r"\{\w*\}", readme("m", inputs, None))
