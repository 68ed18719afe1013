"""Intervals, confidence sequences, guardrails and verdicts that the comparison and the A/B test share."""

from redpp_serve.statistics.guardrails import Guardrail, agreement_guardrail, error_guardrail, p99_guardrail
from redpp_serve.statistics.intervals import Estimate, Quantile, mean_interval, percentile_interval, ratio_interval
from redpp_serve.statistics.sequences import ConfidenceSequence, RatioSequence
from redpp_serve.statistics.unequal_traffic import ArmSequence
from redpp_serve.statistics.verdicts import Advice, Verdict, advice, verdict

__all__ = [
    "Advice",
    "ArmSequence",
    "ConfidenceSequence",
    "Estimate",
    "Guardrail",
    "Quantile",
    "RatioSequence",
    "Verdict",
    "advice",
    "agreement_guardrail",
    "error_guardrail",
    "mean_interval",
    "p99_guardrail",
    "percentile_interval",
    "ratio_interval",
    "verdict",
]
