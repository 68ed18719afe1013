"""What the tests of capture share: networks from one function, and a capture that is checked on the way."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build, load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.runtime.serving_graph import serving_program

IMAGE = (InputSpec("input_0", (3, 8, 8)),)


class Net(nn.Module):
    """A forward given as a function of the module and one input, with buffers by name."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **buffers: Tensor) -> None:
        super().__init__()
        self.body = body
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode, with statistics and zero-initialised weights such that every layer shows."""
    g = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(0.3 * torch.randn(part.num_features, generator=g))
            part.running_var.copy_(0.5 + torch.rand(part.num_features, generator=g))
    for parameter in module.parameters():
        if not parameter.detach().any():
            parameter.data.normal_(std=0.1, generator=g)
    return module.eval()


def captured(module: nn.Module, inputs: Sequence[InputSpec] = IMAGE, messages: list[str] | None = None) -> Graph:
    """The captured graph, after a check that it, its artifact and the server's form of it agree with the module."""
    torch.manual_seed(0)
    graph = capture(module, inputs, [] if messages is None else messages)
    loaded = load(build(graph, {}).data).graph
    for batch in (1, 4):
        x = [
            torch.randn(batch, *i.shape) if i.dtype == "float32" else torch.ones(batch, *i.shape, dtype=torch.int64)
            for i in inputs
        ]
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(module(*(t.clone() for t in x)))
            for program in (Program(graph), Program(loaded), serving_program(loaded, torch.device("cpu"))):
                got = program(*(t.clone() for t in x))
                for mine, theirs in zip(got, expected, strict=True):
                    scale = float(theirs.double().abs().nan_to_num(0, 0).max())
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5 * scale + 1e-7)
    return graph


def refused(module: Any, says: str, inputs: Sequence[InputSpec] = IMAGE) -> None:
    with pytest.raises(RedppError) as caught:
        capture(module, inputs, [])
    assert says in str(caught.value)


@pytest.fixture
def quick() -> Iterator[None]:
    """One thread, as the networks are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
