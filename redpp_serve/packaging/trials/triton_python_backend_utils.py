"""A substitute for the module of this name that Triton's Python back end gives ``model.py``, where no server runs.

It has the parts that the handlers use, and imports nothing of this project.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch


class Tensor:
    """A named tensor; ``held`` is what the server would send or has received."""

    def __init__(self, name: str, held: torch.Tensor) -> None:
        self._name, self.held = name, held

    def name(self) -> str:
        return self._name

    def to_dlpack(self) -> Any:
        return torch.utils.dlpack.to_dlpack(self.held)  # type: ignore[attr-defined]

    @staticmethod
    def from_dlpack(name: str, tensor: torch.Tensor) -> Tensor:
        held = torch.utils.dlpack.from_dlpack(tensor)
        if not held.is_contiguous():
            raise TritonError("DLPack tensor is not contiguous")
        return Tensor(name, held)


class TritonError(Exception):
    """A request's own error."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS = range(7)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self.code = code

    def message(self) -> str:
        return str(self)


class InferenceRequest:
    """One client's inputs (rows, ...) by name, with the protocol's id and what the server passes on of the headers."""

    def __init__(self, inputs: Mapping[str, torch.Tensor], name: str = "", parameters: str = "") -> None:
        self._inputs = [Tensor(name, x) for name, x in inputs.items()]
        self._name, self._parameters = name, parameters

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._name

    def parameters(self) -> str:
        return self._parameters


class InferenceResponse:
    """Outputs, or an error."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._outputs, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Metric:
    """One sample; ``value`` of counters and gauges, ``observed`` of histograms."""

    def __init__(self, buckets: Sequence[float] | None) -> None:
        self.buckets, self._value = buckets, 0.0
        self.observed: list[float] = []

    def increment(self, value: float) -> None:
        self._value += value

    def set(self, value: float) -> None:
        self._value = value

    def observe(self, value: float) -> None:
        self.observed.append(value)

    def value(self) -> float:
        return self._value


class MetricFamily:
    """Samples of one name. The server has one set of them for all processes, kept here in ``samples``."""

    COUNTER, GAUGE, HISTOGRAM = range(3)
    samples: ClassVar[dict[tuple[str, frozenset[tuple[str, str]]], Metric]] = {}

    def __init__(self, name: str, description: str, kind: int) -> None:
        self.name, self.kind = name, kind

    def Metric(self, labels: Mapping[str, str], buckets: Sequence[float] | None = None) -> Metric:
        if (buckets is None) is (self.kind == self.HISTOGRAM):
            raise TritonError("buckets belong to a histogram and to nothing else")
        return self.samples.setdefault((self.name, frozenset(labels.items())), Metric(buckets))
