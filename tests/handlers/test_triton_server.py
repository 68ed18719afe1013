"""The model of Triton's back end with a stand-in for the server: one bad request costs nobody else anything."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref, Size
from redpp_serve.handlers.triton_metrics import TritonBinding, summed
from redpp_serve.handlers.triton_server import RedppModel, non_finite_rows
from redpp_serve.handlers.wire import PROBE_ID
from redpp_serve.packaging.trials import triton_python_backend_utils as stand_in
from redpp_serve.runtime.model import ServingModel
from tests.support.served import INFO, SHAPE, artifact, expected, network, triton_arguments

ORIGINAL = {"model": "tiny", "version": "1.0", "variant": "original"}


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    monkeypatch.setattr(stand_in.MetricFamily, "samples", {})


def model(folder: Path, data: bytes | None = None, **config: Any) -> RedppModel:
    (folder / "model.redpp").write_bytes(artifact() if data is None else data)
    made = type("TritonPythonModel", (RedppModel,), {"artifact": folder / "model.redpp"})()
    made.initialize(triton_arguments(**config))
    return made


def graph(*nodes: Node, inputs: tuple[InputSpec, ...] = (InputSpec("x", (2,)),), **tensors: torch.Tensor) -> bytes:
    return artifact(graph=Graph(inputs, tensors, nodes, (nodes[-1].name,)), preprocess=None)


def ask(served: RedppModel, *requests: Any) -> list[Any]:
    """Each request's first output, or (code, message) of its error; a request is a tensor for x, or tensors by name."""
    items = [stand_in.InferenceRequest(r if isinstance(r, dict) else {"x": torch.as_tensor(r)}) for r in requests]
    responses = served.execute(items)
    return [(r.error().code, r.error().message()) if r.has_error() else r.output_tensors()[0].held for r in responses]


def sample(name: str, **labels: str) -> Any:
    return stand_in.MetricFamily.samples[name, frozenset({**ORIGINAL, **labels}.items())]


def values(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed))


def right(x: torch.Tensor) -> list[Any]:
    return [pytest.approx(expected("1.0", row), rel=1e-4, abs=1e-5) for row in x]


def test_requests_of_several_rows_run_as_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, sizes, call = model(tmp_path), [], ServingModel.__call__
    monkeypatch.setattr(ServingModel, "__call__", lambda self, *x: sizes.append(len(x[0])) or call(self, *x))
    inputs = [values(rows, seed) for seed, rows in enumerate((1, 3, 2))]
    answers = ask(served, *inputs)
    assert sizes == [6] and [len(a) for a in answers] == [1, 3, 2]
    for x, answer in zip(inputs, answers, strict=True):
        assert answer.tolist() == right(x)


def test_a_bad_number_costs_its_sender_alone(tmp_path: Path) -> None:
    served, inputs = model(tmp_path), [values(2, seed) for seed in range(3)]
    for bad in (float("nan"), float("inf"), -float("inf")):
        inputs[1][1, 2, 7, 7] = bad
        answers = ask(served, *inputs)
        code, message = answers[1]
        assert code == stand_in.TritonError.INVALID_ARG and "'x' with NaN, infinity" in message
        assert answers[0].tolist() == right(inputs[0]) and answers[2].tolist() == right(inputs[2])


def test_a_batch_of_bad_requests_does_not_run_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = model(tmp_path)
    monkeypatch.setattr(ServingModel, "__call__", lambda *_: pytest.fail("the network ran"))
    assert [a[0] for a in ask(served, values() * float("nan"), values(0))] == [stand_in.TritonError.INVALID_ARG] * 2


def test_only_the_input_that_breaks_the_network_fails(tmp_path: Path) -> None:
    """A gather with the input as index: an index out of range raises inside the network. The inputs are int64."""
    lw = network().tensors["lw"]
    nodes = (
        Node("f", "aten.flatten.using_ints", (Ref("x"), 0)),
        Node("y", "aten.index_select.default", (Ref("lw"), 0, Ref("f"))),
    )
    served = model(tmp_path, graph(*nodes, inputs=(InputSpec("x", (1,), "int64"),), lw=lw))
    answers = ask(served, [[1]], [[99]], [[4], [0]])
    assert answers[1] == (stand_in.TritonError.INTERNAL, "The network failed on this input")
    assert torch.equal(answers[0], lw[[1]]) and torch.equal(answers[2], lw[[4, 0]])


def test_an_integer_that_the_network_cannot_read_is_its_senders_fault(tmp_path: Path) -> None:
    rows = (((1, 4),), ((1, 4), (0, 2)))
    for limits, found in zip(
        rows, ("values from 1 to 9, expected 1 to 4", "value 9 at [1], expected 0 to 2"), strict=True
    ):
        spec = InputSpec("x", (2,), "int64", limits=limits)
        node = Node("y", "aten.embedding.default", (Ref("w"), Ref("x")))
        served = model(tmp_path, graph(node, inputs=(spec,), w=torch.eye(5)))
        answers = ask(served, [[1, 2]], [[1, 9]], [[4, 0 if len(limits) > 1 else 1]])
        assert answers[1] == (stand_in.TritonError.INVALID_ARG, f"Found input 'x' with {found}")
        assert torch.equal(answers[0], torch.eye(5)[[1, 2]][None]) and len(answers[2]) == 1


def test_requests_of_equal_shapes_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, shapes, call = Size("L", 2, 6, 2), [], ServingModel.__call__
    spec = InputSpec("x", (2, 4), varying=((1, size),))
    served = model(tmp_path, graph(Node("y", "aten.relu.default", (Ref("x"),)), inputs=(spec,)))
    monkeypatch.setattr(ServingModel, "__call__", lambda self, *x: shapes.append(tuple(x[0].shape)) or call(self, *x))
    inputs = [torch.rand(rows, 2, length) for rows, length in ((1, 4), (2, 6), (1, 3), (3, 4), (1, 6))]
    answers = ask(served, *inputs)
    assert shapes == [(4, 2, 4), (3, 2, 6)]
    assert answers[2][0] == stand_in.TritonError.INVALID_ARG and "of 2xL, L of 2..6/2" in answers[2][1]
    assert all(torch.equal(answers[k], inputs[k]) for k in (0, 1, 3, 4))


def test_a_request_that_fails_is_named_by_its_header_or_by_the_protocols_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = model(tmp_path, graph(Node("y", "aten.log.default", (Ref("x"),))))
    zero, header = {"x": torch.zeros(1, 2)}, json.dumps({"X-Request-Id": "from-header", "priority": 1})
    given = [
        ("of-the-body", header, "request from-header:"),
        ("of-the-body", "", "request of-the-body:"),
        ("two words", json.dumps({"x-request-id": "\x1b[2J"}), "a request without an id:"),
        ("of-the-body", "no json", "request of-the-body:"),
        ("", "[]", "a request without an id:"),
    ]
    served.execute([stand_in.InferenceRequest(zero, name, headers) for name, headers, _ in given])
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told == [f"{begin} the network's output is not finite" for *_, begin in given]


def test_an_output_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    served = model(tmp_path, graph(Node("y", "aten.log.default", (Ref("x"),))))
    answers = ask(served, [[1.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]], [[1.0, 1.0]])
    assert answers[1] == (stand_in.TritonError.INTERNAL, "The network's output for this input is not finite")
    assert answers[0].tolist() == answers[2].tolist() == [[0.0, 0.0]]


def test_a_network_that_mixes_the_batch_is_not_answered_with_wrong_rows(tmp_path: Path) -> None:
    node = Node("y", "aten.sum.dim_IntList", (Ref("x"), [0]))
    served = model(tmp_path, graph(node, inputs=(InputSpec("x", (7,)),)))
    assert [a[0] for a in ask(served, [[1.0] * 7], [[1.0] * 7])] == [stand_in.TritonError.INTERNAL] * 2


def test_a_tensor_of_another_rank_costs_its_sender_alone(tmp_path: Path) -> None:
    """Triton lets one through whose number of rows it could not count."""
    x = values(2)
    bad, good = ask(model(tmp_path), values()[0], x)
    assert bad[0] == stand_in.TritonError.INVALID_ARG and "expected one or more rows" in bad[1]
    assert good.tolist() == right(x)


def test_several_inputs_by_name_whatever_their_order(tmp_path: Path) -> None:
    specs = (InputSpec("a", (2,)), InputSpec("b", (2,), "int64"))
    served = model(tmp_path, graph(Node("y", "aten.sub.Tensor", (Ref("a"), Ref("b"))), inputs=specs))
    one = {"b": torch.tensor([[1, 2]]), "a": torch.tensor([[5.0, 5.0]])}
    uneven = {"a": torch.ones(2, 2), "b": torch.tensor([[1, 2]])}
    answers = ask(served, one, uneven, {"a": torch.ones(1, 2)})
    assert answers[0].tolist() == [[4.0, 3.0]]
    assert answers[1][0] == stand_in.TritonError.INVALID_ARG and "(2, 2), (1, 2)" in answers[1][1]
    assert answers[2] == (stand_in.TritonError.INTERNAL, "The server failed to read this request")


def test_bool_and_bfloat16_and_what_is_not_contiguous(tmp_path: Path) -> None:
    served = model(
        tmp_path, graph(Node("y", "aten.bitwise_not.default", (Ref("x"),)), inputs=(InputSpec("x", (2,), "bool"),))
    )
    assert ask(served, [[True, False]])[0].tolist() == [[False, True]]
    served = model(
        tmp_path, graph(Node("y", "aten.relu.default", (Ref("x"),)), inputs=(InputSpec("x", (2,), "bfloat16"),))
    )
    (answer,) = ask(served, [[1.5, -1.0]])
    assert answer.dtype is torch.float32 and answer.tolist() == [[1.5, 0.0]]
    code, message = ask(served, [[3.4e38, 0.0]])[0]  # beyond the largest bfloat16
    assert code == stand_in.TritonError.INVALID_ARG and "bfloat16" in message
    turned = graph(Node("y", "aten.permute.default", (Ref("x"), [0, 2, 1])), inputs=(InputSpec("x", (2, 3)),))
    x = torch.arange(12.0).view(2, 2, 3)
    assert torch.equal(ask(model(tmp_path, turned), x)[0], x.transpose(1, 2))


def test_rows_are_found_out_by_exact_means_where_a_sum_overflows() -> None:
    large = torch.full((2, 3), 3e38)
    assert non_finite_rows(large) is None and not torch.isfinite(large.sum())
    large[1, 0] = float("inf")
    assert non_finite_rows(large).tolist() == [False, True]
    assert non_finite_rows(torch.tensor([1.0, float("nan")])).tolist() == [False, True]
    assert non_finite_rows(torch.tensor([[1], [2]])) is None


def test_every_bucket_runs_before_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, call = [], ServingModel.__call__
    monkeypatch.setattr(ServingModel, "__call__", lambda self, *x: sizes.append(len(x[0])) or call(self, *x))
    model(tmp_path)
    assert sizes == [1, 2, 4, 8]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_configurations_precision_is_the_models(tmp_path: Path, precision: str) -> None:
    given = {"precision": precision, "engine": "redpp"}
    served = model(tmp_path, parameters={name: {"string_value": value} for name, value in given.items()})
    assert served.model.precision == precision
    x = values(2)
    assert ask(served, x)[0].tolist() == [pytest.approx(expected("1.0", row), rel=0.05, abs=0.05) for row in x]
    plan = served.model.plan
    served.finalize()
    assert sample("redpp_plan_info", device="cpu", engine="redpp", precision=precision, digest=plan.digest).value() == 1
    assert plan.seconds < sample("redpp_ready_seconds").value() < 60
    assert plan.counts(8) and all(
        sample("redpp_plan_layers", kernel=k, batch="8").value() == n for k, n in plan.counts(8).items()
    )


def test_a_wrong_precision_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="(?s)precision is 'fp8' in config.pbtxt.*auto, fp32, tf32, fp16, bf16, int8"):
        model(tmp_path, parameters={"precision": {"string_value": "fp8"}})


def test_the_metrics_count_clients_requests_and_no_warm_up(tmp_path: Path) -> None:
    served = model(tmp_path, model_warmup=[{"batch_size": 1}, {"batch_size": 2, "count": 2}, {"batch_size": 8}])
    for _ in range(4):
        ask(served, values(), values())
    ask(served, values(), values(3), values() * float("nan"))
    ask(served, values())
    (probed,) = served.execute([stand_in.InferenceRequest({"x": values()}, PROBE_ID)])
    assert not probed.has_error()
    served.finalize()
    assert {o: sample("redpp_requests_total", outcome=o).value() for o in ("ok", "bad_request", "error")} == {
        "ok": 3,
        "bad_request": 1,
        "error": 0,
    }
    assert sample("redpp_batch_size").observed == [3, 1] and len(sample("redpp_inference_seconds").observed) == 3
    handler = sample("redpp_handler_seconds")
    assert len(handler.observed) == 2 and handler.buckets[0] == 0.00025
    for size, seconds in zip("31", handler.observed, strict=True):
        assert sample("redpp_batches_total", batch=size).value() == 1
        assert sample("redpp_batch_seconds_total", batch=size).value() == pytest.approx(seconds)
    assert sample("redpp_model_parameters").value() == INFO["parameters"] and sample("redpp_model_bytes").value() > 0


def test_two_instances_add_up_and_a_finished_one_takes_its_memory_along(tmp_path: Path) -> None:
    first, second = model(tmp_path), model(tmp_path)
    for served in (first, second):
        ask(served, values())
        served._binding._queue.put(None)  # all that came before is posted
        served._binding._thread.join(10)
    assert sample("redpp_requests_total", outcome="ok").value() == 2
    assert sample("redpp_worker_cpu_seconds_total").value() > 0
    both = sample("redpp_worker_resident_bytes").value()
    other = model(tmp_path)
    other.finalize()
    assert sample("redpp_worker_resident_bytes").value() == pytest.approx(both)
    assert both > 2 * 50e6  # two processes with torch, though here one stands for both


def test_increments_that_came_together_are_one_call() -> None:
    a, b = object(), object()
    entries = [(a, "increment", 1.0), (b, "observe", 2.0), (a, "increment", 0.5), (b, "observe", 3.0), None]
    assert summed(entries) == [(a, "increment", 1.5), (b, "observe", 2.0), (b, "observe", 3.0)]


def test_serving_goes_on_where_metrics_are_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def off(*_: Any, **__: Any) -> None:
        raise stand_in.TritonError("metrics are not allowed")

    monkeypatch.setattr(stand_in.MetricFamily, "__init__", off)
    served, x = model(tmp_path), values()
    assert served.metrics is None and ask(served, x)[0].tolist() == right(x)
    assert [r.message for r in caplog.records] == ["metrics are off: metrics are not allowed"]
    served.finalize()


def test_a_failing_metric_costs_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, x = model(tmp_path), values()
    monkeypatch.setattr(stand_in.Metric, "observe", lambda *_: 1 / 0)
    assert ask(served, x)[0].tolist() == ask(served, x)[0].tolist() == right(x)
    served.finalize()
    assert sample("redpp_requests_total", outcome="ok").value() == 2


def test_a_wrong_configuration_is_refused_at_loading(tmp_path: Path) -> None:
    for config, message in (
        ({"max_batch_size": 0}, "max_batch_size is 0 in config.pbtxt"),
        ({"parameters": {"threads": {"string_value": "two"}}}, "threads is 'two' in config.pbtxt"),
        ({"parameters": {"threads": {"string_value": "0"}}}, "threads is 0 in config.pbtxt"),
    ):
        with pytest.raises(RedppError, match=message):
            model(tmp_path, **config)


def test_threads_come_from_the_configuration(tmp_path: Path) -> None:
    model(tmp_path, parameters={"threads": {"string_value": "2"}})
    assert torch.get_num_threads() == 2
    model(tmp_path, parameters={})
    assert torch.get_num_threads() == 2


def test_a_gpu_that_torch_does_not_find_is_said_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from redpp_serve.handlers.triton_server import _device

    args, chosen = {"model_instance_kind": "GPU", "model_instance_device_id": "1"}, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _device(args) == "cpu" and "finds none" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert _device(args) == "cuda:1" and chosen == [1]
    assert _device({**args, "model_instance_kind": "CPU"}) == "cpu"


def test_a_binding_posts_what_is_set(tmp_path: Path) -> None:
    from redpp_serve.handlers.metrics import FAMILIES

    binding = TritonBinding(stand_in)
    gauge = binding.instrument(FAMILIES["redpp_model_bytes"], ORIGINAL)
    for value in (3, 2):
        gauge.set(value)
    binding.close()
    assert sample("redpp_model_bytes").value() == 2
