"""Small networks of every kind of layer, for tests of capture, counting and pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from tests.support.networks import Builder


@dataclass(frozen=True)
class Example:
    """A network, and the shapes of its inputs."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str = "float32"

    def module(self, seed: int = 0) -> nn.Module:
        """Build the network with random weights and statistics."""
        torch.manual_seed(seed)
        module = self.build().eval()
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 1.5)
        return module

    @functools.cache  # noqa: B019 - examples live as long as the tests
    def graph(self, seed: int = 0) -> Graph:
        """Capture the network, once."""
        specs = [InputSpec(f"x{k}" if k else "x", shape, self.dtype) for k, shape in enumerate(self.shapes)]
        return capture(self.module(seed), specs, [])


class Called(nn.Module):
    """A module whose forward is given as a function of its parts and inputs."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.call = nn.ModuleDict(parts), forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.parts, *inputs)


def tcn() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 3, padding=1),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 16, 3, padding=2, dilation=2),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 3, 1),
    )


def audio() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 12, 10, stride=5), nn.GELU(), nn.Conv1d(12, 12, 8, stride=4), nn.GELU(), nn.Conv1d(12, 6, 3)
    )


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 8, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.Conv3d(8, 2, 1),
    )


class VideoBlock(nn.Module):
    """A residual block in space and time, as in r3d."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 3, padding=1, bias=False)
        self.first, self.second = (nn.Conv3d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm3d(8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(x)))
        y = F.relu(self.norms[1](self.first(x)))
        x = F.relu(x + self.norms[2](self.second(y)))
        return self.head(x.mean((2, 3, 4)))


def generator(dims: int) -> Callable[[], nn.Module]:
    conv = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    return lambda: nn.Sequential(
        conv(8, 12, 4),
        norm(12),
        nn.ReLU(),
        conv(12, 12, 4, 2, 1, bias=False),
        norm(12),
        nn.ReLU(),
        conv(12, 3, 3, 2, 1, output_padding=1),
    )


class UNet(nn.Module):
    """An encoder and a decoder with a transposed convolution and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.low = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        return self.out(torch.cat([F.relu(self.up(F.relu(self.low(skip)))), skip], 1))


def same_padding() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding="same"), nn.ReLU(), nn.Conv2d(12, 12, 3, padding="same", dilation=2), nn.ReLU(),
        nn.Conv2d(12, 2, 3, padding="valid"),
    )  # fmt: skip


def tower() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU())


def siamese() -> nn.Module:
    def forward(parts: nn.ModuleDict, a: Tensor, b: Tensor) -> Tensor:
        difference: Tensor = parts["tower"](a).mean((2, 3)) - parts["tower"](b).mean((2, 3))
        return difference.pow(2).sum(1)

    return Called(forward, tower=tower())


def pyramid(norms: bool) -> Callable[[], nn.Module]:
    """Share a head over three levels, with or without norms of their own."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x, found = F.relu(parts["stem"](x)), []
        for level in range(3):
            y = parts["hidden"](x)
            y = F.relu(parts[f"norm{level}"](y) if norms else y)
            found.append(parts["out"](y).flatten(2))
            x = F.max_pool2d(x, 2)
        return torch.cat(found, 2)

    def build() -> nn.Module:
        parts: dict[str, nn.Module] = {f"norm{level}": nn.BatchNorm2d(12) for level in range(3 * norms)}
        return Called(
            forward,
            stem=nn.Conv2d(3, 8, 3, padding=1),
            hidden=nn.Conv2d(8, 12, 3, padding=1, bias=not norms),
            out=nn.Conv2d(12, 4, 1),
            **parts,
        )

    return build


def repeated() -> nn.Module:
    """Call one convolution on its own output."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = F.relu(parts["stem"](x))
        for _ in range(3):
            x = F.relu(parts["inner"](F.relu(parts["wide"](x))))
        return parts["head"](x.mean((2, 3)))

    return Called(
        forward,
        stem=nn.Conv2d(3, 8, 3, padding=1),
        wide=nn.Conv2d(8, 16, 1),
        inner=nn.Conv2d(16, 8, 3, padding=1),
        head=nn.Linear(8, 3),
    )


def shared_linear() -> nn.Module:
    def forward(parts: nn.ModuleDict, a: Tensor, b: Tensor) -> Tensor:
        return parts["score"](torch.relu(parts["embed"](a)) * torch.relu(parts["embed"](b)))

    return Called(forward, embed=nn.Linear(6, 16), score=nn.Linear(16, 3))


def bag() -> nn.Module:
    """Classify tokens by the mean of their embeddings."""
    return Called(
        lambda parts, x: parts["head"](torch.relu(parts["hidden"](parts["table"](x).mean(1)))),
        table=nn.Embedding(50, 16),
        hidden=nn.Linear(16, 12),
        head=nn.Linear(12, 4),
    )


def grouped(dims: int) -> Callable[[], nn.Module]:
    """Depthwise and grouped convolutions, and a transposed one in groups."""
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    back = {1: nn.ConvTranspose1d, 3: nn.ConvTranspose3d}[dims]
    return lambda: nn.Sequential(
        conv(2, 12, 1),
        nn.ReLU(),
        conv(12, 12, 3, padding=1, groups=12),
        nn.ReLU(),
        back(12, 24, 2, stride=2, groups=4),
        nn.ReLU(),
        conv(24, 2, 1),
    )


def attention() -> nn.Module:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        q, k, v = parts["qkv"](x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        y = torch.einsum("bhij,bhjd->bhid", weights, v) + F.scaled_dot_product_attention(q, k, v)
        return parts["out"](y.transpose(1, 2).flatten(2))

    return Called(forward, qkv=nn.Linear(12, 36), out=nn.Linear(12, 5))


def recurrent_graph() -> Graph:
    """Read the last state of an LSTM over six steps."""
    b = Builder(6, 4)
    names = [f"rnn.{kind}_{place}_l0" for kind in ("weight", "bias") for place in ("ih", "hh")]
    params = [b.tensor(n, b.random(*s)) for n, s in zip(names, ((32, 4), (32, 8), (32,), (32,)), strict=True)]
    first = b.op("first", "select.int", Ref("x"), 1, 0)  # a state of zeros for each input of the batch
    zeros = b.op("zeros", "mul.Scalar", Ref(b.op("wide", "repeat.default", Ref(first), [1, 2])), 0.0)
    state = [Ref(b.op("state", "unsqueeze.default", Ref(zeros), 0))] * 2
    b.op("rnn", "lstm.input", Ref("x"), state, params, True, 1, 0.0, False, False, True)
    b.nodes.append(Node("every", "py.getitem", (Ref("rnn"), 0)))
    last = b.op("last", "select.int", Ref("every"), 1, -1)
    return b.graph(b.linear(b.relu(b.linear(last, "hidden", 8, 6)), "head", 6, 2))


EXAMPLES: dict[str, Example] = {
    "tcn": Example(tcn, ((4, 32),)),
    "audio": Example(audio, ((1, 400),)),
    "volume": Example(volume, ((1, 4, 10, 10),)),
    "video": Example(VideoBlock, ((3, 4, 8, 8),)),
    "generator1d": Example(generator(1), ((8, 2),)),
    "generator2d": Example(generator(2), ((8, 2, 2),)),
    "generator3d": Example(generator(3), ((8, 1, 1, 1),)),
    "unet": Example(UNet, ((3, 12, 12),)),
    "same": Example(same_padding, ((3, 12, 12),)),
    "siamese": Example(siamese, ((3, 12, 12),) * 2),
    "pyramid": Example(pyramid(False), ((3, 16, 16),)),
    "pyramid_norms": Example(pyramid(True), ((3, 16, 16),)),
    "repeated": Example(repeated, ((3, 8, 8),)),
    "shared_linear": Example(shared_linear, ((6,),) * 2),
    "bag": Example(bag, ((9,),), "int64"),
    "grouped1d": Example(grouped(1), ((2, 12),)),
    "grouped3d": Example(grouped(3), ((2, 4, 4, 4),)),
    "attention": Example(attention, ((7, 12),)),
}
