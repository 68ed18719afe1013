"""Baselines that bring channel sets to given widths without data: by chance, and by means of clusters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .clusters import cluster, producer_rows
from .coupled import CoupledNetwork


def random_channels(module: nn.Module, example: Tensor, widths: dict[str, int], seed: int) -> nn.Module:
    """Keep channels by chance; ``widths`` by the set's root."""
    network = CoupledNetwork(module, example)
    generator = torch.Generator().manual_seed(seed)
    for cls in network.sets:
        order = torch.randperm(cls.channels, generator=generator)
        network.keep(cls, sorted(order[: widths[cls.root]].tolist()))
    return network.module


def cluster_mean(
    module: nn.Module, example: Tensor, widths: dict[str, int], absorb: bool = False, seed: int = 0
) -> nn.Module:
    """k-means of the rows that make a channel set's channels; rows and norms averaged, readers' columns summed.

    With ``absorb`` a batch norm that directly follows its layer first becomes part of that layer's rows, so that the
    mean is taken of what the next layer sees.
    """
    network = CoupledNetwork(module, example)
    if absorb:
        absorb_norms(network, scale=True)
    labels = {cls.root: cluster(producer_rows(network.members(cls)), widths[cls.root], seed) for cls in network.sets}
    for cls in network.sets:
        network.merge(cls, labels[cls.root])
    return network.module


@torch.no_grad()
def absorb_norms(network: CoupledNetwork, scale: bool) -> None:
    """Move batch norms into the layers they directly follow; the function stays the same.

    The statistics always move: mean 0, variance 1 stay behind, so a row then has the scale of one output deviation.
    With ``scale`` the norm's own scale and shift move too (shift into a bias); without it they stay in the norm.
    """
    for layer, norm in network.followers().items():
        deviation = (norm.running_var + norm.eps).sqrt()
        mean = norm.running_mean if layer.bias is None else norm.running_mean - layer.bias
        shift = -mean / deviation
        gamma = torch.ones_like(deviation) if norm.weight is None else norm.weight.data.clone()
        beta = torch.zeros_like(deviation) if norm.bias is None else norm.bias.data.clone()
        factor = gamma / deviation if scale else 1 / deviation
        layer.weight.data *= factor.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias = None
        if scale:
            layer.bias = nn.Parameter(beta + gamma * shift)
            gamma, beta = torch.ones_like(gamma), torch.zeros_like(beta)
        else:
            beta = beta + gamma * shift
        norm.weight, norm.bias = nn.Parameter(gamma), nn.Parameter(beta)
        norm.running_mean.zero_()
        norm.running_var.fill_(1 - norm.eps)
