"""Engines are tried in a process of their own: failures, crashes and late ones are told, and the others go on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from redpp_serve.engines.onnx_builder import to_onnx
from redpp_serve.engines.trial import Attempt, try_engines
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


def inputs(*batches: int) -> list[list[np.ndarray]]:
    return [[torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).numpy()] for n in batches]


def expected(arrays: list[list[np.ndarray]]) -> list[Tensor]:
    return [Program(GRAPH)(torch.from_numpy(x))[0] for (x,) in arrays]


@pytest.fixture
def model() -> bytes:
    return to_onnx(GRAPH).SerializeToString()


def fake_onnxruntime(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "onnxruntime.py").write_text(FAKE.format(body=body))
    monkeypatch.syspath_prepend(folder)


def test_outputs_of_each_engine_at_each_batch(model: bytes) -> None:
    arrays = inputs(1, 4)
    for outcome in try_engines([Attempt(name, "fp32", model) for name in ("openvino", "onnxruntime")], arrays, 1, 60):
        assert not outcome.reason and outcome.seconds > 0
        for (found,), wanted in zip(outcome.outputs, expected(arrays), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted)


def test_an_engine_that_refuses_says_why(model: bytes) -> None:
    refused, taken = try_engines(
        [Attempt("onnxruntime", "fp32", b"nonsense"), Attempt("openvino", "fp32", model)], inputs(2), 1, 60
    )
    assert refused.reason and not refused.outputs
    assert taken.outputs and not taken.reason


def test_a_crash_leaves_the_others(model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(tmp_path, "import os; os.abort()", monkeypatch)
    attempts = [Attempt(name, "fp32", model) for name in ("openvino", "onnxruntime", "openvino")]
    before, crashed, after = try_engines(attempts, inputs(2), 1, 60)
    assert "ended with code -6" in crashed.reason
    assert before.outputs and after.outputs and not before.reason and not after.reason


def test_a_late_one_ends_the_trial(model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_onnxruntime(tmp_path, "import time; time.sleep(60)", monkeypatch)
    attempts = [
        Attempt("openvino", "fp32", model),
        Attempt("onnxruntime", "fp32", model),
        Attempt("openvino", "fp32", model),
    ]
    before, late, after = try_engines(attempts, inputs(2), 1, 6)
    assert before.outputs
    assert late.reason == "not ready after 6 s"
    assert "want of time" in after.reason


def test_openvino_leaves_the_signal_stack_as_it_was(model: bytes, tmp_path: Path) -> None:
    """Sessions that end in the order in which they began would else leave a stack that is gone."""
    (tmp_path / "model.onnx").write_bytes(model)
    program = """
import faulthandler, pathlib, signal, sys
import numpy
from redpp_serve.engines.sessions import OpenVinoSession
faulthandler.enable()
model = pathlib.Path(sys.argv[1]).read_bytes()
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
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.onnx")], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-500:]


def test_the_engines_are_imported_without_their_telemetry(tmp_path: Path) -> None:
    program = "from redpp_serve.engines import sessions; sessions.import_onnxruntime(); sessions.import_openvino()"
    environment = {**os.environ, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
