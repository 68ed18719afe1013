"""Operators of the serving side, as `torch.ops.redpp.*`: one schema each, with a fake, a reference and GPU kernels.

The modules of this package are copied as they are into archives that run without redpp-serve: they import nothing
but the standard library, torch and, when a CUDA tensor comes in, triton.
"""

from redpp_serve.kernels.codebook_linear.operator import codebook_linear
from redpp_serve.kernels.codebook_linear.packing import pack_indices
from redpp_serve.kernels.depthwise_conv2d.operator import depthwise_conv2d
from redpp_serve.kernels.fused_conv2d.operator import fused_conv2d
from redpp_serve.kernels.fused_linear.operator import fused_linear
from redpp_serve.kernels.split.operator import split_conv2d, split_linear

__all__ = [
    "codebook_linear",
    "depthwise_conv2d",
    "fused_conv2d",
    "fused_linear",
    "pack_indices",
    "split_conv2d",
    "split_linear",
]
