"""Every operator on the device that runs it: right, always the same bits, and recorded in a CUDA graph.

The cases are those of the operators' own tests. On a machine with a GPU this file is the check of the kernels: run it
alone. Without one the same functions run on the CPU, where the references answer.
"""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from redpp_serve.runtime.cuda_graphs import CudaRecorder, Recorder
from tests.runtime.test_cuda_graphs import StandIn
from tests.support.interpreting import assert_as_good_as_torch, errors
from tests.support.kernel_cases import CALLS, Call, mover, operator
from tests.support.kernel_memory import run_guarded

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TF32 = 2.0**13  # roundings of fp32 in one of tf32
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]

on_every_device = pytest.mark.parametrize("device", DEVICES)
in_every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_operator = pytest.mark.parametrize("op", CALLS)


@pytest.fixture(autouse=True)
def tf32_switches(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's two switches as the precision of the test has them."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = request.node.callspec.params.get("precision") == "tf32"
    yield
    for switch, on in zip(switches, before, strict=True):
        switch.allow_tf32 = on


@on_every_device
@in_every_precision
@every_operator
def test_right(op: str, precision: str, device: str) -> None:
    for_each(op, precision, lambda call: assert_right(op, call, precision, device))


@on_every_device
@in_every_precision
@every_operator
def test_always_the_same_bits(op: str, precision: str, device: str) -> None:
    for_each(op, precision, lambda call: assert_repeats(op, call, device))


@on_every_device
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@every_operator
def test_recorded_in_a_graph(op: str, precision: str, device: str) -> None:
    for_each(op, precision, lambda call: assert_replays(op, call, device))


@on_every_device
@every_operator
def test_a_wrong_value_is_noticed(op: str, device: str) -> None:
    """In the weights of the largest case; so the tests above can fail."""
    _, call = max(CALLS[op](torch.float32), key=lambda item: item[1].arguments[0].numel())
    with pytest.raises(AssertionError):
        assert_right(op, call._replace(arguments=damaged(call.arguments)), "fp32", device)


def for_each(op: str, precision: str, check: Callable[[Call], None]) -> None:
    """Every case, also after one that failed.

    Raises:
        AssertionError: with all cases that failed.
    """
    failed = {}
    for name, call in CALLS[op](PRECISIONS[precision]):
        try:
            check(call)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:600]
    assert not failed, json.dumps(failed, indent=1)


def assert_right(op: str, call: Call, precision: str, device: str) -> None:
    """As good as torch in the same precision, on the CPU or on the device, and nothing outside is read or written.

    A sum of n numbers in fp32 may differ by the order of its additions: by about sqrt(n) roundings, not one.
    """
    found = run_guarded(operator(op), *call.moved(mover(device))).cpu()
    exact = call.dense(mover(dtype=torch.float64))
    dtype = PRECISIONS[precision]
    peers = [errors(found, call.dense(mover(place, dtype)).cpu(), exact) for place in {"cpu", device}]
    result = peers[0] | {"torch_error": max(peer["torch_error"] for peer in peers)}
    if dtype == torch.float32:
        result["rounding"] *= max(1.0, math.sqrt(call.terms), TF32 if precision == "tf32" and device != "cpu" else 0.0)
    assert found.dtype == dtype
    assert_as_good_as_torch(result)


def assert_repeats(op: str, call: Call, device: str) -> None:
    """The same bits again, also where memory held something else before; laid out as the shapes alone promise."""
    arguments = call.moved(mover(device))
    first, promised = operator(op)(*arguments), operator(op)(*call.moved(mover("meta")))
    assert (first.shape, first.dtype, first.stride()) == (promised.shape, promised.dtype, promised.stride())
    for again in (operator(op)(*arguments), run_guarded(operator(op), *arguments)):
        assert torch.equal(first, again), "another result of the same call"


def assert_replays(op: str, call: Call, device: str) -> None:
    """A replay gives for what is in the input now what a call gives for it."""
    arguments = call.moved(mover(device))
    if not operator(op)(*arguments).numel():
        return  # nothing is launched, so there is nothing to record
    replay, (out,) = recorder(device).record(lambda: (operator(op)(*arguments),))
    arguments[0].neg_()
    expected = operator(op)(*arguments).clone()
    out.fill_(torch.nan)
    replay()
    assert torch.equal(out, expected), "the replay differs from the call"


def recorder(device: str) -> Recorder:
    return StandIn() if device == "cpu" else CudaRecorder(torch.device(device))


def damaged(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With one more added to the last number of the second tensor of floating-point numbers."""
    at = [k for k, value in enumerate(arguments) if isinstance(value, Tensor) and value.is_floating_point()][1]
    wrong = arguments[at].clone()
    wrong[(-1,) * wrong.dim()] += 1
    return (*arguments[:at], wrong, *arguments[at + 1 :])
