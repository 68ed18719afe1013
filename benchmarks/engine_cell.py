"""One cell of `benchmarks.engines`, in a process of its own so that its memory and its crash are its own.

``python -m benchmarks.engine_cell SPECIFICATION FILE`` writes the cell to FILE; both are JSON (`CellOptions`).
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from benchmarks.engine_arms import (
    ARMS,
    BY_HAND,
    COMPILED,
    FORCED,
    OURS,
    OURS_AUTO,
    STOCK,
    Call,
    CellOptions,
    Served,
    UnavailableError,
    check_here,
    compile_openvino,
    ours,
    served,
)
from benchmarks.engine_networks import NETWORKS, Kept, Network, keep
from benchmarks.engine_worker import PRUNED, ArmRun, RemoteRun, artifact_of, reason_of
from benchmarks.real_scores import evaluate
from redpp_serve.engines import ENGINES, ON_CPU, OWN
from redpp_serve.engines.onnx_builder import to_onnx
from redpp_serve.errors import RedppError
from redpp_serve.files import write_atomically
from redpp_serve.graph.artifact import load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import mac_count
from redpp_serve.runtime.engine_network import Candidate, EngineRun
from redpp_serve.runtime.engine_network import Network as ServedNetwork
from redpp_serve.runtime.memory import free_memory
from redpp_serve.runtime.plan_cache import PlanCache
from redpp_serve.runtime.serving_graph import serving_graph
from redpp_serve.statistics.intervals import mean_interval, percentile_interval

CHECKED = 8  # inputs, at least, on which an arm is held against float64
EXACT = 1e-3  # largest centred error of fp32: sums in another order
LOWER = (0.05, 2.0)  # of other precisions: at least, and as a multiple of the error that was recorded
FEWEST_ROUNDS = 7
_LEAST_SPREAD = 1e-2  # of the outputs over the inputs, relative to the outputs
_REST_S = 0.08  # between arms of several threads: ONNX Runtime's spin on for 60 ms, on the cores of the next arm
_CALLS_OF_OVERHEAD = 300
_WORKER_ROUNDS = 5
Run = ArmRun | RemoteRun


def measure(options: CellOptions) -> dict[str, Any]:
    """Measure a cell; a failure is a result, too."""
    torch.set_num_threads(options.threads)
    cell: dict[str, Any] = {name: getattr(options, name) for name in ("kind", "network", "arm", "threads")}
    cell["arm"] = Path(options.arm).name  # a pruned network's file may be anywhere
    cell |= {"date": time.strftime("%Y-%m-%d"), "load": round(os.getloadavg()[0], 2)}
    network = NETWORKS[options.network]
    kept = keep(network, Path(options.scratch))
    try:
        return cell | {"status": "measured"} | KINDS[options.kind](network, kept, options)
    except UnavailableError as error:
        return cell | {"status": "unavailable", "reason": str(error)}
    except Exception as error:  # a crash is a result, too
        return cell | {"status": "failed", "reason": reason_of(error)}


# Times: all arms of one network in turns, each in a process of its own.


def times(network: Network, kept: Kept, options: CellOptions) -> dict[str, Any]:
    """Time the arms at each batch size, in turns; an arm whose outputs are wrong is named and gets no time.

    The processes of all arms are started `CellOptions.starts` times: where a process gets its memory alone makes up to
    20 % of its times.
    """
    x = network.inputs(max(CHECKED, *options.batches))
    expected = reference(network, x)
    recorded = {name: record["error"] for name, record in kept.facts["precisions"].items()}
    names = options.arms or tuple(name for name in ARMS if name != COMPILED or options.compiled)
    parts: list[list[Timed]] = []
    left_out, plans = dict[str, str](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "original.npz", x, expected)
        for start in range(options.starts):
            with Arms(options) as arms:
                for name in names:
                    arms.start(name, data)
                limits = {name: limit_of(recorded, ARMS[name].precision) for name in arms.runs}
                seconds, rng = options.seconds / options.starts, np.random.default_rng(start)
                rest = _REST_S if options.threads > 1 else 0.0
                parts.append([timed(arms.runs, batch, limits, seconds, rng, rest) for batch in options.batches])
                plans |= {name: run.plan for name, run in arms.runs.items() if run.plan and name not in plans}
                left_out |= arms.left_out
    rows = [row_of(same) for same in zip(*parts, strict=True)]
    return {"rows": rows, "left_out": left_out, "plans": plans, "clock": options.clock, "starts": options.starts}


class Arms:
    """The processes of a cell, which end with it.

    Args:
        options: what the cell measures.

    Attributes:
        runs: by name, the arms that answer.
        left_out: why others do not.
    """

    def __init__(self, options: CellOptions) -> None:
        self.runs: dict[str, Run] = {}
        self.left_out: dict[str, str] = {}
        self._options = options

    def start(self, name: str, data: Path | None) -> None:
        """Start an arm, alone, so that nothing disturbs its choices."""
        try:
            self.runs[name] = RemoteRun(name, self._options, data)
        except (UnavailableError, RuntimeError) as error:
            self.left_out[name] = str(error)

    def __enter__(self) -> Arms:
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.runs.values():
            run.close()


def write_data(file: Path, x: Tensor, expected: Tensor) -> Path:
    """Write the inputs and the outputs that arms are held against."""
    np.savez(file, x=x.numpy(), expected=expected.numpy())
    return file


def reference(network: Network, x: Tensor) -> Tensor:
    """Return the stock module's outputs in float64.

    Raises:
        RedppError: they hardly depend on the inputs, so that nothing could be told from them.
    """
    module = network.build().double().eval()
    with torch.inference_mode():
        expected: Tensor = torch.cat([module(chunk.double()) for chunk in x.split(CHECKED)])
    spread = float((expected - expected.mean(0)).norm() / expected.norm())
    if spread < _LEAST_SPREAD:
        raise RedppError(
            f"the outputs of {network.name} vary by {spread:.1g} of their size", "outputs that depend on the inputs",
            "settle its batch norms",
        )  # fmt: skip
    return expected


def limit_of(recorded: Mapping[str, float], precision: str) -> float:
    """Return the error that an arm may have; ``auto`` may have the largest one."""
    if precision == "fp32":
        return EXACT
    errors = recorded.values() if precision == "auto" else [recorded.get(precision, 0.0)]
    return max(LOWER[0], LOWER[1] * max(errors, default=0.0))


@dataclass(frozen=True)
class Timed:
    """What the processes of one start gave at a batch size.

    Attributes:
        batch: its size.
        errors: of each arm that answered, relative to the spread of the outputs.
        reasons: why arms are not timed.
        seconds: of each arm that is right, (rounds,).
    """

    batch: int
    errors: dict[str, float]
    reasons: dict[str, str]
    seconds: dict[str, np.ndarray[Any, Any]]


def timed(
    runs: Mapping[str, Run],
    batch: int,
    limits: Mapping[str, float],
    seconds: float,
    rng: np.random.Generator,
    rest: float = 0.0,
) -> Timed:
    """Check the arms at a batch size, then time those that are right, as `in_turns` does."""
    errors, reasons, right = dict[str, float](), dict[str, str](), dict[str, Callable[[], float]]()
    for name, run in runs.items():
        try:
            error = run.check(batch)
        except RuntimeError as failure:
            reasons[name] = str(failure)
            continue
        errors[name] = float(f"{error:.2g}")
        if error <= limits[name]:
            right[name] = partial(run.time, batch)
        else:
            reasons[name] = f"wrong by {error:.2g} of the spread, more than {limits[name]:.2g}"
    return Timed(batch, errors, reasons, in_turns(right, seconds, rng, rest))


def row_of(parts: Sequence[Timed]) -> dict[str, Any]:
    """Return the cells of a batch size; only arms that were right at every start have times."""
    names = [name for name in parts[0].seconds if all(name in part.seconds for part in parts)]
    found = {name: np.concatenate([part.seconds[name] for part in parts]) for name in names}
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for part in parts:
        errors |= {name: max(error, errors.get(name, error)) for name, error in part.errors.items()}
        reasons |= part.reasons
    row: dict[str, Any] = {"batch": parts[0].batch, "rounds": len(next(iter(found.values()), ())), "errors": errors}
    medians = {name: [round(1e3 * float(np.median(part.seconds[name])), 4) for part in parts] for name in names}
    row |= {"ms": _percentiles(found), "ms of each start": medians} if len(parts) > 1 else {"ms": _percentiles(found)}
    return row | {"ratios": _ratios(found), "not timed": reasons}


def in_turns(
    readings: Mapping[str, Callable[[], float]], seconds: float, rng: np.random.Generator, rest: float = 0.0
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the reading of each arm in each round, (rounds,): the mean of two, there and back in a random order.

    Behind each reading is a rest of so many seconds.
    """
    names, rounds = list(readings), []
    for reading in readings.values():
        reading()
    end = time.perf_counter() + seconds
    while names and (len(rounds) < FEWEST_ROUNDS or time.perf_counter() < end):
        order, spent = rng.permutation(len(names)), np.zeros(len(names))
        for index in (*order, *order[::-1]):
            spent[index] += readings[names[index]]() / 2
            time.sleep(rest)
        rounds.append(spent)
    return dict(zip(names, np.array(rounds).T, strict=True)) if names else {}


def _percentiles(found: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, list[float]]:
    """Return milliseconds at the 50th, 20th and 80th percentile."""
    return {n: [round(1e3 * float(q), 4) for q in np.quantile(v, (0.5, 0.2, 0.8))] for n, v in found.items()}


def _ratios(found: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
    """Return how many times as fast an arm is as another: name of the other, median of rounds, 95 % interval."""
    rng = np.random.default_rng(1)
    hand = [name for name in BY_HAND if name in found]
    best = min(hand, key=lambda name: float(np.median(found[name])), default="")
    pairs = [(f"{name} over best by hand", best, name) for name in (OURS, ours(OWN, "fp32"))]
    pairs += [(f"{name} over stock", STOCK, name) for name in (OURS, OURS_AUTO)]
    pairs += [(f"{engine} over by hand", engine, ours(engine, "fp32")) for engine in ON_CPU]
    pairs += [("openvino bf16 over by hand", "openvino bf16", ours("openvino", "bf16"))]
    pairs += [(f"pruned over original, {name}", name, PRUNED + name) for name in found]
    ratios = {}
    for title, over, under in pairs:
        if over in found and under in found:
            ratio = percentile_interval(found[over] / found[under], 0.5, rng)
            ratios[title] = [over, *(round(v, 3) for v in ratio)]
    return ratios


# Ready: what it takes until the first answer.


def ready(network: Network, kept: Kept, options: CellOptions) -> dict[str, Any]:
    """Measure seconds and memory until an arm has answered once, at batch 1."""
    x, arm = network.inputs(1), ARMS[options.arm]
    check_here(arm)
    memory = Memory()
    start = time.perf_counter()
    found = {}
    if arm.engine in ENGINES:
        call, parts = _built(kept, arm.engine, arm.precision, options.threads)
    else:
        call, parts = arm.build(network, kept, options.setting()), {}
        if isinstance(call, Served):
            found["trying"] = round(call.model.plan.seconds, 3)
    begun = time.perf_counter()
    with torch.inference_mode():
        call(x)
    end = time.perf_counter()
    found |= {"seconds": round(end - start, 3), "first_call": round(end - begun, 4), "parts": parts}
    found |= memory.since(kept.facts["weights_mib"])
    if isinstance(call, Served):
        found["seconds_again"] = round(_again(kept, arm.engine, arm.precision, options, x), 3)
    return found


def _built(kept: Kept, engine: str, precision: str, threads: int) -> tuple[Call, dict[str, float]]:
    """Build the network in an engine as a worker does once it has chosen."""
    seconds, clock = {}, time.perf_counter
    start = clock()
    stored = load(kept.artifact)
    seconds["read"], start = clock() - start, clock()
    cpu = torch.device("cpu")
    stored = replace(stored, graph=serving_graph(stored.graph, cpu))
    network = ServedNetwork(stored, stored.graph, (precision,), cpu)
    seconds["fold"], start = clock() - start, clock()
    model = network.model(Candidate(engine, precision))
    seconds["write"], start = clock() - start, clock()
    run = EngineRun(ENGINES[engine], precision, model, threads)
    seconds["compile"] = clock() - start
    network.forget_models()
    return lambda x: run((x,))[0], {name: round(value, 3) for name, value in seconds.items()}


def _again(kept: Kept, engine: str, precision: str, options: CellOptions, x: Tensor) -> float:
    """Return the seconds until the first answer of a worker that finds the times of an earlier one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plans.json"
        served(kept.artifact, engine, precision, options.setting(cache=PlanCache(path)))
        start = time.perf_counter()
        Served(served(kept.artifact, engine, precision, options.setting(cache=PlanCache(path))))(x)
        return time.perf_counter() - start


class Memory:
    """The memory of this process beyond what it has now."""

    def __init__(self) -> None:
        free_memory()
        self._reset = True
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts afresh
        except OSError:
            self._reset = False
        self._before = psutil.Process().memory_info().rss / 2**20

    def since(self, weights: float) -> dict[str, float]:
        """Return MiB beyond the weights, kept and at the peak; no peak where the system does not tell it."""
        peak = _status("VmHWM") if self._reset else math.nan
        free_memory()
        kept = psutil.Process().memory_info().rss / 2**20
        found = {"kept_mib": kept - self._before - weights, "peak_mib": peak - self._before - weights}
        return {name: round(value, 1) for name, value in found.items() if math.isfinite(value)}


def _status(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.nan
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), math.nan)


# Overhead: a call of this project beside the engine's own.


def overhead(network: Network, kept: Kept, options: CellOptions) -> dict[str, Any]:
    """Measure microseconds of a call beyond those of the engine's own call on the same model."""
    engine = options.arm
    stored = load(kept.artifact)
    model = to_onnx(serving_graph(stored.graph, torch.device("cpu"))).SerializeToString()
    x = network.inputs(1)
    array = x.numpy()
    call = served(kept.artifact, engine, "fp32", options.setting())
    own = _own_call(engine, model, options.threads)
    both: dict[str, Callable[[], object]] = {"ours": lambda: call(x), "engine": lambda: own(array)}
    for one in both.values():
        one()
    found = {name: np.empty(_CALLS_OF_OVERHEAD) for name in both}
    for k in range(_CALLS_OF_OVERHEAD):
        for name in both if k % 2 else reversed(both):
            start = time.perf_counter()
            both[name]()
            found[name][k] = time.perf_counter() - start
    more = percentile_interval(1e6 * (found["ours"] - found["engine"]), 0.5, np.random.default_rng(2))
    return {"microseconds": [round(v, 1) for v in more], "ms": _percentiles(found)}


def _own_call(engine: str, model: bytes, threads: int) -> Callable[[Any], object]:
    if engine == "openvino":
        compiled = compile_openvino(model, "f32", threads)
        return lambda x: compiled([x])[0]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


# Workers: two processes on two cores.


def workers(network: Network, kept: Kept, options: CellOptions) -> dict[str, Any]:
    """Measure how many calls two processes of one thread make together, against one alone.

    The arm ``control`` counts in Python instead of running the network: it tells what the machine gives to two.
    """
    ratios, rates = [], []
    both: list[Run] = []
    try:
        for _ in range(2):
            both.append(RemoteRun(options.arm, options, None))
        for _ in range(_WORKER_ROUNDS):
            alone = [_calls([run], options.seconds)[0] for run in both]
            together = _calls(both, options.seconds)
            ratios.append(sum(together) / (sum(alone) / 2))
            rates.append([count / options.seconds for count in (*alone, *together)])
    finally:
        for run in both:
            run.close()
    ratio = mean_interval(ratios, np.random.default_rng(3))
    return {"ratio": [round(v, 3) for v in ratio], "calls_per_second": [round(float(v), 1) for v in np.mean(rates, 0)]}


def _calls(runs: Sequence[Run], seconds: float) -> list[int]:
    for run in runs:
        run.begin(seconds)
    return [run.end() for run in runs]


# Scores: photographs.


def scores(network: Network, kept: Kept, options: CellOptions) -> dict[str, Any]:
    """Hold an arm's outputs on photographs against the original's in fp32."""
    arm = ARMS[options.arm]
    check_here(arm)
    call = arm.build(network, kept, options.setting(CHECKED))
    module = call if isinstance(call, torch.nn.Module) else _Called(call)
    found = evaluate(module.eval(), network.name)
    recorded = kept.facts["precisions"].get(arm.precision, {}).get("error")
    return {"scores": found, "recorded": recorded}


class _Called(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)


# Pruned: the original against a pruned network, at equal engine and precision.


def pruned(network: Network, kept: Kept, options: CellOptions) -> dict[str, Any]:
    """Time an original and its pruned network in turns, in each engine and precision that serves both.

    What a pruned network loses in few bits is its own affair: only fp32 is held to `EXACT`.
    """
    file = Path(options.arm)
    graph, original = artifact_of(file).graph, load(kept.artifact).graph
    x = network.inputs(max(CHECKED, *options.batches))
    names = [name for name in (ours(*pair) for pair in FORCED) if not options.arms or name in options.arms]
    with tempfile.TemporaryDirectory() as folder, Arms(options) as arms:
        data = {
            "": write_data(Path(folder) / "original.npz", x, reference(network, x)),
            PRUNED: write_data(Path(folder) / "pruned.npz", x, _in_double(graph, x)),
        }
        for which in data:
            for name in names:
                arms.start(which + name, data[which])
        limits = {n: EXACT if ARMS[n.removeprefix(PRUNED)].precision == "fp32" else 1.0 for n in arms.runs}
        rng = np.random.default_rng(0)
        parts = [timed(arms.runs, batch, limits, options.seconds, rng) for batch in options.batches]
    return {
        "share": mac_count(graph) / mac_count(original),
        "rows": [row_of([part]) for part in parts],
        "left_out": arms.left_out,
        "clock": options.clock,
    }


def _in_double(graph: Graph, x: Tensor) -> Tensor:
    program = Program(graph.to(torch.float64))
    with torch.inference_mode():
        return torch.cat([program(part.double())[0] for part in x.split(CHECKED)])


KINDS: dict[str, Callable[[Network, Kept, CellOptions], dict[str, Any]]] = {
    "times": times, "ready": ready, "overhead": overhead, "workers": workers, "scores": scores, "pruned": pruned,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    cell = measure(CellOptions.read(arguments[0]))
    write_atomically(Path(arguments[1]), json.dumps(cell, default=str))


if __name__ == "__main__":
    main(sys.argv[1:])
