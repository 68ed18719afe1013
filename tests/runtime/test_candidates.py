"""Every candidate computes its layer, and the rules say which are worth timing."""

import math

import pytest
import torch
from torch import Tensor

from redpp_serve.graph import executor as program
from redpp_serve.graph import weights
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, Node, Ref
from redpp_serve.graph.weights import repeats
from redpp_serve.runtime.candidates import Candidate, candidates, signature, with_kernels
from redpp_serve.runtime.fused_layer import fused_layers
from redpp_serve.runtime.serving_graph import PlanContext, layer_inputs, planned_programs, serving_graph
from tests.support.networks import Builder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def few_values(shape: tuple[int, ...], count: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=g)
    index = torch.randint(count, shape, generator=g)
    index.view(-1)[:count] = torch.arange(count)
    return values[index] / shape[1] ** 0.5


def few_kernels(n_out: int, n_in: int, k: int, seed: int = 0) -> Tensor:
    """One kernel to each input, its negative, or none."""
    g = torch.Generator().manual_seed(seed)
    sign = torch.randint(-1, 2, (n_out, n_in, 1, 1), generator=g)
    return sign * torch.randn(1, n_in, k, k, generator=g) / n_in**0.5


def layers(activation: str = "relu", dtype: torch.dtype = torch.float32) -> Graph:
    """Convolutions of each kind and Linear, each with bias, half of them with a sum, all with an activation."""
    b = Builder(4, 7, 6)
    act = lambda x: b.op(f"{x}_act", f"{activation}.default", Ref(x))  # noqa: E731
    first = act(b.conv("x", "plain", 4, 8, stride=2))
    spatial = act(b.conv(first, "spatial", 8, 8, groups=8))
    grouped = act(b.conv(spatial, "grouped", 8, 8, groups=2))
    repeated = act(b.add(b.conv(grouped, "repeated", 8, 8), first))
    rows = b.op("rows", "mean.dim", Ref(repeated), [3])
    rows = b.op("turned", "transpose.int", Ref(rows), 1, 2)
    coded = act(b.linear(rows, "coded", 8, 12))
    more = act(b.add(b.linear(coded, "more", 12, 12), coded))
    graph = b.graph(b.linear(more, "head", 12, 3, bias=False))
    replaced = {
        "coded.weight": few_values((12, 8), 5),
        "more.weight": few_values((12, 12), 16),
        "repeated.weight": few_kernels(8, 8, 3),
    }
    return serving_graph(graph.with_tensors(replaced).to(dtype), CPU)


def options(graph: Graph, node: Node, device: torch.device, rows: int = 1) -> dict[str, Candidate]:
    shapes = layer_inputs(graph, CPU)
    found = candidates(graph, node, (rows, *shapes[node.name][1:]), device, torch.float32)
    assert found[0].kernel == "dense" and len({c.kernel for c in found}) == len(found)
    return {c.kernel: c for c in found}


KERNELS_OF = {  # layer -> what a CPU and a GPU have beside dense
    "plain": (["library"], ["cudnn", "fused"]),
    "spatial": (["library"], ["cudnn", "depthwise"]),
    "grouped": (["library"], ["cudnn"]),
    "repeated": (["library", "split"], ["cudnn", "fused", "split"]),
    "coded": (["onednn", "codebook:auto", "split"], ["fused", "codebook:pointer", "split"]),
    "more": (["onednn", "codebook:auto"], ["fused", "codebook:pointer"]),
    "head": (["onednn"], ["fused"]),
}


def layer_of(graph: Graph, weight: str) -> Node:
    return next(layer.node for layer in fused_layers(graph) if layer.weight.name.split(".")[0] == weight)


@pytest.mark.parametrize("name", KERNELS_OF)
def test_what_a_device_can_run(name: str) -> None:
    graph = layers()
    for device, expected in zip((CPU, CUDA), KERNELS_OF[name], strict=True):
        assert list(options(graph, layer_of(graph, name), device))[1:] == expected


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_every_candidate_computes_what_the_layer_means(device: torch.device, activation: str) -> None:
    """Also those for a GPU: their operators have implementations for the CPU, cuDNN's apart."""
    graph = layers(activation)
    x = torch.randn(3, 4, 7, 6, generator=torch.Generator().manual_seed(1))
    tried = set()
    for layer in fused_layers(graph):
        wanted = [layer.node.name]
        (exact,) = Program(graph.to(torch.float64), wanted)(x.double())
        for kernel, candidate in options(graph, layer.node, device).items():
            if kernel == "cudnn":
                continue
            node, stored = candidate.make()
            assert node.name == layer.node.name
            read = {layer.x.name} | ({layer.other.name} if layer.other else set())
            assert set(node.refs()) == read | set(stored)
            planned = with_kernels(graph, {node.name: candidate})
            (got,) = Program(planned, wanted)(x)
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
            tried.add(kernel)
    assert tried > ({"dense", "onednn", "split"} if device == CPU else {"dense", "fused", "depthwise", "split"})


def test_cudnn_is_called_as_its_schema_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on a GPU alone; here a stand-in with the names of its schema computes."""
    graph = layers()
    x = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(1))

    def stand_in(schema: torch.FunctionSchema) -> object:
        names = [argument.name for argument in schema.arguments]

        def call(*args: object) -> Tensor:
            given = dict(zip(names, args, strict=True))
            window = [given[name] for name in ("bias", "stride", "padding", "dilation", "groups")]
            y = torch.nn.functional.conv2d(given["self"], given["weight"], *window)
            return torch.relu(y + given["alpha"] * given["z"] if "z" in given else y)

        return call

    for layer in fused_layers(graph):
        if "cudnn" not in (found := options(graph, layer.node, CUDA)):
            continue
        planned = with_kernels(graph, {layer.node.name: found["cudnn"]})
        schema = program.resolve(planned.node(layer.node.name).op)._schema
        assert "cudnn_convolution_" + ("add_relu" if layer.other else "relu") in schema.name
        (want,) = Program(graph, [layer.node.name])(x)
        resolve = program.resolve
        with monkeypatch.context() as patched:
            fake = stand_in(schema)
            patched.setattr(
                program, "resolve", lambda op, fake=fake, real=resolve: fake if op.startswith("cudnn.") else real(op)
            )
            (got,) = Program(planned, [layer.node.name])(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def linear(weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Graph, Node]:
    b = Builder(weight.shape[1])
    b.op("y", "linear.default", Ref("x"), b.tensor("w", weight))
    graph = serving_graph(b.graph("y").to(dtype), CPU)
    return graph, graph.nodes[0]


def worth(graph: Graph, node: Node, rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[str]:
    x_shape = (rows, graph.tensors["w"].shape[1], *(graph.inputs[0].shape[1:]))
    return [c.kernel for c in candidates(graph, node, x_shape, device, dtype) if c.worth_timing]


def test_large_weights_of_few_values_are_worth_a_codebook_for_few_rows() -> None:
    """Bytes are those of the running dtype."""
    graph, node = linear(few_values((2048, 1024), 9))  # 8 MiB in float32
    assert worth(graph, node, 32, CUDA) == ["dense", "codebook:pointer"]
    assert worth(graph, node, 33, CUDA) == ["dense"]
    assert "codebook:auto" in worth(graph, node, 8, CPU)
    half, node = linear(graph.tensors["w"], torch.float16)  # 4 MiB
    assert worth(half, node, 1, CUDA, torch.float16) == ["dense"]
    half, node = linear(few_values((4096, 1024), 9), torch.float16)
    assert worth(half, node, 1, CUDA, torch.float16) == [
        "dense",
        "codebook:prmt16",
        "codebook:pair",
        "codebook:pointer",
    ]
    wide, node = linear(few_values((8192, 512), 8), torch.bfloat16)
    for rows, found in ((64, True), (65, False)):
        assert ("codebook:prmt8" in worth(wide, node, rows, CUDA, torch.bfloat16)) == found
    many, node = linear(few_values((2048, 1024), 17))
    assert not any("codebook" in c.kernel for c in candidates(many, node, (1, 1024), CUDA, torch.float32))


def test_a_split_is_worth_timing_where_few_operations_are_left() -> None:
    """On the CPU, for k x k kernels."""
    for k, device, expected in (
        (3, CPU, ["dense", "library", "split"]),
        (3, CUDA, ["dense"]),
        (1, CPU, ["dense", "library"]),
    ):
        b = Builder(64, 9, 9)
        b.op("y", "conv2d.default", Ref("x"), b.tensor("w", few_kernels(64, 64, k)))
        graph = serving_graph(b.graph("y"), CPU)
        assert worth(graph, graph.nodes[0], 1, device) == expected
        share = repeats(graph.tensors["w"]).split_share
        assert share is not None and (share <= 0.1) == (k == 3)
        dense = graph.with_tensors({"w": torch.randn(64, 64, k, k)})
        assert [c.kernel for c in candidates(dense, graph.nodes[0], (1, 64, 9, 9), CPU, torch.float32)] == [
            "dense",
            "library",
        ]


def test_torchs_own_convolution_is_worth_timing_for_small_layers() -> None:
    """There the time that oneDNN's call takes to start counts."""
    b = Builder(64, 14, 14)
    b.op("y", "conv2d.default", Ref("x"), b.tensor("w", torch.randn(64, 64, 1, 1)))
    graph = serving_graph(b.graph("y"), CPU)
    assert worth(graph, graph.nodes[0], 10, CPU) == ["dense", "library"] and worth(graph, graph.nodes[0], 11, CPU) == [
        "dense"
    ]


def test_packed_linears_are_worth_timing_for_large_layers_and_empty_epilogues_never() -> None:
    graph, node = linear(torch.randn(1024, 1024))
    assert worth(graph, node, 1, CPU) == ["dense", "onednn"] and worth(graph, node, 1, CUDA) == ["dense"]
    small, node = linear(torch.randn(10, 64))
    assert worth(small, node, 1, CPU) == ["dense"]


def test_a_layer_in_another_dtype_has_the_dense_kernel_alone() -> None:
    graph, node = linear(few_values((64, 64), 3), torch.float64)
    for device in (CPU, CUDA):
        assert [c.kernel for c in candidates(graph, node, (1, 64), device, torch.float32)] == ["dense"]


def test_signatures_tell_apart_what_differs_in_time_and_nothing_else() -> None:
    base = layers()
    texts = {
        layer.weight.name: signature(base, layer.node, (1, 8, 4, 3), torch.float32) for layer in fused_layers(base)
    }
    assert len(set(texts.values())) == len(texts)
    for graph, differs in ((layers(), False), (layers("silu"), True), (layers(dtype=torch.float64), True)):
        for layer in fused_layers(graph)[:-1]:
            text = signature(graph, layer.node, (1, 8, 4, 3), torch.float32)
            assert (text != texts[layer.weight.name]) == differs
            assert signature(graph, layer.node, (2, 8, 4, 3), torch.float32) != text
    for weight, same in (
        (few_values((64, 64), 3, 1), True),
        (few_values((64, 64), 4), False),
        (torch.randn(64, 64), False),
    ):
        one, other = linear(few_values((64, 64), 3)), linear(weight)
        assert (signature(*one, (1, 64), torch.float32) == signature(*other, (1, 64), torch.float32)) == same


def test_weights_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = weights._values
    monkeypatch.setattr(weights, "_values", lambda weight: (calls.append(1), real(weight))[1])
    graph, node = linear(few_values((64, 64), 3))
    for rows in (1, 2, 4):
        candidates(graph, node, (rows, 64), CPU, torch.float32)
        signature(graph, node, (rows, 64), torch.float32)
    assert len(calls) == 1


def test_what_repeats_in_a_weight() -> None:
    weight = few_values((32, 40), 7)
    values = repeats(weight).values
    assert values is not None and torch.equal(values, weight.unique())
    assert torch.equal(values[weights.pack_values(weight, values).int()], weight)
    assert repeats(few_values((32, 40), 16)).values is not None and repeats(few_values((32, 40), 17)).values is None
    signed = torch.tensor([[0.0, -0.0], [1.0, -1.0]])
    found = repeats(signed).values
    assert (
        found is not None
        and found.tolist() == [-1, 0, 1]
        and torch.equal(found[weights.pack_values(signed, found).int()], signed)
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_looked_at_too(wrong: float) -> None:
    weight = few_values((32, 40), 3)
    weight[:, 0] = wrong
    assert (repeats(weight).split_share is None) == math.isnan(wrong)


def test_values_that_a_sample_misses_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_SAMPLE", 4)
    monkeypatch.setattr(weights, "_CHUNK", 100)
    for count in (5, 16, 17, 40):
        weight = few_values((32, 40), count)
        found = repeats(weight).values
        assert (found is None) == (count > 16)
        if found is not None:
            assert torch.equal(found, weight.unique()) and torch.equal(
                found[weights.pack_values(weight, found).int()], weight
            )
    assert repeats(torch.zeros(0, 4)).values is None  # a codebook needs a value


def test_buckets_share_programs_and_weights() -> None:
    """Each form of a weight is in memory once, and the dense one only where a bucket uses it."""
    weight = torch.randn(32, 32)
    graph, _ = linear(weight)
    context = PlanContext(graph, CPU, "fp32", layer_inputs(graph, CPU))

    def programs(**kernels: str) -> dict[int, Program]:
        return planned_programs(context, (1, 2, 4), lambda name, batch: kernels[f"b{batch}"])

    made = programs(b1="dense", b2="onednn", b4="onednn")
    assert made[2] is made[4] and made[1] is not made[2]
    assert [t.is_mkldnn for t in made[1].buffers()] == [False] and [t.is_mkldnn for t in made[2].buffers()] == [True]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for made_program in made.values():
        torch.testing.assert_close(made_program(x)[0], x @ weight.t(), rtol=1e-5, atol=1e-5)

    b = Builder(4, 5, 5)
    b.conv("x", "c", 4, 4)
    b.op("p", "linear.default", Ref(b.mean("c")), b.tensor("w", torch.randn(32, 4)))
    kernels = {("c", 1): "dense", ("p", 1): "dense", ("c", 2): "dense", ("p", 2): "onednn"}
    one, two = planned_programs(PlanContext.prepare(b.graph("p"), CPU), (1, 2), lambda *at: kernels[at]).values()
    shared = {id(t) for t in one.buffers()} & {id(t) for t in two.buffers()}
    assert len(shared) == 2  # the convolution's packed weight and its bias
