"""An artifact made ready to answer requests: batch norm folded, weights laid out for the device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .artifact import load
from .batch_norm import fold_batch_norm
from .fused_conv import available
from .fusion import fuse_epilogues
from .graph import Graph, InputSpec
from .program import Program


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
        return tuple(y.cpu() for y in self.program(*(_channels_last(x.to(self.device)) for x in inputs)))

    def warm_up(self, batch: int) -> None:
        """Run zeros at batch sizes 1 and ``batch``, so that no request pays for first-call set-up."""
        for size in {1, batch}:
            self(*(torch.zeros(size, *i.shape, dtype=getattr(torch, i.dtype)) for i in self.inputs))


def serving_program(graph: Graph, device: torch.device) -> Program:
    """The graph with batch norm folded, images and kernels in channels-last layout, and epilogues fused on the CPU."""
    graph = fold_batch_norm(graph)
    if device.type == "cpu" and available():
        graph = fuse_epilogues(graph)
    tensors = {name: t if t.is_mkldnn else _channels_last(t) for name, t in graph.tensors.items()}
    return Program(graph.with_tensors(tensors)).eval()


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
