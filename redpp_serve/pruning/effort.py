"""How much work one pruning run spends, beyond what the user's options say; tests spend less."""

from __future__ import annotations

from dataclasses import dataclass

from redpp_serve.pruning.inputs import SynthesisBudget


@dataclass(frozen=True)
class Effort:
    """Settings that trade the precision of a run for its time.

    Attributes:
        synthesis: how many synthetic inputs to make, in how many steps; None derives both from ``--time-budget``.
        frontier_points: number of networks over the whole range of costs that the report shows.
        latency_seconds: time for measuring the latencies of one set of networks.
        distillation_patience: the distillation is cut short after this many times its budget.
    """

    synthesis: SynthesisBudget | None = None
    frontier_points: int = 8
    latency_seconds: float = 8.0
    distillation_patience: float = 3.0
