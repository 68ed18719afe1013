"""Input-wise split of a convolution and of a linear layer in plain PyTorch: the definition of the operators.

Step 1 computes every unique product once (a depthwise convolution with one output per unique kernel), step 2 builds
each output by gathering and adding its products. Source: RED++ (arXiv 2110.01397), input-wise splitting.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.kernels.shapes import conv_output_size, working_dtype

# Elements of one temporary (64 MiB in fp32). A single image whose output is larger is not cut further.
ELEMENT_BUDGET = 1 << 24


class Tile(NamedTuple):
    """A rectangle of `index` (outputs x inputs of the group) and the range of unique kernels it refers to."""

    outputs: slice
    columns: slice
    first_row: int
    last_row: int


def split_conv2d_reference(
    x: Tensor,
    kernels: Tensor,
    channel: Tensor,
    index: Tensor,
    sign: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute a convolution from unique kernels; the arguments are those of `split_conv2d`.

    Half precisions are computed in fp32 and rounded once at the end. Temporaries hold at most `ELEMENT_BUDGET`
    elements, or one image's worth of the larger of the output and a single channel's products.

    Returns:
        (n, n_out, out_h, out_w), contiguous, in the dtype of `x`.
    """
    n, _, h, w = x.shape
    out_h, out_w = conv_output_size((h, w), kernels.shape[1:], stride, padding, dilation)
    result = x.new_empty((n, index.shape[0], out_h, out_w))
    work = working_dtype(x.dtype)
    offsets = _row_offsets(channel, x.shape[1])
    plane = max(h * w, out_h * out_w)
    images = _samples_per_chunk(offsets, index.shape[0], plane)

    for start in range(0, n, images):
        part = x[start : start + images].to(work)

        def products(first: int, last: int, part: Tensor = part) -> Tensor:
            picked, weight = part[:, channel[first:last]], kernels[first:last].to(work).unsqueeze(1)
            made = F.conv2d(picked, weight, None, list(stride), list(padding), list(dilation), last - first)
            return made.transpose(0, 1).reshape(last - first, -1)

        tiles = _tiles(offsets, index.shape, groups, ELEMENT_BUDGET // (plane * len(part)))
        total = _gather_sum(products, index, sign, tiles, len(part) * out_h * out_w, work)
        total = total.view(-1, len(part), out_h, out_w)
        if bias is not None:
            total += bias.to(work).view(-1, 1, 1, 1)
        result[start : start + images] = total.transpose(0, 1)
    return result


def split_linear_reference(
    x: Tensor, values: Tensor, channel: Tensor, index: Tensor, sign: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute a linear layer from unique values; the arguments are those of `split_linear`.

    Returns:
        (..., n_out), contiguous, in the dtype of `x`.
    """
    flat = x.reshape(-1, x.shape[-1])
    result = x.new_empty((len(flat), index.shape[0]))
    work = working_dtype(x.dtype)
    offsets = _row_offsets(channel, x.shape[-1])
    samples = _samples_per_chunk(offsets, index.shape[0], 1)

    for start in range(0, len(flat), samples):
        part = flat[start : start + samples].to(work)

        def products(first: int, last: int, part: Tensor = part) -> Tensor:
            return part.t()[channel[first:last]] * values[first:last].to(work).unsqueeze(1)

        tiles = _tiles(offsets, index.shape, 1, ELEMENT_BUDGET // len(part))
        total = _gather_sum(products, index, sign, tiles, len(part), work)
        if bias is not None:
            total += bias.to(work).unsqueeze(1)
        result[start : start + samples] = total.t()
    return result.view(*x.shape[:-1], index.shape[0])


def _row_offsets(channel: Tensor, n_in: int) -> list[int]:
    """Return the row at which each input channel's unique kernels begin, and at the end (n_in + 1) their number."""
    return torch.searchsorted(channel, torch.arange(n_in + 1, device=channel.device)).tolist()


def _samples_per_chunk(offsets: list[int], n_out: int, plane: int) -> int:
    most_rows = max((last - first for first, last in pairwise(offsets)), default=0)
    return max(1, ELEMENT_BUDGET // max(1, plane * max(most_rows, n_out)))


def _runs(bounds: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Pack intervals [bounds[i], bounds[i+1]) greedily into runs of total length <= limit, at least one interval."""
    start = 0
    while start < len(bounds) - 1:
        stop = max(start + 1, bisect_right(bounds, bounds[start] + limit) - 1)
        yield start, stop
        start = stop


def _tiles(offsets: list[int], index_shape: Sequence[int], groups: int, row_limit: int) -> Iterator[Tile]:
    """Cut `index` so that a tile refers to at most `row_limit` unique kernels (or to one input channel's)."""
    n_out, per_group = index_shape
    group_outputs = n_out // groups
    for first, last in _runs(offsets[::per_group], row_limit):
        outputs = slice(first * group_outputs, last * group_outputs)
        bounds = offsets[first * per_group : last * per_group + 1]
        if last - first > 1 or bounds[-1] - bounds[0] <= row_limit:
            yield Tile(outputs, slice(0, per_group), bounds[0], bounds[-1])
            continue
        for start, stop in _runs(bounds, row_limit):
            yield Tile(outputs, slice(start, stop), bounds[start], bounds[stop])


def _gather_sum(
    products: Callable[[int, int], Tensor],
    index: Tensor,
    sign: Tensor,
    tiles: Iterator[Tile],
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Sum sign * product over each output's inputs.

    `products(first, last)` returns rows first..last-1 as (last - first, width). An embedding bag is a gather-sum that
    never stores the gathered rows; pairs with index -1 are not part of a bag, so they cost nothing.

    Returns:
        (n_out, width).
    """
    total = torch.zeros((index.shape[0], width), dtype=dtype, device=index.device)
    for tile in tiles:
        if tile.last_row == tile.first_row:
            continue
        rows, factors = index[tile.outputs, tile.columns], sign[tile.outputs, tile.columns]
        counts = (rows >= 0).sum(1)
        kept = (rows >= 0).flatten().nonzero().squeeze(1)
        total[tile.outputs] += F.embedding_bag(
            rows.flatten()[kept].long() - tile.first_row,
            products(tile.first_row, tile.last_row),
            counts.cumsum(0) - counts,
            mode="sum",
            per_sample_weights=factors.flatten()[kept].to(dtype),
        )
    return total
