"""The operators as torch sees them: opcheck, export, compile, refusals, and the FLOP formula."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from redpp_serve import kernels
from redpp_serve.kernels.checks import check_values
from tests.kernels.test_split_reference import build_split, quantised_weight


def conv_arguments(dtype: torch.dtype = torch.float32, groups: int = 2) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    weight = quantised_weight((6, 4 // groups, 3, 3), generator)
    kernel, channel, index, sign = build_split(weight, groups)
    x = torch.randn((2, 4, 8, 7), generator=generator, dtype=torch.float64)
    names = {"x": x.to(dtype), "kernels": kernel.to(dtype), "channel": channel, "index": index, "sign": sign}
    return names | {"bias": torch.ones(6, dtype=dtype), "stride": (2, 1), "padding": 1, "dilation": 1, "groups": groups}


def linear_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    kernel, channel, index, sign = build_split(quantised_weight((6, 5, 1, 1), generator))
    x = torch.randn((3, 5), generator=generator, dtype=torch.float64)
    names = {"x": x.to(dtype), "values": kernel.flatten().to(dtype), "channel": channel, "index": index, "sign": sign}
    return names | {"bias": torch.ones(6, dtype=dtype)}


def dense_weight(arguments: dict[str, Tensor], unique: str) -> Tensor:
    rows = arguments[unique][arguments["index"].clamp(min=0).long()]
    return rows * arguments["sign"].view(*arguments["sign"].shape, *[1] * (rows.dim() - 2)).to(rows.dtype)


class SplitNet(nn.Module):
    """A split convolution and a split linear layer, as a pruned network holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.window = {key: value for key, value in conv_arguments().items() if not isinstance(value, Tensor)}
        for prefix, arguments in (("conv", conv_arguments()), ("linear", linear_arguments())):
            for key, value in arguments.items():
                if isinstance(value, Tensor) and key != "x":
                    self.register_buffer(f"{prefix}_{key}", value)

    def forward(self, x: Tensor) -> Tensor:
        split = self.conv_kernels, self.conv_channel, self.conv_index, self.conv_sign, self.conv_bias
        pooled = kernels.split_conv2d(x, *split, **self.window).relu().mean((2, 3))[:, :5]
        split = self.linear_values, self.linear_channel, self.linear_index, self.linear_sign, self.linear_bias
        return kernels.split_linear(pooled, *split)


def test_functions_equal_the_dense_layers() -> None:
    conv, linear = conv_arguments(torch.float64), linear_arguments(torch.float64)
    expected = F.conv2d(conv["x"], dense_weight(conv, "kernels"), conv["bias"], (2, 1), 1, 1, 2)
    torch.testing.assert_close(kernels.split_conv2d(**conv), expected)
    expected = F.linear(linear["x"], dense_weight(linear, "values"), linear["bias"])
    torch.testing.assert_close(kernels.split_linear(**linear), expected)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_memory_format_of_the_input_does_not_matter(layout: str) -> None:
    arguments = conv_arguments()
    x = arguments["x"]
    forms = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": torch.cat([x, x], 3)[..., : x.shape[3]],
        "expanded": x[:1].expand_as(x),
    }
    found = kernels.split_conv2d(**(arguments | {"x": forms[layout]}))
    torch.testing.assert_close(found, kernels.split_conv2d(**(arguments | {"x": forms[layout].contiguous()})))
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(dtype: torch.dtype, with_bias: bool) -> None:
    conv, linear = conv_arguments(dtype), linear_arguments(dtype)
    if not with_bias:
        conv["bias"] = linear["bias"] = None
    conv |= {"padding": (1, 1), "dilation": (1, 1)}
    torch.library.opcheck(torch.ops.redpp.split_conv2d.default, tuple(conv.values()))
    torch.library.opcheck(torch.ops.redpp.split_linear.default, tuple(linear.values()))


def test_runs_in_inference_mode() -> None:
    net, x = SplitNet(), torch.randn(2, 4, 8, 7)
    with torch.inference_mode():
        found = net(x)
    torch.testing.assert_close(found, net(x))


def test_export_with_a_dynamic_batch_keeps_the_operators() -> None:
    net = SplitNet()
    program = torch.export.export(net, (torch.randn(2, 4, 8, 7),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"redpp.split_conv2d.default", "redpp.split_linear.default"} <= called
    x = torch.randn(5, 4, 8, 7)
    torch.testing.assert_close(program.module()(x), net(x))


def test_compile_without_graph_breaks() -> None:
    net = SplitNet()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for batch in (2, 3):
        x = torch.randn(batch, 4, 8, 7)
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(4, 8, 7)}, r"x must be \(n, n_in, h, w\), found \(4, 8, 7\)"),
        ({"x": torch.zeros(2, 4, 8, 7, dtype=torch.int64)}, "x must be fp32, fp16, bf16 or fp64, found torch.int64"),
        ({"x": torch.zeros(2, 6, 8, 7)}, r"index must be torch.int32 of shape \(6, 3\)"),
        ({"x": torch.zeros(2, 4, 1, 1), "padding": 0}, "does not fit into the input"),
        ({"kernels": torch.zeros(3, 3)}, r"kernels must be \(unique, kh, kw\)"),
        ({"kernels": torch.zeros(3, 0, 3)}, r"kernels must be \(unique, kh, kw\)"),
        ({"kernels": torch.zeros(3, 3, 3, dtype=torch.float16)}, "kernels must be torch.float32"),
        ({"channel": torch.zeros(2, dtype=torch.int64)}, "channel must be torch.int64 of shape"),
        ({"index": torch.zeros(6, 2, dtype=torch.int64)}, "index must be torch.int32"),
        ({"index": torch.zeros(6, dtype=torch.int32)}, r"index must be \(n_out, inputs per group\)"),
        ({"sign": torch.ones(6, 2)}, "sign must be torch.int8"),
        ({"bias": torch.zeros(5)}, r"bias must be torch.float32 of shape \(6,\)"),
        ({"groups": 3}, "groups must be a divisor of the 4 inputs, found 3"),
        ({"groups": 0}, "groups must be a divisor of the 4 inputs, found 0"),
        (
            {"groups": 4, "index": torch.zeros(6, 1, dtype=torch.int32), "sign": torch.ones(6, 1, dtype=torch.int8)},
            "groups must be a divisor of the 6 outputs",
        ),
        ({"stride": 0}, "stride and dilation must be positive"),
        ({"dilation": (1, 1, 1)}, "each .vertical, horizontal.*found .*1, 1, 1"),
        ({"padding": -1}, "padding not negative"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_misfits_are_named(change: dict[str, object], text: str, device: str) -> None:
    arguments = conv_arguments() | change
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=f"redpp::split_conv2d: .*{text}"):
        kernels.split_conv2d(**moved)


def test_misfits_of_the_linear_layer_are_named() -> None:
    arguments = linear_arguments()
    for change, text in (
        ({"x": torch.tensor(1.0)}, "found a scalar"),
        ({"x": torch.zeros(3, 0)}, "x must have inputs"),
        ({"x": torch.zeros(3, 4)}, r"index must be torch.int32 of shape \(6, 4\)"),
        ({"values": torch.zeros(3, 1)}, r"values must be \(unique,\)"),
        ({"bias": torch.zeros(6, device="meta")}, "bias must be .* on cpu, found .* on meta"),
    ):
        with pytest.raises(ValueError, match=f"redpp::split_linear: .*{text}"):
            kernels.split_linear(**(arguments | change))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("index", 1000, r"index must lie within -1\.\.\d+ .*found -?\d+\.\.1000"),
        ("index", -2, r"index must lie within -1\.\.\d+ .*found -2"),
        ("sign", 0, r"sign must be \+1 or -1 \(0 only where index is -1\)"),
        ("sign", 2, r"sign must be \+1 or -1"),
        ("channel", 99, "channel must be non-decreasing within 0..3"),
        ("channel", -1, "channel must be non-decreasing within 0..3"),
    ],
)
def test_values_out_of_range_are_refused_even_after_a_good_call(name: str, value: int, text: str) -> None:
    arguments = conv_arguments()
    kernels.split_conv2d(**arguments)
    arguments[name].flatten()[int(arguments["index"].flatten().argmax()) if name != "channel" else 1] = value
    with pytest.raises(ValueError, match=text):
        kernels.split_conv2d(**arguments)


def test_a_kernel_of_another_input_is_refused() -> None:
    arguments = conv_arguments(groups=1)
    arguments["index"] = arguments["index"].flip(1)
    with pytest.raises(ValueError, match="index refers to a kernel of another input"):
        kernels.split_conv2d(**arguments)


def test_accepted_values_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        arguments = conv_arguments()
        channel, index, sign = (arguments[name].clone() for name in ("channel", "index", "sign"))
    assert index.is_inference()
    check_values("op", len(channel), 4, channel, index, sign, 2)
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda *_: pytest.fail("checked a second time"))
    check_values("op", len(channel), 4, channel, index, sign, 2)


def test_counts_are_the_operations_done() -> None:
    # Two inputs, three outputs: input 0 has one unique kernel used twice, input 1 has two; output 2 has one term.
    kernel = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand(3, 2, 2)
    index = torch.tensor([[0, 1], [0, 2], [-1, 1]], dtype=torch.int32)
    assert kernels.split_conv2d_counts(kernel, index, has_bias=False, positions=10) == (10 * 12, 10 * (9 + 1 + 1 + 0))
    assert kernels.split_conv2d_counts(kernel, index, has_bias=True, positions=10) == (10 * 12, 10 * (9 + 2 + 2 + 1))
    upper = kernels.split_conv2d_counts(kernel.to("meta"), index.to("meta"), has_bias=False, positions=10)
    assert upper == (10 * 12, 10 * (9 + 3))
    assert kernels.split_linear_counts(kernel[:, 0, 0], index, has_bias=False, rows=4) == (12, 4 * 2)
    assert kernels.split_conv2d_counts(kernel[:0], index.clamp(max=-1), has_bias=True, positions=10) == (0, 0)


def test_flop_counter_sees_both_operators() -> None:
    kernels.register_flop_formulas()
    kernels.register_flop_formulas()
    conv, linear = conv_arguments(), linear_arguments()
    with FlopCounterMode(display=False) as counter:
        positions = kernels.split_conv2d(**conv)[:, 0].numel()
        kernels.split_linear(**linear)
    expected = sum(kernels.split_conv2d_counts(conv["kernels"], conv["index"], True, positions))
    expected += sum(kernels.split_linear_counts(linear["values"], linear["index"], True, 3))
    assert counter.get_total_flops() == expected > 0


def test_import_and_a_cpu_call_leave_triton_alone() -> None:
    code = (
        "import sys, torch\nfrom redpp_serve import kernels\n"
        "one = torch.ones(1, 1); zero = torch.zeros(1, dtype=torch.int64)\n"
        "kernels.split_linear(one, one[0], zero, zero.int().view(1, 1), one.to(torch.int8))\n"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
