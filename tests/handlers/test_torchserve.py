"""The handler with a stand-in for the server: one bad request costs nobody else anything."""

import io
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref, Size
from redpp_serve.handlers import torchserve
from redpp_serve.handlers.answers import NotFinite, check_finite
from redpp_serve.handlers.metrics import Family, Metrics, ModelLabels
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.handlers.prometheus import PrometheusBinding
from redpp_serve.handlers.torchserve import RedppHandler
from redpp_serve.handlers.wire import HANDLER_HEADER, PROBE_ID, VARIANT_HEADER
from redpp_serve.runtime.model import ServingModel
from tests.support.served import PREPROCESS, SHAPE, Context, artifact, built, expected, network, npy, picture

RANDOM = np.random.default_rng(0)


def handler(folder: Path, data: bytes | None = None, **context: object) -> tuple[RedppHandler, Context]:
    (folder / "model.redpp").write_bytes(artifact() if data is None else data)
    made, given = RedppHandler(), Context(folder, **context)
    made.initialize(given)
    return made, given


def values() -> np.ndarray:
    return RANDOM.standard_normal(SHAPE, dtype=np.float32)


def test_a_mixed_batch_is_answered_item_by_item(tmp_path: Path) -> None:
    served, context = handler(tmp_path)
    good, image = [values() for _ in range(3)], picture()
    items = [
        {"body": npy(good[0])},
        {"body": b"garbage"},
        {"data": good[1].tolist()},
        {},
        {"body": image},
        {"body": npy(good[2][:1])},
        {"body": json.dumps({"inputs": [good[2].tolist()]})},
    ]
    bodies = [json.loads(body) for body in served.handle(items, context)]
    assert sorted(context.statuses) == [1, 3, 5] and {code for code, _ in context.statuses.values()} == {400}
    inputs = {0: good[0], 2: good[1], 4: PREPROCESS.image(image).numpy(), 6: good[2]}
    for index, x in inputs.items():
        (output,) = bodies[index]["outputs"]
        assert output == pytest.approx(expected("1.0", torch.from_numpy(x)), rel=1e-4, abs=1e-5)
    for index, (_, phrase) in context.statuses.items():
        assert bodies[index] == {"error": phrase} and "expected" in phrase


def test_every_reply_names_its_time_variant_and_type(tmp_path: Path) -> None:
    served, context = handler(tmp_path, artifact("2.0"))
    served.handle([{"body": npy(values())}, {"body": b"?"}], context)
    for index in (0, 1):
        headers = context.headers[index]
        assert 0 < float(headers[HANDLER_HEADER]) < 60_000
        assert headers[VARIANT_HEADER] == "pruned" and headers["content-type"] == "application/json"


def test_a_batch_of_bad_requests_does_not_run_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, context = handler(tmp_path)
    monkeypatch.setattr(ServingModel, "__call__", lambda *_: pytest.fail("the network ran"))
    assert len(served.handle([{"body": b"?"}, {}], context)) == 2
    assert [context.statuses[i][0] for i in (0, 1)] == [400, 400]


def test_a_hostile_message_stays_one_line_of_ascii(tmp_path: Path) -> None:
    """It becomes the HTTP reason phrase, whose length the protocol counts in characters."""
    served, context = handler(tmp_path)
    (body,) = served.handle([{"body": {"é\r\nSet-Cookie: a=b\x00" * 50: 1}}], context)
    code, phrase = context.statuses[0]
    assert code == 400 and re.fullmatch(r"[ -~]{1,300}", phrase)
    assert json.loads(body) == {"error": phrase}


def test_only_the_input_that_breaks_the_network_fails(tmp_path: Path) -> None:
    """A gather with the input as index: an index out of range raises inside the network."""
    lw = network().tensors["lw"]
    nodes = (
        Node("i", "aten.to.dtype", (Ref("x"), torch.int64)),
        Node("f", "aten.flatten.using_ints", (Ref("i"), 0)),
        Node("y", "aten.index_select.default", (Ref("lw"), 0, Ref("f"))),
    )
    graph = Graph((InputSpec("x", (1,)),), {"lw": lw}, nodes, ("y",))
    served, context = handler(tmp_path, artifact(graph=graph, preprocess=None))
    bodies = served.handle([{"body": [1]}, {"body": [99]}, {"body": [4]}], context)
    assert context.statuses == {1: (500, "The network failed on this input")}
    assert json.loads(bodies[0])["outputs"] == [lw[1].tolist()] and json.loads(bodies[2])["outputs"] == [lw[4].tolist()]


def test_requests_of_equal_shapes_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = InputSpec("x", (4,), varying=((0, Size("L", 2, 6, 2)),))
    graph = Graph((spec,), {}, (Node("y", "aten.relu.default", (Ref("x"),)),), ("y",))
    served, context = handler(tmp_path, artifact(graph=graph, preprocess=None), batch_size=8)
    shapes, call = [], ServingModel.__call__
    monkeypatch.setattr(ServingModel, "__call__", lambda self, *x: shapes.append(tuple(x[0].shape)) or call(self, *x))
    lengths = (4, 6, 3, 4, 2, 6, 4)
    bodies = served.handle([{"body": [float(k)] * length} for k, length in enumerate(lengths)], context)
    assert shapes == [(3, 4), (2, 6), (1, 2)]
    assert context.statuses == {2: (400, "Found input 'x' of shape (3,), expected L, L of 2..6/2")}
    for k, length in enumerate(lengths):
        assert k == 2 or json.loads(bodies[k]) == {"outputs": [[float(k)] * length]}


def test_an_output_that_json_cannot_hold_fails_alone(tmp_path: Path) -> None:
    graph = Graph((InputSpec("x", (2,)),), {}, (Node("y", "aten.log.default", (Ref("x"),)),), ("y",))
    served, context = handler(tmp_path, artifact(graph=graph, preprocess=None))
    bodies = served.handle([{"body": [1, 1]}, {"body": [0, 1]}], context)
    assert json.loads(bodies[0]) == {"outputs": [[0.0, 0.0]]}
    assert context.statuses[1][0] == 500 and "not finite" in json.loads(bodies[1])["error"]


def test_a_network_that_mixes_the_batch_is_not_answered_with_wrong_rows(tmp_path: Path) -> None:
    node = Node("y", "aten.sum.dim_IntList", (Ref("x"), [0]))
    graph = Graph((InputSpec("x", (7,)),), {}, (node,), ("y",))
    served, context = handler(tmp_path, artifact(graph=graph, preprocess=None))
    served.handle([{"body": [1] * 7}] * 3, context)
    assert [context.statuses[i][0] for i in range(3)] == [500] * 3


def test_every_bucket_runs_before_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    call = ServingModel.__call__
    monkeypatch.setattr(ServingModel, "__call__", lambda self, *x: sizes.append(len(x[0])) or call(self, *x))
    handler(tmp_path, batch_size=6)
    assert sizes == [1, 2, 4, 6]


def test_the_time_until_a_worker_is_ready_is_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []

    class Recorder(Metrics):
        def ready(self, seconds: float) -> None:
            told.append(seconds)

    def opened(labels: ModelLabels, device: str) -> Metrics:
        return Recorder(labels, PrometheusBinding(), device)

    monkeypatch.setattr(torchserve, "open_metrics", opened)
    start = time.perf_counter()
    served, _ = handler(tmp_path)
    assert len(told) == 1 and served.model.plan.seconds < told[0] < time.perf_counter() - start


def test_outputs_whose_sum_alone_overflows_are_finite() -> None:
    check_finite([torch.zeros(1), torch.full((2, 3), 3e38)])
    with pytest.raises(NotFinite):
        check_finite([torch.zeros(1), torch.tensor([[1.0, float("inf")]])])


class Tallied:
    """Instruments that keep what they are given, as the binding that opens them."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = {}

    def instrument(self, family: Family, labels: Mapping[str, str]) -> "Instrument":
        extra = (labels[name] for name in family.labels)
        return Instrument(self.values.setdefault((family.name, *extra), []))


class Instrument:
    def __init__(self, values: list[float]) -> None:
        self.observe = self.set = values.append
        self.inc = lambda amount=1: values.append(amount)


def test_requests_are_counted_by_outcome_and_batches_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tallied = Tallied()
    monkeypatch.setattr(torchserve, "open_metrics", lambda labels, device: Metrics(labels, tallied, device))
    served, context = handler(tmp_path)
    good = {"body": npy(values())}
    served.handle([good, {"body": b"?"}, good, {}], context)
    context.asked = {0: {"describe": "True"}}
    assert json.loads(served.handle([{}], context)[0])["inputs"]  # asks for no prediction, and is not counted
    context.asked = {0: {"X-Request-Id": PROBE_ID}}
    assert json.loads(served.handle([good], context)[0])["outputs"]  # neither is what asks for the server's health
    context.asked = {}
    monkeypatch.setattr(ServingModel, "__call__", lambda *_: 1 / 0)
    served.handle([good], context)
    counted = {name[1]: sum(found) for name, found in tallied.values.items() if name[0] == "redpp_requests_total"}
    assert counted == {"ok": 2, "bad_request": 2, "error": 1}
    assert tallied.values["redpp_batch_size",] == [4, 1] and len(tallied.values["redpp_inference_seconds",]) == 2
    for size, seconds in zip("41", tallied.values["redpp_handler_seconds",], strict=True):
        assert tallied.values["redpp_batches_total", size] == [1]
        assert tallied.values["redpp_batch_seconds_total", size] == [seconds]


def test_the_precision_comes_from_the_configuration(tmp_path: Path) -> None:
    served, _ = handler(tmp_path, config={"handler": {"precision": "bf16"}})
    assert served.model.precision == "bf16"
    with pytest.raises(RedppError, match="precision is 'half' in model-config.yaml"):
        handler(tmp_path, config={"handler": {"precision": "half"}})


def test_the_time_for_plans_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDPP_PLAN_CACHE", str(tmp_path / "plans.json"))
    for text, timed in (("0", False), ("5", True)):
        monkeypatch.setenv("REDPP_PLAN_SECONDS", text)
        served, context = handler(tmp_path)
        plan, x = served.model.plan, values()
        assert any(choice.times for choice in (*plan.choices, *plan.engines)) == timed
        (output,) = json.loads(served.handle([{"body": npy(x)}], context)[0])["outputs"]
        assert output == pytest.approx(expected("1.0", torch.from_numpy(x)), rel=1e-4, abs=1e-5)
    for text in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("REDPP_PLAN_SECONDS", text)
        with pytest.raises(RedppError, match=f"REDPP_PLAN_SECONDS is '{text}'"):
            handler(tmp_path)


def test_threads_come_from_the_configuration(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    handler(tmp_path, config={"handler": {"threads": 2}})
    assert torch.get_num_threads() == 2
    handler(tmp_path, config={})
    assert torch.get_num_threads() == 2
    with pytest.raises(RedppError, match="threads"):
        handler(tmp_path, config={"handler": {"threads": "two"}})
    with pytest.raises(RedppError, match="threads is 0 in model-config.yaml"):
        handler(tmp_path, config={"handler": {"threads": 0}})


def test_what_cannot_be_served_is_refused_at_loading(tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="artifact"):
        handler(tmp_path, artifact()[:-10])
    with pytest.raises(RedppError, match="matching preprocessing"):
        handler(tmp_path, artifact(preprocess=Preprocess("L", 8, 8, (0.5,), (0.5,))))


def test_metrics_that_are_off_say_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served, context = handler(tmp_path)
    served.handle([{"body": npy(values())}], context)
    assert served.metrics is None
    assert [r.message for r in caplog.records if "metrics are off" in r.message] == [
        "metrics are off: set PROMETHEUS_MULTIPROC_DIR to an empty directory to turn them on"
    ]


def test_several_items_are_answered_in_their_order(tmp_path: Path) -> None:
    served, context = handler(tmp_path)
    several = np.stack([values() for _ in range(9)])
    wanted = np.array([expected("1.0", torch.from_numpy(x)) for x in several])
    items = [{"body": npy(several)}, {"body": json.dumps({"instances": several[:1].tolist()}).encode()}]
    rows, listed = (json.loads(body) for body in served.handle(items, context))
    assert np.array(rows["outputs"]) == pytest.approx(wanted[None], rel=1e-4, abs=1e-5)
    assert np.array(listed["predictions"]) == pytest.approx(wanted[:1, None], rel=1e-4, abs=1e-5)


def test_arrays_are_answered_as_files_where_asked(tmp_path: Path) -> None:
    served, context = handler(tmp_path)
    several = np.stack([values(), values()])
    wanted = np.array([expected("1.0", torch.from_numpy(x)) for x in several])
    asked = ("application/x-npy", "text/html, application/x-npz;q=0.9", "*/*", "Application/X-NPY")
    context.asked = {index: {"Accept": kind} for index, kind in enumerate(asked)}
    bodies = served.handle([{"body": npy(several)}] * 3 + [{"body": npy(several[0])}], context)
    kinds = [context.headers[index]["content-type"] for index in range(4)]
    assert kinds == ["application/x-npy", "application/x-npz", "application/json", "application/x-npy"]
    assert np.load(io.BytesIO(bodies[0])) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert np.load(io.BytesIO(bodies[1]))["output_0"] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert np.load(io.BytesIO(bodies[3])) == pytest.approx(wanted[0], rel=1e-4, abs=1e-5)


def test_the_best_classes_are_named(tmp_path: Path) -> None:
    labels = ["ant", "bee", "cat", "dog", "élan"]
    description = {**built().description, "labels": labels}
    served, context = handler(tmp_path, build(network(), description).data)
    several = np.stack([values(), values()])
    context.asked = {0: {"x-redpp-top-k": "3"}, 1: {"X-Redpp-Top-K": "99"}, 2: {"X-Redpp-Top-K": "0"}}
    bodies = served.handle([{"body": npy(several)}, {"body": npy(several[1])}, {"body": npy(several)}], context)
    rows, one, wrong = map(json.loads, bodies)
    wanted = [np.array(expected("1.0", torch.from_numpy(x))) for x in several]
    for found, y in zip([*rows["classes"], one["classes"]], [*wanted, wanted[1]], strict=True):
        order = np.argsort(y)[::-1][: len(found)]
        assert [c["index"] for c in found] == order.tolist()
        assert [c["label"] for c in found] == [labels[k] for k in order]
        assert [c["value"] for c in found] == pytest.approx(y[order], rel=1e-4, abs=1e-5)
    assert [len(found) for found in rows["classes"]] == [3, 3] and len(one["classes"]) == 5
    assert "how many classes" in wrong["error"]
