"""LSTM, GRU and RNN kept whole while torch.export follows sizes.

torch steps through a sequence to tell the shapes of a recurrent operator's results, which fixes the length. Stand-ins,
which have shapes and compute nothing, take the operators' places during the export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

_KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_OPTIONS = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, bool batch_first"
)
_STAND_INS = torch.library.Library("redpp_capture", "DEF")


def _define(kind: str) -> None:
    hx, more = ("Tensor[] hx", ", Tensor") if kind == "lstm" else ("Tensor hx", "")
    _STAND_INS.define(f"{kind}(Tensor input, {hx}, {_OPTIONS}) -> (Tensor, Tensor{more})")

    def shapes(x: Tensor, hx: Any, *options: Any) -> tuple[Tensor, ...]:
        states = list(hx) if kind == "lstm" else [hx]
        width = states[0].shape[2] * (2 if options[5] else 1)
        return x.new_empty(x.shape[0], x.shape[1], width), *(torch.empty_like(state) for state in states)

    torch.library.register_fake(f"redpp_capture::{kind}", shapes, lib=_STAND_INS)


for _kind in _KINDS:
    _define(_kind)


def stand_ins() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the function that stands in for each of torch's, by the latter."""
    return {getattr(torch, kind): _standing_in(kind) for kind in _KINDS}


def _standing_in(kind: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        packed = isinstance(args[3], (list, tuple))  # sizes of batches before the states
        return getattr(torch if packed else torch.ops.redpp_capture, kind)(*args)

    return call


def with_stand_ins(module: fx.GraphModule) -> fx.GraphModule:
    """Put the stand-ins into a graph; return the same module."""
    return _exchanged(module, {real: stand_in for stand_in, real in _pairs()})


def with_sequences(exported: ExportedProgram) -> ExportedProgram:
    """Put torch's operators back into a program; return the same program."""
    _exchanged(exported.graph_module, dict(_pairs()))
    return exported


def _pairs() -> list[tuple[Any, Any]]:
    return [(getattr(torch.ops.redpp_capture, kind).default, getattr(torch.ops.aten, kind).input) for kind in _KINDS]


def _exchanged(module: fx.GraphModule, targets: dict[Any, Any]) -> fx.GraphModule:
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in targets:
            node.target = targets[node.target]
    module.recompile()
    return module
