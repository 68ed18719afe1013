"""A network compiled by torch.compile, for those who ask for it: it takes a compiler and a minute for a batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph
from redpp_serve.runtime.serving_graph import channels_last

COMPILED = "torch-compile"


class CompiledRun:
    """Runs a network through torch.compile with its weights frozen; each batch size is compiled when it first comes.

    Args:
        graph: the network, as it is served.
        device: where its tensors are.
    """

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._device = device
        program = Program(graph).eval()
        self._run: Callable[..., tuple[Tensor, ...]] = torch.compile(program, dynamic=False)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map inputs (N, ...) to outputs (N, ...) on the CPU that the caller owns."""
        import torch._inductor.config as settings  # noqa: PLC0415 - half a second that others need not wait for

        with settings.patch(freezing=True):
            return tuple(y.cpu() for y in self._run(*(channels_last(x.to(self._device)) for x in inputs)))

    def close(self) -> None:
        """Free the network."""
        torch.compiler.reset()
