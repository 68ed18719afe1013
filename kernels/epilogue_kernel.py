"""The activations of `epilogue` in Triton, on fp32 sums in registers."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``epilogue.ACTIVATIONS[ACTIVATION]`` of a block of fp32 values."""
    if ACTIVATION == "none":
        result = x
    elif ACTIVATION == "relu":
        result = tl.where(x < 0.0, 0.0, x)  # NaN stays NaN, as in torch
    elif ACTIVATION == "relu6":
        result = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACTIVATION == "silu":
        result = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        result = x * tl.sigmoid(2.0 * inner)  # (1 + tanh(a)) / 2 = sigmoid(2 a)
    elif ACTIVATION == "sigmoid":
        result = tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "hardswish" or ACTIVATION == "hardsigmoid")
        gate = x / 6.0 + 0.5
        gate = tl.where(gate < 0.0, 0.0, tl.where(gate > 1.0, 1.0, gate))
        result = x * gate if ACTIVATION == "hardswish" else gate
    return result
