"""The handler with a stand-in for the server: one bad request costs nobody else anything."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref
from redpp_serve.handlers import torchserve
from redpp_serve.handlers.metrics import Metrics, ModelLabels
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.handlers.prometheus import PrometheusBinding
from redpp_serve.handlers.torchserve import RedppHandler
from redpp_serve.handlers.wire import HANDLER_HEADER, VARIANT_HEADER
from redpp_serve.runtime.model import ServingModel
from tests.support.served import PREPROCESS, SHAPE, Context, artifact, expected, network, npy, picture

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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


def test_the_precision_comes_from_the_configuration(tmp_path: Path) -> None:
    served, _ = handler(tmp_path, config={"handler": {"precision": "bf16"}})
    assert served.model.precision == "bf16"
    with pytest.raises(RedppError, match="precision is 'half' in model-config.yaml"):
        handler(tmp_path, config={"handler": {"precision": "half"}})


def test_the_time_for_plans_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDPP_PLAN_CACHE", str(tmp_path / "plans.json"))
    for text, timed in (("0", False), ("5", True)):
        monkeypatch.setenv("REDPP_PLAN_SECONDS", text)
        served, _ = handler(tmp_path)
        plan = served.model.plan
        assert any(choice.times for choice in (*plan.choices, *plan.engines)) == timed
    for text in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("REDPP_PLAN_SECONDS", text)
        with pytest.raises(RedppError, match=f"REDPP_PLAN_SECONDS is '{text}'"):
            handler(tmp_path)


def test_threads_come_from_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDPP_PLAN_SECONDS", "0")
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
