"""Rules that hold on every server: torch's threads, one run for a batch, and failures that cost their senders alone."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import load
from redpp_serve.graph.passes import check_served
from redpp_serve.handlers.metrics import Metrics
from redpp_serve.handlers.tracing import named
from redpp_serve.handlers.wire import OBSERVE_FILE_VARIABLE, OBSERVE_VARIABLE
from redpp_serve.runtime.engine_choice import check_engine
from redpp_serve.runtime.engine_network import AUTO
from redpp_serve.runtime.memory import keep_blocks
from redpp_serve.runtime.model import ServingModel
from redpp_serve.runtime.observer import Observer
from redpp_serve.runtime.planner import PLAN_SECONDS
from redpp_serve.variants import ORIGINAL

log = logging.getLogger(__name__)

PLAN_VARIABLE = "REDPP_PLAN_SECONDS"
NETWORK_FAILED = "The network failed on this input"
NOT_FINITE = "The network's output for this input is not finite"

Item = TypeVar("Item")
Result = TypeVar("Result")


def set_threads(threads: Any, where: str) -> None:
    """Set the number of this worker's torch threads; None leaves it as it is.

    Args:
        threads: what a configuration says.
        where: the configuration's file, for errors.

    Raises:
        RedppError: not a positive integer.
    """
    if threads is None:
        return
    if not isinstance(threads, int) or threads < 1:
        raise RedppError(f"threads is {threads!r} in {where}", "a positive integer", f"correct {where}")
    torch.set_num_threads(threads)


def load_model(
    artifact: Path, device: str, *, batch: Any, precision: Any, where: str, engine: Any = None
) -> ServingModel:
    """Load an artifact, choose its engine and kernels, and run every batch bucket once; the process keeps its memory.

    Args:
        artifact: the file.
        device: ``cpu`` or e.g. ``cuda:0``.
        batch: the largest batch that the server forms; None for 1.
        precision: what a configuration says; None for fp32.
        where: the configuration's file, for errors.
        engine: what a configuration says; None for the fastest.

    Raises:
        RedppError: a damaged artifact, an unknown engine or precision, or one that the network does not run in, or a
            `PLAN_VARIABLE` that is not a number.
    """
    precision, engine = "fp32" if precision is None else precision, AUTO if engine is None else engine
    check_served(precision, where)
    check_engine(engine, where)
    keep_blocks()
    model = ServingModel(
        artifact, device, precision=precision, batch=int(batch or 1), plan_seconds=_plan_seconds(), engine=engine
    )
    model.warm_up()
    return model


def _plan_seconds() -> float:
    text = os.environ.get(PLAN_VARIABLE, str(PLAN_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise RedppError(
            f"{PLAN_VARIABLE} is {text[:40]!r}", "seconds, 0 for no timing", f"correct or unset {PLAN_VARIABLE}"
        )
    return seconds


def open_observer(artifact: Path, model: ServingModel) -> Observer | None:
    """Begin to observe what the original's layers read; None for the pruned network, or where nobody asks for it.

    Args:
        artifact: the file that the model was loaded from.
        model: the loaded model.

    Raises:
        RedppError: `OBSERVE_VARIABLE` is not a positive integer, or `OBSERVE_FILE_VARIABLE` no absolute path.
    """
    text = os.environ.get(OBSERVE_VARIABLE)
    if not text or model.description["variant"] != ORIGINAL.name:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise RedppError(
            f"{OBSERVE_VARIABLE} is {text[:40]!r}",
            "how many requests there are for each that is observed, such as 10",
            f"correct or unset {OBSERVE_VARIABLE}",
        )
    path = os.environ.get(OBSERVE_FILE_VARIABLE, "")
    if not os.path.isabs(path):
        raise RedppError(
            f"{OBSERVE_FILE_VARIABLE} is {path!r}", "the absolute path of a file", f"set {OBSERVE_FILE_VARIABLE}"
        )
    return Observer(load(artifact).graph, int(text), Path(path))


def describe(metrics: Metrics, model: ServingModel) -> None:
    """Record the model's fixed figures and its plan."""
    info, plan = model.description["info"], model.plan
    metrics.describe(parameters=info["parameters"], macs=info["macs"], bytes=model.description["bytes"])
    metrics.plan(plan.engine, plan.precision, plan.digest, {batch: plan.counts(batch) for batch in plan.batches})


def run_network(
    model: ServingModel, inputs: Sequence[Tensor], metrics: Metrics | None, observer: Observer | None = None
) -> tuple[Tensor, ...]:
    """Return the network's outputs (N, ...) for inputs (N, ...), and record them as one run.

    An observer gives way meanwhile, and gets references to the inputs, which nobody may write to afterwards.

    Raises:
        RuntimeError: the outputs are not one row for each row of the inputs.
    """
    start = time.perf_counter()
    outputs = _observed(model, inputs, observer) if observer else model(*inputs)
    rows = len(inputs[0])
    if any(output.dim() == 0 or output.shape[0] != rows for output in outputs):
        raise RuntimeError(f"outputs of shapes {[tuple(o.shape) for o in outputs]} for a batch of {rows}")
    if metrics:
        metrics.inference(time.perf_counter() - start)
    if observer:
        observer.offer(inputs)
    return outputs


def _observed(model: ServingModel, inputs: Sequence[Tensor], observer: Observer) -> tuple[Tensor, ...]:
    observer.busy = True
    try:
        return model(*inputs)
    finally:
        observer.busy = False


def by_shape(items: Sequence[Item], inputs: Callable[[Item], Sequence[Tensor]], rows: int) -> list[list[Item]]:
    """Part items whose inputs have different shapes, and so cannot run together; the order stays within each part.

    Args:
        items: requests.
        inputs: returns an item's tensors.
        rows: how many leading dimensions count rows, which may differ.
    """
    parts: dict[tuple[torch.Size, ...], list[Item]] = {}
    for item in items:
        parts.setdefault(tuple(x.shape[rows:] for x in inputs(item)), []).append(item)
    return list(parts.values())


def together_or_alone(
    items: list[Item], run: Callable[[list[Item]], Result], name: Callable[[Item], str]
) -> Iterator[tuple[list[Item], Result | None]]:
    """Run all items at once; where that fails, run each alone, for one of them may be to blame.

    Args:
        items: requests.
        run: runs some of them.
        name: returns a request's id for the log; empty where it has none.

    Yields:
        The items that ran together, and their result; None for an item that failed alone.
    """
    try:
        result = run(items)
    except Exception:
        if len(items) == 1:
            log.exception("%s the network failed on it", named(name(items[0])))
            yield items, None
        else:
            log.exception("the network failed on a batch of %d", len(items))
            for item in items:
                yield from together_or_alone([item], run, name)
    else:
        yield items, result
