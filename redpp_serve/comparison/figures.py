"""The figures of a comparison by the names that ``--require``, the CSV file and the history know them by."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from redpp_serve.comparison.client import Payload
from redpp_serve.comparison.compare import Comparison
from redpp_serve.comparison.outputs import Heads
from redpp_serve.options import ComparisonOptions
from redpp_serve.report.data import CellRecord, FigureRecord
from redpp_serve.requirements import COMPARED, Figure
from redpp_serve.statistics.intervals import Estimate

_RATIOS = {"speedup": "end_to_end_p50", "handler_speedup": "handler_p50", "throughput_gain": "throughput"}
_BY_ARM = (("", 1), ("original_", 0))


def figures(result: Comparison) -> dict[str, Figure]:
    """Return what was measured, in the order of `COMPARED`."""
    found = {name: value for name, value in _measured(result) if value is not None}
    return {name: found[name] for name in COMPARED if name in found}


def _measured(result: Comparison) -> Iterator[tuple[str, Figure | None]]:
    for name, key in _RATIOS.items():
        yield name, _figure(result.speedup.get(key))
    arms = result.original, result.pruned
    for prefix, version in _BY_ARM:
        arm = arms[version]
        for kind, times in (("", arm.latency_ms), ("handler_", arm.handler_ms or {})):
            yield from ((f"{prefix}{kind}{key}_ms", _figure(x)) for key, x in times.items())
        yield f"{prefix}throughput", Figure(arm.throughput_rps)
        yield f"{prefix}failed", _share(arm.errors, arm.requests)
        yield f"{prefix}accuracy", None if arm.accuracy is None else Figure(arm.accuracy)
        if loop := result.open_loop:
            yield from ((f"{prefix}rate_{key}_ms", _figure(x)) for key, x in (loop.latency_ms[version] or {}).items())
            yield f"{prefix}rate_failed", _share(loop.failed[version], loop.sent[version])
    same = result.agreement
    yield "agreement", None if same.top1 is None else Figure(same.top1)
    yield "difference", Figure(same.mean_relative_difference)
    before, after = (arm.accuracy for arm in arms)
    yield "accuracy_drop", None if before is None or after is None else Figure(100 * (before - after))


def measurable(options: ComparisonOptions, payloads: Sequence[Payload], heads: Heads) -> list[str]:
    """Return the figures that a comparison is going to measure, as far as it is known before."""
    labelled = any(payload.label is not None for payload in payloads)
    known = {"rate_": options.rate is not None, "accuracy": labelled, "agreement": bool(heads.classes)}
    return [name for name in COMPARED if all(so for part, so in known.items() if part in name)]


def to_csv(results: Iterable[Comparison]) -> str:
    """Return a table with a row for each figure of each comparison."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(("time", "server", "concurrency", "rate", "batch", "figure", "value", "low", "high"))
    for result in results:
        about = (result.conditions.time, result.conditions.server) if result.conditions else ("", "")
        cell = cell_record(result)
        for name, figure in figures(result).items():
            rows.writerow((*about, cell.concurrency, cell.rate, cell.batch, name, *figure))
    return stream.getvalue()


def cell_record(result: Comparison) -> CellRecord:
    """Return what the history keeps of a comparison."""
    rate = result.open_loop.rate_rps if result.open_loop else None
    return CellRecord(
        concurrency=result.concurrency,
        rate=rate,
        batch=result.batch,
        inputs=result.agreement.inputs,
        verdict=result.verdict.text,
        figures={name: FigureRecord(**figure._asdict()) for name, figure in figures(result).items()},
    )


def _figure(estimate: Estimate | None) -> Figure | None:
    return None if estimate is None else Figure(*estimate)


def _share(part: int, whole: int) -> Figure | None:
    return Figure(part / whole) if whole else None
