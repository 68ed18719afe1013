"""Run a network in an engine in a process of its own: what crashes there does not take the server down.

Each network has its own process, and so its own heap: networks that share one are up to 7 % slower the later they are
built. The process imports numpy and the engine, not torch, so it starts in a fifth of a second. It builds the network
from a file, makes batches from the stored inputs, and answers lines of JSON.

``python -m redpp_serve.engines.trial FOLDER ENGINE PRECISION THREADS DEVICE MODEL`` is the process.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from redpp_serve.engines.engine import ENGINES

Arrays = list[np.ndarray[Any, Any]]
Shapes = Sequence[Sequence[int]]  # of one of each input, without the batch
_INPUTS = "inputs.npz"
READING_S, _MOST_CALLS = 0.01, 20  # a reading of short calls is the mean of those that fit into this time


class TrialError(Exception):
    """A network that an engine does not run, with the reason."""


def seconds_of(call: Callable[[], object], clock: Callable[[], float], reading: float = READING_S) -> float:
    """Return the seconds of a call by a clock.

    Where it takes less than ``reading`` seconds, that is the mean of the calls that fit into them behind a first one,
    which finds caches cold and threads asleep.
    """

    def mean(calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls

    once = mean(1)
    calls = min(_MOST_CALLS, int(reading / max(once, 1e-9)))
    return mean(calls) if calls else once


class Trial:
    """A network in an engine, in a process of its own.

    Args:
        engine: the engine's name.
        precision: the precision to run it in.
        model: the file of the ONNX model.
        inputs: arrays (n, ...), from which batches are made.
        threads: number of threads of the engine.
        device: the number of the device, where there are several.
        seconds: time for building and for what it is asked, until `allow` gives more.

    Attributes:
        seconds: how long building took, with the engine's import.

    Raises:
        TrialError: it does not build the network, or is late.
    """

    def __init__(
        self, engine: str, precision: str, model: Path, inputs: Arrays, threads: int, seconds: float, device: int = 0
    ) -> None:
        self.allow(seconds)
        self._folder = tempfile.TemporaryDirectory(prefix="redpp-engine-")
        np.savez(Path(self._folder.name) / _INPUTS, *inputs)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        what = [self._folder.name, engine, precision, str(threads), str(device), str(model)]
        command = [_python(), "-B", "-m", "redpp_serve.engines.trial", *what]  # no files in a model repository
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=quiet)
        try:
            self.seconds = float(self._answer())
        except BaseException:
            self.close()
            raise

    def allow(self, seconds: float) -> None:
        """Give it so much time from now on."""
        self._seconds, self._limit = seconds, time.monotonic() + seconds

    def outputs(self, batch: int, shapes: Shapes | None = None) -> Arrays:
        """Return the outputs for a batch of the stored inputs, cut or begun anew to other shapes where some are given.

        Raises:
            TrialError: the network fails on it, or is late.
        """
        with np.load(self._ask("outputs", batch, shapes)) as file:
            return [file[name] for name in file.files]

    def time(self, batch: int, shapes: Shapes | None = None) -> float:
        """Return the seconds of a call, as `seconds_of`: the processor's where the engine has one thread.

        Args:
            batch: the number of inputs.
            shapes: as for `outputs`.

        Raises:
            TrialError: the network fails, or is late.
        """
        return float(self._ask("time", batch, shapes))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def _ask(self, what: str, batch: int, shapes: Shapes | None) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([what, batch, shapes]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer will tell
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, self._limit - time.monotonic()))
        if not ready:
            raise TrialError(f"not ready after {self._seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise TrialError(f"its process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if "failed" in answer:
            raise TrialError(answer["failed"])
        return answer["done"]


def _python() -> str:
    """Return a Python interpreter: this process may be one that a server embeds."""
    own = sys.executable or ""
    return own if Path(own).name.startswith("python") else shutil.which("python3") or own or "python3"


class _Child:
    """The network in this process."""

    def __init__(self, folder: Path, engine: str, precision: str, threads: int, device: int, model: Path) -> None:
        start = time.monotonic()
        alone = threads == 1 and ENGINES[engine].device == "cpu"
        self._clock = time.process_time if alone else time.perf_counter
        self._session = ENGINES[engine].session(model, precision, threads, device)
        self.seconds = time.monotonic() - start
        self._folder = folder
        with np.load(folder / _INPUTS) as file:
            self._inputs = [file[name] for name in file.files]

    def outputs(self, batch: int, shapes: Shapes | None) -> str:
        """Return the file of the outputs."""
        path = self._folder / "outputs.npz"
        np.savez(path, *self._session(self._batch(batch, shapes)))
        return str(path)

    def time(self, batch: int, shapes: Shapes | None) -> float:
        """Return the seconds of a call."""
        return seconds_of(partial(self._session, self._batch(batch, shapes)), self._clock)

    def _batch(self, batch: int, shapes: Shapes | None) -> Arrays:
        wanted = shapes or [x.shape[1:] for x in self._inputs]
        return [_tiled(x, (batch, *shape)) for x, shape in zip(self._inputs, wanted, strict=True)]


def _tiled(x: np.ndarray[Any, Any], shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Do with arrays what `graph.sizes.tiled` does with tensors; this process does not import torch."""
    for axis, length in enumerate(shape):
        if x.shape[axis] != length:
            x = x.take(np.arange(length) % x.shape[axis], axis)
    return np.ascontiguousarray(x)


def _serve(folder: str, engine: str, precision: str, threads: str, device: str, model: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print

    def reply(make: Callable[[], Any]) -> bool:
        try:
            answer = {"done": make()}
        except Exception as error:  # whatever an engine raises is the reason why it is left out
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
        return "done" in answer

    children: list[_Child] = []

    def start() -> float:
        children.append(_Child(Path(folder), engine, precision, int(threads), int(device), Path(model)))
        return children[0].seconds

    if reply(start):
        methods: dict[str, Callable[..., Any]] = {"outputs": children[0].outputs, "time": children[0].time}
        for line in sys.stdin:
            what, *how = json.loads(line)
            reply(partial(methods[what], *how))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
