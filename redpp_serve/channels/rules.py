"""How channels pass through each operator, by its name. An operator that is not here closes what it reads."""

from __future__ import annotations

from redpp_serve.channels.rules_layers import (
    along_axis,
    attention,
    channel_norm,
    conv,
    glu,
    group_norm,
    layer_norm,
    linear,
    matmul,
    prelu,
    reduce,
    spatial,
    spatial_with_indices,
)
from redpp_serve.channels.rules_layout import (
    Rule,
    cat,
    channel_shuffle,
    elementwise,
    getitem,
    index,
    index_select,
    made,
    move,
    number,
    pad,
    part,
    pick,
    reshape,
    reshape_as,
    same,
    whole,
)


def _aten(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


RULES: dict[str, Rule] = {
    **_aten(
        same,
        """
        relu.default relu6.default hardtanh.default silu.default gelu.default hardswish.default hardsigmoid.default
        sigmoid.default tanh.default leaky_relu.default elu.default selu.default mish.default softplus.default
        clone.default contiguous.default to.dtype _to_copy.default neg.default abs.default exp.default expm1.default
        log.default log1p.default sqrt.default rsqrt.default reciprocal.default pow.Tensor_Scalar clamp.default
        clamp_min.default clamp_max.default erf.default sin.default cos.default tan.default sign.default floor.default
        round.default add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar zeros_like.default ones_like.default
        full_like.default ne.Scalar eq.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar logical_not.default
        bitwise_not.default type_as.default remainder.Scalar lift_fresh_copy.default zero.default fill.Scalar
    """,
    ),
    **_aten(
        elementwise,
        """
        add.Tensor addcmul.default sub.Tensor mul.Tensor div.Tensor div.Tensor_mode maximum.default minimum.default where.self
        where.ScalarOther where.ScalarSelf pow.Tensor_Tensor pow.Scalar masked_fill.Scalar masked_fill.Tensor eq.Tensor
        ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor logical_and.default logical_or.default max.other min.other
        bitwise_and.Tensor bitwise_or.Tensor clamp.Tensor fill.Tensor expand_as.default copy.default
        floor_divide.default
    """,
    ),
    **_aten(
        move,
        """
        permute.default transpose.int swapaxes.default t.default unsqueeze.default squeeze.dim squeeze.dims
        expand.default stack.default repeat.default
    """,
    ),
    **_aten(part(1), "slice.Tensor narrow.default"),
    **_aten(part(2), "split.Tensor split.sizes split_with_sizes.default chunk.default"),
    **_aten(reshape, "reshape.default flatten.using_ints unflatten.int"),
    **_aten(pick(1, 0), "select.int unbind.int"),
    **_aten(whole(2), "roll.default"),
    **_aten(whole(1), "flip.default"),
    **_aten(pad, "pad.default constant_pad_nd.default"),
    **_aten(cat, "cat.default concat.default"),
    **_aten(
        made,
        """
        zeros.default ones.default full.default arange.default arange.start arange.start_step new_zeros.default
        new_ones.default new_full.default
    """,
    ),
    **_aten(
        spatial,
        """
        max_pool1d.default max_pool2d.default max_pool3d.default avg_pool1d.default avg_pool2d.default
        avg_pool3d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default
        _adaptive_avg_pool2d.default upsample_bilinear2d.vec upsample_nearest2d.vec upsample_bicubic2d.vec
        reflection_pad2d.default replication_pad2d.default
    """,
    ),
    **_aten(spatial_with_indices, "adaptive_max_pool2d.default max_pool2d_with_indices.default"),
    **_aten(
        reduce,
        """
        mean.default mean.dim sum.default sum.dim_IntList amax.default amin.default var.correction var.dim
        std.correction std.dim linalg_vector_norm.default norm.ScalarOpt_dim logsumexp.default any.dim
    """,
    ),
    **_aten(
        along_axis,
        """
        softmax.int _softmax.default log_softmax.int _log_softmax.default cumsum.default
    """,
    ),
    **_aten(layer_norm, "layer_norm.default rms_norm.default"),
    **_aten(channel_norm, "batch_norm.default instance_norm.default"),
    **_aten(
        conv,
        """
        conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv_transpose1d.default
        conv_transpose2d.input convolution.default
    """,
    ),
    **_aten(matmul, "matmul.default bmm.default mm.default"),
    "aten.linear.default": linear,
    "aten.scaled_dot_product_attention.default": attention,
    "aten.glu.default": glu,
    "aten.group_norm.default": group_norm,
    "aten.prelu.default": prelu,
    "aten.channel_shuffle.default": channel_shuffle,
    "aten.index.Tensor": index,
    "aten.index_select.default": index_select,
    "aten.reshape_as.default": reshape_as,
    "aten.sym_size.int": number,
    "py.getitem": getitem,
    **{
        f"py.{name}": number
        for name in ["add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge"]
    },
}
