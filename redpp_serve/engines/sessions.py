"""A network in each engine: ONNX model in, numpy arrays in and out. Needs numpy and the engine alone, not torch.

The settings keep to what users of these engines report: threads as told and none pinned (pinned workers share a core),
the precision always named (the default is the processor's, not the model's), no threads that spin between calls,
outputs that the caller owns, no telemetry. ONNX Runtime keeps its arena, and with it the memory of the largest batch:
without one, each call has the system map its large values afresh (EfficientNet-Lite0 at batch 32: 345 ms, with the
arena 210). It keeps no patterns of memory, which grow with each batch size and gain nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_FEWEST_RUNS, _MOST_RUNS = 5, 100  # of a profile
_KERNEL = "_kernel_time"  # how ONNX Runtime's profile calls a node's own time
TENSORRT, _CUDA = "TensorrtExecutionProvider", "CUDAExecutionProvider"
Model = bytes | Path  # an ONNX model, or the file of one
# Threads wait busily for each other within a call, for 20 us at most: with two threads, small networks take 5 to 10 %
# longer where they sleep. Between calls, where ONNX Runtime's own spin for 60 ms, they leave the cores to others.
_SPINNING = {
    "session.intra_op.spin_duration_us": "20",
    "session.force_spinning_stop": "1",
    "session.inter_op.allow_spinning": "0",
}
_HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}


def import_openvino() -> Any:
    """Import OpenVINO, which is optional, without its telemetry: the import alone would start a process for it."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, which is optional, without its telemetry, which the import alone would begin to store."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return importlib.import_module("onnxruntime")


class _Stack(ctypes.Structure):
    """The C library's ``stack_t``."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Leave this thread's alternate signal stack as it is.

    Each network that OpenVINO compiles puts a stack of its own there, and puts back the one before when it is freed: if
    that one's network was freed earlier, the next signal that Python handles ends the process.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


class OpenVinoSession:
    """Runs a network in OpenVINO on the CPU.

    Args:
        model: an ONNX model, or its file, whose weights are mapped.
        precision: ``fp32``, ``bf16``, or ``int8`` for a model that holds quantized layers.
        threads: number of threads; with one, the caller's own.
        device: the processor is 0.
        profiled: time every node, for `node_seconds`, which slows the network a little.

    Raises:
        RuntimeError: OpenVINO does not take the model, or not in this precision on this processor.
    """

    def __init__(self, model: Model, precision: str, threads: int, device: int = 0, profiled: bool = False) -> None:
        openvino = import_openvino()
        hint = _HINTS[precision]
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": hint,
            "PERF_COUNT": profiled,
        }
        core = openvino.Core()
        read = core.read_model(model) if isinstance(model, Path) else core.read_model(model, b"")
        with _own_signal_stack():
            self._compiled: Any = core.compile_model(read, "CPU", settings)
        used = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if used not in (hint, {"f32": "float32", "bf16": "bfloat16"}[hint]):
            raise RuntimeError(f"this processor runs {used} where {precision} was asked for")
        with _own_signal_stack():
            self._request: Any = self._compiled.create_infer_request()
        self._tensor = openvino.Tensor

    def __call__(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Map contiguous inputs (N, ...) to outputs that the caller owns."""
        owned = (x if x.flags.writeable else x.copy() for x in inputs)
        tensors = {k: self._tensor(x, shared_memory=True) for k, x in enumerate(owned)}  # arrays take 50 us more
        return list(self._request.infer(tensors, share_outputs=False).values())

    def node_seconds(self, inputs: Sequence[np.ndarray[Any, Any]], seconds: float) -> dict[str, float]:
        """Return the median seconds of each node that OpenVINO runs, by name; for a session that is ``profiled``.

        Args:
            inputs: the inputs of a call.
            seconds: about how long to run.
        """
        found: dict[str, list[float]] = {}
        for _ in _repeated(lambda: self(inputs), seconds):
            for node in self._request.profiling_info:
                found.setdefault(node.node_name, []).append(node.real_time.total_seconds())
        return {name: statistics.median(times) for name, times in found.items()}

    def close(self) -> None:
        """Free the network."""
        with _own_signal_stack():
            self._request = self._compiled = None


def execution_providers() -> list[str]:
    """Return the names of the execution providers that the installed ONNX Runtime offers."""
    return list(import_onnxruntime().get_available_providers())


class OnnxRuntimeSession:
    """Runs a network in ONNX Runtime.

    Args:
        model: an ONNX model, or its file, whose weights are mapped.
        precision: ``fp32``, or ``int8`` for a model that holds quantized layers.
        threads: number of threads.
        device: the device's number, where there are several.
        profiled: time every node, for `node_seconds`, which slows the network a little.
        providers: ONNX Runtime's execution providers, the preferred one first, with their options.

    Raises:
        RuntimeError: ONNX Runtime does not take the model.
    """

    def __init__(
        self,
        model: Model,
        precision: str,
        threads: int,
        device: int = 0,
        profiled: bool = False,
        providers: Sequence[str | tuple[str, dict[str, str]]] = ("CPUExecutionProvider",),
    ) -> None:
        onnxruntime = import_onnxruntime()

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        for name, value in _SPINNING.items():
            options.add_session_config_entry(name, value)
        self._folder = tempfile.TemporaryDirectory(prefix="redpp-profile-") if profiled else None
        if self._folder:
            options.enable_profiling, options.profile_file_prefix = True, str(Path(self._folder.name) / "profile")
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=list(providers))
        self._names = [i.name for i in self._session.get_inputs()]

    def __call__(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Map contiguous inputs (N, ...) to outputs that the caller owns."""
        return list(self._session.run(None, dict(zip(self._names, inputs, strict=True))))

    def node_seconds(self, inputs: Sequence[np.ndarray[Any, Any]], seconds: float) -> dict[str, float]:
        """Return the median seconds of each node that ONNX Runtime runs, by name; once, for a ``profiled`` session.

        Args:
            inputs: the inputs of a call.
            seconds: about how long to run.
        """
        runs = len([*_repeated(lambda: self(inputs), seconds)])
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        found: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                found.setdefault(event["name"].removesuffix(_KERNEL), []).append(event["dur"] / 1e6)
        return {name: statistics.median(times[-runs:]) for name, times in found.items()}

    def close(self) -> None:
        """Free the network."""
        self._session = None
        if self._folder:
            self._folder.cleanup()


class TensorRtSession(OnnxRuntimeSession):
    """Runs a network in TensorRT, through ONNX Runtime's execution provider; arrays are on the host.

    What TensorRT does not take of a network runs in CUDA. It builds its plan when a shape first comes, which takes
    minutes, and keeps it in the user's cache for the next process. It has not been run on a GPU by this project.

    Args:
        model: an ONNX model, or its file.
        precision: ``fp32``, ``fp16``, or ``int8`` for a model whose levels are signed and lie about zero.
        threads: number of threads of what is left on the host.
        device: the GPU's number.
        profiled: time every node.

    Raises:
        RuntimeError: ONNX Runtime does not take the model, or runs it without TensorRT.
    """

    def __init__(self, model: Model, precision: str, threads: int, device: int = 0, profiled: bool = False) -> None:
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TensorRT rounds fp32 to 19 bits otherwise
        given = (TENSORRT, tensorrt_options(precision, device)), (_CUDA, {"device_id": str(device)})
        super().__init__(model, precision, threads, device, profiled, (*given, "CPUExecutionProvider"))
        used = self._session.get_providers()
        if TENSORRT not in used:  # it falls back without an error
            raise RuntimeError(f"ONNX Runtime runs it with {', '.join(used)}, not with {TENSORRT}: its log says why")


def tensorrt_options(precision: str, device: int) -> dict[str, str]:
    """Return the options of ONNX Runtime's TensorRT provider."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redpp-serve" / "tensorrt"
    return {
        "device_id": str(device),
        "trt_fp16_enable": str(precision in ("fp16", "int8")),
        "trt_int8_enable": str(precision == "int8"),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
    }


def _repeated(call: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call for about that long, and often enough for a median; yield behind each call but the first, which prepares."""
    call()
    end = time.perf_counter() + seconds
    for run in range(_MOST_RUNS):
        if run >= _FEWEST_RUNS and time.perf_counter() > end:
            break
        call()
        yield
