"""LSTM, GRU and RNN as operators that stay whole, with weights that are checked before they are read.

torch's kernels take the sizes of a recurrent operator from its states and read weights of those sizes from memory,
whatever the weights' own shapes are. A file with smaller weights would be answered with memory that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from redpp_serve.errors import RedppError

_GATES = {"aten.lstm.input": 4, "aten.gru.input": 3, "aten.rnn_tanh.input": 1, "aten.rnn_relu.input": 1}

SEQUENCES = frozenset(_GATES)
"""Operators that step over a sequence; torch checks the weights of single cells by itself."""


def checked(op: str) -> Callable[..., Any]:
    """Return a recurrent operator that compares the shapes of states and weights before it computes.

    It takes what torch's operator takes: the sequence (N, T, features) or (T, N, features), the state, for an LSTM
    a list of two, the list of weights, and then has_biases, num_layers, dropout, train, bidirectional, batch_first.

    Raises:
        RedppError: a state or weight of another shape than the others call for.
    """
    kind = op.split(".")[1]
    operator = getattr(torch.ops.aten, kind).input

    def call(x: Tensor, state: Any, weights: Sequence[Tensor], *options: Any) -> Any:
        states = list(state) if isinstance(state, (list, tuple)) else [state]
        biases, layers, _, _, bidirectional, batch_first = options
        directions = 2 if bidirectional else 1
        found = [tuple(tensor.shape) for tensor in (*states, *weights)]
        if x.dim() != 3 or len(states) != (2 if kind == "lstm" else 1) or any(s.dim() != 3 for s in states):
            raise _misfit(kind, found, "a sequence and states of three dimensions")
        seen, hidden = states[0].shape[2], states[-1].shape[2]
        shared = (layers * directions, x.shape[0 if batch_first else 1])
        rows = _GATES[op] * hidden
        expected = [(*shared, seen), (*shared, hidden)] if kind == "lstm" else [(*shared, hidden)]
        for layer in range(layers):
            width = x.shape[2] if layer == 0 else seen * directions
            one = [(rows, width), (rows, seen), *([(rows,), (rows,)] if biases else [])]
            expected += (one + ([(seen, hidden)] if seen != hidden else [])) * directions
        if found != expected:
            raise _misfit(kind, found, f"shapes {expected}")
        return operator(x, state, weights, biases, layers, 0.0, False, bidirectional, batch_first)  # no dropout

    return call


def _misfit(kind: str, found: list[tuple[int, ...]], expected: str) -> RedppError:
    return RedppError(
        f"{kind} with states and weights of the shapes {found}", expected, "package the network again from its own file"
    )
