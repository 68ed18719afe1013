"""The modules that a run of a network passes, in the order in which it leaves them: the way to the one to blame."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from redpp_serve.capture.outputs import tensors_in
from redpp_serve.capture.refusals import defined_at


@dataclass(frozen=True)
class Passed:
    """A call of a module.

    Attributes:
        name: its name in the network; empty for the network itself.
        module: the module.
        given: copies of the tensors among its arguments.
        made: copies of the tensors that it returned.
    """

    name: str
    module: nn.Module
    given: list[Tensor]
    made: list[Tensor]

    def where(self) -> str:
        """Name the module and the line of its forward, see `refusals.defined_at`."""
        return defined_at(self.name, self.module)


@torch.no_grad()
def trail(network: nn.Module, run: Callable[[], Any]) -> list[Passed]:
    """Return the calls of a network's modules in a ``run`` until its end or an exception, the innermost first.

    Args:
        network: the network; one of TorchScript tells nothing.
        run: calls it.
    """
    found: list[Passed] = []
    if isinstance(network, torch.jit.ScriptModule):  # its parts call no hooks
        return found

    def note(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            found.append(Passed(name, module, copies(tensors_in([args, kwargs])), copies(tensors_in(result))))

        return keep

    hooks = [part.register_forward_hook(note(name), with_kwargs=True) for name, part in network.named_modules()]
    try:
        with contextlib.suppress(Exception):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors, for a forward may write into its input."""
    return [x.clone() for x in tensors]
