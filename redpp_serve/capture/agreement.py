"""A captured graph must compute what the network computes, for each input of a batch by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import RedppError
from ..runtime.graph import Graph, InputSpec
from ..runtime.program import Program
from .inputs import sample


def check_agreement(graph: Graph, module: nn.Module, inputs: Sequence[InputSpec]) -> None:
    """Compare graph and network on random inputs at batch sizes 2, 1 and 3.

    Servers batch the requests of strangers, so the answer to one input must not depend on the others either.

    Raises:
        RedppError: another result, a failure at one of the batch sizes, or outputs that mix the inputs of a batch.
    """
    program = Program(graph)
    for batch in (2, 1, 3):
        x = sample(inputs, batch, torch.Generator().manual_seed(batch))
        with torch.no_grad():
            try:
                got = program(*(t.clone() for t in x))  # a forward may write into its input
                alone = program(*(t[-1:].clone() for t in x))
                expected = [t for t in torch.utils._pytree.tree_leaves(module(*x)) if isinstance(t, Tensor)]
            except Exception as error:  # whatever the user's forward raises
                raise not_capturable(f"at batch size {batch} it fails: {first_line(error)}",
                                     "a network that takes any batch size") from error
        if len(got) != len(expected) or not all(map(_agree, got, expected)):
            raise not_capturable(f"at batch size {batch} the captured graph gives another result than the network",
                                 "a forward that is a pure function of its inputs")
        if odd := [tuple(y.shape) for y in got if not y.dim() or len(y) != batch]:
            raise not_capturable(f"at batch size {batch} it has an output of shape {odd[0]}",
                                 "a network that takes any batch size, with outputs of shape (N, ...)")
        if not all(_agree(y[-1:], one) for y, one in zip(got, alone)):
            raise not_capturable("the result for one input depends on the others in its batch",
                                 "outputs that are each computed from their own input")


def not_capturable(found: str, expected: str) -> RedppError:
    """The refusal of a network by what was found in it."""
    return RedppError(f"the network cannot be captured: {found}", expected,
                      "change forward accordingly, or package a part of the network that fits")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    """Equal shape and dtype, and values within 1e-4 of the largest one, or within the dtype's own rounding."""
    if mine.shape != theirs.shape or mine.dtype is not theirs.dtype:
        return False
    relative = max(1e-4, 16 * torch.finfo(mine.dtype).eps) if mine.is_floating_point() else 0.0
    mine, theirs = mine.double(), theirs.double()
    finite = theirs[theirs.isfinite()]
    tolerance = relative * float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(mine, theirs, rtol=0.0, atol=tolerance, equal_nan=True)
