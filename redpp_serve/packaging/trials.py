"""Run finished archives' handlers, and Triton versions' models, on one request, each in a process of its own.

Loading torch takes longer than all the rest. One process loads it and forks one for each trial: they share torch and
nothing else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from redpp_serve.errors import RedppError

TIMEOUT_S = 300.0
# Largest difference from the network's outputs in that precision, as a share of the largest: sums in another order.
TOLERANCES = {"fp32": 1e-3, "tf32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
_ARCHIVE = """
import json, sys, time, types
from pathlib import Path
folder = Path(sys.argv[1])
request = (folder / "request.bin").read_bytes()
sys.path.insert(0, str(folder))
import handler
statuses = []
context = types.SimpleNamespace(
    system_properties={"model_dir": str(folder), "gpu_id": None, "batch_size": 1},
    model_yaml_config={"handler": {"threads": 1, "precision": (folder / "precision").read_text()}},
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
scratch = Path(sys.argv[1])
version = Path((scratch / "version").read_text())
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


# Arguments: for each trial the folder with its code.py, which gets the folder, and what it prints to its files there.
_FORKS = """
import os, sys, traceback
import numpy, torch
children = []
for folder in sys.argv[1:]:
    child = os.fork()
    if child:
        children.append(child)
        continue
    for number, name in ((1, "printed"), (2, "errors")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    status = 1
    try:
        sys.argv = ["trial", folder]
        with open(os.path.join(folder, "code.py"), encoding="utf-8") as file:
            exec(compile(file.read(), "trial", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        open(os.path.join(folder, "ended"), "w").close()
        os._exit(status)
for child in children:
    os.waitpid(child, 0)
"""


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        name: what messages and the report call it.
        code: Python that finds what it needs in the folder ``sys.argv[1]`` and prints one line of JSON.
        prepare: fills that folder, which is empty and the trial's own.
        outputs: of the network for the request, without batch dimension.
    """

    name: str
    code: str
    prepare: Callable[[Path], None]
    outputs: Sequence[np.ndarray]


def try_archive(archive: Path, request: bytes, outputs: Sequence[np.ndarray], precision: str = "fp32") -> Trial:
    """The trial of a ``.mar`` as TorchServe would run it; ``request`` is a body."""

    def prepare(folder: Path) -> None:
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)  # an archive that this process has just written
        (folder / "request.bin").write_bytes(request)
        (folder / "precision").write_text(precision, encoding="utf-8")

    return Trial(archive.name, _ARCHIVE, prepare, outputs)


def try_model(version: Path, config: dict[str, Any], request: bytes, outputs: Sequence[np.ndarray]) -> Trial:
    """The trial of one version in a Triton repository, with a stand-in for the back end.

    Args:
        version: the version's folder.
        config: as Triton hands it to the model.
        request: .npy or .npz without batch dimension.
        outputs: see `Trial`.
    """

    def prepare(folder: Path) -> None:
        stand_in = files(__package__).joinpath("triton_stub.py").read_bytes()
        (folder / "triton_python_backend_utils.py").write_bytes(stand_in)
        (folder / "request.bin").write_bytes(request)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "version").write_text(str(version), encoding="utf-8")

    return Trial(f"triton version {version.name}", _MODEL, prepare, outputs)


def run_trials(trials: Sequence[Trial], precision: str = "fp32") -> list[dict[str, object]]:
    """Run all trials side by side and hold their outputs against the graphs', as closely as the precision allows.

    Returns:
        for each {"archive", "milliseconds"}: its name and the handler's time for the request after its warm-up.

    Raises:
        RedppError: one fails or answers something else.
    """
    with tempfile.TemporaryDirectory(prefix="redpp-smoke-") as scratch:
        folders = [Path(scratch) / str(k) for k in range(len(trials))]
        for trial, folder in zip(trials, folders):
            folder.mkdir()
            trial.prepare(folder)
            (folder / "code.py").write_text(trial.code, encoding="utf-8")
        _fork(folders)
        return [
            {"archive": t.name, "milliseconds": _answer(t, folder, precision)} for t, folder in zip(trials, folders)
        ]


def _fork(folders: Sequence[Path]) -> None:
    """Run what lies in the folders until all of it has ended, `TIMEOUT_S` at most; nothing of it runs on afterwards."""
    command = [sys.executable, "-c", _FORKS, *map(str, folders)]
    environment = os.environ | {"REDPP_PLAN_SECONDS": "0"}  # kernels are chosen where the model is served
    parent = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    try:
        _, errors = parent.communicate(timeout=TIMEOUT_S)
        if parent.returncode:
            raise RedppError(
                f"the packaged handlers could not be tried: {_tail(errors)}",
                "a Python that loads torch",
                "repair the installation of torch",
            )
    except subprocess.TimeoutExpired:
        pass  # `_answer` names those that have not ended
    finally:  # after a failure or Ctrl-C some still run
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()


def _answer(trial: Trial, folder: Path, precision: str) -> float:
    """Milliseconds that the handler took for its answer, which must hold the outputs."""
    printed, errors = (_read(folder / name) for name in ("printed", "errors"))
    try:
        answer = json.loads(printed.splitlines()[-1])
        got = [np.asarray(y, dtype=np.float64) for y in answer["reply"]["outputs"]]
        close = all(
            _close(a, np.asarray(b, dtype=np.float64), TOLERANCES[precision])
            for a, b in zip(got, trial.outputs, strict=True)
        )
    except (IndexError, KeyError, ValueError, TypeError):
        why = _tail(printed if "reply" in printed else errors or printed)
        raise _failure(
            trial, why if (folder / "ended").exists() else f"no answer in {TIMEOUT_S:g} s", precision
        ) from None
    if not close:
        raise _failure(trial, "it gave other outputs than the network", precision)
    return round(float(answer["milliseconds"]), 3)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _failure(trial: Trial, why: str, precision: str) -> RedppError:
    do = "report this with the model and the command"
    if precision in ("fp16", "bf16"):  # numbers beyond 65504 are infinite in fp16
        do = f"try --precision fp32: {precision} may hold too few digits or too small a range; if that fails as well, {do}"
    return RedppError(
        f"the handler of {trial.name} failed on one request: {why}",
        "the packaged handler gives the network's outputs",
        do,
    )


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    scale = float(np.abs(b).max(initial=0.0)) or 1.0
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0.0) <= tolerance * scale)


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:] or "it ended without a word"
