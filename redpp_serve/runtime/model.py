"""An artifact made ready to answer requests: batch norm folded, weights laid out for the device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .artifact import load
from .batch_norm import fold_batch_norm
from .candidates import candidates, with_kernels
from .fusion import fuse_epilogues
from .graph import Graph, InputSpec
from .layers import fused_layers
from .program import Program, value_shapes


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
    """The graph with batch norm folded, epilogues fused, images and kernels in channels-last layout, dense kernels."""
    graph = fuse_epilogues(fold_batch_norm(graph))
    shapes = {i.name: (1, *i.shape) for i in graph.inputs} | value_shapes(graph, "cpu")
    dense = {
        layer.node.name: candidates(graph, layer.node, shapes[layer.x.name], device, layer.values.dtype)[0]
        for layer in fused_layers(graph)
    }
    graph = with_kernels(graph, dense)
    tensors = {name: t if t.is_mkldnn else _channels_last(t) for name, t in graph.tensors.items()}
    return Program(graph.with_tensors(tensors)).eval()


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
