"""A precision changes how a network computes, and neither what it computes nor the dtypes that go in and out."""

import pytest
import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.graph.passes import SERVED, check_served, in_precision, precision_dtype, set_switches
from redpp_serve.runtime.serving_graph import PlanContext, planned_programs
from tests.support import networks, rule_networks
from tests.support.networks import Builder

CPU = torch.device("cpu")
GRAPHS = {kind: networks.network(kind, 16) for kind in networks.KINDS}
GRAPHS |= {name: build() for name, (build, _) in rule_networks.OPEN.items()}


@torch.inference_mode()
def served(graph: Graph, precision: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What a server's dense program gives on the CPU."""
    programs = planned_programs(PlanContext.prepare(graph, CPU, precision), (1,), lambda name, batch: "dense")
    return programs[1](*inputs)


def error(got: Tensor, exact: Tensor) -> float:
    """Root of the mean square, relative to the exact values'."""
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_agree_within_their_rounding(name: str, precision: str) -> None:
    """No further from float64 than twice what torch makes of the same graph in that precision, and one rounding."""
    graph, dtype = GRAPHS[name], precision_dtype(precision)
    x = networks.example(graph)
    exact = Program(graph.to(torch.float64))(*x)
    plain = Program(graph.to(dtype))(*(t.to(dtype) for t in x))
    for got, torchs, want in zip(served(graph, precision, *(t.float() for t in x)), plain, exact, strict=True):
        assert got.dtype == torch.float32
        assert error(got, want) <= 2 * error(torchs, want) + torch.finfo(dtype).eps


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_single_precisions_change_nothing(precision: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        graph = GRAPHS["residual"].to(dtype)
        assert in_precision(graph, precision) is graph


def test_dtypes_among_the_arguments_and_floats_made_of_integers() -> None:
    """Positions divided, a mask of scalars, constants and a cast: each in float32 would meet a layer in bfloat16."""
    b = Builder(4)
    b.inputs.append(InputSpec("ids", (4,), "int64"))
    b.nodes += [
        Node("count", "aten.arange.default", (4,)),
        Node("positions", "aten.div.Tensor", (Ref("count"), 4)),
        Node("grid", "aten.arange.default", (4.0,)),
        Node("told", "aten.arange.default", (4,), {"dtype": torch.float32}),
        Node("ones", "aten.ones.default", ([4],)),
        Node("full", "aten.full.default", ([4], 0.5), {"dtype": torch.float32}),
        Node("even", "aten.eq.Scalar", (Ref("ids"), 2)),
        Node("mask", "aten.where.ScalarSelf", (Ref("even"), 0.25, Ref("ones"))),
        Node("cast", "aten._to_copy.default", (Ref("ids"),), {"dtype": torch.float32}),
        Node("as", "aten.to.dtype", (Ref("x"), torch.float32)),
    ]
    total = "as"
    for name in ("positions", "grid", "told", "full", "mask", "cast"):
        total = b.add(total, name)
    inner = b.linear(total, "fc", 4, 4)
    b.nodes.append(Node("best", "aten.argmax.default", (Ref(inner), -1)))
    graph = b.graph(inner, "best", "mask", "ids")
    x, ids = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[1, 2, 3, 2]] * 3)
    want = Program(graph)(x, ids)
    got = served(graph, "bf16", x, ids)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert error(got[0], want[0].double()) < 0.02 and torch.equal(got[2], want[2]) and torch.equal(got[3], ids)
    # no value on the way is wider
    inner_types = Program(in_precision(graph, "bf16")).types(x, ids)
    wide = [
        name
        for name, (_, dtype) in inner_types.items()
        if dtype == torch.float32 and not name.endswith((".wide", ".float32"))
    ]
    assert wide == []


def test_an_output_that_is_an_input_or_a_tensor() -> None:
    graph = Graph((InputSpec("x", (2,)),), {"w": torch.tensor([1.0, 2.0])}, (), ("x", "w"))
    x = torch.tensor([[0.5, 0.25]])
    got = served(graph, "fp16", x)
    assert [t.dtype for t in got] == [torch.float32] * 2
    assert torch.equal(got[0], x) and torch.equal(got[1], graph.tensors["w"])


def test_networks_stored_in_halves_keep_their_outputs_dtype() -> None:
    graph = GRAPHS["mlp"].to(torch.float16)
    x = networks.example(graph)[0]
    for precision, tolerance in (("fp32", 0.005), ("bf16", 0.03), ("fp16", 0.005)):
        (got,) = served(graph, precision, x.half())
        assert got.dtype == torch.float16
        assert error(got, Program(graph.to(torch.float64))(x)[0]) < tolerance


def test_what_does_not_run_in_a_precision_is_refused() -> None:
    with pytest.raises(RedppError, match="float64 values"):
        in_precision(GRAPHS["mlp"].to(torch.float64), "bf16")
    b = Builder(4)
    far = b.op("far", "full_like.default", Ref(b.linear("x", "fc", 4, 4)), 1e9)
    graph = b.graph(b.add("fc", far))
    assert torch.isfinite(served(graph, "bf16", torch.ones(1, 4))[0]).all()
    with pytest.raises(RedppError, match="does not run in fp16 on cpu.*precision fp32"):
        served(graph, "fp16", torch.ones(1, 4))


def test_unknown_precisions_are_refused() -> None:
    for precision in SERVED:
        check_served(precision)
    for wrong in ("int4", "", None, 16):
        with pytest.raises(RedppError, match="one of auto, fp32, tf32, fp16, bf16, int8"):
            check_served(wrong)


def test_switches_of_cuda() -> None:
    """They are torch's own, which are there without a GPU as well."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    try:
        for precision, on in (("fp32", False), ("tf32", True), ("bf16", False)):
            set_switches(precision)
            assert [switch.allow_tf32 for switch in switches] == [on, on]
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
