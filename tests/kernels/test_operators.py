"""Every operator on every device: right in all shapes, always the same bits, recorded in a graph; and its refusals.

On the CPU the references answer. On a machine with a GPU, ``pytest -m gpu tests/kernels`` checks the kernels there.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve import kernels
from redpp_serve.runtime.cuda_graphs import CudaRecorder, Recorder
from tests.support.interpreting import assert_as_good_as_torch, errors
from tests.support.kernel_cases import CALLS, Call, build_split, mover, operator, quantised_weight
from tests.support.kernel_memory import run_guarded
from tests.support.recording import StandIn

PRECISIONS = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
TF32 = 2.0**13  # roundings of fp32 in one of tf32
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]

on_every_device = pytest.mark.parametrize("device", DEVICES)
every_operator = pytest.mark.parametrize("op", CALLS)


@pytest.fixture(autouse=True)
def tf32_switches() -> Iterator[None]:
    """Restore torch's two switches."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    yield
    for switch, on in zip(switches, before, strict=True):
        switch.allow_tf32 = on


@on_every_device
@every_operator
def test_results_are_as_good_as_those_of_torch(op: str, device: str) -> None:
    for_each(op, device, lambda call, precision: assert_right(op, call, precision, device))


@on_every_device
@every_operator
def test_results_have_always_the_same_bits_and_the_promised_layout(op: str, device: str) -> None:
    for_each(op, device, lambda call, _: assert_repeats(op, call, device))


@on_every_device
@every_operator
def test_a_recorded_graph_replays_the_operator(op: str, device: str) -> None:
    for_each(op, device, lambda call, _: assert_replays(op, call, device), ("fp32", "fp16"))


@on_every_device
@every_operator
def test_one_wrong_weight_is_noticed(op: str, device: str) -> None:
    """In the largest case; so the tests above can fail."""
    _, call = max(CALLS[op](torch.float32), key=lambda item: item[1].arguments[0].numel())
    with pytest.raises(AssertionError):
        assert_right(op, damaged(call), "fp32", device)


@every_operator
def test_half_precisions_are_rounded_once(op: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for name, call in CALLS[op](dtype):
            if "prmt" not in name and "pair" not in name:  # which take half precisions alone
                wide = operator(op)(*call.moved(mover(dtype=torch.float32)))
                assert torch.equal(operator(op)(*call.arguments), wide.to(dtype)), (name, dtype)


def for_each(
    op: str, device: str, check: Callable[[Call, str], None], precisions: Iterable[str] = tuple(PRECISIONS)
) -> None:
    """Check every case in these precisions, also after one that failed.

    Raises:
        AssertionError: with all cases that failed.
    """
    failed = {}
    for precision in precisions:
        dtype = PRECISIONS[precision]
        if device == "cpu" and precision == "tf32":
            continue
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        for name, call in CALLS[op](dtype):
            try:
                check(call, precision)
            except Exception as error:
                failed[f"{name}, {precision}"] = f"{type(error).__name__}: {error}"[:600]
    assert not failed, json.dumps(failed, indent=1)


def assert_right(op: str, call: Call, precision: str, device: str) -> None:
    """Demand results as good as torch's in that precision, on the CPU or on the device, and no other memory touched.

    A sum of n numbers in fp32 may differ by the order of its additions: by about sqrt(n) roundings, not one.
    """
    found = run_guarded(operator(op), *call.moved(mover(device))).cpu()
    exact = call.dense(mover(dtype=torch.float64))
    dtype = PRECISIONS[precision]
    peers = [errors(found, call.dense(mover(place, dtype)).cpu(), exact) for place in {"cpu", device}]
    result = peers[0] | {"torch_error": max(peer["torch_error"] for peer in peers)}
    if dtype in (torch.float32, torch.float64):
        result["rounding"] *= max(1.0, math.sqrt(call.terms), TF32 if precision == "tf32" and device != "cpu" else 0.0)
    assert found.dtype == dtype
    assert_as_good_as_torch(result)


def assert_repeats(op: str, call: Call, device: str) -> None:
    """Demand the same bits, also where memory held something else before, laid out as the shapes alone promise."""
    arguments = call.moved(mover(device))
    first, promised = operator(op)(*arguments), operator(op)(*call.moved(mover("meta")))
    assert (first.shape, first.dtype, first.stride()) == (promised.shape, promised.dtype, promised.stride())
    images = op in ("fused_conv2d", "depthwise_conv2d")
    assert first.is_contiguous(memory_format=torch.channels_last if images else torch.contiguous_format)
    for again in (operator(op)(*arguments), run_guarded(operator(op), *arguments)):
        assert torch.equal(first, again), "another result of the same call"


def assert_replays(op: str, call: Call, device: str) -> None:
    """Demand that a replay computes from the current input what a call computes from it."""
    arguments = call.moved(mover(device))
    if not operator(op)(*arguments).numel() or 0 in arguments[0].stride():
        return  # nothing is launched, so there is nothing to record; an expanded input cannot be changed
    replay, (out,) = recorder(device).record(lambda: (operator(op)(*arguments),))
    arguments[0].neg_()
    expected = operator(op)(*arguments).clone()
    out.fill_(torch.nan)
    replay()
    assert torch.equal(out, expected), "the replay differs from the call"


def recorder(device: str) -> Recorder:
    return StandIn() if device == "cpu" else CudaRecorder(torch.device(device))


def damaged(call: Call) -> Call:
    """Add one to the first number of the second tensor of floating-point numbers."""
    places = [k for k, v in enumerate(call.arguments) if isinstance(v, Tensor) and v.is_floating_point()]
    wrong = call.arguments[places[1]].clone()
    wrong[(0,) * wrong.dim()] += 1
    return call.changed(places[1], wrong)


def test_defaults_are_the_plain_layers() -> None:
    x, rows = torch.randn(2, 4, 5, 5), torch.randn(3, 4)
    weight, taps, dense = torch.randn(3, 4, 3, 3), torch.randn(4, 1, 3, 3), torch.randn(6, 4)
    index, codebook = torch.randint(0, 9, (6, 4)), torch.randn(9)
    exact = quantised_weight((6, 4, 3, 3), torch.Generator().manual_seed(0)).float()
    split, flat = build_split(exact), build_split(exact[..., :1, :1])
    for found, expected in (
        (kernels.fused_conv2d(x, weight), F.conv2d(x, weight)),
        (kernels.depthwise_conv2d(x, taps), F.conv2d(x, taps, groups=4)),
        (kernels.fused_linear(rows, dense), F.linear(rows, dense)),
        (kernels.codebook_linear(rows, kernels.pack_indices(index), codebook), F.linear(rows, codebook[index])),
        (kernels.split_conv2d(x, *split), F.conv2d(x, exact)),
        (kernels.split_linear(rows, flat.kernels.flatten(), *flat[1:]), F.linear(rows, exact[..., 0, 0])),
    ):
        torch.testing.assert_close(found, expected)


def test_import_and_calls_on_the_cpu_load_no_compiler() -> None:
    code = (
        "import sys, torch\nfrom redpp_serve import kernels\n"
        "image = torch.ones(1, 1, 1, 1); one = torch.ones(1, 1); zero = torch.zeros(1, dtype=torch.int64)\n"
        "kernels.fused_conv2d(image, image); kernels.depthwise_conv2d(image, image); kernels.fused_linear(one, one)\n"
        "kernels.split_linear(one, one[0], zero, zero.int().view(1, 1), one.to(torch.int8))\n"
        "kernels.codebook_linear(one, kernels.pack_indices(zero.view(1, 1)), one[0])\n"
        "sys.exit(bool({'triton', 'sympy', 'torch._dynamo'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# --- Refusals ---


def given(op: str) -> dict[str, Any]:
    """Make arguments that an operator takes, by name."""
    g = torch.Generator().manual_seed(0)
    window = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1)}
    x = torch.randn(2, 4, 9, 7, generator=g)
    if op == "fused_conv2d":
        weight, residual = torch.randn(5, 4, 3, 2, generator=g), torch.zeros(2, 5, 5, 8)
        return {"x": x, "weight": weight, "bias": torch.ones(5), "residual": residual, "activation": "silu"} | window
    if op == "depthwise_conv2d":
        return {"x": x, "weight": torch.ones(4, 1, 3, 2), "bias": torch.ones(4), "activation": "relu6"} | window
    if op == "fused_linear":
        weight, residual = torch.ones(9, 24), torch.zeros(2, 3, 9)
        return {"x": torch.ones(2, 3, 24), "weight": weight, "bias": torch.ones(9), "residual": residual}
    if op == "codebook_linear":
        index = torch.randint(0, 16, (65, 1025), generator=g)
        indices = kernels.pack_indices(index.clamp(max=15))
        return {"x": torch.ones(5, 1025), "indices": indices, "codebook": torch.ones(16), "bias": torch.ones(65)}
    if op == "split_conv2d":
        kernel, channel, index, sign = build_split(quantised_weight((6, 2, 3, 3), g), 2)
        split = {"x": x, "kernels": kernel.float(), "channel": channel, "index": index, "sign": sign}
        return split | {"bias": torch.ones(6)} | window | {"groups": 2}
    values, channel, index, sign = build_split(quantised_weight((6, 5, 1, 1), g))
    split = {"values": values.flatten().float(), "channel": channel, "index": index, "sign": sign}
    return {"x": torch.ones(3, 5)} | split | {"bias": torch.ones(6)}


INT32, INT8 = torch.int32, torch.int8
REFUSALS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "fused_conv2d": [
        ({"x": torch.zeros(4, 8, 7)}, r"x must be \(n, n_in, h, w\) in .*found torch.float32 \(4, 8, 7\)"),
        ({"x": torch.zeros(2, 4, 9, 7, dtype=torch.int64)}, "x must be .* found torch.int64"),
        ({"x": torch.zeros(2, 6, 9, 7)}, r"weight must be torch.float32 of shape \(5, 6, 3, 2\).* \(5, 4, 3, 2\)"),
        ({"x": torch.zeros(2, 4, 1, 1), "padding": 0}, "does not fit into the input"),
        ({"weight": torch.zeros(5, 4, 3)}, r"weight must be \(outputs, inputs, kh, kw\), found \(5, 4, 3\)"),
        ({"weight": torch.zeros(5, 4, 3, 0)}, r"weight must be"),
        ({"weight": torch.zeros(5, 4, 3, 2).half()}, "weight must be torch.float32"),
        ({"bias": torch.zeros(8)}, r"bias must be torch.float32 of shape \(5,\)"),
        ({"residual": torch.zeros(2, 5, 5, 9)}, r"residual must be torch.float32 of shape \(2, 5, 5, 8\)"),
        ({"stride": (0, 1)}, r"stride and dilation must be positive.*found \(0, 1\)"),
        ({"dilation": (1, 0)}, "stride and dilation must be positive"),
        ({"stride": (1, 1, 1)}, r"each \(vertical, horizontal\), found \(1, 1, 1\)"),
        ({"padding": ()}, r"each \(vertical, horizontal\)"),
        ({"padding": (-1, 0)}, r"padding not negative"),
        ({"activation": "tanh"}, "activation must be one of none, relu.* found 'tanh'"),
    ],
    "depthwise_conv2d": [
        ({"x": torch.zeros(6, 9, 7)}, r"x must be \(n, channels, h, w\)"),
        ({"weight": torch.zeros(4, 2, 3, 2)}, r"weight must be torch.float32 of shape \(4, 1, 3, 2\)"),
        ({"weight": torch.zeros(4, 1, 3)}, r"weight must be \(outputs, inputs, kh, kw\)"),
        ({"bias": torch.zeros(5)}, r"bias must be torch.float32 of shape \(4,\)"),
        ({"dilation": (9, 1)}, "does not fit into the input"),
        ({"activation": "ReLU"}, "found 'ReLU'"),
    ],
    "fused_linear": [
        ({"x": torch.zeros(())}, r"x must be \(\.\.\., n_in\)"),
        ({"x": torch.zeros(2, 3, 24, dtype=torch.int64)}, "x must be"),
        ({"weight": torch.zeros(9, 23)}, "weight must be"),
        ({"weight": torch.zeros(())}, r"weight must be \(n_out, n_in\)"),
        ({"bias": torch.zeros(8)}, "bias must be"),
        ({"residual": torch.zeros(2, 3, 10)}, "residual must be"),
        ({"activation": "tanh"}, "activation"),
    ],
    "codebook_linear": [
        ({"x": torch.tensor(1.0)}, "x must be"),
        ({"x": torch.zeros(2, 1025, dtype=INT32)}, "x must be"),
        ({"codebook": torch.zeros(17)}, "codebook must hold 1 to 16 values"),
        ({"codebook": torch.zeros(0)}, "codebook must hold 1 to 16 values"),
        ({"codebook": torch.zeros(16, dtype=torch.float16)}, "codebook must be torch.float32"),
        ({"indices": torch.zeros(65, 512, dtype=torch.uint8)}, "indices must be torch.uint8 of shape"),
        ({"indices": torch.zeros(65, 576, dtype=INT8)}, "indices must be torch.uint8 of shape"),
        ({"bias": torch.zeros(64)}, "bias must be"),
        ({"activation": "tanhh"}, "activation must be one of"),
        ({"decode": "guess"}, "decode must be auto or one of"),
    ],
    "split_conv2d": [
        ({"x": torch.zeros(4, 8, 7)}, r"x must be \(n, n_in, h, w\) in .*found torch.float32 \(4, 8, 7\)"),
        ({"x": torch.zeros(2, 4, 8, 7, dtype=torch.int64)}, "x must be .* fp32, fp16, bf16 or fp64, found torch.int64"),
        ({"x": torch.zeros(2, 6, 8, 7)}, r"index must be torch.int32 of shape \(6, 3\)"),
        ({"x": torch.zeros(2, 0, 8, 7)}, "x must have inputs"),
        ({"x": torch.zeros(2, 4, 1, 1), "padding": 0}, "does not fit into the input"),
        ({"kernels": torch.zeros(3, 3)}, r"kernels must be \(unique, kh, kw\)"),
        ({"kernels": torch.zeros(3, 0, 3)}, r"kernels must be \(unique, kh, kw\)"),
        ({"kernels": torch.zeros(3, 3, 3, dtype=torch.float16)}, "kernels must be torch.float32"),
        ({"channel": torch.zeros(2, dtype=torch.int64)}, "channel must be torch.int64 of shape"),
        ({"index": torch.zeros(6, 2, dtype=torch.int64)}, "index must be torch.int32"),
        ({"index": torch.zeros(6, dtype=INT32)}, r"index must be \(n_out, inputs per group\)"),
        ({"sign": torch.ones(6, 2)}, "sign must be torch.int8"),
        ({"bias": torch.zeros(5)}, r"bias must be torch.float32 of shape \(6,\)"),
        ({"groups": 3}, "groups must be a divisor of the 4 inputs, found 3"),
        ({"groups": 0}, "groups must be a divisor of the 4 inputs, found 0"),
        (
            {"groups": 4, "index": torch.zeros(6, 1, dtype=INT32), "sign": torch.ones(6, 1, dtype=INT8)},
            "groups must be a divisor of the 6 outputs",
        ),
        ({"stride": 0}, "stride and dilation must be positive"),
        ({"dilation": (1, 1, 1)}, "each .vertical, horizontal.*found .*1, 1, 1"),
        ({"padding": -1}, "padding not negative"),
    ],
    "split_linear": [
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., n_in\)"),
        ({"x": torch.zeros(3, 0)}, "x must have inputs"),
        ({"x": torch.zeros(3, 4)}, r"index must be torch.int32 of shape \(6, 4\)"),
        ({"values": torch.zeros(3, 1)}, r"values must be \(unique,\)"),
    ],
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@every_operator
def test_misfits_are_named(op: str, device: str) -> None:
    move = mover(device)
    for change, text in REFUSALS[op]:
        arguments = {name: move(value) for name, value in (given(op) | change).items()}
        with pytest.raises(ValueError, match=f"redpp::{op}: .*{text}"):
            raise AssertionError((change, getattr(kernels, op)(**arguments)))


@every_operator
def test_a_tensor_on_another_device_is_named(op: str) -> None:
    change = {"bias": given(op)["bias"].to("meta")}
    with pytest.raises(ValueError, match="bias must be .* on cpu, found .* on meta"):
        getattr(kernels, op)(**(given(op) | change))


def test_values_out_of_range_are_refused_even_after_a_good_call() -> None:
    for name, value, text in (
        ("index", 1000, r"index must lie within -1\.\.\d+ .*found -?\d+\.\.1000"),
        ("index", -2, r"index must lie within -1\.\.\d+ .*found -2"),
        ("sign", 0, r"sign must be \+1 or -1 \(0 only where index is -1\)"),
        ("sign", 2, r"sign must be \+1 or -1"),
        ("channel", 99, r"channel must be non-decreasing within 0\.\.3"),
        ("channel", -1, r"channel must be non-decreasing within 0\.\.3"),
    ):
        arguments = given("split_conv2d")
        kernels.split_conv2d(**arguments)
        at = int(arguments["index"].flatten().argmax()) if name != "channel" else 1
        arguments[name].flatten()[at] = value
        with pytest.raises(ValueError, match=text):
            raise AssertionError((name, value, kernels.split_conv2d(**arguments)))


def test_a_kernel_of_another_input_is_refused() -> None:
    for op in ("split_conv2d", "split_linear"):
        arguments = given(op)
        arguments |= {name: arguments[name].flip(1) for name in ("index", "sign")}
        with pytest.raises(ValueError, match=f"redpp::{op}: index refers to a kernel of another input"):
            getattr(kernels, op)(**arguments)


def test_an_index_beyond_the_codebook_is_refused_also_once_it_appears() -> None:
    arguments = given("codebook_linear") | {"codebook": torch.zeros(15)}
    with pytest.raises(ValueError, match="indices must be below the codebook's 15 values, found 15"):
        kernels.codebook_linear(**arguments)
    arguments["indices"] = arguments["indices"] & 0x77
    kernels.codebook_linear(**arguments)
    for byte in (0xF0, 0x0F):
        arguments["indices"][0, 0] = byte
        with pytest.raises(ValueError, match="found 15"):
            kernels.codebook_linear(**arguments)


@pytest.mark.parametrize(("op", "reader"), [("split_conv2d", "aminmax"), ("codebook_linear", "max")])
def test_accepted_values_are_not_read_again(op: str, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        arguments = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given(op).items()}
        if op == "codebook_linear":
            arguments |= {"codebook": torch.ones(8), "indices": arguments["indices"] & 0x77}
        expected = getattr(kernels, op)(**arguments)
        monkeypatch.setattr(torch.Tensor, reader, lambda *_: pytest.fail("read a second time"))
        assert torch.equal(getattr(kernels, op)(**arguments), expected)
        again = {k: v.clone() if k == "sign" else v for k, v in arguments.items()}
        if op == "split_conv2d":  # another tensor of signs
            with pytest.raises(pytest.fail.Exception):
                kernels.split_conv2d(**again)
