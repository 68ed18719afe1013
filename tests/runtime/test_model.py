"""The model that answers requests: equal to the graph it was made from, whatever the batch and the layout."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.runtime import model as model_module
from redpp_serve.runtime.model import ServingModel


def network() -> Graph:
    """A residual block (conv, batch norm, relu, depthwise conv, two adds, relu), reshape, Linear; bias (N, 5)."""
    g = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    tensors = {
        "w": random(6, 6, 3, 3),
        "dw": random(6, 1, 3, 3),
        "db": random(6),
        "lw": 0.1 * random(5, 6 * 5 * 7),
        "gamma": random(6),
        "beta": random(6),
        "mean": random(6),
        "var": random(6).square() + 0.1,
    }
    norm = (Ref("c"), Ref("gamma"), Ref("beta"), Ref("mean"), Ref("var"), False, 0.1, 1e-5, True)
    nodes = (
        Node("c", "aten.conv2d.default", (Ref("x"), Ref("w"), None, [1, 1], [1, 1])),
        Node("n", "aten.batch_norm.default", norm),
        Node("r", "aten.relu.default", (Ref("n"),)),
        Node("d", "aten.conv2d.default", (Ref("r"), Ref("dw"), Ref("db"), [1, 1], [1, 1], [1, 1], 6)),
        Node("t", "aten.add.Tensor", (Ref("r"), Ref("d"))),
        Node("s", "aten.add.Tensor", (Ref("t"), Ref("x"))),
        Node("a", "aten.relu.default", (Ref("s"),)),
        Node("size", "aten.sym_size.int", (Ref("a"), 0)),
        Node("f", "aten.reshape.default", (Ref("a"), [Ref("size"), -1])),
        Node("l", "aten.linear.default", (Ref("f"), Ref("lw"))),
        Node("y", "aten.add.Tensor", (Ref("l"), Ref("bias"))),
    )
    return Graph((InputSpec("x", (6, 5, 7)), InputSpec("bias", (5,))), tensors, nodes, ("y", "a"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServingModel:
    path = tmp_path_factory.mktemp("model") / "model.redpp"
    path.write_bytes(build(network(), {"name": "block"}).data)
    return ServingModel(path, batch=4, plan_seconds=0.5)


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 6, 5, 7, generator=g), torch.randn(batch, 5, generator=g)


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_any_batch_size_gives_what_the_graph_gives(model: ServingModel, batch: int) -> None:
    x = inputs(batch)
    exact = Program(network().to(torch.float64))(*(t.double() for t in x))
    for got, expected in zip(model(*x), exact, strict=True):
        assert got.dtype is torch.float32 and got.device.type == "cpu"
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_layouts_of_the_input(model: ServingModel) -> None:
    x, bias = inputs(4)
    expected = model(x, bias)
    wide = torch.zeros(4, 12, 10, 7)
    wide[:, ::2, ::2] = x
    layouts = {
        "channels last": x.to(memory_format=torch.channels_last),
        "strided": wide[:, ::2, ::2],
        "permuted": x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
    }
    for name, same in layouts.items():
        assert torch.equal(same, x) and not same.is_contiguous()
        for got, want in zip(model(same, bias.t().contiguous().t()), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)


def test_requests_do_not_influence_each_other(model: ServingModel) -> None:
    x, bias = inputs(5)
    together, before = model(x, bias), x.clone()
    for k in range(5):
        for got, want in zip(model(x[k : k + 1], bias[k : k + 1]), together, strict=True):
            torch.testing.assert_close(got, want[k : k + 1], rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(model(x, bias), together, strict=True))


def test_warm_up_description_and_inputs(model: ServingModel) -> None:
    model.warm_up()
    assert model.description["name"] == "block"
    assert model.inputs == network().inputs and model.device == torch.device("cpu")


def test_no_gradients_are_kept(model: ServingModel) -> None:
    assert not any(y.requires_grad for y in model(*(t.requires_grad_() for t in inputs(1))))


def test_integer_inputs_and_half_precision(tmp_path: Path) -> None:
    nodes = (
        Node("e", "aten.embedding.default", (Ref("table"), Ref("ids"))),
        Node("y", "aten.mean.dim", (Ref("e"), [1])),
    )
    table = torch.randn(9, 4).half()
    graph = Graph((InputSpec("ids", (3,), "int64"),), {"table": table}, nodes, ("y",))
    (tmp_path / "m").write_bytes(build(graph, {}).data)
    model = ServingModel(tmp_path / "m")
    model.warm_up()
    (y,) = model(torch.tensor([[1, 8, 0]]))
    assert y.dtype is torch.float16
    torch.testing.assert_close(y, table[[1, 8, 0]].mean(0, keepdim=True))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions(precision: str) -> None:
    model = ServingModel(build(network(), {}).data, precision=precision, batch=2, plan_seconds=0.2)
    x = inputs(3)
    exact = Program(network().to(torch.float64))(*(t.double() for t in x))
    for got, expected in zip(model(*x), exact, strict=True):
        assert got.dtype is torch.float32
        assert (got - expected).norm() <= (0.02 if precision == "bf16" else 1e-5) * expected.norm()
    assert (model.precision, model.batches, model.plan.precision) == (precision, (1, 2), precision)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(RedppError, match="'int4'.*one of auto, fp32, tf32, fp16, bf16, int8"):
        ServingModel(build(network(), {}).data, precision="int4")


class Recorder:
    """Stands in for CUDA graphs; ``fails`` as a network does that waits for the device."""

    fails = False

    def __init__(self, device: torch.device) -> None: ...

    def record(
        self, run: Callable[[], tuple[torch.Tensor, ...]]
    ) -> tuple[Callable[[], None], tuple[torch.Tensor, ...]]:
        if self.fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        outputs = tuple(y.clone() for y in run())
        return lambda: [y.copy_(fresh) for y, fresh in zip(outputs, run(), strict=True)] and None, outputs


@pytest.mark.parametrize("fails", [False, True])
def test_recorded_buckets_and_a_network_that_cannot_be_recorded(
    fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a GPU, where rows are padded; one that cannot be recorded serves call by call, and says why."""
    monkeypatch.setattr(model_module, "CudaRecorder", Recorder)
    monkeypatch.setattr(Recorder, "fails", fails)
    model = ServingModel(build(network(), {}).data, batch=4, plan_seconds=0)
    model._recorded = model._record()
    assert (not model._recorded) == fails
    assert ("without CUDA graphs: operation not permitted when stream is capturing" in caplog.text) == fails
    for rows in (1, 3, 9):
        x = inputs(rows)
        exact = Program(network().to(torch.float64))(*(t.double() for t in x))
        for got, expected in zip(model(*x), exact, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_files_that_are_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"PK\x03\x04")
    for path in (tmp_path / "m", tmp_path / "absent"):
        with pytest.raises(RedppError, match=f"{path} cannot be read"):
            ServingModel(path)


def test_a_worker_loads_no_compiler(tmp_path: Path) -> None:
    """The meta device or a trace would cost each worker a second and a third of its memory."""
    path = tmp_path / "model.redpp"
    path.write_bytes(build(network(), {"name": "block"}).data)
    code = (
        "import sys; from pathlib import Path; from redpp_serve.runtime.model import ServingModel; "
        "ServingModel(Path(sys.argv[1]), batch=2, plan_seconds=0.5).warm_up(); "
        "print({'torch._dynamo', 'sympy', 'triton'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "set()", run.stderr


def test_group_norms_keep_their_digits_in_the_layout_of_images() -> None:
    inputs = (InputSpec("x", (6, 8, 8)),)
    graph = Graph(inputs, {}, (Node("y", "aten.group_norm.default", (Ref("x"), 2)),), ("y",))
    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000
    (found,) = ServingModel(build(graph, {}).data, plan_seconds=0)(x)
    expected = torch.nn.functional.group_norm(x.double(), 2)
    assert (found.double() - expected).norm() < 1e-3 * expected.norm()
