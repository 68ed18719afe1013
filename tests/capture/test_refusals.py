"""Each kind of refusal names the module, the line of its forward, and what to write instead."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.errors import RedppError
from tests.support.captures import IMAGE, quick  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick")

Body = Callable[[Any, Tensor], Any]


class Part(nn.Module):
    """A part of a network, with a buffer of state and one of complex numbers, whose forward `part` gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("state", torch.zeros(1))
        self.register_buffer("phase", torch.ones(8, dtype=torch.complex64))


def part(body: Body) -> Part:
    """Make a part whose forward is the body, also by its name: torch keeps the lines of functions called forward."""
    code = body.__code__.replace(co_name="forward")
    return type("Part", (Part,), {"forward": FunctionType(code, globals())})()


def counted(net: Part, x: Tensor) -> Tensor:
    net.calls += 1
    return x * net.calls


KINDS: dict[str, tuple[Body, str]] = {
    "random numbers": (lambda net, x: x + torch.randn_like(x), "if self.training"),
    "dropout": (lambda net, x: F.dropout(x), "if self.training"),
    "a mask": (lambda net, x: x + x[x > 0].sum(), "torch.where(condition, x, value)"),
    "rows by a mask": (lambda net, x: x[x.mean((1, 2, 3)) > 0], "torch.where(condition, x, value)"),
    "masked_select": (lambda net, x: x + x.masked_select(x > 0).mean(), "torch.where(condition, x, value)"),
    "nonzero": (lambda net, x: x.nonzero(), "torch.where(condition, x, value)"),
    "where of a condition alone": (lambda net, x: torch.where(x > 0)[0], "torch.where(condition, x, value)"),
    "unique": (lambda net, x: x.unique(), "torch.where(condition, x, value)"),
    "item": (lambda net, x: x * x.max().item(), "x.amax((1, 2, 3), keepdim=True) for x.max().item()"),
    "tolist": (lambda net, x: x * torch.tensor(x.tolist()), "x.amax((1, 2, 3), keepdim=True) for x.max().item()"),
    "a tensor of results": (lambda net, x: x * torch.tensor([x.mean(), x.std()])[0], "torch.stack([a, b])"),
    "a condition": (lambda net, x: x if x.mean() > 0 else -x, "torch.where(condition, a, b)"),
    "torch.cond": (lambda net, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "torch.where(condition, a, b)"),
    "a number of classes": (lambda net, x: F.one_hot(x.argmax(-1)), "num_classes=10"),
    "NumPy": (lambda net, x: torch.from_numpy(np.exp(x.numpy())), "torch.clamp(x, 0, 1) for np.clip(x, 0, 1)"),
    "NumPy by itself": (lambda net, x: np.clip(x, 0, 1), "torch.clamp(x, 0, 1) for np.clip(x, 0, 1)"),
    "a deep copy": (lambda net, x: copy.deepcopy(x), "x.clone() for copy.deepcopy(x)"),
    "a nested tensor": (lambda net, x: torch.nested.nested_tensor([x[0], x[1]]).to_padded_tensor(0.0), "padded"),
    "a sparse tensor": (lambda net, x: x.to_sparse().to_dense(), "ordinary tensors"),
    "a complex number": (lambda net, x: (x + 1j * x).abs(), "torch.complex(real, imaginary)"),
    "complex numbers out": (lambda net, x: torch.fft.fft(x), "torch.view_as_real(x)"),
    "complex numbers stored": (lambda net, x: (x * net.phase).abs(), "real and imaginary parts"),
    "a derivative": (lambda net, x: torch.func.grad(lambda t: t.sum())(x), "write the derivative out"),
    "an operator": (lambda net, x: torch.histc(x, 4), "package a part of the network"),
    "the batch's mean": (lambda net, x: x - x.mean(), "x.mean((1, 2, 3), keepdim=True)"),
    "the batch's order": (lambda net, x: x.flip(0), "x.mean((1, 2, 3), keepdim=True)"),
    "one of the batch": (lambda net, x: x + x[:1].exp(), "x.mean((1, 2, 3), keepdim=True)"),
    "the batch's size": (lambda net, x: x * x.shape[0], "x.mean((1, 2, 3), keepdim=True)"),
    "a number out": (lambda net, x: (x, x.mean()), "leave out what describes the whole batch"),
    "the batch at the end": (lambda net, x: x.transpose(0, 1), "return a result for each input"),
    "a fixed batch": (lambda net, x: x.view(2, 192), "x.shape[0], without int()"),
    "the length of the batch": (lambda net, x: x.reshape(len(x), 192), "x.shape[0], without int()"),
    "a loop over the batch": (lambda net, x: torch.stack([row * 2 for row in x]), "one call on the whole batch"),
    "a loop over numbers": (lambda net, x: torch.stack([x[k] for k in range(x.shape[0])]), "one call on the whole"),
    "squeeze": (lambda net, x: x.mean((1, 2, 3), True).squeeze(), "x.squeeze(-1)"),
    "state": (lambda net, x: x + net.state.add_(1), "hand a state in and out of forward"),
    "an exception": (lambda net, x: x.reshape(7), "pass the shape"),
    "a list of numbers": (lambda net, x: x.mean((1, 2, 3)).tolist(), "return the tensor itself, before .tolist()"),
    "text": (lambda net, x: "text", "return the tensor itself"),
    "state in Python": (counted, "keep no state"),
    "another result for one": (lambda net, x: x if x.shape[0] > 1 else 2 * x, "the size of the batch"),
    "another result for many": (lambda net, x: x if x.shape[0] < 8 else 2 * x, "the size of the batch"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:__array_wrap__", "ignore:The PyTorch API of nested")
def test_a_refusal_names_module_line_and_what_to_write(kind: str) -> None:
    body, instead = KINDS[kind]
    network = nn.Sequential(nn.Tanh(), nn.Sequential(OrderedDict(part=part(body))))
    with pytest.raises(RedppError) as caught:
        capture(network.eval(), IMAGE, [])
    assert f"in module 1.part (test_refusals.py:{body.__code__.co_firstlineno})" in str(caught.value)
    assert instead in caught.value.do


def test_the_network_itself_is_named_by_its_class() -> None:
    with pytest.raises(RedppError, match=r"in module Part \(test_refusals.py:"):
        capture(part(lambda net, x: x + torch.randn_like(x)).eval(), IMAGE, [])


def test_modules_of_torch_alone_have_no_line() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.raises(RedppError, match=r"through operator \S+ in module 1\."):
        capture(network, IMAGE, [])
