"""The operators that a graph may call: those that a file may name, and those that loading puts into a graph.

A file names operators of `ALLOWED` alone; `artifact.load` refuses any other before it runs. None of them reads or
writes a file, a device setting, a random state or uninitialized memory. None changes its arguments, except that
`batch_norm` in training would update its statistics, which `capture` refuses.

Loading replaces layers by ``fused.conv2d`` and ``fused.linear``, which say in plain PyTorch what a layer with its
epilogue computes. The others in `_COMPOSED` and `_LIBRARY` compute it with a kernel for some device;
`runtime.candidates` knows where each may be used. Those in `_COMPOSED` take the summand ``other``, or None, as their
second argument and the name of an activation as their last one. `quantization` puts in those of `_INT8`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import redpp_serve.kernels  # noqa: F401 - defines torch.ops.redpp
from redpp_serve.errors import RedppError
from redpp_serve.kernels.epilogue import ACTIVATIONS

FUSED_CONV2D, FUSED_LINEAR = "fused.conv2d", "fused.linear"
INT8_VALUES, INT8_WEIGHT = "int8.values", "int8.weight"

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": partial(F.hardtanh_, min_val=0.0, max_val=6.0),
    "silu": partial(F.silu, inplace=True),
    "sigmoid": torch.sigmoid_,
    "hardswish": partial(F.hardswish, inplace=True),
    "hardsigmoid": partial(F.hardsigmoid, inplace=True),
}


def _finish(y: Tensor, other: Tensor | None, activation: str) -> Tensor:
    """Apply the epilogue to a result that nobody else holds, in place where torch can."""
    y = y if other is None else y.add_(other)
    return _IN_PLACE.get(activation, ACTIVATIONS[activation])(y)


def _then(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make ``call(x, other, *args, activation)`` that computes ``activation(layer(x, *args) + other)``."""

    def call(x: Tensor, other: Tensor | None, *args: Any) -> Tensor:
        return _finish(layer(x, *args[:-1]), other, args[-1])

    return call


def _onednn_conv2d_then(x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """Compute a convolution with a packed weight: the sum inside oneDNN's kernel, the activation after it."""
    (stride, padding, dilation, groups, activation), call = args, torch.ops.mkldnn._convolution_pointwise
    if other is None:
        y = call.default(x, weight, bias, padding, stride, dilation, groups, "none", [], "")
    else:
        y = call.binary(x, other, weight, bias, padding, stride, dilation, groups, "add", None, None, [], None)
    return _finish(y, None, activation)


def _onednn_linear_then(
    x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Compute a Linear with a packed weight: the sum inside oneDNN's product, the activation after it."""
    call = torch.ops.mkldnn._linear_pointwise
    if other is None:
        return _finish(call.default(x, weight, bias, "none", [], ""), None, activation)
    return _finish(call.binary(x, other, weight, bias, "add"), None, activation)


def _codebook_linear(x: Tensor, indices: Tensor, codebook: Tensor, bias: Tensor | None, decode: str) -> Tensor:
    return cast(Tensor, torch.ops.redpp.codebook_linear(x, indices, codebook, bias, "none", decode))


def _int8_values(x: Tensor, scale: float, zero: int) -> Tensor:
    """Round x to 256 levels, ``scale`` apart, of which number ``zero`` stands for 0."""
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)


def _int8_weight(levels: Tensor, scale: Tensor) -> Tensor:
    """Return the float weight (n_out, ...) of int8 levels and a scale (n_out,) for each output channel."""
    return levels * scale.view(-1, *[1] * (levels.dim() - 1))


_COMPOSED: dict[str, Callable[..., Tensor]] = {
    FUSED_CONV2D: _then(F.conv2d),
    FUSED_LINEAR: _then(F.linear),
    "onednn.conv2d_then": _onednn_conv2d_then,
    "onednn.linear_then": _onednn_linear_then,
    "redpp.codebook_linear_then": _then(_codebook_linear),
    "redpp.split_conv2d_then": _then(torch.ops.redpp.split_conv2d),
    "redpp.split_linear_then": _then(torch.ops.redpp.split_linear),
}
_INT8: dict[str, Callable[..., Tensor]] = {INT8_VALUES: _int8_values, INT8_WEIGHT: _int8_weight}
_LIBRARY = {  # called as they are; not every build of torch has them
    "onednn.conv2d": "mkldnn._convolution_pointwise.default",
    "onednn.conv2d_add": "mkldnn._convolution_pointwise.binary",
    "onednn.linear": "mkldnn._linear_pointwise.default",
    "cudnn.conv2d_relu": "aten.cudnn_convolution_relu.default",
    "cudnn.conv2d_add_relu": "aten.cudnn_convolution_add_relu.default",
    "redpp.fused_conv2d": "redpp.fused_conv2d.default",
    "redpp.fused_linear": "redpp.fused_linear.default",
    "redpp.depthwise_conv2d": "redpp.depthwise_conv2d.default",
    "redpp.codebook_linear": "redpp.codebook_linear.default",
}

_ATEN = """
_adaptive_avg_pool2d.default _log_softmax.default _softmax.default _to_copy.default _weight_norm.default abs.default
adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default adaptive_max_pool2d.default
add.Scalar add.Tensor addcmul.default addmm.default amax.default amin.default any.default any.dim arange.default
arange.start arange.start_step argmax.default argmin.default avg_pool1d.default avg_pool2d.default avg_pool3d.default
baddbmm.default batch_norm.default bitwise_and.Tensor bitwise_not.default bitwise_or.Tensor bmm.default cat.default
channel_shuffle.default chunk.default clamp.Tensor clamp.default clamp_max.default clamp_min.default clone.default
concat.default constant_pad_nd.default contiguous.default conv1d.default conv1d.padding conv2d.default conv2d.padding
conv3d.default conv_transpose1d.default conv_transpose2d.input convolution.default copy.default cos.default
cumsum.default div.Scalar div.Tensor div.Tensor_mode einsum.default elu.default embedding.default eq.Scalar eq.Tensor
erf.default exp.default expand.default expand_as.default expm1.default fill.Scalar fill.Tensor flatten.using_ints
flip.default floor.default floor_divide.default full.default full_like.default gather.default ge.Scalar ge.Tensor
gelu.default glu.default group_norm.default gt.Scalar gt.Tensor hardsigmoid.default hardswish.default hardtanh.default
index.Tensor index_put.default index_select.default instance_norm.default layer_norm.default le.Scalar le.Tensor
leaky_relu.default lift_fresh_copy.default linalg_vector_norm.default linear.default log.default log1p.default
log_softmax.int logical_and.default logical_not.default logical_or.default logsumexp.default lt.Scalar lt.Tensor
masked_fill.Scalar masked_fill.Tensor matmul.default max.default max.dim max.other max_pool1d.default max_pool2d.default
max_pool2d_with_indices.default max_pool3d.default maximum.default mean.default mean.dim meshgrid.default
meshgrid.indexing min.default min.dim min.other minimum.default mish.default mm.default mul.Scalar mul.Tensor
narrow.default native_group_norm.default native_layer_norm.default ne.Scalar ne.Tensor neg.default new_full.default
new_ones.default new_zeros.default norm.ScalarOpt_dim ones.default ones_like.default pad.default permute.default
pixel_shuffle.default pixel_unshuffle.default pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default
reciprocal.default reflection_pad2d.default relu.default relu6.default remainder.Scalar repeat.default
repeat_interleave.self_int replication_pad2d.default reshape.default reshape_as.default rms_norm.default roll.default
round.default rsqrt.default rsub.Scalar scaled_dot_product_attention.default select.int select_scatter.default
selu.default sigmoid.default sign.default silu.default sin.default slice.Tensor slice_scatter.default softmax.int
softplus.default split.Tensor split.sizes split_with_sizes.default sqrt.default square.default squeeze.default
squeeze.dim squeeze.dims stack.default std.correction std.dim sub.Scalar sub.Tensor sum.default sum.dim_IntList
swapaxes.default sym_size.int t.default tan.default tanh.default to.dtype topk.default transpose.int tril.default
triu.default type_as.default unbind.int unflatten.int unfold.default unsqueeze.default upsample_bicubic2d.vec
upsample_bilinear2d.vec upsample_nearest2d.vec var.correction var.dim var_mean.correction where.ScalarOther
where.ScalarSelf where.self zero.default zeros.default zeros_like.default
"""
_PYTHON = "add sub mul floordiv truediv mod neg getitem eq ne lt le gt ge"  # of Python's operator, on sizes

ALLOWED = frozenset([*(f"aten.{name}" for name in _ATEN.split()), *(f"py.{name}" for name in _PYTHON.split())])


def resolve(op: str) -> Callable[..., Any]:
    """Find the callable behind an operator's name, such as ``aten.conv2d.default``, ``py.mul`` or ``fused.linear``.

    Raises:
        KeyError: the name is neither on the allow-list nor one that loading uses.
        RedppError: this release of torch lacks the operator.
    """
    if op in _COMPOSED or op in _INT8:
        return (_COMPOSED | _INT8)[op]
    if op not in ALLOWED and op not in _LIBRARY:
        raise KeyError(op)
    family, *names = _LIBRARY.get(op, op).split(".")
    try:
        home: Any = operator if family == "py" else getattr(torch.ops, family)
        return cast(Callable[..., Any], reduce(getattr, names, home))
    except AttributeError as error:
        raise RedppError(
            f"torch {torch.__version__} has no operator {op}",
            "a release of torch with all operators that the network calls",
            "install the release of torch that the model was packaged with",
        ) from error
