"""One arm of `benchmarks.engines` in a process of its own, as a server's worker would hold it.

Arms that share a process share its heap: those that are built last get scattered memory, and are up to 7 % slower. Each
has its own here, and the processes take turns.

``python -m benchmarks.engine_worker ARM OPTIONS DATA`` reads lines of JSON, each a method of `ArmRun` and its argument,
and answers each by a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.engine_arms import (
    ARMS,
    OURS,
    OURS_AUTO,
    Call,
    CellOptions,
    Served,
    UnavailableError,
    check_here,
    served,
)
from benchmarks.engine_networks import NETWORKS, keep
from benchmarks.real_scores import centred_error
from redpp_serve.engines.trial import seconds_of
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import LoadedArtifact, build, load
from redpp_serve.packaging.mar import read_artifact
from redpp_serve.runtime.memory import with_huge_pages

PRUNED = "pruned, "  # before the name of an arm: that arm of the file of a pruned network
CONTROL = "control"  # the arm that counts in Python
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_READING_S = 0.02  # a reading is the mean of the calls that fit into this time


class ArmRun:
    """An arm in this process.

    Args:
        name: the arm's name.
        options: how to run it.
        data: a file of inputs ``x`` (n, ...) and expected outputs; None for one structured input.

    Attributes:
        plan: what this project chose; empty for other arms.

    Raises:
        UnavailableError: the arm does not exist here.
    """

    def __init__(self, name: str, options: CellOptions, data: Path | None) -> None:
        torch.set_num_threads(options.threads)
        self._clock = CLOCKS[options.clock]
        self.plan: dict[str, Any] = {}
        self._x, self._expected = torch.zeros(1), torch.zeros(1)
        if name == CONTROL:
            self._call: Call = _control
            return
        network = NETWORKS[options.network]
        kept, arm = keep(network, Path(options.scratch)), ARMS[name.removeprefix(PRUNED)]
        if data:
            with np.load(data) as file:
                self._x, self._expected = (torch.from_numpy(file[key]) for key in ("x", "expected"))
        else:
            self._x = network.inputs(1)
        check_here(arm)
        setting = options.setting(max(options.batches) if data else 1)
        if name.startswith(PRUNED):
            self._call = Served(served(artifact_bytes(Path(options.arm)), arm.engine, arm.precision, setting))
        else:
            self._call = arm.build(network, kept, setting)
        if isinstance(self._call, Served) and name in (OURS, OURS_AUTO):
            plan = self._call.model.plan
            self.plan = {
                str(c.batch): [c.engine, c.precision, {n: round(1e3 * t, 3) for n, t in c.times.items()}]
                for c in plan.engines
            } | {"seconds": round(plan.seconds, 2)}

    @torch.inference_mode()
    def check(self, batch: int) -> float:
        """Return the error of the outputs for all inputs in parts of a batch, relative to their spread."""
        found = torch.cat([self._call(part) for part in self._x.split(batch)])
        return centred_error(found, self._expected)

    @torch.inference_mode()
    def time(self, batch: int) -> float:
        """Return the seconds of a call: of several behind a first one, unless one takes long."""
        return seconds_of(partial(self._call, self._x[:batch].contiguous()), self._clock, _READING_S)

    def begin(self, seconds: float) -> None:
        """Begin to call for some seconds."""
        self._until = time.perf_counter() + seconds

    @torch.inference_mode()
    def end(self) -> int:
        """Return the number of calls since `begin`."""
        count = 0
        while time.perf_counter() < self._until:
            self._call(self._x)
            count += 1
        return count

    def close(self) -> None:
        """End it."""


class RemoteRun:
    """An `ArmRun` in a process of its own.

    Raises:
        UnavailableError: the arm does not exist here.
        RuntimeError: it failed, or its process died.
    """

    def __init__(self, name: str, options: CellOptions, data: Path | None) -> None:
        command = [sys.executable, "-m", "benchmarks.engine_worker", name, options.write(), str(data or "")]
        pipe = subprocess.PIPE
        arm = ARMS.get(name.removeprefix(PRUNED))
        environment = with_huge_pages(os.environ) if arm and arm.engine else None  # as `serve` and the images do
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        try:
            self.plan: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def check(self, batch: int) -> float:
        """Do as `ArmRun.check`."""
        self._send("check", batch)
        return float(self._answer())

    def time(self, batch: int) -> float:
        """Do as `ArmRun.time`."""
        self._send("time", batch)
        return float(self._answer())

    def begin(self, seconds: float) -> None:
        """Do as `ArmRun.begin`."""
        self._send("count", seconds)

    def end(self) -> int:
        """Do as `ArmRun.end`."""
        return int(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _send(self, method: str, value: float) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer will tell
            self._process.stdin.write(json.dumps([method, value]) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with code {self._process.wait()}")
        kind, value = json.loads(line)
        if kind == "unavailable":
            raise UnavailableError(value)
        if kind == "failed":
            raise RuntimeError(value)
        return value


def _control(x: Tensor) -> Tensor:
    return x + sum(range(20_000))


def artifact_of(file: Path) -> LoadedArtifact:
    """Read the artifact of a ``.mar`` archive or of a ``.redpp`` file."""
    return read_artifact(file) if file.suffix == ".mar" else load(file)


def artifact_bytes(file: Path) -> bytes:
    """Return what `artifact_of` reads as an artifact."""
    stored = artifact_of(file)
    return build(stored.graph, stored.description, stored.samples).data


def reason_of(error: Exception) -> str:
    """Return an exception in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _serve(arguments: list[str]) -> None:
    name, options, data = arguments
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print

    def reply(make: Callable[[], Any]) -> bool:
        kind, value = "done", None
        try:
            value = make()
        except (UnavailableError, RedppError) as error:
            kind, value = "unavailable", str(error)
        except Exception as error:  # whatever an engine raises is the reason why it gets no time
            kind, value = "failed", reason_of(error)
        replies.write(json.dumps([kind, value]) + "\n")
        replies.flush()
        return kind == "done"

    runs: list[ArmRun] = []

    def start() -> dict[str, Any]:
        runs.append(ArmRun(name, CellOptions.read(options), Path(data) if data else None))
        return runs[0].plan

    def count(seconds: float) -> int:
        runs[0].begin(seconds)
        return runs[0].end()

    if reply(start):
        methods: dict[str, Callable[[Any], Any]] = {"check": runs[0].check, "time": runs[0].time, "count": count}
        for line in sys.stdin:
            method, value = json.loads(line)
            reply(lambda method=method, value=value: methods[method](value))


if __name__ == "__main__":
    _serve(sys.argv[1:])
