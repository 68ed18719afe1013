"""Images from a network's own statistics, for peers that recalibrate without data.

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion" (CVPR 2020, arXiv 1912.08795), written
from the paper, without its classification loss: pixels are optimised until each batch norm sees the mean and variance
that it has stored, with a penalty on total variation and size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

_TOTAL_VARIATION, _SIZE = 1e-3, 1e-4
_RATE = 0.1
_FIRST = 10.0  # weight of the first norm, nearest to the pixels


def invert(module: nn.Module, shape: tuple[int, ...], count: int, steps: int, batch: int = 16) -> Tensor:
    """Return images (count, *shape) that match the batch-norm statistics of ``module``; they start from noise."""
    module = copy.deepcopy(module).eval().requires_grad_(False)
    terms: list[Tensor] = []
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for k, norm in enumerate(norms):
        norm.register_forward_pre_hook(_mismatch(terms, _FIRST if k == 0 else 1.0))
    generator = torch.Generator().manual_seed(0)
    made = []
    for size in (min(batch, count - done) for done in range(0, count, batch)):
        images = torch.randn(size, *shape, generator=generator).requires_grad_()
        optimiser = torch.optim.Adam([images], _RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            terms.clear()
            with torch.enable_grad():
                module(images)
                rough = images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()
                loss = torch.stack(terms).sum() + _TOTAL_VARIATION * rough + _SIZE * images.square().mean()
                (images.grad,) = torch.autograd.grad(loss, [images])
            optimiser.step()
            schedule.step()
        made.append(images.detach())
    return torch.cat(made)


def _mismatch(terms: list[Tensor], weight: float) -> Callable[..., None]:
    def hook(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        seen = inputs[0].transpose(0, 1).flatten(1)
        mean = (seen.mean(1) - norm.running_mean).norm()
        terms.append(weight * (mean + (seen.var(1) - norm.running_var).norm()))

    return hook
