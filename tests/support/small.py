"""A small convolutional network with batch norms, its file, and the graphs inside a package of it."""

import zipfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from redpp_serve.capture import Captured, capture_file
from redpp_serve.graph.artifact import load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import InputSpec
from tests.support.small_networks import Small

SHAPE, CLASSES, SHIFT = (1, 12, 12), 5, 0.5
INPUT = "1x12x12"
LABELS = ("ant", "bee", "cat", "dog", "élan")
ARCH = Path(__file__).with_name("small_networks.py")

_CAPTURED: dict[tuple[str, bytes, str, tuple[InputSpec, ...]], Captured] = {}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters as constructed with this seed, statistics of batch norms far from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            fan = max(1, parameter[0].numel())
            parameter.data = torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5
        if isinstance(part, nn.BatchNorm2d):
            shape = part.running_mean.shape
            part.running_mean = 0.3 * torch.randn(shape, generator=generator)
            part.running_var = 0.5 + torch.rand(shape, generator=generator)
            part.weight.data = 0.5 + torch.rand(shape, generator=generator)
    return module.eval()


def network() -> nn.Module:
    """`Small`, where one channel of ``body`` is there twice, so that exact merging has something to do."""
    module = randomise(Small())
    with torch.no_grad():
        for tensor in (module.body[0].weight, module.body[0].bias, *module.body[1].state_dict().values()):
            if tensor.dim():
                tensor[8:] = tensor[:8]
    return module


def write_model(folder: Path, module: nn.Module | None = None) -> Path:
    """``folder/small.pt``, a state_dict."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save((module or network()).state_dict(), folder / "small.pt")
    return folder / "small.pt"


def captured(model: Path, factory: str = "Small", inputs: tuple[InputSpec, ...] = (InputSpec("x", SHAPE),)) -> Captured:
    """The captured network of `write_model`; each file's is captured once in a process, which takes a second."""
    key = model.name, model.read_bytes(), factory, inputs
    if key not in _CAPTURED:
        _CAPTURED[key] = capture_file(model, inputs, arch=f"{ARCH}:{factory}")
    made = _CAPTURED[key]
    return replace(
        made,
        graph=replace(made.graph, tensors=dict(made.graph.tensors)),
        source=dict(made.source),
        messages=list(made.messages),
    )


def arguments(model: Path, factory: str = "Small") -> list[str]:
    """The command line's words for the same."""
    return [str(model), "--arch", f"{ARCH}:{factory}", "--input", INPUT]


def write_data(path: Path, module: nn.Module | None = None, images: int = 40) -> Path:
    """Inputs with the network's own answers as labels: it has an accuracy of 1."""
    x = torch.randn(images, *SHAPE, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        labels = (module or network())(x).argmax(1)
    numpy.savez(path, inputs=x.numpy(), labels=labels.numpy())
    return path


def outputs(archive: Path, *inputs: Tensor) -> list[list[float]]:
    """What the network in an archive gives for one input, without server and handler."""
    with zipfile.ZipFile(archive) as file:
        program = _program(file.read("model.redpp"))
    with torch.no_grad():
        return [y[0].tolist() for y in program(*(x[None] for x in inputs))]


@lru_cache(8)
def _program(artifact: bytes) -> Program:
    return Program(load(artifact).graph)
