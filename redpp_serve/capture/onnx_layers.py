"""Rules for ONNX's layers with windows, norms and resizing: how each is computed with torch's operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from redpp_serve.capture.onnx_call import Call, UnsupportedError, like
from redpp_serve.capture.onnx_file import Array

Pads = list[tuple[int, int]]  # before and after, for each spatial dimension

_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG_POOLS: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_TO_ONE: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def conv(call: Call) -> Tensor:
    """Compute Conv; padding that is not the same on both sides is a step of its own."""
    x, weight = call.x(), call.x(1)
    spatial = _spatial(x)
    strides, dilations = _each(call, "strides", spatial), _each(call, "dilations", spatial)
    pads = _pads(call, x, list(weight.shape[2:]), strides, dilations)
    x, padding = _padded(x, pads, 0.0)
    bias = call.x(2) if call.has(2) else None
    return _CONVS[spatial - 1](x, weight, bias, strides, padding, dilations, call.attribute("group", 1))


def conv_transpose(call: Call) -> Tensor:
    """Compute ConvTranspose; what uneven padding removes is cut off."""
    x, weight = call.x(), call.x(1)
    spatial, kernel = _spatial(x), list(weight.shape[2:])
    strides, dilations = _each(call, "strides", spatial), _each(call, "dilations", spatial)
    extra = call.attribute("output_padding") or [0] * spatial
    full = [
        s * (n - 1) + p + (k - 1) * d + 1
        for s, n, p, k, d in zip(strides, x.shape[2:], extra, kernel, dilations, strict=True)
    ]
    auto = call.attribute("auto_pad", "NOTSET")
    wanted = call.attribute("output_shape")
    if wanted is None and auto.startswith("SAME"):
        wanted = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        totals = [max(0, size - want) for size, want in zip(full, wanted[-spatial:], strict=True)]
        pads = [_halves(total, late=auto == "SAME_UPPER") for total in totals]
    else:
        pads = _explicit(call, spatial)
    bias = call.x(2) if call.has(2) else None
    even = all(before == after for before, after in pads)
    padding = [before for before, _ in pads] if even else [0] * spatial
    y = _TRANSPOSED[spatial - 1](x, weight, bias, strides, padding, extra, call.attribute("group", 1), dilations)
    for at, (before, after) in enumerate(pads if not even else []):
        y = y.narrow(at + 2, before, full[at] - before - after)
    return y


def max_pool(call: Call) -> Tensor:
    """Compute MaxPool without its indices."""
    if len([name for name in call.node.outputs if name]) > 1:
        raise UnsupportedError("returns the places of the largest values")
    x, kernel = call.x(), list(call.attribute("kernel_shape"))
    spatial = _spatial(x)
    strides, dilations = _each(call, "strides", spatial), _each(call, "dilations", spatial)
    x, padding = _padded(x, _pads(call, x, kernel, strides, dilations), -math.inf, kernel)
    ceil = bool(call.attribute("ceil_mode", 0))
    pooled: Tensor = _MAX_POOLS[spatial - 1](x, kernel, strides, padding, dilations, ceil)
    return pooled


def average_pool(call: Call) -> Tensor:
    """Compute AveragePool; uneven padding that does not count divides by the numbers in each window."""
    x, kernel = call.x(), list(call.attribute("kernel_shape"))
    spatial = _spatial(x)
    strides = _each(call, "strides", spatial)
    if set(_each(call, "dilations", spatial)) != {1}:
        raise UnsupportedError("has dilations")
    pads = _pads(call, x, kernel, strides, [1] * spatial)
    ceil, counts = bool(call.attribute("ceil_mode", 0)), bool(call.attribute("count_include_pad", 0))
    pool = _AVG_POOLS[spatial - 1]
    padded, padding = _padded(x, pads, 0.0, kernel)
    if padded is x or counts:
        return pool(padded, kernel, strides, padding, ceil, counts)
    ones, _ = _padded(torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device), pads, 0.0, kernel)
    return pool(padded, kernel, strides, 0, ceil) / pool(ones, kernel, strides, 0, ceil)


def global_average_pool(call: Call) -> Tensor:
    """Compute GlobalAveragePool."""
    x = call.x()
    return _TO_ONE[_spatial(x) - 1](x, 1)


def batch_norm(call: Call) -> Tensor:
    """Compute BatchNormalization by its stored statistics."""
    if call.attribute("training_mode", 0) or call.attribute("spatial", 1) != 1:
        raise UnsupportedError("normalises by the statistics of the batch")
    mean, variance = (call.x(at, trained=False) for at in (3, 4))
    return F.batch_norm(call.x(), mean, variance, call.x(1), call.x(2), False, 0.0, call.attribute("epsilon", 1e-5))


def instance_norm(call: Call) -> Tensor:
    """Compute InstanceNormalization."""
    return F.instance_norm(call.x(), weight=call.x(1), bias=call.x(2), eps=call.attribute("epsilon", 1e-5))


def layer_norm(call: Call) -> Tensor:
    """Compute LayerNormalization."""
    x = call.x()
    shape = list(x.shape[call.attribute("axis", -1) % x.dim() :])
    weight, bias = (call.x(at).reshape(shape) if call.has(at) else None for at in (1, 2))
    return F.layer_norm(x, shape, weight, bias, call.attribute("epsilon", 1e-5))


def rms_norm(call: Call) -> Tensor:
    """Compute RMSNormalization."""
    x = call.x()
    shape = list(x.shape[call.attribute("axis", -1) % x.dim() :])
    return F.rms_norm(x, shape, call.x(1).reshape(shape), call.attribute("epsilon", 1e-5))


def group_norm(call: Call) -> Tensor:
    """Compute GroupNormalization; before opset 21 the scale is one for each group."""
    x, groups = call.x(), call.attribute("num_groups")
    weight, bias = call.x(1), call.x(2)
    if call.opset < 21:
        weight, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (weight, bias))
    return F.group_norm(x, groups, weight, bias, call.attribute("epsilon", 1e-5))


def local_response_norm(call: Call) -> Tensor:
    """Compute LRN."""
    alpha, beta, bias = (call.attribute(n, d) for n, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    return F.local_response_norm(call.x(), call.attribute("size"), alpha, beta, bias)


def pad(call: Call) -> Tensor:
    """Compute Pad; the batch is never padded."""
    x = call.x()
    rank = x.dim()
    numbers = call.ints(1) if call.has(1) else call.attribute("pads")
    axes = call.ints(3) if call.has(3) else list(range(rank))
    pads: Pads = [(0, 0)] * rank
    for at, axis in enumerate(axes):
        pads[axis] = numbers[at], numbers[at + len(axes)]
    if not any(chain(*pads)):
        return x
    mode = call.attribute("mode", "constant")
    if mode == "constant":
        value = call.number(2, 0.0) if call.has(2) else call.attribute("value", 0.0)
        return F.pad(x, _flat(pads), value=value)
    first = next(at for at, each in enumerate(pads) if any(each))
    if first < rank - 3 or rank < 3:
        raise UnsupportedError(f"pads by mode {mode} what torch does not")
    first = max(first, 2) if rank > 2 else first
    return F.pad(x, _flat(pads[first:]), {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}[mode])


def resize(call: Call) -> Tensor:
    """Compute Resize or Upsample of spatial dimensions, along one after the other where torch has no such operator."""
    x = call.x()
    upsample = call.node.op == "Upsample"
    scales_at = 1 if upsample or call.opset < 11 else 2
    scales: list[float] | None = call.attribute("scales")
    if call.has(scales_at) and call.known(scales_at).size:
        scales = [float(v) for v in call.known(scales_at)]
    sizes = call.ints(3) if call.has(3) else None
    axes = call.attribute("axes") or list(range(x.dim()))
    if call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch" or call.attribute("antialias", 0):
        raise UnsupportedError("keeps proportions or smooths while it shrinks")
    mode = call.attribute("mode", "nearest")
    place = call.attribute("coordinate_transformation_mode", "half_pixel" if call.opset > 10 else "asymmetric")
    changed: list[tuple[int, int, float]] = []  # axis, new size, scale
    for at, axis in enumerate(axes):
        if axis % x.dim() < 2 and (scales is None or scales[at] == 1):
            continue  # batch and channels, whose sizes are those that there are
        old = int(x.shape[axis])
        scale = scales[at] if scales is not None else sizes[at] / old if sizes else 1.0
        size = int(sizes[at]) if sizes else math.floor(old * scale)
        if size != old or scale != 1:
            changed.append((axis % x.dim(), size, scale))
    if mode == "nearest":
        return _nearest(call, x, changed, place)
    if mode == "cubic" and call.attribute("cubic_coeff_a", -0.75) != -0.75:
        raise UnsupportedError("interpolates with a coefficient of its own")
    exact = all(size == x.shape[axis] * scale for axis, size, scale in changed)
    native = place in ("align_corners", "half_pixel") or (place == "pytorch_half_pixel" and exact)
    if native and exact and x.dim() == 4 and {axis for axis, _, _ in changed} <= {2, 3}:
        size = list(x.shape[2:])
        for axis, new, _ in changed:
            size[axis - 2] = new
        name = "bilinear" if mode == "linear" else "bicubic"
        return F.interpolate(x, size, mode=name, align_corners=place == "align_corners")
    if mode != "linear":
        raise UnsupportedError(f"interpolates by mode {mode} with {place}")
    for axis, new, scale in changed:
        weights = like(_linear_weights(int(x.shape[axis]), new, scale, place), x)
        x = (x.transpose(axis, -1) @ weights.to(x.dtype).T).transpose(axis, -1)
    return x


def _nearest(call: Call, x: Tensor, changed: Sequence[tuple[int, int, float]], place: str) -> Tensor:
    rounding = call.attribute("nearest_mode", "round_prefer_floor")
    if call.opset < 11:
        rounding = "floor"
    roundings: dict[str, Callable[[Array], Array]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_floor": lambda v: np.ceil(v - 0.5),
        "round_prefer_ceil": lambda v: np.floor(v + 0.5),
    }
    picked: dict[int, Array] = {}
    for axis, new, scale in changed:
        old = int(x.shape[axis])
        picked[axis] = np.clip(roundings[rounding](_coordinates(old, new, scale, place)), 0, old - 1).astype(np.int64)
    like_torch = all(
        (places == np.arange(len(places)) * int(x.shape[axis]) // len(places)).all() for axis, places in picked.items()
    )
    if like_torch and x.dim() == 4 and set(picked) <= {2, 3}:
        size = [len(picked[axis]) if axis in picked else int(x.shape[axis]) for axis in (2, 3)]
        return F.interpolate(x, size, mode="nearest")
    for axis, places in picked.items():
        x = x.index_select(axis, like(places, x))
    return x


def _coordinates(old: int, new: int, scale: float, place: str) -> Array:
    """Return where in the input each output lies, as docs/Operators.md says of Resize."""
    at = np.arange(new, dtype=np.float32)  # the engines' precision, which decides where ties fall
    if place == "asymmetric":
        return at / np.float32(scale)
    if place == "align_corners":
        return at * (old - 1) / (new - 1) if new > 1 else at * 0
    if place == "half_pixel" or (place == "pytorch_half_pixel" and new > 1):
        return (at + 0.5) / np.float32(scale) - 0.5
    if place == "pytorch_half_pixel":
        return at * 0
    if place == "tf_half_pixel_for_nn":
        return (at + 0.5) / np.float32(scale)
    if place == "half_pixel_symmetric":
        return old / 2 * (1 - new / (np.float32(scale) * old)) + (at + 0.5) / np.float32(scale) - 0.5
    raise UnsupportedError(f"resizes with {place}")


def _linear_weights(old: int, new: int, scale: float, place: str) -> Array:
    """Return (new, old): what each output takes of each input."""
    at = np.clip(_coordinates(old, new, scale, place), 0, old - 1)
    low = np.floor(at).astype(int)
    weights, rows = np.zeros((new, old), np.float32), np.arange(new)
    np.add.at(weights, (rows, low), 1 - (at - low))
    np.add.at(weights, (rows, np.minimum(low + 1, old - 1)), at - low)
    return weights


def _spatial(x: Tensor) -> int:
    spatial = x.dim() - 2
    if not 1 <= spatial <= 3:
        raise UnsupportedError(f"reads a value of {x.dim()} dimensions")
    return spatial


def _each(call: Call, name: str, spatial: int) -> list[int]:
    return list(call.attribute(name) or [1] * spatial)


def _pads(call: Call, x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> Pads:
    auto = call.attribute("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        return _explicit(call, len(kernel))
    if auto == "VALID":
        return [(0, 0)] * len(kernel)
    pads = []
    for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        pads.append(_halves(total, late=auto != "SAME_LOWER"))
    return pads


def _explicit(call: Call, spatial: int) -> Pads:
    pads = call.attribute("pads") or [0] * (2 * spatial)
    return list(zip(pads[:spatial], pads[spatial:], strict=True))


def _halves(total: int, *, late: bool) -> tuple[int, int]:
    """Split padding; an odd one comes at the end where ``late``."""
    small = total // 2
    return (small, total - small) if late else (total - small, small)


def _padded(x: Tensor, pads: Pads, value: float, kernel: list[int] | None = None) -> tuple[Tensor, list[int]]:
    """Return a value and the padding that is left to the operator, which takes the same on both sides.

    A pool takes no more than half of its ``kernel``.
    """
    even = all(before == after for before, after in pads)
    if even and (kernel is None or all(2 * before <= k for (before, _), k in zip(pads, kernel, strict=True))):
        return x, [before for before, _ in pads]
    return F.pad(x, _flat(pads), value=value), [0] * len(pads)


def _flat(pads: Pads) -> list[Any]:
    """Return padding as torch takes it: the last dimension first."""
    return list(chain(*reversed(pads)))


RULES: dict[str, Callable[[Call], Any]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "GroupNormalization": group_norm,
    "LRN": local_response_norm,
    "Pad": pad,
    "Resize": resize,
    "Upsample": resize,
}
