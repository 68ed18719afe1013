"""Coupled channels of a module, found by Torch-Pruning, so that every peer prunes the very same sets.

A channel set is everything that the output channels of one convolution or Linear drag along: other producers of the
same residual stream, batch norms, depthwise filters, gates, and the input columns of every reader. A set is open if its
channels can be averaged and summed; layer norms, attention, grouped convolutions and network outputs close theirs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.ops import OPTYPE

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_CLOSED_OPS = {
    OPTYPE.SPLIT: "split",
    OPTYPE.UNBIND: "unbind",
    OPTYPE.SLICE: "slice",
    OPTYPE.EXPAND: "expand",
    OPTYPE.OUTPUT: "network output",
    OPTYPE.PARAMETER: "a bare parameter",
}


@dataclass(frozen=True)
class Member:
    """A layer that a set touches. ``spots`` (channels, n) int64: which of the layer's own output channels (``out``)
    or input columns belong to each channel of the channel set; n is above 1 behind a flatten."""

    name: str
    module: nn.Module
    out: bool
    spots: Tensor

    @property
    def is_norm(self) -> bool:
        return isinstance(self.module, NORMS)

    @property
    def is_producer(self) -> bool:
        """Its rows make the channel set's channels (a depthwise filter counts)."""
        return self.out and not self.is_norm


@dataclass(frozen=True)
class ChannelSet:
    """Coupled channels under the name of the layer that makes them first."""

    root: str
    channels: int


class CoupledNetwork:
    """A copy of a module whose channel sets can be merged or dropped, in place.

    Args:
        module: in eval mode; it is left as it is.
        example: one batched input (1, ...).

    ``sets`` are the open ones in order of execution, ``closed`` gives the others' reasons by root.
    """

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        self.module = copy.deepcopy(module).eval()
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells of bare parameters, whose sets are closed here
            self.graph = tp.DependencyGraph().build_dependency(self.module, example_inputs=example)
            groups = list(self.graph.get_all_groups())
        self.names = {m: name for name, m in self.module.named_modules()}
        self.modules = dict(self.module.named_modules())
        self.sets: list[ChannelSet] = []
        self.closed: dict[str, str] = {}
        for group in groups:
            root = self.names[group[0].dep.target.module]
            reason = self._closed_because(group)
            if reason:
                self.closed[root] = reason
            else:
                self.sets.append(ChannelSet(root, len(group[0].idxs)))

    def members(self, cls: ChannelSet) -> list[Member]:
        """The layers with weights that the channel set touches, as they are now."""
        return self._members(self._group(cls, range(self._width(cls))))

    def keep(self, cls: ChannelSet, kept: Sequence[int]) -> None:
        """Drop every channel of the channel set that is not in ``kept``."""
        dropped = sorted(set(range(self._width(cls))) - set(kept))
        if dropped:
            self._group(cls, dropped).prune()

    def merge(self, cls: ChannelSet, labels: Tensor) -> None:
        """One channel for each value of ``labels`` (channels,): rows and norms averaged, readers' columns summed."""
        clusters = [(labels == label).nonzero().view(-1) for label in labels.unique()]
        with torch.no_grad():
            for member in self.members(cls):
                for cluster in clusters:
                    if len(cluster) > 1:
                        _merge_member(member, cluster)
        self.keep(cls, [int(cluster[0]) for cluster in clusters])

    def followers(self) -> dict[nn.Module, nn.Module]:
        """For each convolution or Linear whose output only a batch norm reads, that batch norm."""
        pairs = {}
        for module, node in self.graph.module2node.items():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and len(node.outputs) == 1:
                reader = node.outputs[0]
                if isinstance(reader.module, NORMS) and len(reader.inputs) == 1:
                    pairs[module] = reader.module
        return pairs

    def _width(self, cls: ChannelSet) -> int:
        return self.graph.get_out_channels(self.modules[cls.root])

    def _group(self, cls: ChannelSet, channels: Sequence[int]) -> tp.Group:
        root = self.modules[cls.root]
        prune = self.graph.get_pruner_of_module(root).prune_out_channels
        return self.graph.get_pruning_group(root, prune, list(channels))

    def _members(self, group: tp.Group) -> list[Member]:
        members = []
        for item in group:
            module = item.dep.target.module
            if isinstance(module, (nn.Conv2d, nn.Linear, *NORMS)):
                order = torch.tensor(item.root_idxs).argsort(stable=True)
                spots = torch.tensor(item.idxs)[order].view(len(group[0].idxs), -1)
                out = self.graph.is_out_channel_pruning_fn(item.dep.handler)
                members.append(Member(self.names[module], module, out, spots))
        return members

    def _closed_because(self, group: tp.Group) -> str:
        for item in group:
            module, kind = item.dep.target.module, item.dep.target.type
            if kind in _CLOSED_OPS:
                return _CLOSED_OPS[kind]
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                grouped = isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module)
                if grouped:
                    return "a grouped convolution"
            elif not isinstance(module, NORMS) and any(True for _ in module.parameters()):
                return type(module).__name__
        if not any(not member.out for member in self._members(group)):
            return "network output"
        return ""


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def _merge_member(member: Member, cluster: Tensor) -> None:
    module, spots = member.module, member.spots[cluster]  # (size, n)
    if not member.out:
        columns = module.weight.data.transpose(0, 1)  # a view: writes reach the weight
        columns[spots[0]] = columns[spots].sum(0)
        return
    parts = [module.weight, module.bias]
    if member.is_norm:
        parts += [module.running_mean, module.running_var]
    for part in parts:
        if part is not None:
            part.data[spots[0]] = part.data[spots].mean(0)
