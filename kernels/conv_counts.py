"""FLOP formula of the dense convolutions for torch's counter."""

from torch import Tensor


def conv2d_flops(x: Tensor, weight: Tensor, *rest: object, out_val: Tensor) -> int:
    """Two per multiply-accumulate, as torch counts its own convolutions: every tap at every output position.

    Serves `fused_conv2d` and `depthwise_conv2d`. Bias, residual and activation count nothing, duplicated channels
    neither: they are stored, not computed.
    """
    n, _, out_h, out_w = out_val.shape
    return 2 * n * out_h * out_w * weight.numel()
