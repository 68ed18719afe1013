"""Run finished archives' handlers, and the models of a Triton repository, on one request, each in a process of its own.

The programs in this folder run what was packaged with the code that was packaged: they import nothing of the installed
project. A process each also means that one version cannot spoil the other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from redpp_serve.errors import RedppError
from redpp_serve.state_folders import scratch_folder

TIMEOUT_S = 300.0
# Largest difference from the network's outputs in that precision, as a share of the largest: sums in another order.
# Without time to plan, auto and int8 are fp32.
TOLERANCES = {"auto": 1e-3, "int8": 1e-3, "fp32": 1e-3, "tf32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
_PROGRAMS = Path(__file__).parent

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Trial:
    """One version to run, and the outputs that it must give.

    Attributes:
        name: the word for it in messages and in the report.
        command: a program of this folder with its arguments; it prints one line of JSON.
        files: name -> content of what it finds in its working folder.
        outputs: the network's outputs by name for the request, without batch dimension.
        precision: the precision that it computes in, which decides how close its outputs must be.
        half: the 16-bit precision that its weights are stored in, which decides so too; empty where they are wider.
        modules: what to import before the program starts, once for all trials.
    """

    name: str
    command: tuple[str, ...]
    files: Mapping[str, bytes]
    outputs: Mapping[str, Array]
    precision: str
    half: str = ""
    modules: tuple[str, ...] = ("torch",)


def try_archive(
    archive: Path, request: bytes, outputs: Mapping[str, Array], precision: str = "fp32", half: str = ""
) -> Trial:
    """Return the trial of a ``.mar`` as TorchServe would run it; ``request`` is a body, the rest as in `Trial`."""
    command = ("run_archive.py", str(archive.resolve()), precision)
    return Trial(archive.name, command, {"request.bin": request}, outputs, precision, half)


def try_model(
    version: Path, config: Mapping[str, Any], request: bytes, outputs: Mapping[str, Array], half: str = ""
) -> Trial:
    """Return the trial of one version in a Triton repository, with a substitute for the Python back end.

    Args:
        version: the version's folder.
        config: the configuration as Triton hands it to the model.
        request: .npy or .npz without batch dimension.
        outputs: see `Trial`.
        half: see `Trial`.
    """
    files = {"request.bin": request, "config.json": json.dumps(config).encode()}
    precision = config["parameters"]["precision"]["string_value"]
    command = ("run_model.py", str(version.resolve()))
    return Trial(f"triton version {version.name}", command, files, outputs, precision, half)


def run_trials(trials: Sequence[Trial], timeout_s: float = TIMEOUT_S) -> list[dict[str, object]]:
    """Run all trials side by side and compare their outputs with the networks'.

    Args:
        trials: what to run.
        timeout_s: seconds until a trial without an answer fails.

    Returns:
        {"archive", "milliseconds"} for each: its name, and the handler's time for the request after its warm-up.

    Raises:
        RedppError: a trial fails, or answers something else.
    """
    with scratch_folder(Path(tempfile.gettempdir()), "redpp-smoke-") as scratch, ExitStack() as stack:
        folders = [scratch / str(k) for k in range(len(trials))]
        process = _start(trials, folders)
        stack.callback(_end, process)  # after a failure or Ctrl-C some still run
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        ended = [(folder / "ended").exists() for folder in folders]
        pairs = list(zip(trials, folders, strict=True))
        found: list[dict[str, object]] = [
            {"archive": trial.name, "milliseconds": _milliseconds(trial, folder)}
            for trial, folder in compress(pairs, ended)
        ]
        if not all(ended):
            why = f"no answer in {timeout_s:g} s" if process.returncode is None else "its process did not start"
            raise _failure(trials[ended.index(False)], why)
        return found


def _start(trials: Sequence[Trial], folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start a process group that runs all trials, each in its folder."""
    asked = []
    for trial, folder in zip(trials, folders, strict=True):
        folder.mkdir()
        for name, content in trial.files.items():
            (folder / name).write_bytes(content)
        program, *arguments = trial.command
        asked.append({"folder": str(folder), "program": str(_PROGRAMS / program), "arguments": arguments})
    modules = sorted({module for trial in trials for module in trial.modules})
    # By path, not by -m: that would import this project, where the archive's own copy has to be imported.
    command = [sys.executable, str(_PROGRAMS / "run_all.py"), json.dumps({"modules": modules, "trials": asked})]
    environment = os.environ | {"REDPP_PLAN_SECONDS": "0"}  # kernels are chosen where the model is served
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=nothing, stderr=nothing, start_new_session=True, env=environment)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _milliseconds(trial: Trial, folder: Path) -> float:
    """Return the handler's time for its answer, which must hold the outputs."""
    printed, errors = ((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("printed", "errors"))
    try:
        answer = json.loads(printed.splitlines()[-1])
        found = answer["reply"]["outputs"]
        named = found if isinstance(found, dict) else dict(zip(trial.outputs, found, strict=True))
        tolerance = max(TOLERANCES[trial.precision], TOLERANCES.get(trial.half, 0.0))
        close = named.keys() == trial.outputs.keys() and all(
            _close(np.asarray(named[name], dtype=np.float64), np.asarray(wanted, dtype=np.float64), tolerance)
            for name, wanted in trial.outputs.items()
        )
    except (IndexError, KeyError, ValueError, TypeError):
        raise _failure(trial, _tail(printed if "reply" in printed else errors or printed)) from None
    if not close:
        raise _failure(trial, "it gave other outputs than the network")
    return round(float(answer["milliseconds"]), 3)


def _failure(trial: Trial, why: str) -> RedppError:
    do = "report this with the model and the command"
    if trial.precision in ("fp16", "bf16"):  # numbers beyond 65504 are infinite in fp16
        reason = f"{trial.precision} may hold too few digits or too small a range"
        do = f"try --precision fp32: {reason}; if that fails as well, {do}"
    return RedppError(
        f"the handler of {trial.name} failed on one request: {why}",
        "the packaged handler gives the network's outputs",
        do,
    )


def _close(a: Array, b: Array, tolerance: float) -> bool:
    scale = float(np.abs(b).max(initial=0.0)) or 1.0
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0.0) <= tolerance * scale)


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-400:] or "it ended without a message"
