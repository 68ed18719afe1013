"""The operator ``redpp::fused_linear``."""

from redpp_serve.kernels.fused_linear.operator import fused_linear

__all__ = ["fused_linear"]
