"""Names that say that a file holds something else than the plain weights of a network."""

from __future__ import annotations

import re
from collections.abc import Iterable

from redpp_serve.capture.sniff import shorten
from redpp_serve.errors import RedppError

_UNQUANTIZED = (
    "give the weights from before quantization; package computes in int8 by itself where that is faster (--precision)"
)
_MERGE = "merge them into their network (merge_and_unload() in peft, fuse_lora() in diffusers) and save its state_dict"
_GATHER = "save it again with the full state_dict type (StateDictType.FULL_STATE_DICT), on one process"

_QUANTIZERS = ("torchao.", "bitsandbytes.", "auto_gptq.", "gptqmodel.", "awq.", "quanto.", "optimum.quanto.", "hqq.")

# Each: what the entries are, a pattern that names of such entries hold, what to do about it.
_FOREIGN: tuple[tuple[str, re.Pattern[str], str], ...] = (
    (
        "adapters beside a network (LoRA or its relatives)",
        re.compile(
            r"(^|[._])(lora_(A|B|up|down|mid|E|embedding_[AB]|magnitude_vector)|hada_w[12]|lokr_w[12]|ia3_l|oft_r)\b"
        ),
        _MERGE,
    ),
    ("weights quantized by GPTQ or AWQ", re.compile(r"(^|\.)(qweight|qzeros|g_idx)$"), _UNQUANTIZED),
    (
        "weights quantized by bitsandbytes",
        re.compile(r"(^|[._])(SCB|weight_format|(nested_)?absmax|(nested_)?quant_map|quant_state)\b"),
        _UNQUANTIZED,
    ),
    (
        "weights quantized by torch.ao.quantization",
        re.compile(r"(^|\.)(_packed_params|zero_point|fake_quant_enabled|observer_enabled|activation_post_process)\b"),
        _UNQUANTIZED,
    ),
    (
        "quantized weights with their scales",
        re.compile(r"(^|\.)(weight|input)_(scale(_inv|_2)?|zero_point|packed)$|(^|\.)(scales|qscales|weight_qdata)$"),
        _UNQUANTIZED,
    ),
    ("the flattened parts of a network that FSDP has split", re.compile(r"(^|\.)_?flat_param(_\d+)?$"), _GATHER),
    (
        "the state of an optimizer",
        re.compile(r"(^|\.)(exp_avg|exp_avg_sq|momentum_buffer|max_exp_avg_sq)$"),
        "give the file of the same checkpoint that holds the network's weights",
    ),
)


def refuse_foreign(names: Iterable[str]) -> None:
    """Refuse entries that no plain network has.

    Raises:
        RedppError: some of the names are of such entries; says what they are.
    """
    names = list(names)
    for what, pattern, do in _FOREIGN:
        if found := [name for name in names if pattern.search(name)]:
            raise RedppError(f"the file holds {what}: {shorten(found)}", "the plain weights of a network", do)


def refuse_libraries(names: Iterable[str]) -> None:
    """Refuse a pickle that names a library of tensors that are quantized or spread over machines.

    Raises:
        RedppError: one of the names, as ``module.name``, is of such a library.
    """
    for name in names:
        if name.startswith(_QUANTIZERS):
            found = f"the file holds weights quantized by {name.partition('.')[0]}: {shorten([name])}"
            raise RedppError(found, "the plain weights of a network", _UNQUANTIZED)
        if name.startswith("torch.distributed."):
            found = f"the file holds parts of tensors that are spread over processes: {shorten([name])}"
            raise RedppError(found, "the plain weights of a network", _GATHER)
