"""The operators ``redpp::split_conv2d`` and ``redpp::split_linear``."""

from redpp_serve.kernels.split.operator import split_conv2d, split_linear

__all__ = ["split_conv2d", "split_linear"]
