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
from redpp_serve.graph.recurrent import SEQUENCES, checked
from redpp_serve.kernels.epilogue import ACTIVATIONS

FUSED_CONV2D, FUSED_LINEAR = "fused.conv2d", "fused.linear"
INT8_VALUES, INT8_WEIGHT = "int8.values", "int8.weight"
LEVELS = 256  # of a value in eight bits

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
    return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, LEVELS - 1)


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
_adaptive_avg_pool2d.default _cdist_forward.default _conj.default _conj_physical.default _fft_c2c.default
_fft_c2r.default _fft_r2c.default _linalg_det.default _linalg_slogdet.default _linalg_solve_ex.default
_linalg_svd.default _log_softmax.default _safe_softmax.default _softmax.default _to_copy.default _trilinear.default
_upsample_bicubic2d_aa.default _upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.default _upsample_bilinear2d_aa.vec
_upsample_nearest_exact1d.default _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.default
_upsample_nearest_exact2d.vec _upsample_nearest_exact3d.default _upsample_nearest_exact3d.vec _weight_norm.default
abs.default acos.default acosh.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
adaptive_avg_pool3d.default adaptive_max_pool1d.default adaptive_max_pool2d.default adaptive_max_pool3d.default
add.Scalar add.Tensor addbmm.default addcdiv.default addcmul.default addmm.default addmv.default addr.default
affine_grid_generator.default all.default all.dim all.dims amax.default amin.default aminmax.default angle.default
any.default any.dim any.dims arange.default arange.start arange.start_step argmax.default argmin.default
argsort.default argsort.stable asin.default asinh.default atan.default atan2.default atanh.default avg_pool1d.default
avg_pool2d.default avg_pool3d.default baddbmm.default bartlett_window.default batch_norm.default bilinear.default
bitwise_and.Scalar bitwise_and.Tensor bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_not.default
bitwise_or.Scalar bitwise_or.Tensor bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar
bitwise_xor.Tensor blackman_window.default blackman_window.periodic bmm.default bucketize.Tensor cat.default
cdist.default ceil.default celu.default channel_shuffle.default cholesky_solve.default chunk.default clamp.Tensor
clamp.default clamp_max.Tensor clamp_max.default clamp_min.Tensor clamp_min.default clone.default col2im.default
complex.default concat.default constant_pad_nd.default contiguous.default conv1d.default conv1d.padding conv2d.default
conv2d.padding conv3d.default conv3d.padding conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input
convolution.default copy.default copysign.Scalar copysign.Tensor cos.default cosh.default cosine_similarity.default
count_nonzero.default count_nonzero.dim_IntList cummax.default cummin.default cumprod.default cumsum.default
deg2rad.default diag_embed.default diagonal.default diagonal_scatter.default diff.default digamma.default dist.default
div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode dot.default einsum.default elu.default embedding.default
eq.Scalar eq.Tensor erf.default erfc.default erfinv.default exp.default exp2.default expand.default expand_as.default
expm1.default eye.default eye.m fft_fft.default fft_fft2.default fft_fftn.default fft_hfft.default fft_ifft.default
fft_ifft2.default fft_ifftn.default fft_ihfft.default fft_irfft.default fft_irfft2.default fft_irfftn.default
fft_rfft.default fft_rfft2.default fft_rfftn.default fill.Scalar fill.Tensor flatten.using_ints flip.default
floor.default floor_divide.Scalar floor_divide.default fmax.default fmin.default fmod.Scalar fmod.Tensor frac.default
full.default full_like.default gather.default ge.Scalar ge.Tensor gelu.default glu.default grid_sampler.default
grid_sampler_2d.default grid_sampler_3d.default group_norm.default gru.input gru_cell.default gt.Scalar gt.Tensor
hamming_window.default hamming_window.periodic hann_window.default hann_window.periodic hardshrink.default
hardsigmoid.default hardswish.default hardtanh.default heaviside.default hypot.default i0.default im2col.default
imag.default index.Tensor index_add.default index_copy.default index_fill.int_Scalar index_fill.int_Tensor
index_put.default index_select.default instance_norm.default isclose.default isfinite.default isin.Tensor_Scalar
isin.Tensor_Tensor isinf.default isnan.default istft.default kaiser_window.default kthvalue.default layer_norm.default
ldexp.Tensor le.Scalar le.Tensor leaky_relu.default lerp.Scalar lerp.Tensor lgamma.default lift_fresh_copy.default
linalg_cholesky.default linalg_cholesky_ex.default linalg_cross.default linalg_det.default linalg_eigh.default
linalg_eigvalsh.default linalg_inv.default linalg_inv_ex.default linalg_lu.default linalg_matrix_exp.default
linalg_pinv.atol_rtol_tensor linalg_qr.default linalg_solve.default linalg_solve_triangular.default
linalg_vector_norm.default linear.default linspace.default log.default log10.default log1p.default log2.default
log_sigmoid.default log_softmax.int logaddexp.default logaddexp2.default logcumsumexp.default logical_and.default
logical_not.default logical_or.default logical_xor.default logit.default logspace.default logsumexp.default lstm.input
lstm_cell.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor masked_scatter.default matmul.default
max.default max.dim max.other max_pool1d.default max_pool1d_with_indices.default max_pool2d.default
max_pool2d_with_indices.default max_pool3d.default max_pool3d_with_indices.default max_unpool2d.default
max_unpool3d.default maximum.default mean.default mean.dim median.default median.dim meshgrid.default
meshgrid.indexing min.default min.dim min.other minimum.default mish.default mm.default mode.default mul.Scalar
mul.Tensor mv.default nan_to_num.default nanmean.default nanmedian.default nanmedian.dim nansum.default narrow.default
native_group_norm.default native_layer_norm.default ne.Scalar ne.Tensor neg.default new_full.default new_ones.default
new_zeros.default nextafter.default norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype norm.ScalarOpt_dtype
ones.default ones_like.default outer.default pad.default pairwise_distance.default permute.default
pixel_shuffle.default pixel_unshuffle.default polar.default polygamma.default pow.Scalar pow.Tensor_Scalar
pow.Tensor_Tensor prelu.default prod.default prod.dim_int quantile.default quantile.scalar rad2deg.default
real.default reciprocal.default reflection_pad1d.default reflection_pad2d.default reflection_pad3d.default
relu.default relu6.default remainder.Scalar remainder.Scalar_Tensor remainder.Tensor renorm.default repeat.default
repeat_interleave.self_int replication_pad1d.default replication_pad2d.default replication_pad3d.default
reshape.default reshape_as.default resolve_conj.default resolve_neg.default rms_norm.default rnn_relu.input
rnn_relu_cell.default rnn_tanh.input rnn_tanh_cell.default roll.default rot90.default round.decimals round.default
rsqrt.default rsub.Scalar rsub.Tensor scalar_tensor.default scaled_dot_product_attention.default scatter.src
scatter.value scatter_add.default scatter_reduce.two searchsorted.Tensor select.int select_scatter.default
selu.default sgn.default sigmoid.default sign.default signbit.default silu.default sin.default sinc.default
sinh.default slice.Tensor slice_scatter.default softmax.int softplus.default softshrink.default sort.default
sort.stable special_entr.default special_erfcx.default special_i1.default special_log_ndtr.default
special_ndtri.default split.Tensor split.sizes split_with_sizes.default sqrt.default square.default squeeze.default
squeeze.dim squeeze.dims stack.default std.correction std.dim std_mean.correction stft.center stft.default sub.Scalar
sub.Tensor sum.default sum.dim_IntList swapaxes.default sym_size.int t.default take.default take_along_dim.default
tan.default tanh.default tensor_split.sections threshold.default tile.default to.dtype topk.default trace.default
transpose.int trapezoid.dx trapezoid.x tril.default tril_indices.default triu.default triu_indices.default
trunc.default type_as.default unbind.int unflatten.int unfold.default unsafe_chunk.default unsafe_split.Tensor
unsafe_split_with_sizes.default unsqueeze.default upsample_bicubic2d.default upsample_bicubic2d.vec
upsample_bilinear2d.default upsample_bilinear2d.vec upsample_linear1d.default upsample_linear1d.vec
upsample_nearest1d.default upsample_nearest1d.vec upsample_nearest2d.default upsample_nearest2d.vec
upsample_nearest3d.default upsample_nearest3d.vec upsample_trilinear3d.default upsample_trilinear3d.vec vander.default
var.correction var.dim var_mean.correction view_as_complex.default view_as_real.default where.Scalar where.ScalarOther
where.ScalarSelf where.self xlogy.Scalar_Other xlogy.Scalar_Self xlogy.Tensor zero.default zeros.default
zeros_like.default
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
    if op in SEQUENCES:
        return checked(op)
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
