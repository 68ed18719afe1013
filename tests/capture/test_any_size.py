"""Networks whose inputs vary in size are captured for all of them, or refused with what fixes the size."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.capture.inputs import parse_input, parse_sizes, sample
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build, load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.sizes import ends, resized
from redpp_serve.options import Options
from redpp_serve.pruning.pipeline import prune

SIDES = ["H=32..96/32", "W=32..96/32"]


class Segments(nn.Module):
    """A fully convolutional network with a skip and an output of the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep, self.up = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        up = self.up(torch.relu(self.deep(down)))
        return F.interpolate(self.head(torch.cat([up, down], 1)), size=x.shape[-2:], mode="bilinear")


class Text(nn.Module):
    """A transformer that reads ids and a mask of any length up to 64, with embeddings of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(50, 16), nn.Parameter(torch.randn(1, 64, 16))
        self.layer, self.head = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.layer(self.table(ids) + self.places[:, : ids.shape[1]], src_key_padding_mask=mask == 0)
        weight = (mask != 0).unsqueeze(-1).float()
        return self.head((hidden * weight).sum(1) / weight.sum(1).clamp(min=1))


class Sound(nn.Module):
    """Strided convolutions over a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 8, 9, stride=4), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 9))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None]).mean(-1))


class Recurrent(nn.Module):
    """An LSTM in both directions beneath a GRU, over a sequence of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True),
            nn.GRU(10, 4, batch_first=True),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = self.first(x)
        steps, last = self.second(hidden)
        return steps, last[0]


def captured(module: nn.Module, inputs: list[str], sizes: list[str], messages: list[str] | None = None) -> Graph:
    torch.manual_seed(0)
    known = parse_sizes(sizes)
    specs = [parse_input(text, k, known) for k, text in enumerate(inputs)]
    return capture(module.eval(), specs, [] if messages is None else messages)


NETWORKS = [
    (Segments, ["3xHxW"], SIDES),
    (Segments, ["3xSxS"], ["S=36..100/32"]),
    (Text, ["L:int64", "L:int64"], ["L=2..64"]),
    (Sound, ["T"], ["T=401..4000"]),
    (Recurrent, ["Tx6"], ["T=3..40"]),
]


def outputs(graph: Graph, module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return what graph and module give for random inputs of the smallest and largest sizes."""
    found = []
    for number, chosen in enumerate(ends(graph.inputs)):
        x = sample([resized(spec, chosen) for spec in graph.inputs], 2, torch.Generator().manual_seed(number))
        with torch.no_grad():
            expected = module(*x)
            found.extend(zip(Program(graph)(*x), expected if isinstance(expected, tuple) else (expected,), strict=True))
    return found


@pytest.mark.parametrize(("module", "inputs", "sizes"), NETWORKS)
def test_a_network_computes_the_same_at_every_size(module, inputs, sizes):
    module, messages = module(), []
    graph = load(build(captured(module, inputs, sizes, messages), {}).data).graph
    assert "sizes vary" in messages[-1] and "pruned and timed at" in messages[-1]
    for got, expected in outputs(graph, module):
        assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("module", "inputs", "sizes"), NETWORKS)
def test_a_pruned_network_takes_every_size(module, inputs, sizes):
    module = module()
    graph = captured(module, inputs, sizes)
    options = Options(hash="none", keep=0.75, distil=0, time_budget=1, max_error=10, round_to=1)
    for got, expected in outputs(prune(graph, options).pruned, module):
        assert got.shape == expected.shape and bool(got.isfinite().all())


def test_what_fixes_the_size_is_named():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64 * 64, 3))
    with pytest.raises(RedppError, match=r"inputs of 3x32x32 it fails in 2: .*cannot be multiplied.*has a fixed one"):
        captured(flat, ["3xHxW"], ["H=32..128/32", "W=32..128/32"])
    with pytest.raises(RedppError, match=r"inputs of 65, 65 it fails in Text: "):
        captured(Text(), ["L:int64", "L:int64"], ["L=8..65"])


@pytest.mark.parametrize("kind", [pytest.param("traced", marks=pytest.mark.exhaustive), "scripted"])
@pytest.mark.parametrize(
    ("module", "inputs", "sizes"), [*NETWORKS[1:4], pytest.param(*NETWORKS[4], marks=pytest.mark.exhaustive)]
)
def test_torchscript_is_taken_for_sizes_that_vary_or_refused_with_what_to_save(module, inputs, sizes, kind):
    torch.manual_seed(1)
    network, known = module().eval(), parse_sizes(sizes)
    example = sample([parse_input(text, k, known) for k, text in enumerate(inputs)], 2, torch.Generator())
    traced = kind == "traced"
    script = torch.jit.trace(network, example, check_trace=False) if traced else torch.jit.script(network)
    if module is Text or (not traced and module is Segments):  # sizes in tensors; operators of lists, branches
        why = "it reads a size from a tensor" if traced else "TS2EPConverter|aten::slice"
        with pytest.raises(RedppError, match=f"not convert this TorchScript.*({why}).*before it is traced or scripted"):
            captured(script, inputs, sizes)
        return
    for got, expected in outputs(captured(script, inputs, sizes), network):
        assert got.shape == expected.shape and torch.allclose(got, expected, atol=1e-4)


def test_a_trace_that_keeps_the_size_of_its_example_is_refused():
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], int(x.shape[1]) // 2, 2).sum(2)

    class Kept(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(int(x.shape[1])).to(x)

    for network in (Fixed(), Kept()):
        script = torch.jit.trace(network.eval(), torch.randn(2, 64), check_trace=False)
        with pytest.raises(
            RedppError, match="of 32 it fails: .*a trace keeps the sizes of its example.*save the module"
        ):
            captured(script, ["T"], ["T=32..96/32"])
