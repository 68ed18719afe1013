"""Run a finished archive's handler on one request, in a process of its own, as TorchServe would."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ..errors import RedppError

TIMEOUT_S = 300.0
_CHILD = """
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


def start(archive: Path, request: bytes, folder: Path) -> subprocess.Popen[str]:
    """Unpack the archive into an empty folder and start its handler on one request."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)  # an archive that this process has just written
    (folder / "request.bin").write_bytes(request)
    command = [sys.executable, "-c", _CHILD, str(folder), str(folder / "request.bin")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_archives(archives: list[Path], request: bytes, expected: list[list[np.ndarray]]) -> list[dict[str, object]]:
    """Run each archive's handler on the request and hold its outputs against the graph's.

    Args:
        archives: ``.mar`` files.
        request: body of one request.
        expected: for each archive the network's outputs for it, without batch dimension.

    Returns:
        for each {"archive", "milliseconds"}: the handler's time for the request after its warm-up.

    Raises:
        RedppError: a handler fails or answers something else.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="redpp-smoke-") as scratch:
        children: list[subprocess.Popen[str]] = []
        try:
            for k, archive in enumerate(archives):
                children.append(start(archive, request, Path(scratch) / str(k)))
            for archive, child, outputs in zip(archives, children, expected):
                results.append({"archive": archive.name, "milliseconds": _answer(archive, child, outputs)})
        finally:
            for child in children:  # after a failure or Ctrl-C some still run
                child.kill()
                child.communicate()
    return results


def _answer(archive: Path, child: subprocess.Popen[str], outputs: list[np.ndarray]) -> float:
    """Milliseconds that the handler took for its answer, which must hold the outputs."""
    try:
        printed, errors = child.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise _failure(archive, f"no answer in {TIMEOUT_S:g} s") from None
    try:
        answer = json.loads(printed.splitlines()[-1])
        got = [np.asarray(y, dtype=np.float64) for y in answer["reply"]["outputs"]]
        close = all(_close(a, np.asarray(b, dtype=np.float64)) for a, b in zip(got, outputs, strict=True))
    except (IndexError, KeyError, ValueError, TypeError):
        raise _failure(archive, _tail(printed if "reply" in printed else errors or printed)) from None
    if not close:
        raise _failure(archive, "it gave other outputs than the network")
    return round(float(answer["milliseconds"]), 3)


def _failure(archive: Path, why: str) -> RedppError:
    return RedppError(f"the handler of {archive.name} failed on one request: {why}",
                      "the packaged handler gives the network's outputs", "report this with the model and the command")


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    scale = float(np.abs(b).max(initial=0.0)) or 1.0
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0.0) <= 1e-3 * scale)


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:] or "it ended without a word"
