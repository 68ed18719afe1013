"""The integers that inputs hold are read from what reads them, entry by entry, or are said to be unknown."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redpp_serve.capture.export import capture
from redpp_serve.capture.ranges import with_ranges
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec

ROWS, OTHER = ((0, 9),), ((0, 6),)
BYTES = ((0, 255),)


class Reads(nn.Module):
    """A network whose forward is a function of it and its integer inputs, with tables of 10 and 7 rows."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.body = body
        self.table, self.other = nn.Embedding(10, 4), nn.Embedding(7, 4)
        self.linear, self.conv = nn.Linear(4, 3), nn.Conv2d(3, 4, 3)
        self.register_buffer("starts", torch.tensor([0, 2, 5]))
        self.register_buffer("positions", torch.arange(6))

    def forward(self, x: Tensor, gate: Tensor | None = None, kind: Tensor | None = None) -> Tensor:
        return self.body(self, *(t for t in (x, gate, kind) if t is not None))


def inputs_of(body: Callable[..., Tensor], *specs: InputSpec) -> tuple[InputSpec, ...]:
    torch.manual_seed(0)
    return capture(Reads(body).eval(), specs, []).inputs


def columns(m: Any, x: Tensor) -> Tensor:
    first, second, third = x.unbind(1)
    return m.table(first) + m.other(second) + m.table(third)


def chosen(m: Any, x: Tensor) -> Tensor:
    return m.table(torch.where(x < 0, torch.zeros_like(x), x))


def led(m: Any, x: Tensor) -> Tensor:
    return m.table(torch.cat([x.new_full((x.shape[0], 1), 9), x], 1))


ONE_INPUT = [
    ("embedding", lambda m, x: m.linear(m.table(x)), (6,), ROWS),
    ("after a cast and a clone", lambda m, x: m.table(x.to(torch.int64).clone()), (6,), ROWS),
    ("tables one behind the other", lambda m, x: m.table(x + m.starts), (3,), ((0, 1), (0, 2), (0, 4))),
    ("reserved rows", lambda m, x: m.table(x + 2), (3,), ((0, 7),)),
    ("columns", lambda m, x: m.table(x[:, 0]) + m.other(x[:, 1]), (2,), (*ROWS, *OTHER)),
    ("unbound columns", columns, (3,), (*ROWS, *OTHER, *ROWS)),
    ("columns of a sequence", lambda m, x: m.table(x[..., 0]) + m.other(x[..., 1]), (5, 2), (*ROWS, *OTHER)),
    ("rows of a stack", lambda m, x: m.table(x[:, 0]) + m.other(x[:, 1]), (2, 3), ROWS * 3 + OTHER * 3),
    ("a token in front", led, (5,), ROWS),
    ("padding", lambda m, x: m.table(F.pad(x, (1, 0), value=3)), (5,), ROWS),
    ("counted down", lambda m, x: m.table(9 - x), (5,), ROWS),
    ("a stored table", lambda m, x: m.table.weight[x], (5,), ROWS),
    ("index_select", lambda m, x: m.table.weight.index_select(0, x.flatten()).view(-1, 5, 4), (5,), ROWS),
    ("gather", lambda m, x: m.positions.expand(x.shape[0], -1).gather(1, x), (5,), ((0, 5),)),
    ("clamped", lambda m, x: m.table(x.clamp(0, 9)), (5,), ROWS),
    ("hashed", lambda m, x: m.table(x % 10), (5,), ROWS),
    ("chosen", chosen, (5,), ROWS),
    ("a one-hot code by hand", lambda m, x: (x.unsqueeze(-1) == m.positions).float(), (5,), ((0, 5),)),
    ("also compared with padding", lambda m, x: m.table(x) * (x != 0).unsqueeze(-1).float(), (5,), ROWS),
    ("moved about", lambda m, x: m.table(x.repeat(1, 2).view(-1, 5, 2).transpose(1, 2).flip(2)), (5,), ROWS),
    ("in parts", lambda m, x: torch.cat([m.table(part) for part in x.chunk(2, 1)], 1), (6,), ROWS),
    ("unread in part", lambda m, x: m.table(x[:, :2]), (4,), (*ROWS * 2, (0, 1), (0, 1))),
    ("a flag", lambda m, x: x.bool().float(), (5,), ((0, 1),)),
    ("numbers", lambda m, x: m.linear(x.float()), (4,), ()),
    ("rows and numbers", lambda m, x: m.table(x[:, 0]) + x[:, 1:].float().sum(1, keepdim=True), (4,), ()),
]


@pytest.mark.parametrize(("body", "shape", "ranges"), [case[1:] for case in ONE_INPUT], ids=[c[0] for c in ONE_INPUT])
def test_what_reads_integers_tells_their_range(body, shape, ranges):
    (spec,) = inputs_of(body, InputSpec("x", shape, "int64"))
    assert spec.ranges == ranges


@pytest.mark.parametrize(
    ("body", "shape", "dtype"),
    [
        (lambda m, x: m.conv(x.float() / 255), (3, 16, 16), "uint8"),
        (lambda m, x: m.conv(x / 255), (3, 16, 16), "uint8"),
        (lambda m, x: m.conv(x.permute(0, 3, 1, 2).float().div(127.5) - 1), (16, 16, 3), "uint8"),
        (lambda m, x: m.conv((x.float() - 120) / 50), (3, 16, 16), "int32"),
        (lambda m, x: m.conv(x.to(torch.float32).flip(1)), (3, 8, 40), "int64"),
    ],
)
def test_pictures_are_bytes(body, shape, dtype):
    (spec,) = inputs_of(body, InputSpec("x", shape, dtype))
    assert (spec.ranges, spec.limits) == (BYTES, ())


@pytest.mark.parametrize(
    "hides",
    [
        lambda scores, gate: scores + (1.0 - gate[:, None].float()) * -1e4,
        lambda scores, gate: scores + (gate[:, None] - 1) * 1e9,
        lambda scores, gate: scores.masked_fill(gate[:, None] == 0, -1e9),
        lambda scores, gate: scores.masked_fill(~gate[:, None].bool(), -1e9),
        lambda scores, gate: torch.where(gate[:, None] > 0, scores, -1e9),
        lambda scores, gate: scores * (gate != 0)[:, None].float(),
    ],
)
def test_attention_masks(hides):
    def body(m: Any, x: Tensor, gate: Tensor, kind: Tensor) -> Tensor:
        hidden = m.table(x) + m.other(kind)
        return hides(hidden @ hidden.transpose(1, 2), gate).softmax(-1) @ hidden

    ids, mask, kinds = inputs_of(body, *(InputSpec("", (5,), "int64") for _ in range(3)))
    assert (ids.ranges, mask.ranges, kinds.ranges) == (ROWS, ((0, 1),), OTHER)
    assert (ids.limits, mask.limits) == (ROWS, ())


def test_a_mask_that_only_weighs_is_known_by_its_name():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            weight = attention_mask.unsqueeze(-1).float()
            return (self.table(ids) * weight).sum(1) / weight.sum(1).clamp(min=1)

    specs = [InputSpec("", (5,), "int64")] * 2
    assert capture(Mean().eval(), specs, []).inputs[1].ranges == ((0, 1),)
    unnamed = inputs_of(lambda m, x, gate: m.table(x) * gate.unsqueeze(-1).float(), *specs)
    assert unnamed[1].ranges == ()


def test_lengths_reach_from_one_to_the_longest():
    def body(m: Any, x: Tensor, gate: Tensor) -> Tensor:
        return m.table(x) * (torch.arange(6)[None] < gate).unsqueeze(-1).float()

    _, lengths = inputs_of(body, InputSpec("", (6,), "int64"), InputSpec("", (1,), "int64"))
    assert lengths.ranges == ((1, 6),)


def test_what_the_network_can_read_is_wider_than_what_it_is_given():
    def limits(body: Callable[..., Tensor], *given: tuple[int, int]) -> tuple[Any, Any]:
        (spec,) = inputs_of(body, InputSpec("x", (3,), "int64", given))
        return spec.ranges, spec.limits

    assert limits(lambda m, x: m.table.weight[x]) == (ROWS, ((-10, 9),))
    assert limits(lambda m, x: m.table(x.clamp(0, 9))) == (ROWS, ())
    assert limits(lambda m, x: m.table(x), (3, 4)) == (((3, 4),), ROWS)
    assert limits(lambda m, x: m.linear(x[..., None].float().expand(-1, -1, 4)), (0, 99)) == (((0, 99),), ())
    assert limits(lambda m, x: m.table(x - 1), (1, 5)) == (((1, 5),), ((1, 10),))


def test_a_range_that_the_network_cannot_read_is_refused():
    def body(m: Any, x: Tensor) -> Tensor:
        return m.table(x[:, :1]) + m.other(x[:, 1:])

    with pytest.raises(RedppError, match="index out of range.*the integers that it reads"):
        inputs_of(body, InputSpec("x", (2,), "int64", ((0, 9), (7, 7))))
    graph = capture(Reads(body).eval(), [InputSpec("x", (2,), "int64")], [])
    with pytest.raises(RedppError, match=r"gives 0..9,0..7 for x.*Expected: 0..6"):
        with_ranges(replace(graph, inputs=(replace(graph.inputs[0], ranges=((0, 9), (0, 7))),)))
