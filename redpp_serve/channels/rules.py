"""How channels pass through each operator, by its name; an operator that is not here closes the channels it reads."""

from __future__ import annotations

from redpp_serve.channels import rules_layers as layers
from redpp_serve.channels import rules_layout as layout
from redpp_serve.channels.walk import CONVOLUTIONS, Rule
from redpp_serve.graph.layers import RECURRENT
from redpp_serve.graph.operators import ALLOWED


def _aten(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


RULES: dict[str, Rule] = {
    **_aten(
        layout.same,
        """
        relu.default relu6.default hardtanh.default silu.default gelu.default hardswish.default
        hardsigmoid.default sigmoid.default tanh.default leaky_relu.default elu.default selu.default
        mish.default softplus.default clone.default contiguous.default to.dtype _to_copy.default neg.default
        abs.default exp.default expm1.default log.default log1p.default sqrt.default rsqrt.default
        square.default reciprocal.default pow.Tensor_Scalar clamp.default clamp_min.default clamp_max.default
        erf.default sin.default cos.default tan.default sign.default floor.default round.default add.Scalar
        sub.Scalar mul.Scalar div.Scalar rsub.Scalar zeros_like.default ones_like.default full_like.default
        ne.Scalar eq.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar logical_not.default bitwise_not.default
        type_as.default remainder.Scalar lift_fresh_copy.default zero.default fill.Scalar acos.default acosh.default
        asin.default asinh.default atan.default atanh.default cosh.default sinh.default celu.default ceil.default
        trunc.default frac.default erfc.default exp2.default log2.default log10.default log_sigmoid.default
        logit.default nan_to_num.default isnan.default isinf.default isfinite.default sgn.default signbit.default
        sinc.default hardshrink.default softshrink.default threshold.default deg2rad.default rad2deg.default
        round.decimals fmod.Scalar floor_divide.Scalar div.Scalar_mode copysign.Scalar special_entr.default
        """,
    ),
    **_aten(
        layout.elementwise,
        """
        add.Tensor addcmul.default sub.Tensor mul.Tensor div.Tensor div.Tensor_mode maximum.default minimum.default
        where.self where.ScalarOther where.ScalarSelf pow.Tensor_Tensor pow.Scalar masked_fill.Scalar
        masked_fill.Tensor eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor logical_and.default
        logical_or.default max.other min.other bitwise_and.Tensor bitwise_or.Tensor clamp.Tensor fill.Tensor
        expand_as.default copy.default floor_divide.default atan2.default hypot.default fmod.Tensor remainder.Tensor
        logaddexp.default logaddexp2.default xlogy.Tensor copysign.Tensor heaviside.default fmax.default fmin.default
        lerp.Scalar lerp.Tensor addcdiv.default rsub.Tensor logical_xor.default bitwise_xor.Tensor clamp_min.Tensor
        clamp_max.Tensor isclose.default
        """,
    ),
    **_aten(
        layout.move,
        """
        permute.default transpose.int swapaxes.default t.default unsqueeze.default squeeze.dim squeeze.dims
        expand.default stack.default repeat.default
        """,
    ),
    **_aten(layout.part(1), "slice.Tensor narrow.default"),
    **_aten(layout.part(2), "split.Tensor split.sizes split_with_sizes.default chunk.default"),
    **_aten(layout.reshape, "reshape.default flatten.using_ints unflatten.int"),
    **_aten(layout.reshape_as, "reshape_as.default"),
    **_aten(layout.pick(1, 0), "select.int unbind.int"),
    **_aten(layout.whole(2), "roll.default"),
    **_aten(layout.whole(1), "flip.default"),
    **_aten(layout.pad, "pad.default constant_pad_nd.default"),
    **_aten(layout.cat, "cat.default concat.default"),
    **_aten(layout.channel_shuffle, "channel_shuffle.default"),
    **_aten(layout.index, "index.Tensor"),
    **_aten(layout.index_select, "index_select.default"),
    **_aten(
        layout.made,
        """
        zeros.default ones.default full.default arange.default arange.start arange.start_step new_zeros.default
        new_ones.default new_full.default
        """,
    ),
    **_aten(
        layers.spatial,
        """
        max_pool1d.default max_pool2d.default max_pool3d.default avg_pool1d.default avg_pool2d.default
        avg_pool3d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default
        _adaptive_avg_pool2d.default upsample_bilinear2d.vec upsample_nearest2d.vec upsample_bicubic2d.vec
        reflection_pad1d.default reflection_pad2d.default reflection_pad3d.default replication_pad1d.default
        replication_pad2d.default replication_pad3d.default adaptive_max_pool1d.default adaptive_max_pool2d.default
        adaptive_max_pool3d.default max_pool2d_with_indices.default max_pool3d_with_indices.default
        upsample_nearest1d.vec upsample_nearest3d.vec upsample_linear1d.vec upsample_trilinear3d.vec
        _upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec _upsample_nearest_exact3d.vec
        _upsample_bilinear2d_aa.vec _upsample_bicubic2d_aa.vec
        """,
    ),
    **_aten(
        layers.reduce,
        """
        mean.default mean.dim sum.default sum.dim_IntList amax.default amin.default var.correction var.dim
        std.correction std.dim linalg_vector_norm.default norm.ScalarOpt_dim logsumexp.default any.dim
        any.dims all.dim all.dims prod.dim_int nansum.default
        """,
    ),
    **_aten(
        layers.along_axis,
        """
        softmax.int _softmax.default log_softmax.int _log_softmax.default _safe_softmax.default cumsum.default
        cumprod.default logcumsumexp.default
        """,
    ),
    **_aten(layers.layer_norm, "layer_norm.default rms_norm.default"),
    **_aten(layers.channel_norm, "batch_norm.default instance_norm.default"),
    **_aten(layers.group_norm, "group_norm.default"),
    **_aten(layers.prelu, "prelu.default"),
    **dict.fromkeys(CONVOLUTIONS, layers.conv),
    **_aten(layers.linear, "linear.default"),
    **_aten(layers.embedding, "embedding.default"),
    **dict.fromkeys(RECURRENT & ALLOWED, layers.recurrent),
    **_aten(layers.matmul, "matmul.default bmm.default mm.default"),
    **_aten(layers.attention, "scaled_dot_product_attention.default"),
    **_aten(layers.glu, "glu.default"),
    **_aten(layout.number, "sym_size.int"),
    **dict.fromkeys((op for op in ALLOWED if op.startswith("py.")), layout.number),
    "py.getitem": layout.getitem,
}
