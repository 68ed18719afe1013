"""Launch of the fused convolution's kernel for a Linear. Imported for CUDA tensors only."""

import math

import torch
from torch import Tensor

from redpp_serve.kernels.fused_conv2d.kernel import fused_conv2d_triton


def fused_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    positions: Tensor | None,
    channels: int,
    activation: str,
) -> Tensor:
    """Launches the kernel for arguments already checked; see `fused_linear.fused_linear`. fp32, fp16 or bf16."""
    rows = math.prod(x.shape[:-1])
    addend = None if residual is None else residual.reshape(rows, channels, 1, 1)
    window = (1, 1), (0, 0), (1, 1)
    out = fused_conv2d_triton(
        *(
            x.reshape(rows, x.shape[-1], 1, 1),
            weight.reshape(*weight.shape, 1, 1),
            bias,
            addend,
            positions,
            channels,
            activation,
            *window,
        ),
        tf32=torch.backends.cuda.matmul.allow_tf32,
    )
    return out.reshape(*x.shape[:-1], channels)
