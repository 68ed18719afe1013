"""Which kernel runs each layer, and what every candidate took: for the terminal and for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redpp_serve.report import markup
from redpp_serve.report.formats import DASH, dig, number, printable, seconds, shorten

VERSIONS = {"original": "original", "pruned": "pruned"}
HEAD = ("layer", "input", "batch", "kernel", "source", "dense", "chosen", "others")
WHY = {
    "rule": "dense without timing: no other kernel was worth it",
    "budget": "dense: the time for planning was over",
    "network": "dense: the whole network was not faster with the kernel that won alone",
}


class Row(NamedTuple):
    """Layers of one kind at one batch size, as text."""

    layer: str
    shape: str
    batch: str
    kernel: str
    source: str
    dense: str
    chosen: str
    others: str


def plan_rows(plan: Mapping[str, Any]) -> list[Row]:
    """A row for each set of equal layers that had a choice, in the network's order; layers without one are left out."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for choice in _choices(plan):
        times = choice.get("times")
        if isinstance(times, Mapping) and times:
            key = repr([*(choice.get(part) for part in ("shape", "batch", "kernel", "source")), sorted(times.items())])
            groups.setdefault(key, []).append(choice)
    return [_row(alike) for alike in groups.values()]


def plan_summary(plan: Mapping[str, Any]) -> list[str]:
    """What no row says: how many layers each kernel runs, their times in all, what was not timed, and how long the plan
    took.
    """
    choices = _choices(plan)
    found = [_batch_line(batch, [c for c in choices if c.get("batch") == batch]) for batch in _list(plan, "batches")]
    for source, why in WHY.items():
        layers = sum(choice.get("source") == source for choice in choices)
        if layers:
            found.append(f"{layers} of {len(choices)} choices {why}")
    if any(_faster(choice) for choice in choices):
        found.append("a kernel with a lower median than dense is not taken where it is not surely 3 % faster")
    return [
        *found,
        f"plan made in {seconds(plan.get('seconds'))} on {shorten(plan.get('device') or DASH, 60)}, {printable(plan.get('precision'))}",
    ]


def plan_text(plans: Mapping[str, Any]) -> str:
    """Both versions' tables for the terminal."""
    parts = []
    for key, title in VERSIONS.items():
        plan = dig(plans, key)
        if isinstance(plan, Mapping):
            rows = plan_rows(plan)
            table = _aligned([Row(*HEAD), *rows]) if rows else []
            parts += [title, *table, *(f"  {line}" for line in plan_summary(plan)), ""]
    return "\n".join(parts).rstrip()


def plan_section(report: Mapping[str, Any]) -> str:
    """The page's card; nothing where no plan was made."""
    parts = []
    for key, title in VERSIONS.items():
        plan = dig(report, "plan", key)
        if isinstance(plan, Mapping):
            rows = plan_rows(plan)
            if rows:
                parts.append(markup.table(f"The {title} network", HEAD, rows, "ctnttnnw", "dense", "tall"))
            parts.append(markup.note(f"The {title} network: " + ". ".join(plan_summary(plan)) + "."))
    return markup.section("Kernels", *parts) if parts else ""


def _choices(plan: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [choice for choice in _list(plan, "choices") if isinstance(choice, Mapping)]


def _list(plan: Mapping[str, Any], key: str) -> list[Any]:
    """Nothing where a file that was edited holds something else."""
    found = plan.get(key)
    return list(found) if isinstance(found, (list, tuple)) else []


def _batch_line(batch: Any, choices: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(printable(choice.get("kernel")) for choice in choices)
    line = f"batch {printable(batch)}: " + ", ".join(f"{n} {kernel}" for kernel, n in sorted(counts.items()))
    times = [(number(dig(c, "times", "dense")), number(dig(c, "times", str(c.get("kernel"))))) for c in choices]
    timed = [(dense, chosen) for dense, chosen in times if dense is not None and chosen is not None]
    if not timed:
        return line
    dense, chosen = map(sum, zip(*timed))
    return f"{line}; {len(timed)} timed, which take {_time(dense)} with dense kernels, {_time(chosen)} as chosen"


def _faster(choice: Mapping[str, Any]) -> bool:
    """Whether another kernel has a lower time than the dense one that stayed after timing."""
    times = choice.get("times")
    if (
        choice.get("kernel") != "dense"
        or choice.get("source") not in ("measured", "cached", "shipped")
        or not isinstance(times, Mapping)
    ):
        return False
    found = {name: number(value) for name, value in times.items()}
    dense = found.get("dense")
    return dense is not None and any(value is not None and value < dense for value in found.values())


def _row(alike: Sequence[Mapping[str, Any]]) -> Row:
    first, times = alike[0], alike[0]["times"]
    kernel = str(first.get("kernel"))
    more = f" and {len(alike) - 1} alike" if len(alike) > 1 else ""
    others = ", ".join(
        f"{printable(name)} {_time(value)}" for name, value in times.items() if name not in ("dense", kernel)
    )
    return Row(
        shorten(first.get("name") or DASH, 48) + more,
        printable(first.get("shape")),
        printable(first.get("batch")),
        printable(kernel),
        printable(first.get("source")),
        _time(times.get("dense")),
        _time(times.get(kernel)),
        others or DASH,
    )


def _time(value: Any) -> str:
    found = number(value)
    return DASH if found is None else f"{1e6 * found:.1f} us" if found < 1e-3 else f"{1e3 * found:.2f} ms"


def _aligned(rows: Sequence[Row]) -> list[str]:
    """Columns as wide as their longest text, the figures to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    right = {"batch", "dense", "chosen"}
    return [
        "  "
        + "  ".join(
            text.rjust(w) if head in right else text.ljust(w) for text, w, head in zip(row, widths, HEAD)
        ).rstrip()
        for row in rows
    ]
