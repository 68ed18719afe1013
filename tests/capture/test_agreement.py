"""What is no function of one input is refused, however well it exports."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.agreement import check_agreement
from redpp_serve.capture.export import capture
from redpp_serve.capture.flat import FlatNetwork
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from tests.support.captures import Net, captured, quick, refused  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick")


def calls(count: list[int], x: Tensor) -> Tensor:
    count[0] += 1
    return x * count[0]


IMPURE: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "random": (lambda net, x: x + torch.rand(8), "operator aten.rand.default"),
    "dropout in eval mode": (lambda net, x: F.dropout(x, 0.5, True), "operator aten.dropout.default"),
    "state in Python": (lambda net, x, count=[0]: calls(count, x), "another result than the network"),
    "control by data": (lambda net, x: x * 2 if x.sum() > 0 else x, "data-dependent"),
    "torch.cond": (lambda net, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "operator cond"),
    "fixed batch": (lambda net, x: x.view(2, 192), "batch"),
    "fixed batch by assertion": (lambda net, x: x if x.shape[0] == 2 else 1 / 0, "for batches of 2 alone"),
    "another result for many": (lambda net, x: x if x.shape[0] < 8 else 2 * x, "at batch size 9"),
    "mean over the batch": (lambda net, x: x - x.mean(0), "depends on the others in its batch"),
    "largest of the batch": (lambda net, x: x * x.amax(), "depends on the others in its batch"),
    "divided by the largest of the batch": (lambda net, x: x / x.abs().amax(), "depends on the others in its batch"),
    "rows left out by value": (
        lambda net, x: x[x.mean((1, 2, 3)) > -9],
        "aten.index.Tensor in module Net (captures.py:",
    ),
    "a number read from data": (lambda net, x: x * x.max().item(), "operator aten.item.default"),
    "no batch in the output": (lambda net, x: x.mean(), "an output of shape ()"),
    "constant output": (lambda net, x: (x, torch.zeros(5)), "output of shape (5,)"),
    "a scalar by name": (lambda net, x: {"y": x, "loss": x.mean()}, "an output of shape () (loss)"),
    "text": (lambda net, x: "text", "forward returns no tensor but output_0 (the text 'text')"),
    "complex numbers": (lambda net, x: torch.fft.fft(x), "an output of complex numbers"),
    "rows shuffled": (lambda net, x: x.flip(0), "depends on the others in its batch"),
}


@pytest.mark.parametrize("case", IMPURE)
def test_what_is_no_function_of_one_input(case: str) -> None:
    body, says = IMPURE[case]
    refused(Net(body).eval(), says)


def test_batch_norm_by_batch_statistics() -> None:
    """Its answer to a request would depend on whose requests the server puts into the same batch."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    refused(network, "depends on the others in its batch")


def test_bytes_divided_by_the_largest_of_the_batch() -> None:
    """Random bytes have the largest value 255 in every image; those of photographs differ."""
    spec = InputSpec("x", (3, 8, 8), "uint8")
    with pytest.raises(RedppError, match="depends on the others in its batch"):
        capture(Net(lambda net, x: x.float() / x.amax()).eval(), [spec], [])
    capture(Net(lambda net, x: x.float() / x.amax((1, 2, 3), keepdim=True)).eval(), [spec], [])


def test_infinite_outputs_are_compared() -> None:
    captured(Net(lambda net, x: torch.where(x > 0, x, -torch.inf)).eval())


X = (InputSpec("x", (4,)),)


def disagrees(
    op: str, args: tuple[Any, ...], module: Callable[[Tensor], Any], outputs: tuple[str, ...] = ("y",)
) -> bool:
    """Whether the graph of one call is told from the module."""
    graph = Graph(X, {}, (Node("y", op, (Ref("x"), *args)),), outputs)
    try:
        check_agreement(graph, FlatNetwork(Net(lambda net, x: module(x)), lambda tensors: (tensors, {}), X))
    except RedppError as error:
        assert "another result than the network" in str(error)
        return True
    return False


def test_what_counts_as_another_result() -> None:
    double = ("aten.mul.Tensor", (2.0,))
    assert not disagrees(*double, lambda x: x * 2)
    assert not disagrees(*double, lambda x: x * 2 * (1 + 1e-6))
    assert not disagrees("aten.log.default", (), torch.log)  # not a number at the same places
    assert disagrees(*double, lambda x: x * 2 * (1 + 1e-3))
    assert disagrees(*double, lambda x: x * 2 + 1e-3)
    assert disagrees(*double, lambda x: (x * 2)[:, :3])
    assert disagrees(*double, lambda x: (x * 2).double())
    assert disagrees(*double, lambda x: (x * 2, x))
    assert disagrees(*double, lambda x: x * 2, ("y", "x"))
    assert disagrees(*double, lambda x: torch.where(x > 0, x * 2, torch.nan))
    assert disagrees(*double, lambda x: torch.where(x > 0, x * 2, -torch.inf))
    assert disagrees("aten.log.default", (), lambda x: x.log().nan_to_num())
    assert disagrees("aten.gt.Scalar", (0,), lambda x: x >= 10)
