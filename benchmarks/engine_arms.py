"""The arms of `benchmarks.engines`: a network as its users would run it by hand, and as this project serves it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.engine_networks import Kept, Network
from benchmarks.real_data import fitting_images
from redpp_serve.engines import ENGINES, ON_CPU, OWN
from redpp_serve.engines.onnx_builder import to_onnx
from redpp_serve.engines.sessions import import_openvino
from redpp_serve.graph.artifact import load
from redpp_serve.graph.quantization import find_ranges, in_int8
from redpp_serve.runtime.engine_network import AUTO, ranges
from redpp_serve.runtime.memory import keep_blocks
from redpp_serve.runtime.model import ServingModel
from redpp_serve.runtime.plan_cache import PlanCache
from redpp_serve.runtime.serving_graph import serving_graph

Call = Callable[[Tensor], Tensor]
PLAN_SECONDS = 20.0  # as a worker has by default
_PHOTOGRAPHS = 64  # as many as packaging makes synthetic inputs for ranges


class UnavailableError(Exception):
    """An arm does not exist for this network on this processor; the text says why."""


@dataclass(frozen=True)
class Setting:
    """How an arm runs.

    Attributes:
        threads: number of threads.
        batch: the largest batch.
        plan_seconds: time that this project may spend on its choices.
        cache: where it keeps times; None for nowhere.
    """

    threads: int
    batch: int
    plan_seconds: float = PLAN_SECONDS
    cache: PlanCache | None = None


@dataclass(frozen=True)
class CellOptions:
    """What a cell measures, and how.

    Attributes:
        kind: one of `engine_cell.KINDS`.
        network: its name.
        arm: the arm's name; ``all`` for kinds that compare arms; the file of a pruned network.
        threads: number of threads.
        scratch: the folder of `engine_networks.keep`.
        batches: batch sizes of times.
        seconds: of timing all arms at one batch size.
        plan_seconds: time that this project may spend on its choices.
        compiled: whether ``torch.compile`` takes part.
        arms: names of the arms to time; none for all.
        clock: what times are of, one of `engine_worker.CLOCKS`.
        starts: how often the processes of the arms are started anew, with a share of the time each.
    """

    kind: str
    network: str
    arm: str
    threads: int
    scratch: str
    batches: tuple[int, ...] = (1, 8, 32)
    seconds: float = 20.0
    plan_seconds: float = PLAN_SECONDS
    compiled: bool = False
    arms: tuple[str, ...] = ()
    clock: str = "wall"
    starts: int = 1

    def setting(self, batch: int = 1, cache: PlanCache | None = None) -> Setting:
        """Return how an arm runs."""
        return Setting(self.threads, batch, self.plan_seconds, cache)

    @classmethod
    def read(cls, text: str) -> CellOptions:
        """Read a specification."""
        found = json.loads(text)
        return cls(**found | {name: tuple(found[name]) for name in ("batches", "arms")})

    def write(self) -> str:
        """Return the specification that `read` takes."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Arm:
    """One way to run a network.

    Attributes:
        name: its name in results.
        precision: what it computes in; ``auto`` where it chooses.
        build: makes the call (N, ...) -> (N, classes).
        engine: the engine that this project is told to use; empty for arms by hand.
    """

    name: str
    precision: str
    build: Callable[[Network, Kept, Setting], Call]
    engine: str = ""


def _stock(network: Network, kept: Kept, setting: Setting) -> Call:
    module: nn.Module = network.build().eval()
    return module


def _compiled(network: Network, kept: Kept, setting: Setting) -> Call:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    inductor.freezing = True
    call: Call = torch.compile(network.build().eval(), dynamic=False)
    return call


def _onnxruntime(network: Network, kept: Kept, setting: Setting) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(kept.onnx, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(hint: str) -> Callable[[Network, Kept, Setting], Call]:
    def build(network: Network, kept: Kept, setting: Setting) -> Call:
        compiled = compile_openvino(kept.openvino, hint, setting.threads)
        return lambda x: torch.from_numpy(compiled([x.numpy()])[0])

    return build


def _nncf(network: Network, kept: Kept, setting: Setting) -> Call:
    """Let NNCF quantize what OpenVINO converted, with its defaults, after inputs that it is shown."""
    openvino = import_openvino()
    try:
        import nncf
    except ImportError as error:
        raise UnavailableError(f"nncf is not installed: {error}") from error
    shown = [x.numpy() for x in _shown(network).split(1)]
    found = nncf.quantize(openvino.Core().read_model(kept.openvino), nncf.Dataset(shown), subset_size=len(shown))
    compiled = _compiled_model(openvino.Core(), found, "f32", setting.threads)
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0])


def _own_ranges(network: Network, kept: Kept, setting: Setting) -> Call:
    """Find the ranges of this project's eight bits on photographs, not on synthetic inputs; the layers are the same."""
    stored = load(kept.artifact)
    served = serving_graph(stored.graph, torch.device("cpu"))
    found = find_ranges(served, [_shown(network)])
    chosen = {name: pair for name, pair in found.items() if name in ranges(stored.description)}
    compiled = compile_openvino(to_onnx(in_int8(served, chosen)).SerializeToString(), "f32", setting.threads)
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0])


def _shown(network: Network) -> Tensor:
    """Return the photographs (n, ...) that ranges are found on; none of them is scored.

    Raises:
        UnavailableError: there are none for this network.
    """
    if network.name != "lite0":
        raise UnavailableError("there are photographs for lite0 alone")
    return fitting_images(network.name, _PHOTOGRAPHS)


def compile_openvino(model: Path | bytes, hint: str, threads: int) -> Any:
    """Compile a model with OpenVINO's defaults but for threads, precision, and pinning.

    Pinned to the first core, it would meet whatever else runs there; the arms beside it would not.
    """
    core = import_openvino().Core()
    return _compiled_model(core, core.read_model(model, *([] if isinstance(model, Path) else [b""])), hint, threads)


def _compiled_model(core: Any, model: Any, hint: str, threads: int) -> Any:
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint, "ENABLE_CPU_PINNING": False}
    return core.compile_model(model, "CPU", settings)


def _served(engine: str, precision: str) -> Callable[[Network, Kept, Setting], Call]:
    def build(network: Network, kept: Kept, setting: Setting) -> Call:
        return Served(served(kept.artifact, engine, precision, setting))

    return build


class Served:
    """A served network as a call of one input and one output."""

    def __init__(self, model: ServingModel) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        """Map inputs (N, ...) to outputs (N, classes)."""
        return self.model(x)[0]


def served(source: Path | bytes, engine: str, precision: str, setting: Setting) -> ServingModel:
    """Load an artifact, or the file of one, as a worker does.

    Raises:
        UnavailableError: the engine or the precision that was named does not serve it.
    """
    keep_blocks()
    model = ServingModel(
        source, engine=engine, precision=precision, batch=setting.batch, plan_seconds=setting.plan_seconds,
        cache=setting.cache,
    )  # fmt: skip
    others = {c.engine for c in model.plan.engines} - {engine} if engine != AUTO else set()
    if precision != AUTO:
        others |= {c.precision for c in model.plan.engines} - {precision}
    if others:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in model.plan.left_out.items())
        raise UnavailableError(reasons or f"{', '.join(sorted(others))} serves it instead")
    model.warm_up()
    return model


def ours(engine: str, precision: str) -> str:
    """Return the name of this project's arm for an engine and a precision."""
    return f"ours {precision}" if engine == AUTO else f"ours {engine} {precision}"


FORCED = ((OWN, "fp32"), (OWN, "bf16"), *((name, p) for name in ON_CPU for p in ("fp32", "bf16", "int8")))
FORCED = tuple(pair for pair in FORCED if pair not in (("onnxruntime", "bf16"), ("onnxruntime", "int8")))
NNCF, ON_PHOTOGRAPHS = "openvino int8, NNCF on photographs", "openvino int8, our ranges on photographs"
STOCK, COMPILED, OURS, OURS_AUTO = "stock", "torch.compile", ours(AUTO, "fp32"), ours(AUTO, AUTO)
ARMS = {
    arm.name: arm
    for arm in (
        Arm(STOCK, "fp32", _stock),
        Arm(COMPILED, "fp32", _compiled),
        Arm("onnxruntime", "fp32", _onnxruntime),
        Arm("openvino", "fp32", _openvino("f32")),
        Arm("openvino bf16", "bf16", _openvino("bf16")),
        Arm(NNCF, "int8", _nncf),
        Arm(ON_PHOTOGRAPHS, "int8", _own_ranges),
        Arm(OURS, "fp32", _served(AUTO, "fp32"), AUTO),
        Arm(OURS_AUTO, AUTO, _served(AUTO, AUTO), AUTO),
        *(Arm(ours(engine, p), p, _served(engine, p), engine) for engine, p in FORCED),
    )
}
BY_HAND = (STOCK, "onnxruntime", "openvino")  # in fp32; what the served network must not lose against


def check_here(arm: Arm) -> None:
    """Refuse precisions for which this processor has no instructions: engines would simulate or replace them.

    Raises:
        UnavailableError: it has none.
    """
    served_here = ENGINES["openvino"].precisions()
    if arm.precision not in (*served_here, "fp32", AUTO):
        raise UnavailableError(f"no instructions for {arm.precision} on this {platform.machine()}")
