"""A ResNet-18 that exists as an ONNX file alone, packaged and served by both servers, answers as ONNX Runtime does."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from redpp_serve.capture import capture_file
from redpp_serve.capture.arch import import_library
from redpp_serve.options import Options, ServerOptions, Serving
from redpp_serve.packaging.package import package
from redpp_serve.report.data import Report
from redpp_serve.serving.serve import open_server
from redpp_serve.serving.server import LocalServer
from redpp_serve.variants import NAMES
from tests.support.rollout import predict, read
from tests.support.small import randomise

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.server

SHAPE, REQUESTS, DUPLICATES = (3, 64, 64), 20, 8


def resnet18() -> nn.Module:
    """Random weights, and in the first convolution of each block some channels twice."""
    network = randomise(import_library("torchvision").models.resnet18(num_classes=10))
    blocks = [part for part in network.modules() if hasattr(part, "downsample")]
    assert len(blocks) == 8
    with torch.no_grad():
        for block in blocks:
            block.bn2.weight.mul_(0.3)  # the sums of residuals stay of one size
            for tensor in (block.conv1.weight, *block.bn1.state_dict().values()):
                if tensor.dim():
                    tensor[-DUPLICATES:] = tensor[:DUPLICATES]
    return network


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.onnx.export(
        resnet18(),
        (torch.randn(2, *SHAPE),),
        str(path),
        dynamo=False,
        input_names=["image"],
        output_names=["scores"],
        dynamic_axes={"image": {0: "batch"}, "scores": {0: "batch"}},
    )
    return path


@pytest.fixture(scope="module")
def packaged(file: Path) -> tuple[Path, Report]:
    options, serving = Options(method="red++", hash="none"), Serving(precision="fp32")
    out = file.parent / "resnet"
    return out, package(capture_file(file, []), out, name="resnet", options=options, serving=serving)


@pytest.fixture(scope="module", params=["torchserve", "triton"])
def server(request: pytest.FixtureRequest, packaged: tuple[Path, Report]) -> Iterator[LocalServer]:
    with open_server(packaged[0], ServerOptions(request.param), name="resnet") as running:
        yield running


def test_the_planted_duplicates_are_gone(packaged: tuple[Path, Report]) -> None:
    """Each block loses them from the output of its first convolution and from the input of its second."""
    _, report = packaged
    kept = {
        layer.name: layer.pruned_shape[0] for layer in report.layers if "layer" in layer.name and "conv1" in layer.name
    }
    assert list(kept.values()) == [n - DUPLICATES for n in (64, 64, 128, 128, 256, 256, 512, 512)]


def test_answers_are_those_of_onnx_runtime(server: LocalServer, file: Path) -> None:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).standard_normal((REQUESTS, *SHAPE)).astype(np.float32)
    expected = session.run(["scores"], {"image": images})[0]
    limit = 1e-4 * float(expected.max() - expected.min())
    for version, variant in zip(server.versions, NAMES, strict=True):
        for image, scores in zip(images, expected, strict=True):
            found, values = read(server.kind, *predict(server, version, [image]))
            assert found == variant
            np.testing.assert_allclose(np.ravel(values), scores, rtol=0, atol=limit)
