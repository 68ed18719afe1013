"""How wide each channel set becomes for a given number of multiply-accumulates: one ratio for all, in steps of 8."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .coupled import ChannelSet, CoupledNetwork, Member, is_depthwise


def layer_macs(module: nn.Module, example: Tensor) -> dict[str, int]:
    """Multiply-accumulates of every convolution and Linear for one input (1, ...), by name."""
    macs: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            channels = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
            macs[name] = macs.get(name, 0) + output.numel() // channels * layer.weight.numel()

        return hook

    handles = [
        layer.register_forward_hook(count(name))
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        module(example)
    for handle in handles:
        handle.remove()
    return macs


@dataclass(frozen=True)
class CostModel:
    """What the layers cost when sets get narrower.

    ``uses`` holds for each layer with an open set: its multiply-accumulates now, and the shares of its rows and of its
    columns that belong to each set, by the set's root. ``inner`` are the roots of sets with a single
    producer, depthwise filters and gates apart: all but residual streams.
    """

    sets: tuple[ChannelSet, ...]
    uses: dict[str, tuple[int, dict[str, float], dict[str, float]]]
    inner: frozenset[str]

    @property
    def open_macs(self) -> int:
        """Of all layers that touch an open channel set."""
        return sum(macs for macs, _, _ in self.uses.values())

    def removed(self, widths: dict[str, int]) -> float:
        """Multiply-accumulates saved by these widths (by root; a channel set that is left out stays)."""
        gone = {cls.root: 1 - widths.get(cls.root, cls.channels) / cls.channels for cls in self.sets}
        saved = 0.0
        for macs, rows, columns in self.uses.values():
            left = 1.0
            for shares in (rows, columns):
                left *= 1 - sum(share * gone[root] for root, share in shares.items())
            saved += macs * (1 - left)
        return saved


def cost_model(network: CoupledNetwork, example: Tensor) -> CostModel:
    """The model of a network that nothing has been taken out of yet; ``example`` is one batched input (1, ...)."""
    macs = layer_macs(network.module, example)
    uses: dict[str, tuple[int, dict[str, float], dict[str, float]]] = {}
    inner = set()
    for cls in network.sets:
        members = network.members(cls)
        if _producers(members, macs) == 1:
            inner.add(cls.root)
        for member in members:
            if member.is_norm:
                continue
            _, rows, columns = uses.setdefault(member.name, (macs[member.name], {}, {}))
            if is_depthwise(member.module):
                rows[cls.root] = member.spots.numel() / member.module.out_channels
            else:
                size = member.module.weight.shape[0 if member.out else 1]
                (rows if member.out else columns)[cls.root] = member.spots.numel() / size
    return CostModel(tuple(network.sets), uses, frozenset(inner))


def _producers(members: Sequence[Member], macs: dict[str, int]) -> int:
    """Count the layers that write a set's channels; gates, of one position, count only where nothing else does."""
    writers = [m for m in members if m.is_producer and not is_depthwise(m.module)]
    positions = [macs[m.name] // m.module.weight.numel() for m in writers]
    return sum(p == max(positions) for p in positions) if max(positions) == 1 else sum(p > 1 for p in positions)


def spreads(model: CostModel, removed: float, round_to: int, near: float) -> Iterator[tuple[str, dict[str, int]]]:
    """The usual ways to spread a ratio: over all sets, and over inner channels only, with residual streams left
    whole, where that comes within ``near`` multiply-accumulates of the target and differs."""
    everywhere = uniform_widths(model, removed, round_to)
    yield "all sets", everywhere
    inside = uniform_widths(model, removed, round_to, model.inner)
    if inside != everywhere and abs(model.removed(inside) - removed) <= near:
        yield "inner channels", inside


def uniform_widths(
    model: CostModel, removed: float, round_to: int, roots: frozenset[str] | None = None
) -> dict[str, int]:
    """Return widths by root that keep one share of every set, as near to ``removed`` operations as steps allow.

    Only the sets in ``roots`` change, if given.

    One more or one less step of all sets alike is coarse where layers are narrow. So the sets take the last
    step one by one, the most expensive first, while the saving stays within ``removed``; the smallest of the others
    follows where that is nearer.
    """
    changing = [cls for cls in model.sets if roots is None or cls.root in roots]
    whole = {cls.root: cls.channels for cls in model.sets}
    steps = {step / cls.channels for cls in changing for step in range(round_to, cls.channels, round_to)}
    shares = sorted(steps | {1.0})
    at = [{**whole, **{cls.root: _width(cls, share, round_to) for cls in changing}} for share in shares]
    low = max((k for k in range(len(at)) if model.removed(at[k]) >= removed), default=0)
    if low + 1 == len(at):
        return at[low]
    narrow, widths = at[low], dict(at[low + 1])
    if model.removed(narrow) <= removed:
        return narrow
    left = sorted(
        (cls.root for cls in changing if narrow[cls.root] < widths[cls.root]),
        key=lambda root: -model.removed({**widths, root: narrow[root]}),
    )
    for root in left:
        tried = {**widths, root: narrow[root]}
        if model.removed(tried) <= removed:
            widths = tried
    over = [{**widths, root: narrow[root]} for root in left if widths[root] > narrow[root]]
    return min([widths, *over], key=lambda w: abs(model.removed(w) - removed))


def _width(cls: ChannelSet, share: float, round_to: int) -> int:
    steps = max(1, math.ceil(round(share * cls.channels / round_to, 6)))
    return min(cls.channels, steps * round_to)
