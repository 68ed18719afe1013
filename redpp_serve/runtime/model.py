"""An artifact made ready to answer requests: batch norm folded, epilogues fused, weights laid out for the device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .artifact import load
from .graph import InputSpec
from .programs import channels_last, serving_program

__all__ = ["ServingModel", "serving_program"]


class ServingModel:
    """Runs one artifact; original and pruned networks go through this same class.

    Args:
        source: path of the artifact.
        device: where to run, e.g. ``cpu`` or ``cuda:0``.
    """

    def __init__(self, source: Path, device: str = "cpu") -> None:
        artifact = load(source)
        self.description = artifact.description
        self.inputs: tuple[InputSpec, ...] = artifact.graph.inputs
        self.device = torch.device(device)
        self.program = serving_program(artifact.graph, self.device).to(self.device)

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Batched inputs (N, ...) as the artifact declares them, to the network's outputs on the CPU."""
        return tuple(y.cpu() for y in self.program(*(channels_last(x.to(self.device)) for x in inputs)))

    def warm_up(self, batch: int) -> None:
        """Run zeros at batch sizes 1 and ``batch``, so that no request pays for first-call set-up."""
        for size in {1, batch}:
            self(*(torch.zeros(size, *i.shape, dtype=getattr(torch, i.dtype)) for i in self.inputs))
