"""What lower precisions cost a network: errors on inputs that gave no ranges, and the ranges of eight bits.

Each precision is compared with the same network in fp32, family by family, by the judge of pruning. Eight bits are for
every layer where that keeps the error that a user allows. Layers that stay wide among them cost more than their own
time, as what they read and give changes its form: EfficientNet-Lite0 at batch 1 with VNNI is 2.2 times as fast as fp32
with all layers in eight bits, 1.5 times with depthwise ones left wide. Depthwise ones lose most by one scale for each
input. They are left wide where that alone keeps the error allowed, or halves one that is above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, Node
from redpp_serve.graph.operators import FUSED_CONV2D
from redpp_serve.graph.quantization import Ranges, find_ranges, in_int8, quantizable
from redpp_serve.pruning.judge import Difference, Reference
from redpp_serve.runtime.serving_graph import serving_graph

_CALIBRATION, _JUDGED = 64, 16  # inputs that give ranges; inputs of each family that judge
_WORTH_WIDE = 0.5  # of an error that is not allowed: depthwise layers stay wide where that takes it below


@dataclass(frozen=True)
class PrecisionRecord:
    """The error of a network in a precision, relative to itself in fp32.

    Attributes:
        error: the worst family's relative output error.
        agreement: share of inputs with the same top-1 class on the worst family; None where there are no classes.
        known: whether the families agree on the error.
        note: what the precision leaves wide, in words.
    """

    error: float
    agreement: float | None = None
    known: bool = True
    note: str = ""

    @classmethod
    def of(cls, difference: Difference, note: str = "") -> PrecisionRecord:
        """Summarise a comparison with the network in fp32."""
        return cls(difference.error, difference.agreement, difference.known, note)


@dataclass(frozen=True)
class Precisions:
    """The precisions that a network can be served in.

    Attributes:
        records: what each costs, by name; fp32 costs nothing and is not among them.
        ranges: of what the layers in eight bits read and give, by the value's name in the served graph.
    """

    records: Mapping[str, PrecisionRecord] = field(default_factory=dict)
    ranges: Ranges = field(default_factory=dict)

    def description(self, limit: float | None) -> dict[str, Any]:
        """Return what an artifact says of them.

        Args:
            limit: the error up to which ``auto`` may choose a precision; None where it may choose fp32 alone.
        """
        within = [] if limit is None else [name for name, record in self.records.items() if record.error <= limit]
        return {
            "auto": ["fp32", *within],
            "errors": {name: record.error for name, record in self.records.items()},
            "ranges": {name: list(pair) for name, pair in self.ranges.items()},
        }


@torch.no_grad()
def measure_precisions(
    graph: Graph, fit: Sequence[Tensor], families: Mapping[str, Sequence[Tensor]], limit: float = 0.0
) -> Precisions:
    """Measure what bfloat16 and eight bits cost a network, on the CPU.

    Args:
        graph: the network as it is stored.
        fit: inputs that give the ranges, (images, ...) for each network input; without any, eight bits are left out.
        families: inputs that judge, by the name of their family.
        limit: the error up to which ``auto`` may choose a precision.
    """
    cpu = torch.device("cpu")
    served = serving_graph(graph, cpu)
    reference = Reference(graph, {name: [x[:_JUDGED].cpu() for x in family] for name, family in families.items()})
    records: dict[str, PrecisionRecord] = {}
    try:
        records["bf16"] = PrecisionRecord.of(reference.compare(Program(serving_graph(graph, cpu, "bf16"))))
    except (RedppError, RuntimeError, NotImplementedError):  # an operator that has no bfloat16 form
        records.pop("bf16", None)
    if not quantizable(served) or not fit:
        return Precisions(records)
    ranges = find_ranges(served, [x[:_CALIBRATION].cpu() for x in fit])
    if any(not low <= high < float("inf") for low, high in ranges.values()):
        return Precisions(records)
    found = PrecisionRecord.of(reference.compare(Program(in_int8(served, ranges))))
    wide = {node.args[0].name for node in quantizable(served) if _is_depthwise(served, node)}
    if wide and not found.error <= limit:
        narrowed = {name: pair for name, pair in ranges.items() if name not in wide}
        other = PrecisionRecord.of(reference.compare(Program(in_int8(served, narrowed))), "depthwise layers in fp32")
        if other.error <= max(limit, _WORTH_WIDE * found.error) or found.error != found.error:
            found, ranges = other, narrowed
    records["int8"] = found
    return Precisions(records, ranges)


def _is_depthwise(graph: Graph, node: Node) -> bool:
    weight = graph.tensors[node.args[2].name]
    return node.op == FUSED_CONV2D and node.args[7] > 1 and weight.shape[1] == 1
