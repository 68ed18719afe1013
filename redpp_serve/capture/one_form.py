"""One form for each kind of call, whichever way the network came.

An eager export, traced, scripted and frozen TorchScript, and a program of core operators write the same layer in
different ways. `one_form` gives a call the form that eager exports have: convolutions by their dimension with
padding in numbers, norms with one result, casts as casts. `linear_form` does what takes more than one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from redpp_serve.graph.graph import Node, Ref
from redpp_serve.graph.passes import BATCH_NORM

_CONV_DIMENSIONS = (1, 2, 3)


@dataclass(frozen=True)
class Call:
    """One call of an exported program.

    Attributes:
        name: the name of its value.
        op: the operator's name.
        given: its arguments by their names in the operator's schema, defaults included.
        values: torch's description (shape and dtype) of each tensor among them, by name.
        first_only: whether of several results the first alone is read.
    """

    name: str
    op: str
    given: dict[str, Any]
    values: Mapping[str, Any]
    first_only: bool

    def node(self, op: str, *args: Any) -> tuple[Node, ...]:
        """Make the node that takes this call's place."""
        return (Node(self.name, f"aten.{op}", args),)

    def take(self, names: str) -> list[Any]:
        """Return the arguments of these names."""
        return [self.given[name] for name in names.split()]

    def dimensions(self, argument: str) -> int:
        """Return the number of dimensions of a tensor argument."""
        return len(self.values[self.given[argument].name].shape)

    def as_it_is(self) -> tuple[Node, ...]:
        """Make a node of the call without change."""
        return (Node(self.name, self.op, tuple(self.given.values())),)


Form = Callable[[Call], tuple[Node, ...] | Ref]


def one_form(call: Call) -> tuple[Node, ...] | Ref:
    """Return the nodes that compute a call of an operator of `FORMS`; its argument itself if that is its result."""
    if call.op in FIRST_RESULT and not call.first_only:
        return call.as_it_is()
    return FORMS[call.op](call)


def _convolution(call: Call) -> tuple[Node, ...]:
    x, weight, bias, stride, padding, dilation = call.take("input weight bias stride padding dilation")
    transposed, output_padding, groups = call.take("transposed output_padding groups")
    n = call.dimensions("weight") - 2
    if n not in _CONV_DIMENSIONS or call.dimensions("input") != n + 2:
        return call.node("convolution.default", *list(call.given.values())[:9])
    if transposed:
        op = f"conv_transpose{n}d.{'default' if n == 1 else 'input'}"
        return call.node(op, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return call.node(f"conv{n}d.default", x, weight, bias, stride, padding, dilation, groups)


def _named_padding(call: Call) -> tuple[Node, ...]:
    """Give ``same`` and ``valid`` padding in numbers; what ``same`` has more on the far side goes before the layer."""
    x, weight, bias, stride, padding, dilation, groups = call.take("input weight bias stride padding dilation groups")
    n = call.dimensions("weight") - 2
    kernel = [int(size) for size in call.values[weight.name].shape[2:]]
    dilations = [dilation] * n if isinstance(dilation, int) else list(dilation) * (n // len(dilation))
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
    before: tuple[Node, ...] = ()
    if any(amount % 2 for amount in total):
        amounts = [side for amount in reversed(total) for side in (0, amount % 2)]
        before = (Node(f"{call.name}_pad", "aten.constant_pad_nd.default", (x, amounts)),)
        x = Ref(before[0].name)
    near = [amount // 2 for amount in total]
    return (*before, *call.node(f"conv{n}d.default", x, weight, bias, stride, near, dilation, groups))


def _batch_norm(call: Call) -> tuple[Node, ...]:
    given = call.given
    eps = given.get("eps", given.get("epsilon"))
    momentum = given.get("momentum", given.get("exponential_average_factor"))
    x, weight, bias = call.take("input weight bias")
    statistics = given.get("running_mean"), given.get("running_var")
    return (
        Node(call.name, BATCH_NORM, (x, weight, bias, *statistics, given.get("training", False), momentum, eps, True)),
    )


def _layer_norm(call: Call) -> tuple[Node, ...]:
    return call.node("layer_norm.default", *call.take("input normalized_shape weight bias eps"))


def _group_norm(call: Call) -> tuple[Node, ...]:
    return call.node("group_norm.default", *call.take("input group weight bias eps"))


def _softmax(call: Call) -> tuple[Node, ...]:
    if call.given["half_to_float"]:
        return call.as_it_is()
    return call.node(f"{call.op.removeprefix('aten._').removesuffix('.default')}.int", *call.take("self dim"))


def _adaptive_pool(call: Call) -> tuple[Node, ...]:
    return call.node(call.op.removeprefix("aten._"), *call.take("self output_size"))


def _max_pool(call: Call) -> tuple[Node, ...]:
    op = call.op.removeprefix("aten.").replace("_with_indices", "")
    return call.node(op, *call.take("self kernel_size stride padding dilation ceil_mode"))


def _attention(call: Call) -> tuple[Node, ...]:
    q, k, v, mask, dropout, causal, scale = call.take("query key value attn_mask dropout_p is_causal scale")
    op = "aten.scaled_dot_product_attention.default"
    return (Node(call.name, op, (q, k, v, mask, dropout, causal), {"scale": scale}),)


def _cast(call: Call) -> tuple[Node, ...] | Ref:
    """Cast where that changes the dtype; device and layout in memory are the server's choice."""
    x, dtype = call.given["self"], call.given.get("dtype")
    if isinstance(call.given.get("other"), Ref):
        dtype = call.values[call.given["other"].name].dtype
    if not isinstance(x, Ref):  # torch takes a number for a tensor, as where vmap counts the numbers of a row
        return (Node(call.name, "aten.scalar_tensor.default", (x,), {"dtype": dtype or torch.tensor(x).dtype}),)
    if dtype is None or dtype is call.values[x.name].dtype:
        return x
    return call.node("to.dtype", x, dtype)


def _rrelu(call: Call) -> tuple[Node, ...]:
    """Take the slope of eval mode, the middle of the range that training draws from."""
    x, lower, upper = call.take("self lower upper")
    return call.node("leaky_relu.default", x, (lower + upper) / 2)


def _matrix_transpose(call: Call) -> tuple[Node, ...]:
    x = call.given["self"]
    if call.op == "aten.mH.default" and call.values[x.name].dtype.is_complex:
        return call.as_it_is()
    return call.node("transpose.int", x, -2, -1)


def _first(call: Call) -> Ref:
    result: Ref = call.given["input"]
    return result


FORMS: dict[str, Form] = {
    **dict.fromkeys(
        ("aten.convolution.default", "aten._convolution.default", "aten._convolution.deprecated"), _convolution
    ),
    **dict.fromkeys(
        (*(f"aten.conv{n}d.padding" for n in _CONV_DIMENSIONS), "aten._convolution_mode.default"), _named_padding
    ),
    **dict.fromkeys(
        (
            "aten._native_batch_norm_legit_no_training.default",
            "aten._native_batch_norm_legit.default",
            "aten._native_batch_norm_legit.no_stats",
            "aten.native_batch_norm.default",
            "aten.cudnn_batch_norm.default",
            "aten.miopen_batch_norm.default",
        ),
        _batch_norm,
    ),
    "aten.native_layer_norm.default": _layer_norm,
    "aten.native_group_norm.default": _group_norm,
    **dict.fromkeys(("aten._softmax.default", "aten._log_softmax.default"), _softmax),
    **dict.fromkeys(("aten._adaptive_avg_pool2d.default", "aten._adaptive_avg_pool3d.default"), _adaptive_pool),
    **dict.fromkeys(("aten.max_pool2d_with_indices.default", "aten.max_pool3d_with_indices.default"), _max_pool),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _attention,
    **dict.fromkeys(
        (
            "aten.to.dtype",
            "aten.to.device",
            "aten.to.dtype_layout",
            "aten.to.other",
            "aten.type_as.default",
            "aten._to_copy.default",
        ),
        _cast,
    ),
    "aten.rrelu.default": _rrelu,
    **dict.fromkeys(("aten.mT.default", "aten.mH.default"), _matrix_transpose),
    "aten.native_dropout.default": _first,
}
FIRST_RESULT = frozenset(
    op for op, form in FORMS.items() if form in (_batch_norm, _layer_norm, _group_norm, _max_pool, _attention, _first)
)
