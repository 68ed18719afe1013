"""The operator ``redpp::fused_conv2d``."""

from redpp_serve.kernels.fused_conv2d.operator import fused_conv2d

__all__ = ["fused_conv2d"]
