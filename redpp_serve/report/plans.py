"""Which kernel runs each layer, and what every candidate took: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redpp_serve.report import markup
from redpp_serve.report.formats import DASH, dig, number, printable, seconds, shorten

VERSIONS = {"original": "original", "redpp": "pruned"}
HEAD = ("layer", "input", "batch", "kernel", "dense", "chosen", "others")


class Row(NamedTuple):
    """Layers of one kind at one batch size, as text."""

    layer: str
    shape: str
    batch: str
    kernel: str
    dense: str
    chosen: str
    others: str


def plan_rows(plan: Mapping[str, Any]) -> list[Row]:
    """A row for each set of equal layers that had a choice, in the network's order; layers without one are left out."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for choice in _choices(plan):
        times = choice.get("times")
        if isinstance(times, Mapping) and times:
            key = choice.get("shape"), choice.get("batch"), choice.get("kernel"), tuple(sorted(times.items()))
            groups.setdefault(key, []).append(choice)
    return [_row(alike) for alike in groups.values()]


def plan_summary(plan: Mapping[str, Any]) -> list[str]:
    """What no row says: how many layers each kernel runs, what was not timed, and how long the plan took."""
    found = []
    for batch in plan.get("batches") or []:
        counts: dict[str, int] = {}
        for choice in _choices(plan):
            if choice.get("batch") == batch:
                name = printable(choice.get("kernel"))
                counts[name] = counts.get(name, 0) + 1
        found.append(f"batch {printable(batch)}: " + ", ".join(f"{n} {kernel}" for kernel, n in sorted(counts.items())))
    for source, why in (("rule", "dense without timing: no other kernel was worth it"), ("budget", "dense: the time for planning was over"),
                        ("network", "dense: the whole network was not faster with the kernel that won alone")):
        layers = sum(choice.get("source") == source for choice in _choices(plan))
        if layers:
            found.append(f"{layers} of {len(_choices(plan))} choices {why}")
    return [*found, f"plan made in {seconds(plan.get('seconds'))} on {shorten(plan.get('device') or DASH, 60)}, {printable(plan.get('precision'))}"]


def plan_text(plans: Mapping[str, Any]) -> str:
    """Both versions' tables for the terminal."""
    parts = []
    for key, title in VERSIONS.items():
        plan = dig(plans, key)
        if isinstance(plan, Mapping):
            parts += [f"{title}", *_aligned([Row(*HEAD), *plan_rows(plan)]), *(f"  {line}" for line in plan_summary(plan)), ""]
    return "\n".join(parts).rstrip()


def plan_section(report: Mapping[str, Any]) -> str:
    """The page's card; nothing where no plan was made."""
    parts = []
    for key, title in VERSIONS.items():
        plan = dig(report, "plan", key)
        if isinstance(plan, Mapping):
            rows = [(r.layer, r.shape, r.batch, r.kernel, r.dense, r.chosen, r.others) for r in plan_rows(plan)]
            parts.append(markup.table(f"The {title} network", HEAD, rows, "ctntnnw", "dense", "tall"))
            parts.append(markup.note(". ".join(plan_summary(plan)) + "."))
    return markup.section("Kernels", *parts) if parts else ""


def _choices(plan: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [choice for choice in plan.get("choices") or [] if isinstance(choice, Mapping)]


def _row(alike: Sequence[Mapping[str, Any]]) -> Row:
    first, times = alike[0], alike[0]["times"]
    kernel = str(first.get("kernel"))
    more = f" and {len(alike) - 1} alike" if len(alike) > 1 else ""
    others = ", ".join(f"{printable(name)} {_time(value)}" for name, value in times.items() if name not in ("dense", kernel))
    return Row(shorten(first.get("name") or DASH, 48) + more, printable(first.get("shape")), printable(first.get("batch")),
               printable(kernel), _time(times.get("dense")), _time(times.get(kernel)), others or DASH)  # fmt: skip


def _time(value: Any) -> str:
    found = number(value)
    return DASH if found is None else f"{1e6 * found:.1f} us" if found < 1e-3 else f"{1e3 * found:.2f} ms"


def _aligned(rows: Sequence[Row]) -> list[str]:
    """Columns as wide as their longest text, the figures to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(HEAD))]
    right = {"batch", "dense", "chosen"}
    return ["  " + "  ".join(text.rjust(w) if head in right else text.ljust(w) for text, w, head in zip(row, widths, HEAD)).rstrip()
            for row in rows]  # fmt: skip
