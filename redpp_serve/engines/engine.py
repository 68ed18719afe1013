"""`Engine`: what an engine is called, what it needs, which precisions it serves here, and how it takes a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import numpy as np

from redpp_serve.engines import processor
from redpp_serve.engines.sessions import OnnxRuntimeSession, OpenVinoSession

OWN = "redpp"  # the project's own runtime: torch, with a kernel chosen for each layer
INSTALL = "pip install 'redpp-serve[engines]'"


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
    """An engine for whole networks on the CPU.

    Attributes:
        name: what ``--engine`` and reports call it.
        packages: the packages that it needs, with the least release of each, as numbers.
        precisions: returns the precisions that are worth trying on this processor.
        session: takes an ONNX model, a precision, a number of threads, and whether to time nodes (``profiled``).
        exact_integers: whether it computes integers and float64 as torch does, and looks up nothing that is not there.
    """

    name: str
    packages: dict[str, tuple[int, ...]]
    precisions: Callable[[], tuple[str, ...]]
    session: Callable[..., Session]
    exact_integers: bool = True

    @property
    def version(self) -> str:
        """The releases of its packages, for keys of measured times; names those that are missing."""
        return ", ".join(f"{package} {_installed(package) or 'missing'}" for package in self.packages)

    def unavailable(self) -> str:
        """Return why the engine cannot be used, with what to do; empty where it can."""
        for package, least in self.packages.items():
            found = _installed(package)
            wanted = ".".join(map(str, least))
            if found is None:
                return f"{package} is not installed ({INSTALL})"
            if _numbers(found) < least:
                return f"{package} {found} is installed, {wanted} or later is needed ({INSTALL})"
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
    )
}
