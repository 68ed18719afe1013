"""Measure what the handler and its metrics add to a request, beside the barest handler that could serve the network.

In one process, without server or network, the same requests in turns: the cost is a few microseconds on
milliseconds, which no measurement through a server would resolve.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.handler import Arm
from redpp_serve.comparison.client import Payload
from redpp_serve.comparison.payloads import folder_payloads
from redpp_serve.handlers.metrics import DIRECTORY
from redpp_serve.runtime.model import ServingModel
from redpp_serve.statistics.intervals import percentile_interval

BATCHES = (1, 8)


class Bare:
    """Reads .npy, runs the same network in the same runtime, writes JSON: no checks, no metrics, no headers."""

    def __init__(self, model: ServingModel) -> None:
        self.model = model

    def answer(self, payloads: list[Payload]) -> list[bytes]:
        x = torch.stack([torch.from_numpy(np.load(io.BytesIO(p.body))) for p in payloads])
        (y, *_) = self.model(x)
        return [json.dumps({"outputs": [row]}, separators=(",", ":")).encode() for row in y.tolist()]


def overhead(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """For each batch size the added time of our handler over the bare one, and of metrics over none, in per cent.

    Raises:
        SystemExit: the handlers do not give the same answers.
    """
    payloads = folder_payloads(folder)[: max(BATCHES)]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ[DIRECTORY] = str(Path(scratch) / "metrics")
        measured = Arm(folder / "original.mar", Path(scratch) / "with", 1)
        assert measured.handler.metrics is not None
        plain = Arm(folder / "original.mar", Path(scratch) / "without", 1)
        plain.handler.metrics = None
        # All share one copy of the weights: with copies, whoever runs twice in a row would find his own in the cache.
        plain.handler.model = measured.handler.model
        bare = Bare(measured.handler.model)
        for arm in (measured, plain):
            arm.check(payloads)
        ours, theirs = ([json.loads(body) for body in arm.answer(payloads)] for arm in (measured, bare))
        if not np.allclose([x["outputs"] for x in ours], [x["outputs"] for x in theirs], rtol=1e-5):
            raise SystemExit("the bare handler gives other answers")
        return [_row([bare, plain, measured], payloads[:batch], rounds, rng) for batch in BATCHES]


def _row(arms: list[Any], payloads: list[Payload], rounds: int, rng: np.random.Generator) -> dict[str, Any]:
    seconds = np.zeros((rounds, len(arms)))
    for k in range(rounds):
        for arm in rng.permutation(len(arms)):
            start = time.perf_counter()
            arms[arm].answer(payloads)
            seconds[k, arm] = time.perf_counter() - start
    row: dict[str, Any] = {
        "batch": len(payloads),
        "rounds": rounds,
        "bare_ms": round(1e3 * float(np.median(seconds[:, 0])), 4),
    }
    for name, arm, base in (("handler", 2, 0), ("metrics", 2, 1)):
        added = percentile_interval(100 * (seconds[:, arm] / seconds[:, base] - 1), 0.5, rng)
        row[f"{name}_percent"] = [round(x, 2) for x in added]
    return row
