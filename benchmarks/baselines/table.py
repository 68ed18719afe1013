"""The results in words and tables: what was measured, and which targets were met."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .methods import METHODS, NEAR

HEADLINE = "distilled"  # the method that the targets are about
DROPS = {"digits": 0.5, "fonts": 1.0}  # points, with half of the open sets' multiply-accumulates removed
SMALL_DROP = 0.3  # with 30 % removed
WANTED = {"baseline": "ahead of every data-free baseline", "ceiling": "at or above least squares on real images"}
Cells = dict[tuple[str, float], dict[str, Any]]  # of one network, by method and ratio


def cells_of(data: dict[str, Any], network: str) -> Cells:
    return {(c["method"], c["ratio"]): c for c in data["cells"] if c["network"] == network and c["ratio"] is not None}


def ratios_of(cells: Cells) -> list[float]:
    return sorted({ratio for _, ratio in cells})


def markdown(data: dict[str, Any]) -> str:
    """The whole report."""
    machine = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        "# Quality: accuracy against cost, without data and without fine-tuning",
        "Accuracy in percent on held-out images, by the share of multiply-accumulates (of layers that touch an open "
        "channel set) that is removed. All methods prune the same sets to multiples of 8 and are "
        "counted the same way. Where a method has several settings, its most accurate one is shown. A figure in "
        f"brackets missed its target cost by more than {NEAR:.0%}; the share it did remove stands beside it. Model "
        "folding is this project's implementation from its paper. The ceiling alone sees real training images.",
        f"Measured on {machine['device']}, {machine['threads']} threads; {versions}.",
    ]
    for name, network in data["networks"].items():
        cells = cells_of(data, name)
        parts.append(f"## {name}")
        parts.append(
            f"{network['accuracy']:.2f} % on {network['images']} images of the {network['task']} task; "
            f"{network['parameters']:,} parameters, {network['macs']:,} multiply-accumulates, "
            f"{network['open_macs'] / network['macs']:.0%} of them in layers with an open channel set."
        )
        if cells:
            parts += [_accuracy_table(cells), _cost_table(cells)]
        parts += [_stage_table(c["rows"]) for c in data["cells"] if c["network"] == name and c["method"] == "stages"]
    parts.append("## Targets")
    parts.append("\n".join(f"* {line}" for line in targets(data)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _accuracy_table(cells: Cells) -> str:
    ratios = ratios_of(cells)
    present = [name for name in METHODS if any(method == name for method, _ in cells)]
    rows = [[METHODS[name].title, *(_accuracy(cells.get((name, ratio))) for ratio in ratios)] for name in present]
    return _table(["accuracy, removed", *(f"{ratio:.0%}" for ratio in ratios)], rows)


def _accuracy(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    reached = abs(cell["removed"] - cell["ratio"]) <= NEAR
    return f"{cell['accuracy']:.2f}" if reached else f"({cell['accuracy']:.2f} at {cell['removed']:.0%})"


def _cost_table(cells: Cells) -> str:
    """What the headline's points cost; without it, those of the last method there is."""
    shown = next(name for name in (HEADLINE, *reversed(METHODS)) if any(m == name for m, _ in cells))
    rows = []
    for ratio in ratios_of(cells):
        cell = cells.get((shown, ratio))
        if cell:
            sizes = [f"{cell[name]:,}" for name in ("macs", "parameters")]
            rows.append([f"{ratio:.0%}", *sizes, _latency(cell), f"{cell['seconds']:.0f}"])
    head = [f"{METHODS[shown].title}, removed", "MACs", "parameters", "time, share of the original's", "seconds"]
    return _table(head, rows)


def _latency(cell: dict[str, Any]) -> str:
    found = cell["latency"]
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f}), batch {found['batch']}" if found else ""


def _stage_table(rows: list[dict[str, Any]]) -> str:
    figures = ("multiplications", "additions", "bytes")
    body = [[row["stage"], *(f"{row[name]:,}" for name in figures), f"{row['accuracy']:.2f}"] for row in rows]
    return _table(["RED++'s stages", "multiplications", "additions", "bytes of weights", "accuracy"], body)


def targets(data: dict[str, Any]) -> list[str]:
    """A line for each target and network that there are figures for, beginning with met or missed."""
    lines = []
    for name, network in data["networks"].items():
        cells = cells_of(data, name)
        drops = ((0.5, DROPS[network["task"]]), (0.3, SMALL_DROP))
        for ratio, allowed in drops:
            cell = cells.get((HEADLINE, ratio))
            if cell:
                lost = network["accuracy"] - cell["accuracy"]
                reached = cell["removed"] >= ratio - NEAR
                text = f"{name}: {ratio:.0%} removed ({cell['removed']:.1%} reached) costs {lost:.2f} points"
                lines.append(_verdict(reached and lost <= allowed + 1e-9, f"{text}, at most {allowed:.1f} wanted"))
        lines += _comparisons(name, cells)
    return lines


def _comparisons(name: str, cells: Cells) -> Iterator[str]:
    for kind, wanted in WANTED.items():
        gaps = []  # accuracy of ours less the rival's
        for (method, ratio), rival in cells.items():
            ours = cells.get((HEADLINE, ratio))
            if ours is None or method not in METHODS or METHODS[method].kind != kind:
                continue
            if rival["removed"] <= ours["removed"] + NEAR:  # one that removed more proves nothing
                gaps.append((ours["accuracy"] - rival["accuracy"], f"{ratio:.0%} {method}"))
        if gaps:
            behind = [f"{place} by {-gap:.2f}" for gap, place in gaps if gap < -1e-9]
            level = sum(abs(gap) <= 1e-9 for gap, _ in gaps)
            text = f"{name}: {wanted}: ahead {len(gaps) - level - len(behind)}, level {level}, behind {len(behind)}"
            yield _verdict(not behind, text + (f" ({', '.join(behind)})" if behind else ""))


def _verdict(met: bool, text: str) -> str:
    return f"{'met' if met else 'missed'}: {text}"
