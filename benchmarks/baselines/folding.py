"""Model folding, written from its paper as a baseline of this project.

Wang, Sikic, Thiele and Saukh, "Forget the Data and Fine-Tuning! Just Fold the Network to Compress" (ICLR 2025,
arXiv 2502.10216): channels are clustered with k-means on the weights of every layer that a channel set touches; a
cluster becomes its mean and its readers' columns their sum. Means have less variance than what they replace, which
the paper repairs without data in one of two ways:

* Fold-AR (approximate repair): of n channels of unit variance with mean correlation c, the mean has the variance
  (1 + (n - 1) c) / n; c is taken to be the mean cosine of their weights, and the batch norm is scaled by the inverse.
* Fold-DIR (deep-inversion repair): the folded network's batch-norm statistics are estimated again, on images made
  from the original network's own statistics.

Both can take the weights as they are or normalised by the batch norm's statistics. Normalising raises the weights of
channels that hardly vary to the size of all others, which makes poor clusters on networks trained with weight decay;
so both settings are run, and the better one counts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .clusters import cluster, norm_rows, producer_rows, reader_columns
from .coupled import NORMS, CoupledNetwork, Member
from .merging import absorb_norms

_LEAST_VARIANCE = 1e-3  # of a mean of channels, relative to theirs, where their weights cancel


def fold_labels(
    module: nn.Module, example: Tensor, widths: dict[str, int], normalise: bool, seed: int = 0
) -> dict[str, Tensor]:
    """Which channels of each channel set are folded together, by root; ``widths`` by root."""
    network = CoupledNetwork(module, example)
    if normalise:
        absorb_norms(network, scale=False)
    labels = {}
    for cls in network.sets:
        members = network.members(cls)
        features = torch.cat([producer_rows(members), norm_rows(members), reader_columns(members)], 1)
        labels[cls.root] = cluster(features, widths[cls.root], seed)
    return labels


def fold(
    module: nn.Module, example: Tensor, labels: dict[str, Tensor], normalise: bool = False, repair: bool = False
) -> nn.Module:
    """Fold every channel set by its labels; with ``repair`` by the approximate repair (Fold-AR), else with none.

    ``normalise``: average rows that the batch norm's statistics have been moved into.
    """
    network = CoupledNetwork(module, example)
    if normalise:
        absorb_norms(network, scale=False)
    if repair:
        _expect_variances(network, labels)
    for cls in network.sets:
        network.merge(cls, labels[cls.root])
    return network.module


@torch.no_grad()
def _expect_variances(network: CoupledNetwork, labels: dict[str, Tensor]) -> None:
    """Give every norm, for all channels of a cluster, the variance that the cluster's mean is expected to have."""
    followers = {norm: layer for layer, norm in network.followers().items()}
    found = []  # all first: a norm behind a concatenation belongs to several sets
    for cls in network.sets:
        members = network.members(cls)
        found += [
            (norm, _mean_variance(norm, members, labels[cls.root], followers.get(norm.module)))
            for norm in members
            if norm.is_norm
        ]
    for member, variance in found:
        member.module.running_var.data[member.spots] = variance[:, None].expand_as(member.spots)


def _mean_variance(norm: Member, members: Sequence[Member], labels: Tensor, before: nn.Module | None) -> Tensor:
    """(channels,): a mean of channels with deviations s and correlations c has the variance mean(s_i s_j c_ij).

    The cosines are those of the layer right ``before`` the norm, or of all producers where there is no such layer.
    """
    rows = producer_rows([m for m in members if m.is_producer and m.module is before] or members)
    rows = nn.functional.normalize(rows.double(), dim=1)
    variance = norm.module.running_var.double()[norm.spots].mean(1)
    weighted = rows * variance.sqrt()[:, None]
    expected = variance.clone()
    for label in labels.unique():
        inside = labels == label
        floor = _LEAST_VARIANCE * variance[inside].mean()
        expected[inside] = torch.maximum(weighted[inside].mean(0).square().sum(), floor)
    return expected.to(norm.module.running_var.dtype)


@torch.no_grad()
def estimate_statistics(module: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose batch norms hold the mean and variance that they see on ``images`` (n, ...), all at once."""
    module = copy.deepcopy(module)
    norms = [m for m in module.modules() if isinstance(m, NORMS)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # of a single batch: its own statistics
        norm.train()
    module(images)
    return module.eval()
