"""Operators of the serving side, as `torch.ops.redpp.*`: one schema each, with a fake, a reference and GPU kernels.

The modules of this package are copied as they are into archives that run without redpp-serve: they import nothing
but the standard library, torch and, when a CUDA tensor comes in, triton.
"""

from .codebook_linear import codebook_linear
from .codebook_packing import pack_indices, unpack_indices
from .depthwise_conv2d import depthwise_conv2d
from .fused_conv2d import fused_conv2d
from .fused_linear import fused_linear
from .split import split_conv2d, split_linear
from .split_counts import OperationCounts, register_flop_formulas, split_conv2d_counts, split_linear_counts

__all__ = [
    "OperationCounts",
    "codebook_linear",
    "depthwise_conv2d",
    "fused_conv2d",
    "fused_linear",
    "pack_indices",
    "register_flop_formulas",
    "split_conv2d",
    "split_conv2d_counts",
    "split_linear",
    "split_linear_counts",
    "unpack_indices",
]
