"""Which requests the handlers of both servers hand to the observer: those that the original has answered."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.handlers import batching
from redpp_serve.handlers.torchserve import RedppHandler
from redpp_serve.handlers.triton_server import RedppModel
from redpp_serve.handlers.wire import OBSERVE_FILE_VARIABLE, OBSERVE_VARIABLE
from redpp_serve.packaging.trials import triton_python_backend_utils as stand_in
from redpp_serve.runtime.model import ServingModel
from tests.support.served import SHAPE, Context, artifact, npy, triton_arguments


class Recorder:
    """An observer that notes what it is given."""

    def __init__(self, graph: Any, every: int, path: Path) -> None:
        self.given, self.seen, self.closed = (len(graph.nodes), every, path), [], False
        self.busy = False

    def offer(self, inputs: Any) -> None:
        assert not self.busy
        self.seen += [inputs[0].clone()]

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _observing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(batching, "Observer", Recorder)
    monkeypatch.setenv(OBSERVE_VARIABLE, "7")
    monkeypatch.setenv(OBSERVE_FILE_VARIABLE, str(tmp_path / "moments"))
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    monkeypatch.setattr(stand_in.MetricFamily, "samples", {})


def torchserve(folder: Path, version: str = "1.0") -> tuple[RedppHandler, Context]:
    (folder / "model.redpp").write_bytes(artifact(version))
    made, given = RedppHandler(), Context(folder)
    made.initialize(given)
    return made, given


def triton(folder: Path, version: str = "1.0", **config: Any) -> RedppModel:
    (folder / "model.redpp").write_bytes(artifact(version))
    made = type("TritonPythonModel", (RedppModel,), {"artifact": folder / "model.redpp"})()
    made.initialize(triton_arguments(**config))
    return made


def test_the_answered_requests_of_torchserve_are_offered(tmp_path: Path) -> None:
    served, context = torchserve(tmp_path)
    assert served.observer and served.observer.given == (4, 7, tmp_path / "moments")
    assert served.observer.seen == []  # no warm-up
    x = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)
    served.handle([{"body": npy(x[0])}, {"body": b"garbage"}, {"body": npy(x[1])}], context)
    (seen,) = served.observer.seen
    assert seen.tolist() == x.tolist()


def test_the_answered_requests_of_triton_are_offered_and_no_warm_up(tmp_path: Path) -> None:
    served = triton(tmp_path, model_warmup=[{"batch_size": 1}])
    x = torch.randn(3, *SHAPE)
    bad = torch.full((1, *SHAPE), float("nan"))
    requests = [[x], [x, bad]]  # the first is the warm-up
    for tensors in requests:
        served.execute([stand_in.InferenceRequest({"x": tensor}) for tensor in tensors])
    (seen,) = served.observer.seen
    assert seen.tolist() == x.tolist()
    served.finalize()
    assert served.observer.closed


def test_the_observer_gives_way_while_the_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, context = torchserve(tmp_path)
    busy = []

    def call(*_: Any) -> Any:
        busy.append(served.observer.busy)
        raise ValueError

    monkeypatch.setattr(ServingModel, "__call__", call)
    served.handle([{"body": npy(np.zeros(SHAPE, np.float32))}], context)
    assert busy == [True] and not served.observer.busy and served.observer.seen == []


def test_the_pruned_network_and_a_server_that_nobody_told_observe_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torchserve(tmp_path, "2.0")[0].observer is None and triton(tmp_path, "2.0").observer is None
    monkeypatch.delenv(OBSERVE_VARIABLE)
    served, context = torchserve(tmp_path)
    assert served.observer is None and triton(tmp_path).observer is None
    served.handle([{"body": npy(np.zeros(SHAPE, np.float32))}], context)
    assert context.statuses == {}


@pytest.mark.parametrize(
    ("variable", "value"),
    [(OBSERVE_VARIABLE, v) for v in ("0", "-1", "ten", "1.5", "²")]
    + [(OBSERVE_FILE_VARIABLE, v) for v in ("", "here")],
)
def test_a_wrong_environment_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(RedppError, match=f"{variable} is"):
        torchserve(tmp_path)
