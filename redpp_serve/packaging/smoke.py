"""Run a finished archive's handler, or a Triton version's model, on one request, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RedppError

TIMEOUT_S = 300.0
_ARCHIVE = """
import json, sys, time, types
from pathlib import Path
folder, request = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
sys.path.insert(0, str(folder))
import handler
statuses = []
context = types.SimpleNamespace(
    system_properties={"model_dir": str(folder), "gpu_id": None, "batch_size": 1}, model_yaml_config={"handler": {"threads": 1}},
    model_name="smoke",
    manifest=json.loads((folder / "MAR-INF/MANIFEST.json").read_text()),
    set_response_status=lambda code=200, phrase="", idx=0: statuses.append([code, phrase]),
    set_response_header=lambda *a, **k: None, set_all_response_status=lambda *a, **k: None,
    set_response_content_type=lambda *a, **k: None,
    get_request_header=lambda *a, **k: None,
)
service = handler.Service()
service.initialize(context)
start = time.perf_counter()
(reply,) = service.handle([{"body": request}], context)
seconds = time.perf_counter() - start
reply = reply if isinstance(reply, str) else bytes(reply).decode()
print(json.dumps({"milliseconds": 1e3 * seconds, "reply": json.loads(reply), "statuses": statuses}))
"""


# The first request is the warm-up.
_MODEL = """
import json, sys, time
from pathlib import Path
version, scratch = Path(sys.argv[1]), Path(sys.argv[2])
sys.dont_write_bytecode = True
sys.path[:0] = [str(version), str(scratch)]
import triton_python_backend_utils as backend
import numpy, torch
import model
config = json.loads((scratch / "config.json").read_text())
loaded = numpy.load(scratch / "request.bin")
names = [spec["name"] for spec in config["input"]]
arrays = [loaded] if isinstance(loaded, numpy.ndarray) else [loaded[name] for name in names]
inputs = {name: torch.from_numpy(array[None]) for name, array in zip(names, arrays)}
served = model.TritonPythonModel()
served.initialize({
    "model_config": json.dumps(config), "model_name": config["name"], "model_version": version.name,
    "model_instance_kind": "CPU", "model_instance_device_id": "0",
})
for _ in range(2):
    start = time.perf_counter()
    (response,) = served.execute([backend.InferenceRequest(inputs)])
    seconds = time.perf_counter() - start
served.finalize()
reply = {"error": response.error().message()} if response.has_error() else {
    "outputs": [tensor.held[0].tolist() for tensor in response.output_tensors()]}
print(json.dumps({"milliseconds": 1e3 * seconds, "reply": reply}))
"""


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        name: what messages and the report call it.
        start: starts the process; its argument is an empty folder of its own.
        outputs: of the network for the request, without batch dimension.
    """

    name: str
    start: Callable[[Path], subprocess.Popen[str]]
    outputs: Sequence[np.ndarray]


def try_archive(archive: Path, request: bytes, outputs: Sequence[np.ndarray]) -> Trial:
    """The trial of a ``.mar`` as TorchServe would run it; ``request`` is a body."""

    def start(folder: Path) -> subprocess.Popen[str]:
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)  # an archive that this process has just written
        (folder / "request.bin").write_bytes(request)
        return _python(_ARCHIVE, folder, folder / "request.bin")

    return Trial(archive.name, start, outputs)


def try_model(version: Path, config: dict[str, Any], request: bytes, outputs: Sequence[np.ndarray]) -> Trial:
    """The trial of one version in a Triton repository, with a stand-in for the back end.

    Args:
        version: the version's folder.
        config: as Triton hands it to the model.
        request: .npy or .npz without batch dimension.
        outputs: see `Trial`.
    """

    def start(folder: Path) -> subprocess.Popen[str]:
        stand_in = files(__package__).joinpath("stand_in.py").read_bytes()
        (folder / "triton_python_backend_utils.py").write_bytes(stand_in)
        (folder / "request.bin").write_bytes(request)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return _python(_MODEL, version, folder)

    return Trial(f"triton version {version.name}", start, outputs)


def run_trials(trials: Sequence[Trial]) -> list[dict[str, object]]:
    """Run all trials side by side and hold their outputs against the graphs'.

    Returns:
        for each {"archive", "milliseconds"}: its name and the handler's time for the request after its warm-up.

    Raises:
        RedppError: one fails or answers something else.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="redpp-smoke-") as scratch:
        children: list[subprocess.Popen[str]] = []
        try:
            for k, trial in enumerate(trials):
                folder = Path(scratch) / str(k)
                folder.mkdir()
                children.append(trial.start(folder))
            for trial, child in zip(trials, children):
                results.append({"archive": trial.name, "milliseconds": _answer(trial, child)})
        finally:
            for child in children:  # after a failure or Ctrl-C some still run
                child.kill()
                child.communicate()
    return results


def _python(code: str, *arguments: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _answer(trial: Trial, child: subprocess.Popen[str]) -> float:
    """Milliseconds that the handler took for its answer, which must hold the outputs."""
    try:
        printed, errors = child.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise _failure(trial, f"no answer in {TIMEOUT_S:g} s") from None
    try:
        answer = json.loads(printed.splitlines()[-1])
        got = [np.asarray(y, dtype=np.float64) for y in answer["reply"]["outputs"]]
        close = all(_close(a, np.asarray(b, dtype=np.float64)) for a, b in zip(got, trial.outputs, strict=True))
    except (IndexError, KeyError, ValueError, TypeError):
        raise _failure(trial, _tail(printed if "reply" in printed else errors or printed)) from None
    if not close:
        raise _failure(trial, "it gave other outputs than the network")
    return round(float(answer["milliseconds"]), 3)


def _failure(trial: Trial, why: str) -> RedppError:
    return RedppError(f"the handler of {trial.name} failed on one request: {why}",
                      "the packaged handler gives the network's outputs", "report this with the model and the command")


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    scale = float(np.abs(b).max(initial=0.0)) or 1.0
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0.0) <= 1e-3 * scale)


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:] or "it ended without a word"
