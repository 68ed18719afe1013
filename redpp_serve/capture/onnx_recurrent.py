"""LSTM, GRU and RNN of ONNX as torch's operators, which order gates and store biases in another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from redpp_serve.capture.onnx_call import Call, UnsupportedError
from redpp_serve.capture.onnx_file import Array, OnnxNode
from redpp_serve.graph.recurrent import checked

RECURRENT = "Recurrent"  # a call whose weights are torch's: values are x, states, and four tensors a direction
# Where torch's gates are among ONNX's: input, forget, cell, output of iofc; reset, update, new of zrh.
_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_ACTIVATIONS: dict[str, dict[tuple[str, ...], str]] = {
    "LSTM": {("sigmoid", "tanh", "tanh"): "lstm"},
    "GRU": {("sigmoid", "tanh"): "gru"},
    "RNN": {("tanh",): "rnn_tanh", ("relu",): "rnn_relu"},
}
Derive = Callable[[str, str, Callable[[Array], Array]], str]


def with_torchs_weights(node: OnnxNode, stored: Callable[[str], Array | None], derive: Derive) -> OnnxNode:
    """Return a recurrent call as one of torch's, with weights in torch's order.

    Args:
        node: a call of LSTM, GRU or RNN.
        stored: the array of a constant, None for what is computed.
        derive: stores what a function makes of a constant, under a name that the text adds to; returns the new name.

    Raises:
        UnsupportedError: torch's operator computes something else, or the weights are computed or misshapen.
    """
    operator, directions = _operator(node)
    names = dict(enumerate(node.inputs))
    matrices = [stored(names.get(at, "")) for at in (1, 2)]
    if any(m is None or m.ndim != 3 for m in matrices) or matrices[1] is None or matrices[0] is None:
        raise UnsupportedError("has weights that are computed")
    hidden, order = matrices[1].shape[2], _GATES[node.op]
    rows = len(order) * hidden
    bias = stored(names[3]) if names.get(3) else None
    fits = matrices[0].shape[:2] == (directions, rows) and matrices[1].shape == (directions, rows, hidden)
    if not fits or (names.get(3) and (bias is None or bias.shape != (directions, 2 * rows))):
        raise UnsupportedError("has weights of sizes that do not fit each other")

    def part(direction: int, cut: slice, values: Array) -> Array:
        chosen = values[direction][cut]
        return np.concatenate([chosen[k * hidden : (k + 1) * hidden] for k in order])

    weights = []
    for d in range(directions):
        for at, leaf in ((1, "weight_ih"), (2, "weight_hh")):
            weights.append(derive(names[at], f"{leaf}{d}", partial(part, d, slice(None))))
        for at, leaf in ((0, "bias_ih"), (1, "bias_hh")):
            if bias is not None:
                cut = slice(at * rows, (at + 1) * rows)
                weights.append(derive(names[3], f"{leaf}{d}", partial(part, d, cut)))
            else:
                weights.append(derive(names[1], f"{leaf}{d}", partial(_zeros, rows)))
    states = [names.get(5, ""), names.get(6, "")]
    attributes = {**node.attributes, "operator": operator, "hidden_size": hidden}
    return replace(node, op=RECURRENT, inputs=(names[0], *states, *weights), attributes=attributes)


def _zeros(count: int, like: Array) -> Array:
    return np.zeros(count, like.dtype)


def _operator(node: OnnxNode) -> tuple[str, int]:
    """Return torch's operator and the number of directions."""
    attribute, given = node.attributes.get, [bool(name) for name in node.inputs]
    directions = 2 if attribute("direction", "forward") == "bidirectional" else 1
    known = _ACTIVATIONS[node.op]
    names = tuple(name.lower() for name in attribute("activations") or next(iter(known)) * directions)
    one = names[: len(names) // directions]
    if names != one * directions or one not in known:
        raise UnsupportedError(f"has the activations {', '.join(names)}")
    if any(given[4:5]):
        raise UnsupportedError("takes the length of each sequence")
    if any(given[7:8]) or attribute("clip") is not None or attribute("input_forget", 0):
        raise UnsupportedError("has peepholes, a clip or coupled gates")
    if node.op == "GRU" and not attribute("linear_before_reset", 0):
        raise UnsupportedError("resets the state before its product, which torch does after it")
    return known[one], directions


def recurrent(call: Call) -> tuple[Tensor, ...]:
    """Compute a recurrent call; return all states (T, directions, N, hidden), and the last ones."""
    x, operator = call.x(), call.attribute("operator")
    batch_first, direction = bool(call.attribute("layout", 0)), call.attribute("direction", "forward")
    time, hidden = (1 if batch_first else 0), call.attribute("hidden_size")
    both, count = direction == "bidirectional", (x.shape[0] if batch_first else x.shape[1])
    weights = [call.x(at) for at in range(3, len(call.values))]
    states = [_state(call, at, batch_first) for at in ((1, 2) if operator == "lstm" else (1,))]
    start = [x.new_zeros(2 if both else 1, count, hidden) if state is None else state for state in states]
    state = start if operator == "lstm" else start[0]
    x = x.flip(time) if direction == "reverse" else x
    y, *last = checked(f"aten.{operator}.input")(x, state, weights, True, 1, 0.0, False, both, batch_first)
    y = y.flip(time) if direction == "reverse" else y
    y = y.unflatten(2, (2 if both else 1, hidden))
    if batch_first:
        return y, *(part.transpose(0, 1) for part in last)
    return y.transpose(1, 2), *last


def _state(call: Call, at: int, batch_first: bool) -> Tensor | None:
    if not call.has(at):
        return None
    found = call.x(at, trained=False)
    return found.transpose(0, 1) if batch_first else found


def refuse(call: Call) -> Tensor:
    """Refuse a recurrent call that is met before it has torch's weights, as one of constants alone."""
    raise UnsupportedError("computes a constant")


RULES = {RECURRENT: recurrent, **dict.fromkeys(_GATES, refuse)}
