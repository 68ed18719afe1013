"""Torch-Pruning's own pruner with L1 and FPGM importance, on the sets and the cost that all methods share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .coupled import CoupledNetwork
from .widths import layer_macs

_ROUNDS = 12


def importance(name: str) -> tp.importance.Importance:
    """``l1``: group L1 magnitude; ``fpgm``: distance to the geometric median. The library's defaults otherwise."""
    return {"l1": lambda: tp.importance.MagnitudeImportance(p=1), "fpgm": tp.importance.FPGMImportance}[name]()


def prune_uniformly(module: nn.Module, example: Tensor, widths: dict[str, int], name: str) -> nn.Module:
    """Widths (by the set's root) given through the library's dictionary of ratios."""
    ratios = {}
    network = CoupledNetwork(module, example)
    channels = {cls.root: cls.channels for cls in network.sets}
    for root, width in widths.items():  # half a channel more, so that no rounding of the ratio takes one too many
        ratios[root] = max(0.0, 1 - (width + 0.5) / channels[root])
    pruned = copy.deepcopy(module).eval()
    modules = dict(pruned.named_modules())
    by_module = {modules[root]: ratio for root, ratio in ratios.items()}
    _prune(pruned, example, name, network.closed, pruning_ratio=0.0, pruning_ratio_dict=by_module)
    return pruned


def prune_globally(module: nn.Module, example: Tensor, removed: float, round_to: int, name: str) -> nn.Module:
    """All channels ranked together; the ratio is searched so that the cost comes nearest to the target."""
    total = sum(layer_macs(module, example).values())
    closed = CoupledNetwork(module, example).closed
    low, high, best = 0.0, 1.0, (float("inf"), module)
    for _ in range(_ROUNDS):
        ratio = (low + high) / 2
        pruned = copy.deepcopy(module).eval()
        _prune(pruned, example, name, closed, global_pruning=True, pruning_ratio=ratio, round_to=round_to)
        got = total - sum(layer_macs(pruned, example).values())
        if abs(got - removed) < best[0]:
            best = abs(got - removed), pruned
        low, high = (ratio, high) if got < removed else (low, ratio)
    return best[1]


def _prune(module: nn.Module, example: Tensor, name: str, closed: Iterable[str], **how: Any) -> None:
    """One step of the library's pruner on ``module``; the sets whose roots are in ``closed`` are left alone."""
    names = dict(module.named_modules())
    ignored = [names[root] for root in closed]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp.pruner.BasePruner(module, example, importance(name), ignored_layers=ignored, **how).step()
