"""Engines are tried in a process of their own: failures, crashes and late ones are told, and the others go on."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from redpp_serve.engines import ON_CPU
from redpp_serve.engines.onnx_builder import write_onnx
from redpp_serve.engines.sessions import OnnxRuntimeSession
from redpp_serve.engines.trial import Trial, TrialError, seconds_of
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec, Node, Ref

GRAPH = Graph(
    (InputSpec("x", (3,)),), {"w": torch.arange(6.0).view(2, 3)},
    (Node("y", "aten.linear.default", (Ref("x"), Ref("w"))),), ("y",),
)  # fmt: skip
FAKE = """
class SessionOptions:
    def add_session_config_entry(self, name, value):
        pass

def InferenceSession(*args, **kwargs):
    {body}
"""


INPUTS = [torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).numpy()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(GRAPH, tmp_path_factory.mktemp("model"))


def fake_onnxruntime(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "onnxruntime.py").write_text(FAKE.format(body=body))
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize("engine", ON_CPU)
def test_outputs_and_times_at_each_batch(engine: str, model: Path) -> None:
    trial = Trial(engine, "fp32", model, INPUTS, 1, 60)
    try:
        assert trial.seconds > 0
        for batch in (1, 4, 6):  # more than are stored: they begin anew
            (found,) = trial.outputs(batch)
            wanted = Program(GRAPH)(torch.from_numpy(INPUTS[0])[torch.arange(batch) % 4])[0]
            torch.testing.assert_close(torch.from_numpy(found), wanted)
            assert 0 <= trial.time(batch) < 60
    finally:
        trial.close()


@pytest.mark.parametrize(
    ("calls", "expected"),
    [([0.5], 0.5), ([0.004, 0.001, 0.003], 0.002), ([0.011, 9.0], 0.011)],
    ids=["a long call counts alone", "a first short call does not count", "as soon as it fills the time"],
)
def test_a_reading_is_the_mean_of_short_calls_behind_a_first(calls: list[float], expected: float) -> None:
    now, left = [0.0], iter(calls)

    def call() -> None:
        now[0] += next(left)

    assert seconds_of(call, lambda: now[0], 0.01) == pytest.approx(expected)


def test_threads_of_onnx_runtime_leave_the_cores_to_others_between_calls(tmp_path: Path) -> None:
    wide = 512
    graph = Graph(
        (InputSpec("x", (wide,)),), {"w": torch.ones(wide, wide)},
        (Node("y", "aten.linear.default", (Ref("x"), Ref("w"))),), ("y",),
    )  # fmt: skip
    session = OnnxRuntimeSession(write_onnx(graph, tmp_path), "fp32", 2)
    try:
        idle = []
        for _ in range(10):
            session([np.ones((wide, wide), np.float32)])
            start = time.process_time()
            time.sleep(0.05)
            idle.append(time.process_time() - start)
        assert statistics.median(idle) < 0.01
    finally:
        session.close()


def test_an_engine_that_refuses_says_why(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(TrialError, match="InvalidProtobuf"):
        Trial("onnxruntime", "fp32", tmp_path / "model.onnx", INPUTS, 1, 60)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os; os.abort()", "ended with code -6"),
        ("import os; os._exit(3)", "ended with code 3"),
        ("raise SystemExit(4)", "ended with code 4"),
        ("import time; time.sleep(60)", "not ready after 1 s"),
        ("print('noise'); raise ValueError('two  lines\\nof it')", "^ValueError: two lines of it$"),
    ],
)
def test_a_crash_is_a_reason(
    body: str, reason: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_onnxruntime(tmp_path, body, monkeypatch)
    late = "sleep" in body
    with pytest.raises(TrialError, match=reason):
        Trial("onnxruntime", "fp32", model, INPUTS, 1, 1 if late else 60)
    assert not psutil.Process().children()


def test_a_crash_between_calls_is_told_at_the_next(model: Path) -> None:
    trial = Trial("openvino", "fp32", model, INPUTS, 1, 60)
    trial._process.kill()
    for ask in (trial.outputs, trial.time):
        with pytest.raises(TrialError, match="ended with code -9"):
            ask(1)
    trial.close()


def test_openvino_leaves_the_signal_stack_as_it_was(model: Path) -> None:
    """Sessions that end in the order in which they began would else leave a stack that is gone."""
    program = """
import faulthandler, pathlib, signal, sys
import numpy
from redpp_serve.engines.sessions import OpenVinoSession
faulthandler.enable()
model = pathlib.Path(sys.argv[1])
sessions = [OpenVinoSession(model, "fp32", 1) for _ in range(4)]
for session in sessions:
    session([numpy.zeros((2, 3), numpy.float32)])
for session in sessions:
    session.close()
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(True))
signal.raise_signal(signal.SIGUSR1)
sys.exit(0 if heard else 5)
"""
    done = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]


def test_the_engines_are_imported_without_their_telemetry(tmp_path: Path) -> None:
    program = "from redpp_serve.engines import sessions; sessions.import_onnxruntime(); sessions.import_openvino()"
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
