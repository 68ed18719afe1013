"""One cell of the tables: several ways to compute one layer, each held against the right answer before it is timed.

A cell's first contender is its reference, the library call that everybody would make. A contender that fails, is wrong
or is too slow to build has no time in the cell; it has the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_journal import Journal
from benchmarks.gpu_timing import Bench, Pass, Peaks, in_turns, ratio, spread

Call = Callable[[], Tensor]
TRY_S = 25.0  # to compile and check one contender
PEER_ERROR = 1e-2


@dataclass(frozen=True)
class Contender:
    """``fresh()`` gives a call with operands of its own: a cold pass needs many.

    ``moved`` and ``flop`` are the bytes that a call has to move, each operand once, and its operations as a dense
    layer, two for each multiply-accumulate. ``expected()`` is its right answer where that is not the cell's: a peer
    with another number format is right when it computes what its own stored weights say. Such a peer rounds its input
    too; it is held to `PEER_ERROR` instead of the reference's own error, unless it is ``exact``.
    """

    name: str
    fresh: Callable[[], Call]
    moved: int
    flop: int
    expected: Callable[[], Tensor] | None = None
    exact: bool = True
    limit_s: float = TRY_S


@dataclass(frozen=True)
class Cell:
    """``expected()`` is the right answer in higher precision; ``fields`` names the cell in the results.

    ``absent`` has the contenders that do not take part and why.
    """

    section: str
    fields: dict[str, Any]
    contenders: Sequence[Contender]
    expected: Callable[[], Tensor]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return " ".join([self.section, *(f"{k}={v}" for k, v in self.fields.items())])


def tensors_bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The larger of ||got - expected|| / ||expected|| and of max |got - expected| / max |expected|, in fp64.

    The second sees one wrong element among millions. Infinite for another shape or a value that is not finite.
    """
    if got.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    difference, scale = got.double() - expected.double(), expected.double()
    tiny = torch.finfo(torch.float64).tiny
    error = max(
        float(difference.norm() / (scale.norm() + tiny)), float(difference.abs().max() / (scale.abs().max() + tiny))
    )
    return error if error == error and bool(got.isfinite().all()) else float("inf")


def error_limit(reference_error: float, dtype: torch.dtype) -> float:
    """Twice what the library itself gets wrong in this precision, and one rounding."""
    return 2 * reference_error + torch.finfo(dtype).eps


def poison(like: Tensor) -> None:
    """Leaves NaN in memory that the next result of this size will probably get: who does not write it is seen."""
    for _ in range(2):
        torch.full_like(like, float("nan"))


def measure_cell(cell: Cell, bench: Bench, peaks: Peaks, journal: Journal, seconds: float) -> dict[str, Any]:
    """The cell's record: times in microseconds (median, p10, p90) with warm and with cold L2, and ratios to the
    reference (above 1: faster than it); ``seconds`` of timing for all contenders in one state of the cache."""
    expected = functools.cache(cell.expected)
    found: dict[str, dict[str, Any]] = {name: {"failed": reason} for name, reason in cell.absent.items()}
    ready: dict[str, _Ready] = {}
    limit = 0.0  # from the first that is right: the reference, unless it fails
    for contender in cell.contenders:
        build = functools.partial(_prepare, contender, contender.expected or expected, limit, bench, peaks)
        built, reason = journal.attempt(f"{cell.key} {contender.name}", contender.limit_s, build)
        if built is None:
            found[contender.name] = {"failed": reason}
            continue
        ready[contender.name] = built
        found[contender.name] = {"error": built.error, "moved": contender.moved, "flop": contender.flop}
        limit = limit or built.limit
    if ready:
        times, reason = journal.attempt(f"{cell.key} timing", 60.0, lambda: _times(cell, peaks, ready, seconds))
        for name in ready:
            found[name].update(times[name] if times else {"failed": reason})
    return {"section": cell.section, **cell.fields, "reference": cell.contenders[0].name, "contenders": found}


@dataclass(frozen=True)
class _Ready:
    """A contender that was right, with its passes."""

    contender: Contender
    expected: Callable[[], Tensor]
    error: float
    limit: float
    warm: Pass
    cold: Pass


def _prepare(contender: Contender, expected: Callable[[], Tensor], limit: float, bench: Bench, peaks: Peaks) -> _Ready:
    """Raises ArithmeticError for a wrong answer, and whatever the contender raises."""
    call = contender.fresh()
    poison(call())
    got = call()
    error = relative_error(got, expected())
    allowed = limit if limit and contender.exact else error_limit(PEER_ERROR, got.dtype)
    if error > allowed:
        raise ArithmeticError(f"wrong: relative error {error:.2g}, at most {allowed:.2g}")
    count, copies = peaks.calls(contender.moved, contender.flop), peaks.copies(contender.moved)
    warm = bench.make_pass([call] * count)
    several = [call, *(contender.fresh() for _ in range(copies - 1))]
    cold = bench.make_pass(several * -(-count // copies))
    limit = (
        limit
        if limit and contender.exact
        else max(error_limit(error, got.dtype), allowed if not contender.exact else 0.0)
    )
    return _Ready(contender, expected, error, limit, warm, cold)


def _times(cell: Cell, peaks: Peaks, ready: dict[str, _Ready], seconds: float) -> dict[str, dict[str, Any]]:
    """Times of all that are ready; who is wrong after the last pass has none."""
    times = {
        state: in_turns({name: getattr(r, state) for name, r in ready.items()}, seconds) for state in ("warm", "cold")
    }
    reference, rows = cell.contenders[0].name, {}
    for name, one in ready.items():
        after = max(relative_error(p.result, one.expected()) for p in (one.warm, one.cold))
        if after > one.limit:
            rows[name] = {"failed": f"wrong after its timing: relative error {after:.2g}, at most {one.limit:.2g}"}
            continue
        row: dict[str, Any] = {"rounds": len(times["cold"][name])}
        for state, found in times.items():
            row[f"{state}_us"] = spread(found[name]).micro()
            if reference in found:
                against = ratio(found[reference], found[name])
                row[f"{state}_ratio"] = [round(v, 3) for v in (against.median, against.p10, against.p90)]
        floor = 1e6 * peaks.roofline(one.contender.moved, one.contender.flop)
        rows[name] = {**row, "roofline_us": round(floor, 3), "roofline_share": round(floor / row["cold_us"][0], 3)}
    return rows
