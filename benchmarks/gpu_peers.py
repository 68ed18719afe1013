"""Other people's kernels for the same Linear layer, as far as they are installed: each computes what its own stored
weights say, and is checked against that.

Formats differ: int4 and NF4 weights have a scale for each group of 64 or 128, fp8 rounds the input too. All are what a
user could take instead of a codebook; none computes the codebook's function.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cells import Call, Contender, tensors_bytes
from benchmarks.gpu_timing import Bench

GROUP = 128
INNER_TILES = 8
NF4_BLOCK = 64
COMPILED_ROWS = (1, 8, 64)  # torch.compile builds every shape anew, which takes seconds: only these
COMPILE_S, GEMLITE_S = 30.0, 30.0


def linear_peers(x: Tensor, weight: Tensor, bench: Bench) -> tuple[list[Contender], dict[str, str]]:
    """The peers that can run here for x (rows, n_in) and weight (n_out, n_in), and why the others cannot."""
    if bench.rehearse:
        return [], dict.fromkeys(("int4pack", "fp8", "nf4", "gemlite"), "needs a GPU")
    found, absent = [_int4pack(x, weight)], {}
    if torch.cuda.get_device_capability(bench.device) >= (8, 9):
        found.append(_fp8(x, weight))
    else:
        absent["fp8"] = "this GPU has no fp8"
    for name, module, make in (("nf4", "bitsandbytes", _nf4), ("gemlite", "gemlite", _gemlite)):
        if find_spec(module):
            found.append(make(x, weight))
        else:
            absent[name] = f"{module} is not installed"
    return found, absent


def compiled_linear(x: Tensor, weight: Tensor, bench: Bench) -> Contender:
    """torch.compile with max-autotune, without its own graphs: every contender runs in the benchmark's."""

    @functools.cache
    def compiled() -> Call:
        how = {"backend": "eager"} if bench.rehearse else {"mode": "max-autotune-no-cudagraphs"}
        return torch.compile(_linear, dynamic=False, **how)

    def fresh() -> Call:
        own = weight.clone()
        return lambda: compiled()(x, own)

    moved = tensors_bytes(x, weight) + len(x) * len(weight) * x.element_size()
    return Contender("torch.compile", fresh, moved, 2 * len(x) * weight.numel(), limit_s=COMPILE_S)


def grouped_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest unsigned 4-bit numbers (n_out, n_in) int32, with scale and zero (n_out, groups) fp32:
    weight is about ``(number - 8) * scale + zero``."""
    parts = weight.float().view(len(weight), -1, group)
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-6)
    number = ((parts - low[..., None]) / scale[..., None]).round().clamp(0, 15)
    return number.view_as(weight).to(torch.int32), scale, low + 8 * scale


def ungrouped(number: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """The weight that `grouped_int4`'s numbers stand for, (n_out, n_in) fp32."""
    parts = number.view(len(number), -1, group).float()
    return ((parts - 8) * scale[..., None] + zero[..., None]).view(len(number), -1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _moved(x: Tensor, weight: Tensor, *stored: Tensor) -> tuple[int, int]:
    out = len(x) * len(weight) * 2
    return tensors_bytes(x, *stored) + out, 2 * len(x) * weight.numel()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def _int4pack(x: Tensor, weight: Tensor) -> Contender:
    """torch's own int4 product (bf16, groups of 128)."""
    n_out, n_in = weight.shape

    @functools.cache
    def prepared() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        number, scale, zero = grouped_int4(weight, GROUP)
        scale, zero = scale.bfloat16(), zero.bfloat16()
        two = ((number[:, ::2] << 4) | number[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(two.contiguous(), INNER_TILES)
        scales = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
        return x.bfloat16(), packed, scales, ungrouped(number, scale.float(), zero.float(), GROUP)

    def fresh() -> Call:
        half, packed, scales, _ = prepared()
        own = packed.clone()
        return lambda: torch.ops.aten._weight_int4pack_mm(half, own, GROUP, scales)

    moved, flop = _moved(x, weight)
    stored = n_out * n_in // 2 + 4 * n_out * n_in // GROUP
    return Contender(
        "int4pack", fresh, moved + stored, flop, lambda: _product(prepared()[0], prepared()[3]), exact=False
    )


def _fp8(x: Tensor, weight: Tensor) -> Contender:
    """torch's fp8 product, with the input in fp8 already, which is its best case."""

    @functools.cache
    def prepared() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales = [t.abs().max().float() / largest for t in (x, weight)]
        return *((t.float() / s).to(torch.float8_e4m3fn) for t, s in zip((x, weight), scales, strict=True)), *scales

    def fresh() -> Call:
        half, stored, *scales = prepared()
        own = stored.clone()
        return lambda: torch._scaled_mm(half, own.t(), *scales, out_dtype=torch.bfloat16)

    def expected() -> Tensor:
        half, stored, a, b = prepared()
        return _product(half.float() * a, stored.float() * b)

    moved, flop = _moved(x, weight)
    return Contender("fp8", fresh, moved - tensors_bytes(x) // 2 + weight.numel(), flop, expected, exact=False)


def _nf4(x: Tensor, weight: Tensor) -> Contender:
    """bitsandbytes' NF4 (blocks of 64)."""

    @functools.cache
    def prepared() -> tuple[Tensor, object, Tensor]:
        from bitsandbytes import functional

        stored, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
        return stored, state, functional.dequantize_4bit(stored, state)

    def fresh() -> Call:
        import bitsandbytes

        stored, state, _ = prepared()
        own = stored.clone()
        return lambda: bitsandbytes.matmul_4bit(x, own.t(), quant_state=state)

    moved, flop = _moved(x, weight)
    stored = weight.numel() // 2 + 4 * weight.numel() // NF4_BLOCK
    return Contender(
        "nf4", fresh, moved + stored, flop, lambda: _product(x, prepared()[2]), exact=False, limit_s=GEMLITE_S
    )


def _gemlite(x: Tensor, weight: Tensor) -> Contender:
    """gemlite's 4-bit weights with 16-bit activations (groups of 128); it tunes itself in its first call."""
    n_out, n_in = weight.shape

    @functools.cache
    def prepared() -> tuple[Tensor, Tensor, Tensor]:
        number, scale, zero = grouped_int4(weight, GROUP)
        return number.to(torch.uint8), scale.to(x.dtype), (8 - zero / scale).to(x.dtype)

    def fresh() -> Call:
        from gemlite import DType, GemLiteLinear

        number, scale, zero = prepared()
        layer = GemLiteLinear(
            W_nbits=4,
            group_size=GROUP,
            in_features=n_in,
            out_features=n_out,
            input_dtype=DType.FP16,
            output_dtype=DType.FP16,
        )
        layer.pack(number, scale, zero, bias=None)
        return lambda: layer(x)

    def expected() -> Tensor:
        number, scale, zero = prepared()
        parts = number.view(n_out, -1, GROUP).float()
        return _product(x, ((parts - zero.float()[..., None]) * scale.float()[..., None]).view(n_out, n_in))

    moved, flop = _moved(x, weight)
    stored = n_out * n_in // 2 + 4 * n_out * n_in // GROUP
    return Contender("gemlite", fresh, moved + stored, flop, expected, exact=False, limit_s=GEMLITE_S)
