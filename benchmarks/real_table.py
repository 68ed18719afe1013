"""The cells of `benchmarks.real` in words and tables: what was measured, what was lost, which goals were met."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.real_arms import ARMS, NEAR

HONEST = (0.7, 2.0)  # reported error as a multiple of the real one
Cells = dict[tuple[str, str], dict[str, Any]]  # of one network, by arm and point


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        network: where it is measured.
        arm: of `ARMS`.
        point: operating point.
        figure: ``agreement`` (the mean over sets, percent), ``accuracy`` (percent), ``seconds`` or ``cpu_seconds``.
        wanted: at least this; at most, where the figure is a time.
    """

    network: str
    arm: str
    point: str
    figure: str
    wanted: float


GOALS = (
    *(Goal("lite0", "ours", f"macs={p}", "agreement", w) for p, w in (("0.90", 72), ("0.80", 60), ("0.65", 41))),
    *(
        Goal("lite0", arm, f"macs={p}", "agreement", w)
        for arm in ("ours_inputs", "ours_moments")
        for p, w in (("0.90", 80), ("0.80", 72), ("0.65", 52))
    ),
    Goal("lite0", "ours", "default", "agreement", 90),
    Goal("lite0", "ours", "default", "seconds", 300),
    Goal("digit", "ours", "macs=0.50", "accuracy", 96.6),
    Goal("mobilenetv2_050", "ours", "keep=0.5", "seconds", 60),
    Goal("resnet50", "ours", "macs=0.50", "cpu_seconds", 600),
)


def markdown(data: Mapping[str, Any]) -> str:
    """The whole report."""
    machine = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        "# Real networks: what pruning does on photographs that are never fitted",
        "Agreement is the share of images with the original's largest output, in percent, with its 95 % "
        "Clopper-Pearson interval (which takes crops of one photograph for independent). The error is that of the "
        "outputs, each centred over the images, relative to the original's. A: crops of landscapes and buildings. "
        "B: objects and animals. Where an arm has several settings, the best one is shown, chosen with hindsight. "
        "Model folding is this project's implementation from its paper. Nothing that is evaluated is ever fitted to; "
        "the arms that see real inputs say so, and see others.",
        f"Measured on {machine['device']}; {versions}. Dates, threads and the digest of the code stand in each cell "
        "of the JSON file.",
    ]
    for name, network in data["networks"].items():
        cells = {(c["arm"], c["point"]): c for c in data["cells"] if c["network"] == name}
        if cells:
            parts += [f"## {name}", _of_network(network), _overview(cells), _truth(cells), _stages(cells)]
    parts += ["## Losing cells", _list(losing(data)), "## Goals", _list(goals(data))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _of_network(network: Mapping[str, Any]) -> str:
    parts = [f"{network['macs']:,} multiply-accumulates", f"{network['parameters']:,} parameters"]
    parts += [f"{name}: {one['images']} images" for name, one in network["sets"].items()]
    if known := network.get("known"):
        shares = (f"{known[key]:,}" for key in ("right", "right_in_five"))
        parts.append(
            f"of {known['labelled']:,} labelled inputs {' first and '.join(shares)} among the first five right"
        )
    return "; ".join(parts) + "."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _list(lines: Iterator[str]) -> str:
    return "\n".join(f"* {line}" for line in lines) or "None."


def _points(cells: Cells) -> list[str]:
    return sorted({point for _, point in cells}, key=lambda p: (p != "default", p.partition("=")[0], -_number(p)))


def _number(point: str) -> float:
    return float(point.partition("=")[2] or 0)


def _overview(cells: Cells) -> str:
    points = _points(cells)
    rows = []
    for name, arm in ARMS.items():
        if any(a == name for a, _ in cells):
            sees = f" ({arm.data})" if arm.data else ""
            rows.append([arm.title + sees, *(_short(cells.get((name, point))) for point in points)])
    return _table(["agreement, %", *points], rows)


def _short(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["status"] != "measured":
        return "-" if cell["status"] == "unavailable" else cell["status"]
    if not cell["scores"]:
        return f"{cell['cpu_seconds']:.0f} CPU s"
    text = " / ".join(f"{100 * s['agreement']:.1f}" for s in cell["scores"].values())
    accuracy = _accuracy(cell)
    text += f", accuracy {accuracy:.2f}" if accuracy is not None else ""
    reached = cell["point"] == "default" or abs(cell["share"] - _number(cell["point"])) <= NEAR
    return text if reached else f"({text} at {cell['share']:.2f})"


def _accuracy(cell: Mapping[str, Any]) -> float | None:
    """Percent right of a set that has labels throughout."""
    whole = [s for s in cell["scores"].values() if s["labelled"] == s["images"]]
    return 100 * whole[0]["right"] / whole[0]["labelled"] if whole else None


def _truth(cells: Cells) -> str:
    """What the tool says of its own cells, and what is so."""
    rows = []
    for (arm, point), cell in sorted(cells.items(), key=lambda item: (list(ARMS).index(item[0][0]), item[0][1])):
        if ARMS[arm].kind != "ours":
            continue
        name = f"{point}, {ARMS[arm].data or 'no data'}" + (", ceiling" if arm == "ceiling" else "")
        cost = [f"{cell['cpu_seconds']:.0f} / {cell['seconds']:.0f}", f"{cell['peak_mib']:,}"]
        if cell["status"] != "measured":
            rows.append([name, "", f"{cell['status']}: {cell['reason']}", "", "", "", *cost])
            continue
        scores = cell["scores"].values()
        real = [
            " / ".join(f"{100 * s['agreement']:.1f} ({100 * s['low']:.0f} to {100 * s['high']:.0f})" for s in scores),
            " / ".join(f"{s['error']:.3f}" for s in scores),
        ]
        said = cell["reported"]
        ratios = " / ".join("" if r is None else f"{r:.2f}" for r in cell["reported_to_real"].values())
        rows.append([name, f"{cell['share']:.2f}", *real, _said(said), ratios, *cost])
    head = ["redpp-serve", "MACs", "agreement, %", "error", "reported error, agreement", "reported / real error"]
    return _table([*head, "CPU / wall s", "MiB"], rows) if rows else ""


def _said(reported: Mapping[str, Any]) -> str:
    error, agreement = reported.get("output_error", reported.get("error")), reported.get("agreement")
    words = [f"{error:.3f}" if isinstance(error, (int, float)) else "unknown"]
    words += [f"{100 * agreement:.1f} %"] if isinstance(agreement, (int, float)) else []
    return ", ".join(words)


def _stages(cells: Cells) -> str:
    lines = []
    for (arm, point), cell in cells.items():
        spent = [f"{s['name']} {s['seconds']:.0f}" for s in cell.get("stages", []) if s["seconds"] >= 1]
        if spent:
            lines.append(f"{point}, {ARMS[arm].data or 'no data'}: {', '.join(spent)}")
    return ("Seconds of the stages:\n\n" + _list(iter(lines))) if lines else ""


def _mean_agreement(cell: Mapping[str, Any]) -> float:
    return 100 * sum(s["agreement"] for s in cell["scores"].values()) / len(cell["scores"])


def losing(data: Mapping[str, Any]) -> Iterator[str]:
    """A line for each cell of ours that is refused, crashes, lies about its error, or falls behind a peer."""
    for name in data["networks"]:
        cells = {(c["arm"], c["point"]): c for c in data["cells"] if c["network"] == name}
        for (arm, point), cell in cells.items():
            if ARMS[arm].kind != "ours" or cell["status"] == "unavailable":
                continue
            place = f"{name}, {point}, {ARMS[arm].data or 'no data'}"
            if cell["status"] != "measured":
                yield f"{place}: {cell['status']}, {cell['reason']}"
                continue
            for which, ratio in cell["reported_to_real"].items():
                if ratio is None or not HONEST[0] <= ratio <= HONEST[1]:
                    said = "unknown" if ratio is None else f"{ratio:.2f} of the real one"
                    yield f"{place}: the reported error is {said} on {which}"
            yield from _behind(place, cell, cells)


def _behind(place: str, cell: Mapping[str, Any], cells: Cells) -> Iterator[str]:
    """Peers that see no more data than ours, and removed no less, but agree with the original more often."""
    for (arm, point), rival in cells.items():
        fair = ARMS[arm].kind == "peer" and (not ARMS[arm].data or ARMS[cell["arm"]].data)
        if point != cell["point"] or not fair or rival["status"] != "measured" or not cell["scores"]:
            continue
        gap = _mean_agreement(rival) - _mean_agreement(cell)
        if gap > 0 and rival["share"] <= cell["share"] + NEAR:
            yield f"{place}: {ARMS[arm].title} agrees {gap:.1f} points more often"


def goals(data: Mapping[str, Any]) -> Iterator[str]:
    """A line for each goal, beginning with met, missed or not measured."""
    for goal in GOALS:
        place = f"{goal.network}, {goal.point}, {ARMS[goal.arm].data or 'no data'}: {goal.figure.replace('_', ' ')}"
        cell = next(
            (c for c in data["cells"] if (c["network"], c["arm"], c["point"]) == (goal.network, goal.arm, goal.point)),
            None,
        )
        if cell is None or cell["status"] == "unavailable":
            yield f"not measured: {place} of {goal.wanted:g}"
        elif cell["status"] != "measured":
            yield f"missed: {place} of {goal.wanted:g}: {cell['status']}"
        else:
            got = _figure(cell, goal.figure)
            met = got <= goal.wanted if goal.figure.endswith("seconds") else got >= goal.wanted
            yield f"{'met' if met else 'missed'}: {place} {got:.1f}, wanted {goal.wanted:g}"


def _figure(cell: Mapping[str, Any], figure: str) -> float:
    if figure == "agreement":
        return _mean_agreement(cell)
    return float(cell[figure]) if figure.endswith("seconds") else float(_accuracy(cell) or 0.0)
