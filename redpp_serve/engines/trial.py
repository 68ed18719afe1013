"""Try networks in their engines in a process of its own: what crashes there does not take the server down.

The child reads models and inputs from a folder and writes outputs there; it imports numpy and the engines, not torch,
so it starts in a fraction of a second. A crash leaves the attempt that it was at without a result, and another child
goes on behind it.

``python -m redpp_serve.engines.trial FOLDER`` is the child.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from redpp_serve.engines.engine import ENGINES

Arrays = list[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Attempt:
    """One network in one engine.

    Attributes:
        engine: the engine's name.
        precision: the precision to run it in.
        model: the ONNX model.
    """

    engine: str
    precision: str
    model: bytes


@dataclass
class Outcome:
    """The result of an attempt.

    Attributes:
        outputs: one list of outputs for each list of inputs; none where it failed.
        reason: why it failed.
        seconds: how long building took, which for the first of an engine includes its import.
    """

    outputs: list[Arrays] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0


def try_engines(attempts: Sequence[Attempt], inputs: Sequence[Arrays], threads: int, seconds: float) -> list[Outcome]:
    """Run each network once on each list of inputs, in a process of its own.

    Args:
        attempts: the networks and their engines.
        inputs: lists of inputs (N, ...).
        threads: number of threads of each engine.
        seconds: time for all of them; what is not tried by then has failed.
    """
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="redpp-engines-") as name:
        folder = Path(name)
        _write(folder, attempts, inputs, threads)
        first = 0
        while first < len(attempts):
            code = _run_child(folder, first, end - time.monotonic())
            states = _states(folder)
            reached = max(states, default=-1)
            if reached == len(attempts) - 1 and states[reached].get("ended"):
                break
            began = max(first, reached)
            states.setdefault(began, {})
            if not states[began].get("ended"):
                late = code is None
                reason = f"not ready after {seconds:.0f} s" if late else f"its process ended with code {code}"
                _note(folder, began, ended=True, reason=reason)
                if late:
                    break
            first = began + 1
        return _outcomes(folder, len(attempts), len(inputs))


def _write(folder: Path, attempts: Sequence[Attempt], inputs: Sequence[Arrays], threads: int) -> None:
    models: dict[int, int] = {}  # equal models are written once
    for attempt in attempts:
        if id(attempt.model) not in models:
            models[id(attempt.model)] = len(models)
            (folder / f"model{models[id(attempt.model)]}.onnx").write_bytes(attempt.model)
    for k, arrays in enumerate(inputs):
        np.savez(folder / f"inputs{k}.npz", *arrays)
    plan = [{"engine": a.engine, "precision": a.precision, "model": models[id(a.model)]} for a in attempts]
    document = {"attempts": plan, "inputs": len(inputs), "threads": threads}
    (folder / "plan.json").write_text(json.dumps(document), encoding="utf-8")


def _run_child(folder: Path, first: int, seconds: float) -> int | None:
    """Return the child's exit status; None where it had to be stopped."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [_python(), "-m", "redpp_serve.engines.trial", str(folder), str(first)]
    quiet = subprocess.DEVNULL
    try:
        return subprocess.run(
            command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, timeout=max(0.1, seconds), check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def _python() -> str:
    """Return a Python interpreter: this process may be one that a server embeds."""
    own = sys.executable or ""
    return own if Path(own).name.startswith("python") else shutil.which("python3") or own or "python3"


def _note(folder: Path, attempt: int, **state: Any) -> None:
    with open(folder / "states.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"attempt": attempt, **state}) + "\n")


def _states(folder: Path) -> dict[int, dict[str, Any]]:
    path = folder / "states.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        state = json.loads(line)
        found.setdefault(state["attempt"], {}).update(state)
    return found


def _outcomes(folder: Path, attempts: int, inputs: int) -> list[Outcome]:
    states, found = _states(folder), []
    for k in range(attempts):
        state: Mapping[str, Any] = states.get(k, {"reason": "not tried for want of time"})
        outcome = Outcome(reason=state.get("reason", ""), seconds=state.get("seconds", 0.0))
        if not outcome.reason:
            for batch in range(inputs):
                with np.load(folder / f"outputs{k}-{batch}.npz") as file:
                    outcome.outputs.append([file[name] for name in file.files])
        found.append(outcome)
    return found


def _child(folder: Path, first: int) -> None:
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    for k, attempt in enumerate(plan["attempts"]):
        if k < first:
            continue
        _note(folder, k, ended=False)
        start = time.monotonic()
        reason, seconds = "", 0.0
        try:
            model = (folder / f"model{attempt['model']}.onnx").read_bytes()
            session = ENGINES[attempt["engine"]].session(model, attempt["precision"], plan["threads"])
            seconds = time.monotonic() - start
            for batch in range(plan["inputs"]):
                with np.load(folder / f"inputs{batch}.npz") as file:
                    arrays = [file[name] for name in file.files]
                np.savez(folder / f"outputs{k}-{batch}.npz", *session(arrays))
            session.close()
        except Exception as error:  # whatever an engine raises is the reason why it is left out
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _note(folder, k, ended=True, reason=reason, seconds=seconds)


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]))
