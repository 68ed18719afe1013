"""Classes of coupled channels: what must be kept or taken out together, and where it lies in a network's tensors.

One channel of a class is everything that computes or scales it (rows of each producer's weight, entries of biases
and norms, filters of depthwise convolutions) and everything that reads it (columns of each reader's weight).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A tensor that holds something of each channel: channel c has the entries ``positions[c]`` of dimension ``dim``.

    ``positions`` is (channels, m) int64; m is 1, or the size of a group or head.
    """

    tensor: str
    dim: int
    positions: Tensor


@dataclass(frozen=True)
class Reader:
    """A call that sums over the channels: entries ``positions[c]`` (channels, m) of dimension ``dim`` of its weight
    multiply the same entries of axis ``axis`` of ``value``, its input.

    m is 1, or H * W behind a flatten, or the size of a group or head. Other entries may belong to other classes.
    """

    node: str
    tensor: str
    dim: int
    value: str
    axis: int
    positions: Tensor


@dataclass(frozen=True)
class ChannelClass:
    """One class. ``name`` is its first producer's layer name; ``producers`` are layer names in order of execution.

    ``closed`` is the reason why these channels must stay, empty for an open class.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    parts: tuple[Part, ...]
    readers: tuple[Reader, ...]
    closed: str = ""
