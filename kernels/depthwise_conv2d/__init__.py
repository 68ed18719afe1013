"""The operator ``redpp::depthwise_conv2d``."""

from redpp_serve.kernels.depthwise_conv2d.operator import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
