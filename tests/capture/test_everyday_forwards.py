"""One-line forwards as people write them: captured, packed, loaded and served, they compute what the module does.

The lines of a group are one network with an output each, which spares an export for each line; a refusal names the
line that it is about.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.captures import captured, quick  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("quick")

Lines = dict[str, Callable[[Any, Tensor], Tensor]]

POINTWISE: Lines = {
    "clip": lambda net, x: x.clip(-1, 1),
    "clip by tensors": lambda net, x: torch.clip(x, net.low, net.low + 1),
    "square": lambda net, x: x.square(),
    "nan_to_num": lambda net, x: x.log().nan_to_num(0.0, 1.0, -1.0),
    "celu": lambda net, x: F.celu(x, 0.7),
    "softsign": lambda net, x: F.softsign(x),
    "tanhshrink": lambda net, x: F.tanhshrink(x),
    "hardshrink": lambda net, x: F.hardshrink(x, 0.3),
    "softshrink": lambda net, x: F.softshrink(x, 0.3),
    "threshold": lambda net, x: F.threshold(x, 0.1, -2.0),
    "rrelu in eval mode": lambda net, x: F.rrelu(x),
    "logsigmoid": lambda net, x: F.logsigmoid(x),
    "softmin": lambda net, x: F.softmin(x, 1),
    "isnan": lambda net, x: x.log().isnan(),
    "isfinite": lambda net, x: torch.isfinite(x.reciprocal()),
    "frac": lambda net, x: torch.frac(x) + torch.trunc(x) + torch.ceil(x),
    "exp2": lambda net, x: torch.exp2(x) - torch.log2(x.abs() + 1),
    "atan": lambda net, x: x.atan() + x.tanh().asin() + x.sinh().asinh(),
    "erfinv": lambda net, x: torch.erfinv(x.tanh() * 0.9),
    "sinc": lambda net, x: torch.sinc(x) + torch.deg2rad(x),
    "logit": lambda net, x: torch.logit(x.sigmoid(), 1e-6),
    "decimals": lambda net, x: torch.round(x, decimals=0) + x.sign() + torch.sgn(x),
    "aliases": lambda net, x: torch.multiply(torch.subtract(x, 1), torch.absolute(torch.negative(x))),
}
TWO_VALUES: Lines = {
    "hypot": lambda net, x: torch.hypot(x, x + 1),
    "lerp": lambda net, x: torch.lerp(x, x * 2, 0.3),
    "lerp by a tensor": lambda net, x: torch.lerp(x, -x, net.low.sigmoid()),
    "logaddexp": lambda net, x: torch.logaddexp(x, x.flip(1)),
    "atan2": lambda net, x: torch.atan2(x, x.flip(1)),
    "fmod": lambda net, x: x.fmod(0.7) + torch.fmod(x, x.abs() + 1) + torch.remainder(x, x.abs() + 1),
    "fmax": lambda net, x: torch.fmax(x, x.flip(2)) - torch.fmin(x, x.flip(2)),
    "copysign": lambda net, x: torch.copysign(x, x.flip(1)),
    "heaviside": lambda net, x: torch.heaviside(x, net.low),
    "addcdiv": lambda net, x: torch.addcdiv(x, x, x.abs() + 1, value=0.5),
    "xlogy": lambda net, x: torch.xlogy(x, x.abs() + 1),
    "isclose": lambda net, x: torch.isclose(x, x.round()),
    "logical_xor": lambda net, x: torch.logical_xor(x > 0, x > 1) ^ (x > 2),
    "masked_fill": lambda net, x: x.masked_fill(x > 0.5, float("-inf")).softmax(2),
    "masked_scatter": lambda net, x: torch.where(x > 0, x, 0.1 * x),
    "floor division": lambda net, x: x // 0.5 + torch.div(x, 0.3, rounding_mode="trunc"),
    "integer shifts": lambda net, x: ((x.abs() * 10).int() << 1) | 1,
}
LAYOUT: Lines = {
    "movedim": lambda net, x: x.movedim(1, -1),
    "movedim of several": lambda net, x: torch.movedim(x, (1, 2), (2, 1)),
    "mT": lambda net, x: x.mT,
    "mH": lambda net, x: x.mH @ x,
    "swapaxes": lambda net, x: x.swapaxes(1, 2).swapdims(2, 3),
    "tile": lambda net, x: x.tile(1, 1, 2, 1),
    "rot90": lambda net, x: x.rot90(1, (2, 3)),
    "fliplr": lambda net, x: x.fliplr(),
    "unfold": lambda net, x: F.unfold(x, 3, padding=1),
    "fold": lambda net, x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2),
    "tensor unfold": lambda net, x: x.unfold(2, 4, 2).sum(-1),
    "pixel_unshuffle": lambda net, x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "hstack": lambda net, x: torch.hstack([x, x]) + torch.dstack([x, x])[:, :1, :8],
    "broadcast_to": lambda net, x: x[:, :1].broadcast_to(x.shape) + x,
    "tensor_split": lambda net, x: torch.tensor_split(x, 2, dim=2)[1],
    "diagonal": lambda net, x: x.diagonal(dim1=2, dim2=3),
    "diag_embed": lambda net, x: torch.diag_embed(x.mean((2, 3))),
    "triu": lambda net, x: x.triu(1) + x.tril(-1),
    "meshgrid": lambda net, x: x + torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")).sum(0),
    "unflatten": lambda net, x: x.unflatten(2, (2, 4)).flatten(1, 2),
    "ravel of channels": lambda net, x: x.contiguous(memory_format=torch.channels_last).reshape(x.size(0), -1),
    "roll": lambda net, x: x.roll((1, 2), (2, 3)),
    "repeat_interleave": lambda net, x: x.repeat_interleave(2, dim=3),
}
REDUCTIONS: Lines = {
    "prod": lambda net, x: x.prod(1),
    "cumprod": lambda net, x: x.cumprod(1),
    "cummax": lambda net, x: x.cummax(2).values,
    "logcumsumexp": lambda net, x: x.logcumsumexp(2),
    "sort": lambda net, x: x.sort(2, descending=True).values,
    "argsort": lambda net, x: x.argsort(2),
    "median": lambda net, x: x.median(1).values,
    "kthvalue": lambda net, x: x.kthvalue(2, 3).values,
    "quantile": lambda net, x: x.flatten(1).quantile(0.3, dim=1),
    "std_mean": lambda net, x: torch.std_mean(x, (2, 3))[0],
    "all and any": lambda net, x: (x > -9).all(1) & (x > 0).any(2).any(1)[:, None],
    "aminmax": lambda net, x: torch.aminmax(x, dim=2).max,
    "count_nonzero": lambda net, x: torch.count_nonzero(x > 0, dim=(2, 3)),
    "nansum": lambda net, x: x.log().nansum((2, 3)),
    "diff": lambda net, x: x.diff(dim=2),
    "norm": lambda net, x: x.norm(p=1, dim=(2, 3)) + torch.linalg.norm(x, dim=(2, 3)),
    "lp_pool": lambda net, x: F.lp_pool2d(x.abs(), 2, 2),
    "one_hot": lambda net, x: F.one_hot(x.flatten(1).argmax(1), 192).float(),
    "bucketize": lambda net, x: torch.bucketize(x, net.edges),
    "searchsorted": lambda net, x: torch.searchsorted(net.edges, x, right=True),
}
PRODUCTS: Lines = {
    "normalize": lambda net, x: F.normalize(x.flatten(1)),
    "cosine_similarity": lambda net, x: F.cosine_similarity(x, x.flip(1), dim=1),
    "pairwise_distance": lambda net, x: F.pairwise_distance(x.flatten(1), x.flatten(1) * 2),
    "cross": lambda net, x: torch.cross(x, x.flip(1), dim=1),
    "cdist": lambda net, x: torch.cdist(x.flatten(2), x.flatten(2) + 1),
    "addmm": lambda net, x: torch.addmm(net.layer.bias, x[:, 0, 0], net.layer.weight.T),
    "bmm": lambda net, x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)),
    "baddbmm": lambda net, x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2]),
    "einsum attention": lambda net, x: torch.einsum("bchw,bcxw->bhx", x, x),
    "einsum with a weight": lambda net, x: torch.einsum("bchw,vw->bchv", x, net.layer.weight),
    "einsum over channels": lambda net, x: torch.einsum("bchw,dc->bdhw", x, net.mix),
    "einsum outer": lambda net, x: torch.einsum("bi,bj->bij", x[:, 0, 0], x[:, 1, 1]),
    "tensordot": lambda net, x: torch.tensordot(x, net.layer.weight, dims=([3], [1])),
    "matmul with a parameter": lambda net, x: x @ net.layer.weight.t() + net.layer.bias,
    "bilinear": lambda net, x: net.pair(x[:, 0, 0], x[:, 1, 1]),
    "a stored mask": lambda net, x: x[..., net.kept],
    "slogdet": lambda net, x: torch.linalg.slogdet(x @ x.mT + 9 * torch.eye(8))[1],
    "pinv": lambda net, x: torch.linalg.pinv(x @ x.mT + 9 * torch.eye(8)),
    "lu": lambda net, x: torch.linalg.lu(x @ x.mT + 9 * torch.eye(8))[2],
    "kron": lambda net, x: torch.kron(x.flatten(2), net.mix),
    "kron of unequal ranks": lambda net, x: x[:, 0].kron(net.low[:2]),
    "inverse": lambda net, x: torch.linalg.inv(x @ x.mT + 9 * torch.eye(8)) - torch.inverse(x @ x.mT + torch.eye(8)),
    "take_along_dim": lambda net, x: torch.take_along_dim(x, x.argsort(2), 2),
    "bags of rows": lambda net, x: F.embedding_bag((x[:, 0] > 0).flatten(1).long() + 1, net.mix),
    "weighted bags": lambda net, x: F.embedding_bag(
        (x[:, 0, 0] > 0).long(), net.mix, mode="sum", per_sample_weights=x[:, 1, 1]
    ),
    "bags by starts": lambda net, x: F.embedding_bag(
        (x[:, 0, 0] > 0).long().flatten(), net.mix, torch.arange(x.shape[0]) * 8, mode="max"
    ),
    "adjoint": lambda net, x: x.mT @ x + x.transpose(-1, -2) @ x.mH,
    "scatter_add": lambda net, x: torch.zeros_like(x).scatter_add(2, (x > 0).long(), x),
    "gather": lambda net, x: x.gather(2, x.argsort(2)),
    "index_add": lambda net, x: x.index_add(1, torch.tensor([0, 2]), x[:, :2]),
    "position of the largest": lambda net, x: x.flatten(1).topk(3).indices,
}
SAMPLING: Lines = {
    "grid_sample": lambda net, x: F.grid_sample(x, x.permute(0, 2, 3, 1)[..., :2].tanh(), align_corners=False),
    "affine_grid": lambda net, x: F.affine_grid(x[:, 0, :2, :3], [x.size(0), 3, 6, 6], align_corners=False),
    "nearest-exact": lambda net, x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"),
    "trilinear": lambda net, x: F.interpolate(x[:, None], size=(6, 16, 16), mode="trilinear"),
    "linear": lambda net, x: F.interpolate(x.flatten(2), scale_factor=2, mode="linear"),
    "area": lambda net, x: F.interpolate(x, size=(4, 4), mode="area"),
    "antialias": lambda net, x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True),
    "bicubic": lambda net, x: F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=True),
    "nearest of a row": lambda net, x: F.interpolate(x.flatten(2), scale_factor=2),
    "conv_transpose3d": lambda net, x: net.volume(x[:, None]),
    "max_unpool": lambda net, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "local response": lambda net, x: F.local_response_norm(x, 2),
    "circular padding": lambda net, x: F.pad(x, (1, 1, 2, 2), mode="circular"),
    "padding of a row": lambda net, x: F.pad(x.flatten(2), (3, 2), mode="reflect"),
    "adaptive_max_pool": lambda net, x: F.adaptive_max_pool2d(x, 3) + F.adaptive_avg_pool2d(x, 3),
}
SPECTRA: Lines = {
    "stft": lambda net, x: torch.stft(x.flatten(1), 32, 16, window=net.window, return_complex=True).abs(),
    "power": lambda net, x: (
        torch.stft(x.flatten(1), 32, 16, return_complex=True, window=torch.hann_window(32)).abs() ** 2
    ),
    "istft": lambda net, x: torch.istft(
        torch.stft(x.flatten(1), 32, 16, window=net.window, return_complex=True), 32, 16, window=net.window
    ),
    "rfft magnitude": lambda net, x: torch.fft.rfft(x.flatten(1)).abs(),
    "fft of a picture": lambda net, x: torch.fft.fftshift(torch.fft.fft2(x), dim=(2, 3)).abs().log1p(),
    "filter": lambda net, x: torch.fft.irfft2(torch.fft.rfft2(x) * net.mask, s=(8, 8)),
    "a complex filter of stored numbers": lambda net, x: torch.fft.irfft2(
        torch.fft.rfft2(x) * torch.view_as_complex(torch.stack([net.mask, -net.mask], -1)), s=(8, 8)
    ),
    "a filter of four dimensions": lambda net, x: (
        torch.fft.rfft2(x) * torch.view_as_complex(torch.stack([net.mask, -net.mask], -1)[None])
    ).abs(),
    "real and imaginary": lambda net, x: torch.fft.fft(x).real + torch.fft.ifft(x).imag,
    "phase": lambda net, x: torch.view_as_real(torch.fft.rfft(x)).flatten(3),
}
PLACES: Lines = {
    "to a device": lambda net, x: x.to("cpu") + x.cpu() * 2,
    "to a weight": lambda net, x: x.to(net.layer.weight) + x.type_as(net.low),
    "to its dtype and place": lambda net, x: x.to(net.low.device, torch.float32, non_blocking=True),
    "channels last": lambda net, x: x.to(memory_format=torch.channels_last).mul(2),
    "double and back": lambda net, x: x.double().mul(2).float() + x.type(torch.float32),
    "new tensors": lambda net, x: x + x.new_tensor([1.0, 2, 3]).view(3, 1, 1) + x.new_full((8,), 2.0),
    "made like": lambda net, x: torch.cat([torch.full_like(x, 2), torch.empty_like(x).fill_(3.0)], 1),
    "counted": lambda net, x: x + torch.linspace(0, 1, 8) + torch.arange(0, 4, 0.5),
}
STATISTICS: Lines = {
    "covariance of each": lambda net, x: torch.vmap(torch.cov)(x[:, 0]),
    "correlation of each": lambda net, x: torch.vmap(torch.corrcoef)(x[:, 0]),
    "covariance of weights": lambda net, x: x[:, 0, :5, :5] @ torch.cov(net.layer.weight, correction=0),
    "weighted covariance": lambda net, x: (
        x[:, 0, :5, :5]
        @ net.layer.weight.cov(fweights=torch.arange(1, 9), aweights=torch.linspace(0.1, 1, 8), correction=1)
    ),
    "variance of a row": lambda net, x: x * torch.cov(net.low) * torch.corrcoef(net.low),
    "pairs": lambda net, x: x.flatten(1)[:, torch.combinations(torch.arange(4))].prod(-1),
    "triples with repeats": lambda net, x: torch.combinations(net.low[:4], 3, with_replacement=True).sum() * x,
}
MAPPED: Lines = {
    "a row at a time": lambda net, x: torch.vmap(lambda row: row * 2 + row.mean())(x),
    "traces": lambda net, x: torch.vmap(torch.trace)(x[:, 0] @ x[:, 1]),
    "pairs of rows": lambda net, x: torch.func.vmap(F.cosine_similarity)(x[:, 0], x[:, 1]),
    "several heads": lambda net, x: torch.vmap(lambda w: x[:, 0] @ w)(torch.stack([net.layer.weight.T] * 2)).mean(0),
    "an inner axis": lambda net, x: torch.vmap(torch.vmap(lambda row: net.layer(row).softmax(-1)))(x),
    "channels where they were": lambda net, x: torch.vmap(lambda channel: channel * 2, in_dims=1, out_dims=1)(x),
    "channels last": lambda net, x: torch.vmap(torch.relu, in_dims=1, out_dims=-1)(x),
    "columns of a layer": lambda net, x: torch.vmap(net.layer, in_dims=2, out_dims=2)(x),
    "two results": lambda net, x: torch.vmap(lambda row: (row, row.sum()), out_dims=(1, 0))(x)[0].transpose(0, 1),
    "channels of rows": lambda net, x: torch.vmap(torch.vmap(torch.cos, in_dims=1, out_dims=2))(x),
}
WITHOUT_GRADIENTS: Lines = {
    "data": lambda net, x: x.data * 2,
    "data of a weight": lambda net, x: x @ net.layer.weight.data.T,
    "data of a sum": lambda net, x: (x + 1).data.clamp_(0),
    "detach": lambda net, x: x.detach() + x.clone().detach_().requires_grad_(False),
}
MASKS: Lines = {
    "filled where not a number": lambda net, x: x.log().masked_fill(x.log().isnan(), 0.0),
    "filled beyond a limit": lambda net, x: x.masked_fill(x > net.low, net.low[0]),
    "filled in place": lambda net, x: x.clone().masked_fill_(~(x > 0), -1e9).softmax(-1),
    "filled with a function": lambda net, x: torch.masked_fill(x, x > 0, 1.0),
    "later places": lambda net, x: x.masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf")).softmax(-1),
    "put by a mask": lambda net, x: x.index_put((x < 0,), torch.tensor(0.0)),
    "stored places": lambda net, x: x[:, :, torch.arange(8) % 3 > 0],
    "times a mask": lambda net, x: x * (x > 0) + 0.1 * x * (x <= 0).to(x.dtype),
    "two numbers": lambda net, x: torch.where(x > 0, 1.0, -1.0),
    "a number in a tensor": lambda net, x: torch.where(x > 0, torch.tensor(1.0), x),
    "a new zero": lambda net, x: torch.where(x > 0, x, x.new_zeros(())),
    "the largest alone": lambda net, x: x.eq(x.max(1, keepdim=True)[0]).float(),
    "within": lambda net, x: x.ge(0.5).logical_and(x.le(1)).float(),
    "the least number": lambda net, x: (x + torch.finfo(x.dtype).min * (x < 0)).softmax(1),
}
ENDINGS: Lines = {
    "largest of each channel": lambda net, x: net.conv(x).relu().amax((2, 3)),
    "class": lambda net, x: net.layer(x).argmax(-1),
    "share of positive": lambda net, x: (net.conv(x) > 0).float().mean((2, 3)),
    "log of shares": lambda net, x: net.layer(F.relu(x)).log_softmax(-1).exp(),
    "in a row": lambda net, x: net.conv(x).view(x.size(0), -1),
    "as tokens": lambda net, x: net.conv(x).reshape(x.shape[0], 6, -1).permute(0, 2, 1),
    "sizes added": lambda net, x: x.view((*x.shape[:2], 64)).sum(-1),
    "sizes unpacked": lambda net, x: x.view(*x.shape[:2], -1).prod(-1),
    "rows of all": lambda net, x: x.reshape(-1, 8).mean(1).reshape(x.shape[0], -1),
    "pooled": lambda net, x: F.adaptive_avg_pool2d(x, (1, 1)).squeeze(-1).squeeze(-1),
    "pooled and picked": lambda net, x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
    "with a temperature": lambda net, x: F.softmax(x / 0.07, dim=1),
    "a size in the name": lambda net, x: x if x.size(1) == 3 else x.repeat(1, 3, 1, 1),
    "in training alone": lambda net, x: F.dropout(x, 0.5, net.training) * (2 if net.training else 1),
    "bytes": lambda net, x: (x.sigmoid() * 255).to(torch.uint8),
}
PICKED: Lines = {
    "every other number": lambda net, x: x.flatten(1)[:, ::2],
    "channels in another order": lambda net, x: x[:, [2, 1, 0]] + x[:, torch.tensor([2, 0, 0])],
    "the last": lambda net, x: x[:, -1:] + x[..., None].squeeze(-1),
    "the middle": lambda net, x: x[:, :, 1:-1, 1:-1],
    "every other pixel": lambda net, x: x[:, :, ::2, ::2] + x[:, :, 1::2, 1::2],
    "backwards": lambda net, x: x[:, :, torch.arange(7, -1, -1)],
    "parts turned round": lambda net, x: torch.cat(x.split(1, 1)[::-1], 1) * x.chunk(3, 1)[0],
    "both signs": lambda net, x: torch.cat([F.relu(x), F.relu(-x)], dim=1),
    "unbound": lambda net, x: sum(x.unbind(1)) + torch.stack(x.unbind(1), -1).max(-1)[0],
    "folded": lambda net, x: functools.reduce(torch.add, x.unbind(1)),
    "a list of layers": lambda net, x: torch.stack([net.layer(x[:, i]) for i in range(x.shape[1])], 1),
    "rows of a unit matrix": lambda net, x: torch.eye(8)[x.argmax(-1)],
    "nearest of a codebook": lambda net, x: net.mix[torch.cdist(x[:, :, 0].mT, net.mix).argmin(-1)],
    "patches": lambda net, x: x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(x.shape[0], 3, 16, 4),
    "shuffled channels": lambda net, x: F.channel_shuffle(x.repeat(1, 2, 1, 1), 2),
    "of all and one": lambda net, x: x.new_ones(x.shape[0], 2) * x[:, 0, 0, :2],
}
NORMALISED: Lines = {
    "by mean and deviation": lambda net, x: (x - x.mean((1, 2, 3), True)) / (x.std((1, 2, 3), keepdim=True) + 1e-5),
    "to 0 and 1": lambda net, x: (
        (x - x.amin((1, 2, 3), True)) / (x.amax((1, 2, 3), True) - x.amin((1, 2, 3), True) + 1e-6)
    ),
    "by the largest": lambda net, x: x / x.flatten(1).max(1)[0].view(-1, 1, 1, 1),
    "by the length": lambda net, x: x / x.norm(dim=1, keepdim=True).clamp_min(1e-6),
    "by variance": lambda net, x: x.sub(x.mean(1, True)).div(x.var(1, keepdim=True, unbiased=False).add(1e-5).sqrt()),
    "layer": lambda net, x: F.layer_norm(x, x.shape[1:]) + F.rms_norm(x, (8,)),
    "instance": lambda net, x: F.instance_norm(x) + F.group_norm(x, 3),
    "unlike the target": lambda net, x: F.mse_loss(x, net.conv(x)[:, :3], reduction="none").mean((1, 2, 3)),
    "entropies": lambda net, x: F.kl_div(x.log_softmax(1), x.flip(1).softmax(1), reduction="none").sum(1),
    "density": lambda net, x: torch.distributions.Normal(0.0, 1.0).log_prob(x),
    "doubt": lambda net, x: torch.distributions.Categorical(logits=x).entropy(),
    "a layer made on the way": lambda net, x: nn.Softmax(dim=1)(nn.Upsample(scale_factor=2, mode="bilinear")(x)),
    "recomputed": lambda net, x: checkpoint(net.conv, x, use_reentrant=False),
    "called by name": lambda net, x: torch.func.functional_call(net.conv, dict(net.conv.named_parameters()), (x,)),
}
GROUPS = {
    "masks": MASKS,
    "endings": ENDINGS,
    "picked": PICKED,
    "normalised": NORMALISED,
    "pointwise": POINTWISE,
    "two values": TWO_VALUES,
    "layout": LAYOUT,
    "reductions": REDUCTIONS,
    "products": PRODUCTS,
    "sampling": SAMPLING,
    "spectra": SPECTRA,
    "places": PLACES,
    "statistics": STATISTICS,
    "mapped": MAPPED,
    "without gradients": WITHOUT_GRADIENTS,
}


class Everyday(nn.Module):
    """A network with an output for each line."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self.lines = lines
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.layer, self.pair, self.volume = nn.Linear(8, 5), nn.Bilinear(8, 8, 4), nn.ConvTranspose3d(1, 2, 2, 2)
        self.mix = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("low", torch.linspace(-1, 0, 8))
        self.register_buffer("edges", torch.linspace(-2, 2, 9))
        self.register_buffer("window", torch.hann_window(32))
        self.register_buffer("kept", torch.arange(8) % 3 > 0)
        self.register_buffer("mask", torch.rand(8, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(line(self, x) for line in self.lines.values())


def test_there_are_two_hundred() -> None:
    assert sum(len(lines) for lines in GROUPS.values()) >= 200


@pytest.mark.parametrize("group", GROUPS)
def test_everyday_lines(group: str) -> None:
    torch.manual_seed(0)
    captured(Everyday(GROUPS[group]).eval())
