"""`Engine`: what an engine is called, what it needs, which precisions it serves here, and how it takes a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import numpy as np

from redpp_serve.engines import processor
from redpp_serve.engines.sessions import (
    TENSORRT,
    OnnxRuntimeSession,
    OpenVinoSession,
    TensorRtSession,
    execution_providers,
)

INSTALL = "pip install 'redpp-serve[engines]'"
OWN = "redpp"  # the project's own runtime: torch, with a kernel chosen for each layer


class Session(Protocol):
    """A network in an engine."""

    def __call__(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Map contiguous inputs (N, ...) to outputs that the caller owns."""

    def node_seconds(self, inputs: Sequence[np.ndarray[Any, Any]], seconds: float) -> dict[str, float]:
        """Return the median seconds of each node that the engine runs, by name, in about ``seconds`` of calls."""

    def close(self) -> None:
        """Free the network."""


@dataclass(frozen=True)
class Engine:
    """An engine for whole networks.

    Attributes:
        name: what ``--engine`` and reports call it.
        packages: the packages that it needs, with the least release of each, as numbers.
        precisions: returns the precisions that are worth trying on this processor.
        session: takes an ONNX model, a precision, a number of threads, the device's number, and whether to time nodes
            (``profiled``).
        exact_integers: whether it computes integers and float64 as torch does, and looks up nothing that is not there.
        device: the kind of device that it serves on.
        provider: ONNX Runtime's execution provider that it is; empty for the CPU's.
        symmetric: whether its eight bits are signed and lie about zero.
        patience: seconds that building may take where the engine is named; one that needs any is not tried by itself.
        install: what to do where a package is missing.
    """

    name: str
    packages: dict[str, tuple[int, ...]]
    precisions: Callable[[], tuple[str, ...]]
    session: Callable[..., Session]
    exact_integers: bool = True
    device: str = "cpu"
    provider: str = ""
    symmetric: bool = False
    patience: float = 0.0
    install: str = INSTALL

    @property
    def version(self) -> str:
        """The releases of its packages, for keys of measured times; names those that are missing."""
        return ", ".join(f"{package} {_installed(package) or 'missing'}" for package in self.packages)

    def unavailable(self, device: str = "cpu") -> str:
        """Return why the engine cannot be used on a kind of device, with what to do; empty where it can."""
        if device != self.device:
            return f"it serves on {self.device}, not on {device}"
        for package, least in self.packages.items():
            found = _installed(package)
            wanted = ".".join(map(str, least))
            if found is None:
                return f"{package} is not installed ({self.install})"
            if _numbers(found) < least:
                return f"{package} {found} is installed, {wanted} or later is needed ({self.install})"
        if self.provider and self.provider not in (offered := execution_providers()):
            return f"onnxruntime offers {', '.join(offered)}, not {self.provider} ({self.install})"
        return ""


def _openvino_precisions() -> tuple[str, ...]:
    bf16 = ("bf16",) if processor.bf16_pays() else ()
    return ("fp32", *bf16, *(("int8",) if processor.int8_pays() else ()))


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in text.split("+")[0].split(".")[:3])


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "openvino",
            {"openvino": (2025, 0), "onnx": (1, 18)},
            _openvino_precisions,
            OpenVinoSession,
            exact_integers=False,
        ),
        Engine("onnxruntime", {"onnxruntime": (1, 20), "onnx": (1, 18)}, lambda: ("fp32",), OnnxRuntimeSession),
        Engine(
            "tensorrt",
            {"onnxruntime-gpu": (1, 20), "onnx": (1, 18)},
            lambda: ("fp32", "fp16", "int8"),
            TensorRtSession,
            exact_integers=False,
            device="cuda",
            provider=TENSORRT,
            symmetric=True,
            patience=900.0,
            install="pip install onnxruntime-gpu onnx tensorrt, of releases that fit each other",
        ),
    )
}
ON_CPU = tuple(name for name, engine in ENGINES.items() if engine.device == "cpu")
