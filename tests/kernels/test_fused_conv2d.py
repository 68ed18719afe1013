"""The dense convolutions as torch sees them: meaning, opcheck, export, compile, refusals, and the FLOP formula."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from redpp_serve import kernels
from redpp_serve.kernels.epilogue import ACTIVATIONS

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
POSITIONS = [[4, -1], [0, 7], [6, 2], [-1, 3], [1, 5]]  # five computed channels, eight stored ones


def fused_arguments(dtype: torch.dtype = torch.float32, positions: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    channels = 8 if positions else 5
    tensors = {"x": random(2, 4, 9, 7), "weight": random(5, 4, 3, 2), "bias": random(5)}
    tensors["residual"] = random(2, channels, 5, 8)
    tensors["positions"] = torch.tensor(POSITIONS, dtype=torch.int32) if positions else None
    window = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1)}
    return tensors | {"channels": channels, "activation": "silu"} | window


def depthwise_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 6, 9, 7), (6, 1, 3, 2), (6,)
    x, weight, bias = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    window = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 2)}
    return {"x": x, "weight": weight, "bias": bias, "activation": "relu6"} | window


def stored(computed: Tensor) -> Tensor:
    out = computed.new_full((computed.shape[0], 8, *computed.shape[2:]), torch.nan)
    for o, row in enumerate(POSITIONS):
        for channel in row:
            if channel >= 0:
                out[:, channel] = computed[:, o]
    return out


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_meaning(activation: str) -> None:
    fused, depthwise = fused_arguments(torch.float64), depthwise_arguments(torch.float64)
    found = kernels.fused_conv2d(**(fused | {"activation": activation}))
    sums = F.conv2d(fused["x"], fused["weight"], fused["bias"], (2, 1), 1)
    torch.testing.assert_close(found, ACTIVATIONS[activation](stored(sums) + fused["residual"]))
    found = kernels.depthwise_conv2d(**(depthwise | {"activation": activation}))
    sums = F.conv2d(depthwise["x"], depthwise["weight"], depthwise["bias"], (2, 1), 1, (1, 2), 6)
    torch.testing.assert_close(found, ACTIVATIONS[activation](sums))


def test_defaults_are_a_plain_convolution() -> None:
    x, weight, taps = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3), torch.randn(4, 1, 3, 3)
    torch.testing.assert_close(kernels.fused_conv2d(x, weight), F.conv2d(x, weight))
    torch.testing.assert_close(kernels.depthwise_conv2d(x, taps), F.conv2d(x, taps, groups=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_round_once(dtype: torch.dtype) -> None:
    calls = {kernels.fused_conv2d: fused_arguments(dtype), kernels.depthwise_conv2d: depthwise_arguments(dtype)}
    for op, arguments in calls.items():
        wide = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
        assert torch.equal(op(**arguments), op(**wide).to(dtype))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_results_are_channels_last_whatever_the_input(layout: str) -> None:
    for op, arguments in ((kernels.fused_conv2d, fused_arguments()), (kernels.depthwise_conv2d, depthwise_arguments())):
        x = arguments["x"]
        forms = {
            "channels_last": x.to(memory_format=torch.channels_last),
            "sliced": torch.cat([x, x], 3)[..., : x.shape[3]],
            "expanded": x[:1].expand_as(x),
        }
        found = op(**(arguments | {"x": forms[layout]}))
        torch.testing.assert_close(found, op(**(arguments | {"x": forms[layout].contiguous()})))
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("x", "weight", "expected"),
    [
        ((0, 4, 5, 5), (3, 4, 3, 3), (0, 3, 3, 3)),
        ((2, 0, 5, 5), (3, 0, 3, 3), (2, 3, 3, 3)),
        ((2, 4, 5, 5), (0, 4, 3, 3), (2, 0, 3, 3)),
    ],
    ids=["images", "inputs", "outputs"],
)
def test_none_of(x: tuple[int, ...], weight: tuple[int, ...], expected: tuple[int, ...]) -> None:
    bias = torch.arange(float(weight[0]))
    found = kernels.fused_conv2d(torch.ones(x), torch.ones(weight), bias, activation="relu")
    assert found.shape == expected
    if x[1] == 0:
        assert torch.equal(found, bias.view(1, -1, 1, 1).expand(expected))


def test_depthwise_without_channels_or_images() -> None:
    assert kernels.depthwise_conv2d(torch.ones(2, 0, 5, 5), torch.ones(0, 1, 3, 3)).shape == (2, 0, 3, 3)
    assert kernels.depthwise_conv2d(torch.ones(0, 2, 5, 5), torch.ones(2, 1, 3, 3)).shape == (0, 2, 3, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [True, False])
def test_opcheck(dtype: torch.dtype, extras: bool) -> None:
    fused, depthwise = fused_arguments(dtype, positions=extras), depthwise_arguments(dtype)
    if not extras:
        fused |= {"bias": None, "residual": None}
        depthwise["bias"] = None
    torch.library.opcheck(torch.ops.redpp.fused_conv2d.default, tuple(fused.values()))
    torch.library.opcheck(torch.ops.redpp.depthwise_conv2d.default, tuple(depthwise.values()))


class Net(nn.Module):
    """Both operators, as a serving graph holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.randn(8, 4, 3, 3))
        self.taps = nn.Buffer(torch.randn(8, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = kernels.fused_conv2d(x, self.weight, activation="relu", padding=1)
        return x + kernels.depthwise_conv2d(x, self.taps, activation="relu6", padding=1)


def test_export_with_a_dynamic_batch_keeps_the_operators() -> None:
    net = Net()
    program = torch.export.export(net, (torch.randn(2, 4, 8, 7),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"redpp.fused_conv2d.default", "redpp.depthwise_conv2d.default"} <= called
    x = torch.randn(5, 4, 8, 7)
    torch.testing.assert_close(program.module()(x), net(x))


def test_compile_without_graph_breaks() -> None:
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for batch in (2, 3):
        x = torch.randn(batch, 4, 8, 7)
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(4, 8, 7)}, r"x must be \(n, n_in, h, w\).*found torch.float32 \(4, 8, 7\)"),
        ({"x": torch.zeros(2, 4, 9, 7, dtype=torch.int64)}, "x must be .* found torch.int64"),
        ({"x": torch.zeros(2, 6, 9, 7)}, r"weight must be torch.float32 of shape \(5, 6, 3, 2\).* \(5, 4, 3, 2\)"),
        ({"x": torch.zeros(2, 4, 1, 1), "padding": 0}, "does not fit into the input"),
        ({"weight": torch.zeros(5, 4, 3)}, r"weight must be \(outputs, inputs, kh, kw\), found \(5, 4, 3\)"),
        ({"weight": torch.zeros(5, 4, 3, 0)}, r"weight must be"),
        ({"weight": torch.zeros(5, 4, 3, 2).half()}, "weight must be torch.float32"),
        ({"bias": torch.zeros(8)}, r"bias must be torch.float32 of shape \(5,\)"),
        ({"residual": torch.zeros(2, 5, 5, 8)}, r"residual must be torch.float32 of shape \(2, 8, 5, 8\)"),
        ({"stride": (0, 1)}, r"stride and dilation must be positive.*found \(0, 1\)"),
        ({"stride": (1, 1, 1)}, r"each \(vertical, horizontal\), found \(1, 1, 1\)"),
        ({"padding": ()}, r"each \(vertical, horizontal\)"),
        ({"padding": (-1, 0)}, r"padding not negative"),
        ({"activation": "tanh"}, "activation must be one of none, relu.* found 'tanh'"),
        ({"positions": None}, "channels must be"),
        ({"positions": torch.zeros(4, 2, dtype=torch.int32)}, r"positions must be torch.int32 of shape \(5"),
        ({"positions": torch.tensor(POSITIONS)}, "positions must be torch.int32"),
        ({"positions": torch.tensor(POSITIONS, dtype=torch.int32).clamp(max=6)}, "exactly once"),
        ({"channels": 9, "residual": None}, "exactly once"),
    ],
)
def test_fused_refusals(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"redpp::fused_conv2d: .*{text}"):
        kernels.fused_conv2d(**(fused_arguments() | change))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(6, 9, 7)}, r"x must be \(n, n_in, h, w\)"),
        ({"weight": torch.zeros(6, 2, 3, 2)}, r"weight must be torch.float32 of shape \(6, 1, 3, 2\)"),
        ({"bias": torch.zeros(5)}, r"bias must be torch.float32 of shape \(6,\)"),
        ({"dilation": (9, 1)}, "does not fit into the input"),
        ({"activation": "ReLU"}, "found 'ReLU'"),
    ],
)
def test_depthwise_refusals(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"redpp::depthwise_conv2d: .*{text}"):
        kernels.depthwise_conv2d(**(depthwise_arguments() | change))


def test_flop_counter_counts_as_for_torchs_convolutions() -> None:
    kernels.register_flop_formulas()
    fused, depthwise = fused_arguments(), depthwise_arguments()
    with FlopCounterMode(display=False) as ours:
        kernels.fused_conv2d(**fused)
        kernels.depthwise_conv2d(**depthwise)
    with FlopCounterMode(display=False) as torchs:
        F.conv2d(fused["x"], fused["weight"], None, (2, 1), 1)
        F.conv2d(depthwise["x"], depthwise["weight"], None, (2, 1), 1, (1, 2), 6)
    assert ours.get_total_flops() == torchs.get_total_flops() > 0


def test_a_cpu_call_leaves_triton_and_the_compiler_alone() -> None:
    code = (
        "import sys, torch\nfrom redpp_serve import kernels\n"
        "one = torch.ones(1, 1, 1, 1); table = torch.tensor([[0, 1]], dtype=torch.int32)\n"
        "kernels.fused_conv2d(one, one, positions=table, channels=2)\nkernels.depthwise_conv2d(one, one)\n"
        "sys.exit(bool({'triton', 'sympy', 'torch._dynamo'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
