"""Tell the gains apart: from stock eager PyTorch to the engine, to the precision, to pruning, measured in one run.

The arms run in turns in this process, as the workers run them but without a server: eager PyTorch on the original as it
was captured, operator by operator; the original as it is served; the original in the precision of the pruned version;
the pruned version as it is served. The product of the three gains is what a user of the stock handler sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redpp_serve.comparison.compare import Gain
from redpp_serve.graph.artifact import load
from redpp_serve.graph.executor import Program
from redpp_serve.packaging.mar import artifact_bytes
from redpp_serve.planning import served_as
from redpp_serve.runtime.device import parse_device
from redpp_serve.runtime.engine_network import stored_inputs
from redpp_serve.runtime.model import ServingModel
from redpp_serve.runtime.plan import EngineChoice
from redpp_serve.runtime.timing import MOST_ROUNDS, rounds, timed, torch_threads
from redpp_serve.statistics.intervals import ratio_interval
from redpp_serve.variants import ORIGINAL, PRUNED

EAGER = "eager PyTorch"
_SECONDS = 6.0  # for each batch size
_FEWEST = 5


def measure_gains(folder: Path, seconds: float = _SECONDS, seed: int = 0) -> list[Gain]:
    """Measure the gains of a packaged network at batch 1 and at its largest batch, on the device of this machine.

    Args:
        folder: what `package` wrote.
        seconds: about how long to measure each batch size; choosing engines comes on top where nothing is cached.
        seed: of the intervals.

    Raises:
        RedppError: the folder cannot be used, or a network does not run.
    """
    serving, device = served_as(folder), parse_device(None)
    with torch_threads(serving["threads"]):
        arms = _Arms(folder, serving, device)
        rng = np.random.default_rng([seed, 3])
        sizes = sorted({1, serving["batch_size"]})
        return [gain for size in sizes for gain in _gains(arms.at(size), size, seconds, rng)]


class _Arms:
    """The networks of a package, each built once."""

    def __init__(self, folder: Path, serving: dict[str, Any], device: torch.device) -> None:
        self._data = {variant.name: artifact_bytes(variant.archive_in(folder)) for variant in (ORIGINAL, PRUNED)}
        self._serving, self._device = serving, device
        self._original = load(self._data[ORIGINAL.name])
        self._eager = Program(self._original.graph).to(device).eval()
        self._models: dict[tuple[str, str, str], ServingModel] = {}

    def at(self, batch: int) -> dict[str, Callable[[], object]]:
        """Return the four runs at a batch size, by what they are in words."""
        inputs = stored_inputs(self._original, batch)
        wanted, engine = self._serving["precision"], self._serving["engine"]
        original, pruned = self._model(ORIGINAL.name, wanted, engine), self._model(PRUNED.name, wanted, engine)
        chosen, before = _choice(pruned, batch), _choice(original, batch)
        same = original
        if chosen.precision != before.precision:  # on the engine of the pruned version, so that pruning stands alone
            same = self._model(ORIGINAL.name, chosen.precision, chosen.engine)
        return {
            EAGER: lambda: self._run_eager(inputs),
            f"original, {_words(original, batch)}": lambda: original(*inputs),
            f"original at the pruned version's precision, {_words(same, batch)}": lambda: same(*inputs),
            f"pruned, {_words(pruned, batch)}": lambda: pruned(*inputs),
        }

    @torch.inference_mode()
    def _run_eager(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(y.cpu() for y in self._eager(*(x.to(self._device) for x in inputs)))

    def _model(self, variant: str, precision: str, engine: str) -> ServingModel:
        key = variant, precision, engine
        if key not in self._models:
            self._models[key] = ServingModel(
                self._data[variant],
                str(self._device),
                precision=precision,
                batch=self._serving["batch_size"],
                engine=engine,
            )
        return self._models[key]


def _choice(model: ServingModel, batch: int) -> EngineChoice:
    return next(choice for choice in model.plan.engines if choice.batch == batch)


def _words(model: ServingModel, batch: int) -> str:
    choice = _choice(model, batch)
    return f"{choice.engine} {choice.precision}"


def _gains(arms: dict[str, Callable[[], object]], batch: int, seconds: float, rng: np.random.Generator) -> list[Gain]:
    runs = [timed(run) for run in arms.values()]
    for run in runs:
        run()
    end, rows = time.perf_counter() + seconds, list[list[float]]()
    for row in rounds(runs):
        rows.append(row)
        if len(rows) == MOST_ROUNDS or (len(rows) >= _FEWEST and time.perf_counter() > end):
            break
    times, names = np.array(rows), list(arms)
    steps = (("engine", 0, 1), ("precision", 1, 2), ("pruning", 2, 3), ("all", 0, 3))
    return [
        Gain(batch, step, names[a], names[b], ratio_interval(times[:, a], times[:, b], 0.5, rng))
        for step, a, b in steps
    ]
