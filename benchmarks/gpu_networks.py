"""Whole networks: the stock eager handler, torch.compile, and both versions in this project's runtime.

Weights are random, with batch-norm statistics of random images. The pruned network keeps half of the channels of every
channel set, and its Linear layers have 16 values each. Each arm is held against its own network in fp32
before it is timed; its error may be twice that of torch's plain run in half precision.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gpu_checkout  # noqa: F401 - before the project
from benchmarks.gpu_cells import Call, error_limit, relative_error, tensors_bytes
from benchmarks.gpu_journal import Journal
from benchmarks.gpu_models import MODELS, SIDE, randomised
from benchmarks.gpu_targets import COMPILED
from benchmarks.gpu_timing import Bench, in_turns, ratio, spread
from redpp_serve.capture.export import capture
from redpp_serve.channels.coupling import couple
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import find_layers
from redpp_serve.options import HashTarget
from redpp_serve.pruning.hashing import hash_weight
from redpp_serve.runtime.cuda_graphs import BucketRunner, CudaRecorder
from redpp_serve.runtime.plan import Plan
from redpp_serve.runtime.plan_cache import PlanCache
from redpp_serve.runtime.planner import make_plan
from redpp_serve.runtime.serving_graph import PlanContext, layer_inputs, planned_programs, serving_graph

BATCHES = (8, 1, 32, 128)  # the most telling first
WIDTH, VALUES = 0.5, 16
CAPTURE_SIDES = {"vgg16": SIDE}  # pixels; a network whose pooling adapts is captured on small images
SMALL_SIDE = 96
PREPARE_S, ARM_S, COMPILE_S = 90.0, 30.0, 150.0
ROUNDS_S = 1.0
LEAST_ERROR = 1e-5  # of sums in another order, where torch's plain run is the fp32 run itself
PASS_CALLS = {1: 8, 8: 4}  # answers between two looks at the clock, by batch; 1 for others


@dataclass
class Network:
    """A network in all its forms. ``plans`` and ``programs`` go by version, original or pruned."""

    name: str
    module: nn.Module
    graphs: dict[str, Graph]
    served: dict[str, Graph] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    programs: dict[str, dict[int, Program]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """A network made ready for one batch: ``host`` takes the images on the host to the answers on the host, ``device``
    has its images on the GPU already and leaves its answers there."""

    host: Call
    device: Call
    weights: int


def prepare(name: str, bench: Bench, side: int = SIDE) -> Network:
    """Build, capture and prune one network, on the CPU."""
    torch.manual_seed(0)
    small = min(side, CAPTURE_SIDES.get(name, SMALL_SIDE))
    module = randomised(MODELS[name](), torch.randn(8, 3, small, small))
    graph = capture(module, (InputSpec("x", (3, small, small)),), [])
    pruned = with_codebooks(narrowed(graph, WIDTH))
    spec = replace(graph.inputs[0], shape=(3, side, side))
    return Network(
        name, module, {"original": replace(graph, inputs=(spec,)), "pruned": replace(pruned, inputs=(spec,))}
    )


def narrowed(graph: Graph, width: float) -> Graph:
    """That part of the channels of each channel set, drawn at random, in multiples of 8."""
    coupling, generator = couple(graph), torch.Generator().manual_seed(0)
    kept = {}
    for channel_set in coupling.open:
        count = max(8, int(channel_set.channels * width) // 8 * 8) if channel_set.channels > 8 else channel_set.channels
        kept[channel_set.name] = torch.randperm(channel_set.channels, generator=generator)[:count].sort().values
    return coupling.narrow(kept)


def with_codebooks(graph: Graph) -> Graph:
    """Each Linear layer's weights at the nearest of 16 values (k-means over a part of them)."""
    changed = {}
    for layer in find_layers(graph):
        if layer.axis == -1:
            weight = graph.tensors[layer.weight]
            sample = weight.flatten()[:: max(1, weight.numel() >> 16)]
            values = torch.from_numpy(
                hash_weight(sample, "kmeans", HashTarget(values=VALUES)).codebook.values
            ).unique()[:VALUES]
            values = values.to(weight.dtype)
            changed[layer.weight] = values[torch.bucketize(weight, (values[1:] + values[:-1]) / 2)]
    return graph.with_tensors(changed)


def plan(
    network: Network, version: str, bench: Bench, batches: Sequence[int], cache: PlanCache, seconds: float
) -> None:
    """Choose the kernels of a version, as a worker does at its start."""
    context = _context(network, version, bench)
    network.plans[version] = make_plan(context, tuple(sorted(batches)), seconds=seconds, cache=cache)


def place(network: Network, version: str, bench: Bench, batches: Sequence[int]) -> None:
    """Make the programs of a version with the kernels of its plan; with dense ones where planning failed."""
    chosen = network.plans.get(version)
    kernel = chosen.kernel if chosen else lambda layer, batch: "dense"
    network.programs[version] = planned_programs(_context(network, version, bench), sorted(batches), kernel)


def _context(network: Network, version: str, bench: Bench) -> PlanContext:
    graph, precision = _served(network, version, bench), _precision(bench)
    return PlanContext(graph, bench.device, precision, layer_inputs(graph, bench.device, precision))


def _served(network: Network, version: str, bench: Bench) -> Graph:
    if version not in network.served:
        network.served[version] = serving_graph(network.graphs[version], bench.device, _precision(bench))
    return network.served[version]


def _precision(bench: Bench) -> str:
    return "fp32" if bench.rehearse else "fp16"


def stock_arm(network: Network, images: Tensor, bench: Bench, dtype: torch.dtype) -> Arm:
    """What TorchServe's own handler does: the module as it is, called eagerly on NCHW."""
    module = _copied(network.module, dtype).to(bench.device)
    placed = images.to(bench.device, dtype)
    return Arm(
        lambda: module(images.to(bench.device).to(dtype)).float().cpu(), lambda: module(placed), _module_bytes(module)
    )


def served_arm(network: Network, images: Tensor, bench: Bench, version: str) -> Arm:
    """This project's runtime: one recorded graph for the batch, static buffers."""
    batch, program = len(images), network.programs[version][len(images)]
    placed = images.to(bench.device, bench.dtype).contiguous(memory_format=torch.channels_last)
    weights = tensors_bytes(*program.buffers())
    if bench.rehearse:
        return Arm(lambda: program(images)[0], lambda: program(placed)[0], weights)
    runner = BucketRunner({batch: program}, network.served[version].inputs, bench.device, CudaRecorder(bench.device))
    replayed = bench.make_pass([lambda: program(placed)[0]])

    def device() -> Tensor:
        replayed.graph.replay()
        return replayed.result

    return Arm(lambda: runner(images)[0], device, weights)


def compiled_arm(network: Network, images: Tensor, bench: Bench, mode: str) -> Arm:
    """torch.compile of the original: half precision, channels_last, frozen weights, its own CUDA graphs."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    inductor.freezing = True
    module = _copied(network.module, bench.dtype).to(bench.device).to(memory_format=torch.channels_last)
    call = torch.compile(module, dynamic=False, **({"backend": "eager"} if bench.rehearse else {"mode": mode}))
    placed = images.to(bench.device, bench.dtype).contiguous(memory_format=torch.channels_last)

    def host() -> Tensor:
        moved = images.to(bench.device, bench.dtype).contiguous(memory_format=torch.channels_last)
        return call(moved).float().cpu()

    for _ in range(3):  # compile, record, replay
        call(placed)
    return Arm(host, lambda: call(placed), _module_bytes(module))


ArmMaker = Callable[[Network, Tensor, Bench], Arm]
ARMS: dict[str, tuple[str, ArmMaker]] = {  # by name: the version that says what is right
    "stock fp32": ("original", lambda n, x, b: stock_arm(n, x, b, torch.float32)),
    "stock fp16": ("original", lambda n, x, b: stock_arm(n, x, b, b.dtype)),
    "original": ("original", lambda n, x, b: served_arm(n, x, b, "original")),
    "pruned": ("pruned", lambda n, x, b: served_arm(n, x, b, "pruned")),
}
COMPILED_ARMS = {
    COMPILED: ("original", lambda n, x, b: compiled_arm(n, x, b, "max-autotune")),
    **{name: ARMS[name] for name in ("original", "pruned")},
}


def measure_network(
    network: Network, batch: int, arms: dict[str, tuple[str, ArmMaker]], bench: Bench, journal: Journal, seconds: float
) -> dict[str, Any]:
    """One row: times with the images on the GPU and on the host, images per second, memory."""
    side = network.graphs["original"].inputs[0].shape[-1]
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))
    key, found, ready = f"network {network.name} batch={batch}", {}, {}
    for name, (version, make) in arms.items():
        limit = min(seconds, COMPILE_S if name == COMPILED else ARM_S)
        arm, reason = journal.attempt(
            f"{key} {name}", limit, functools.partial(_checked, network, version, make, images, bench)
        )
        found[name] = {"failed": reason} if arm is None else arm[1]
        if arm is not None:
            ready[name] = arm[0]
    times, reason = (
        journal.attempt(f"{key} timing", 60.0, lambda: _network_times(ready, batch, bench)) if ready else ({}, "")
    )
    for name in ready:
        found[name].update(times[name] if times else {"failed": reason})
    row = {
        "section": "network",
        "network": network.name,
        "batch": batch,
        "reference": next(iter(arms)),
        "contenders": found,
    }
    return {**row, **({"peer": "torch.compile"} if COMPILED in arms else {})}


def _checked(
    network: Network, version: str, make: ArmMaker, images: Tensor, bench: Bench
) -> tuple[Arm, dict[str, Any]]:
    """Raises ArithmeticError for wrong answers, from the host or on the device."""
    right, plain = answers(network.graphs[version], images, bench)
    before = _held(bench)
    arm = make(network, images, bench)
    if not bench.rehearse:
        torch.cuda.reset_peak_memory_stats()
    error = 0.0
    limit = max(error_limit(relative_error(plain, right), bench.dtype), LEAST_ERROR)
    for name, call in (("host", arm.host), ("device", arm.device)):
        got = call().float().to(right.device)
        error = max(error, relative_error(got, right))
        if error > limit:
            raise ArithmeticError(f"wrong on the {name}: relative error {error:.2g}, at most {limit:.2g}")
    highest = 0 if bench.rehearse else torch.cuda.max_memory_allocated()
    peak = max(0, highest - before, _held(bench) - before)
    return arm, {"error": error, "peak_mb": round(peak / 1e6, 1), "weight_mb": round(arm.weights / 1e6, 3)}


_answers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def answers(graph: Graph, images: Tensor, bench: Bench) -> tuple[Tensor, Tensor]:
    """The network's outputs in fp32 without TF32, and in torch's plain run in the bench's precision; on the CPU."""
    key = (id(graph), len(images))
    if key not in _answers:
        found = []
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):  # once is not worth a choice
            for dtype in (torch.float32, bench.dtype):
                program = Program(graph.to(dtype)).to(bench.device)
                found.append(
                    torch.cat([program(part.to(bench.device, dtype))[0].float().cpu() for part in images.split(32)])
                )
        _answers[key] = (found[0], found[1])
    return _answers[key]


def _network_times(ready: dict[str, Arm], batch: int, bench: Bench) -> dict[str, dict[str, Any]]:
    calls = PASS_CALLS.get(batch, 1)
    states = {
        state: in_turns(
            {name: _waited(getattr(arm, state), calls, bench) for name, arm in ready.items()},
            0.0 if bench.rehearse else ROUNDS_S,
        )
        for state in ("device", "host")
    }
    first, rows = next(iter(ready)), {}
    for name in ready:
        row = rows[name] = {}
        for state, times in states.items():
            row[f"{state}_us"] = spread(times[name]).micro()
            against = ratio(times[first], times[name])
            row[f"{state}_ratio"] = [round(v, 3) for v in (against.median, against.p10, against.p90)]
        row["ratios_over"] = first
        row["images_per_s"] = round(batch / (row["device_us"][0] * 1e-6), 1)
    return rows


def _waited(call: Call, count: int, bench: Bench) -> Callable[[], float]:
    """Seconds until the answer is there, by the host's clock; each call waits for its own."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
            bench.works()
        return (time.perf_counter() - start) / count

    return run


def _copied(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(module).to(dtype).eval()


def _module_bytes(module: nn.Module) -> int:
    return tensors_bytes(*module.parameters(), *module.buffers())


def _held(bench: Bench) -> int:
    """Return the bytes of GPU memory that this process cannot give back: its tensors, and what recorded graphs keep."""
    if bench.rehearse:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
