"""The operator ``redpp::codebook_linear``."""

from redpp_serve.kernels.codebook_linear.operator import codebook_linear

__all__ = ["codebook_linear"]
