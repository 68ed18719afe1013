"""The networks of `benchmarks.engines` at real sizes, and what a run of it keeps of each in a folder.

EfficientNet-Lite0 and the digits ResNet-20 are trained. The others have seeded weights, batch-norm statistics of a
forward pass over structured inputs, and residual branches as strong as after training: outputs that do not depend on
inputs would let every wrong engine pass, and signals that die out would make every precision look bad.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import real_networks
from redpp_serve.capture.arch import build
from redpp_serve.capture.export import capture
from redpp_serve.engines.sessions import import_openvino
from redpp_serve.files import write_atomically
from redpp_serve.graph import artifact
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import mac_count, parameter_count
from redpp_serve.pruning.families import Scale, families_of, structured
from redpp_serve.pruning.inputs import Sources, prepare
from redpp_serve.pruning.matching import SynthesisBudget
from redpp_serve.pruning.precisions import measure_precisions
from redpp_serve.reference import catalog

PRECISION_ERROR = 0.1  # that ``auto`` may add, as packaging does by default
RECIPE = 1  # raise it when a change of this file changes what is kept
SAMPLES = 4  # inputs that an artifact carries
_PACKAGES = ("torch", "torchvision", "timm", "onnxscript", "openvino")
_FITTED, _JUDGED = 64, 16  # inputs that give ranges; inputs of each family that judge
_SEEN, _CHUNK = 32, 8  # inputs that give batch-norm statistics
_BRANCH_SCALE = 0.3  # of what ends residual branches in ConvNeXt, ResNet and RegNet: small after training, not before
_BRANCH_ENDS = (".gamma", ".bn3.weight", ".f.c.1.weight")


@dataclass(frozen=True)
class Network:
    """One network of the benchmark.

    Attributes:
        name: its name in results.
        shape: of one input.
        build: makes the module in eval mode.
        scale: of pictures that it reads.
    """

    name: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]
    scale: Scale

    @property
    def spec(self) -> InputSpec:
        """The network's input."""
        return InputSpec("x", self.shape)

    def inputs(self, count: int, seed: int = 11) -> Tensor:
        """Return structured inputs (count, ...), of all families in turn."""
        return structured_inputs(self.spec, count, self.scale, seed)


class AudioNetwork(nn.Module):
    """A keyword spotter on 16,000 samples: strided 1-D convolutions, then residual depthwise-separable blocks."""

    def __init__(self, width: int = 128, blocks: int = 6, classes: int = 35) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(1, width // 2, 80, stride=4, padding=38, bias=False), nn.BatchNorm1d(width // 2), nn.ReLU(),
            nn.MaxPool1d(4), nn.Conv1d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.MaxPool1d(4),
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, width, 9, padding=4, groups=width, bias=False), nn.Conv1d(width, width, 1, bias=False),
                nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm1d(width),
            )
            for _ in range(blocks)
        )  # fmt: skip
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map samples (N, 1, n) to scores (N, classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean(-1))


class Thin(nn.Module):
    """Almost no work on a large picture: what a call costs beyond the work shows here."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 32, stride=32), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures (N, 3, height, width) to scores (N, 10)."""
        return self.head(torch.relu(self.patches(x)).mean((2, 3)))


_PICTURE = (3, 224, 224)
_IMAGENET = Scale((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_LITE0 = real_networks.NETWORKS["lite0"]


def _arch(name: str) -> Callable[[], nn.Module]:
    return _seeded(lambda: build(name, {}))


def _seeded(
    make: Callable[[], nn.Module], shape: tuple[int, ...] = _PICTURE, scale: Scale = _IMAGENET
) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        module = make()
        settle(module, structured_inputs(InputSpec("x", shape), _SEEN, scale, 5))
        return module

    return seeded


def settle(module: nn.Module, inputs: Tensor) -> None:
    """Make a constructed network behave as a trained one: batch norms know their inputs, and branches add a share.

    Args:
        module: the network, which ends in eval mode.
        inputs: structured inputs (n, ...).
    """
    module.eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(_BRANCH_ENDS):
                parameter.fill_(_BRANCH_SCALE)
        for norm in [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for chunk in inputs.split(_CHUNK):
            module(chunk)
    module.eval()


NETWORKS = {
    network.name: network
    for network in (
        Network(
            "lite0",
            _PICTURE,
            lambda: deepcopy(real_networks.load_module("lite0")),
            Scale(*_LITE0.scale or ((0.0,), (1.0,))),
        ),
        Network("resnet50", _PICTURE, _arch("torchvision:resnet50"), _IMAGENET),
        Network("mobilenetv3", _PICTURE, _arch("torchvision:mobilenet_v3_large"), _IMAGENET),
        Network("regnetx400", _PICTURE, _arch("torchvision:regnet_x_400mf"), _IMAGENET),
        Network("vit_small", _PICTURE, _arch("timm:vit_small_patch16_224"), _IMAGENET),
        Network("convnext_atto", _PICTURE, _arch("timm:convnext_atto"), _IMAGENET),
        Network(
            "digits_resnet20",
            (1, 32, 32),
            lambda: catalog.load("digits_resnet20").eval(),
            Scale((catalog.DIGITS.mean,), (catalog.DIGITS.std,)),
        ),
        Network("audio", (1, 16000), _seeded(AudioNetwork, (1, 16000), Scale()), Scale()),
        Network("thin", _PICTURE, _seeded(Thin), _IMAGENET),
    )
}


def structured_inputs(spec: InputSpec, count: int, scale: Scale, seed: int) -> Tensor:
    """Return structured inputs (count, ...), of all families of their kind in turn."""
    names = families_of(spec)
    each = -(-count // len(names))
    parts = [structured(spec, each, seed, name, scale) for name in names]
    return torch.stack(parts, 1).flatten(0, 1)[:count].contiguous()


@dataclass(frozen=True)
class Kept:
    """What a run keeps of a network.

    Attributes:
        folder: where it is.
        facts: the network's figures, and the seconds that each export took.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def artifact(self) -> Path:
        """The network as packaging stores it, with what it says of precisions."""
        return self.folder / "model.redpp"

    @property
    def onnx(self) -> Path:
        """The module, exported by torch."""
        return self.folder / "by_hand.onnx"

    @property
    def openvino(self) -> Path:
        """The exported program, converted by OpenVINO."""
        return self.folder / "by_hand.xml"


def keep(network: Network, scratch: Path) -> Kept:
    """Make a network's artifact and the exports that its users would make by hand, unless the folder has them."""
    folder, versions = scratch / network.name, made_with()
    facts_file = folder / "facts.json"
    facts = json.loads(facts_file.read_text(encoding="utf-8")) if facts_file.exists() else {}
    if facts.get("made_with") != versions:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        facts = {"made_with": versions} | _make(network, Kept(folder, {}))
        write_atomically(facts_file, json.dumps(facts, indent=1))
    return Kept(folder, facts)


def made_with() -> dict[str, str]:
    """Return the releases that decide what is kept."""
    found = {"recipe": str(RECIPE)}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # not every network needs it
            found[package] = importlib.metadata.version(package)
    return found


def _make(network: Network, kept: Kept) -> dict[str, Any]:
    module = network.build()
    start = time.perf_counter()
    graph = capture(module, (network.spec,), [])
    seconds = {"capture": time.perf_counter() - start}
    description, judged = describe_precisions(network, graph)
    data = artifact.build(graph, description, (network.inputs(SAMPLES),)).data
    write_atomically(kept.artifact, data)
    for name, export in (("onnx", _export_onnx), ("openvino", _export_openvino)):
        start = time.perf_counter()
        export(module, network.inputs(2), kept)
        seconds[name] = time.perf_counter() - start
    return {
        "macs": mac_count(graph),
        "parameters": parameter_count(graph),
        "weights_mib": sum(t.numel() * t.element_size() for t in graph.tensors.values()) / 2**20,
        "export_seconds": seconds,
        "precisions": judged,
    }


def describe_precisions(network: Network, graph: Graph) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an artifact's description as packaging writes it, and what each precision costs."""
    budget = SynthesisBudget(_FITTED, _CHUNK, 0, _JUDGED)
    inputs = prepare(graph, Sources(scale=network.scale), budget)
    found = measure_precisions(graph, inputs.fit, inputs.families, PRECISION_ERROR)
    description = {"name": network.name, "variant": "original", "info": {}}
    judged = {name: vars(record) for name, record in found.records.items()}
    return description | {"precision": found.description(PRECISION_ERROR)}, judged


def _export_onnx(module: nn.Module, example: Tensor, kept: Kept) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        module, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=False
    )
    assert program is not None
    program.save(kept.onnx)


def _export_openvino(module: nn.Module, example: Tensor, kept: Kept) -> None:
    openvino = import_openvino()
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    model = openvino.convert_model(program)
    model.reshape([-1, *example.shape[1:]])  # it forgets what is not dynamic
    openvino.save_model(model, kept.openvino, compress_to_fp16=False)
