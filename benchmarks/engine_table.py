"""The cells of `benchmarks.engines` in tables: what is faster, what it takes, what was lost, which goals were met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.engine_arms import ARMS, FORCED, OURS, OURS_AUTO, STOCK, ours
from redpp_serve.engines import OWN

LEAST = 0.97  # times as fast as the best by hand, in fp32
OVER_STOCK = {"lite0": 3.0, "resnet50": 3.0}  # times as fast as the stock module, at automatic precision,
_WIDE = ("avx512", "amx")  # on processors with these instructions
TWO_WORKERS = 1.9
MOST_OVERHEAD = 100.0  # microseconds
MOST_TRYING, MOST_READY = 15.0, 1.0  # seconds, the latter of networks of 25 million weights
MOST_KEPT = 100.0  # MiB
HONEST = (0.7, 2.0)  # recorded error as a multiple of the one on photographs
_BEST, _GAIN = f"{OURS} over best by hand", f"{OURS_AUTO} over {STOCK}"


def markdown(data: Mapping[str, Any]) -> str:
    """Return the whole report."""
    machine = data.get("environment")
    if not machine:
        return "no cells\n"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        "# Engines: the served network beside what its users would run by hand",
        "By hand: the stock module called eagerly, ONNX Runtime on what `torch.onnx.export` writes, OpenVINO on what "
        "`convert_model` makes of the exported program, with their defaults but for threads (and no pinned threads). "
        "Ours: an artifact in `ServingModel`, with the engine that it chooses, or the one named. Each arm of a row "
        "has a process of its own; they take turns, and only those whose outputs agree with float64. All "
        "processes are started `starts` times (JSON file), as memory may lie better in one than in another. Times are "
        "medians in milliseconds of a batch with the 20th and 80th percentiles, of readings that are means of the "
        "calls that fit into 20 ms; ratios say how many times as fast, with 95 % intervals. With several threads each "
        "reading is followed by a rest, until ONNX Runtime's threads no longer spin on the cores of the next arm."
        + (f" Ours has the memory of a worker: {machine['memory']}." if "memory" in machine else ""),
        f"Measured on {machine['device']} ({machine['processor']}); {versions}. Dates, the machine's load before each "
        "cell, errors and what was left out stand in the JSON file.",
    ]
    for title, body in _SECTIONS.items():
        if text := body(data):
            parts += [f"## {title}", text]
    parts += ["## Losing cells", _list(losing(data)), "## Goals", _list(goals(data))]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""


def _list(lines: Iterator[str]) -> str:
    return "\n".join(f"* {line}" for line in lines) or "None."


def _cells(data: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    return [c for c in data["cells"] if c["kind"] == kind and c["status"] == "measured"]


def _rows(data: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for cell in _cells(data, "times"):
        for row in cell["rows"]:
            yield cell, row


def _ms(row: Mapping[str, Any], name: str) -> str:
    if name not in row["ms"]:
        return "wrong" if name in row["not timed"] else ""
    middle, low, high = row["ms"][name]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _ratio(row: Mapping[str, Any], title: str) -> str:
    found = row["ratios"].get(title)
    return f"{found[1]:.2f} ({found[2]:.2f} to {found[3]:.2f})" if found else ""


def _place(cell: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    clock = "" if cell["clock"] == "wall" else f" ({cell['clock']} time)"
    return [cell["network"], f"{row['batch']} / {cell['threads']}{clock}"]


def _times(data: Mapping[str, Any]) -> str:
    columns = {
        "stock eager": STOCK, "ONNX Runtime": "onnxruntime", "OpenVINO": "openvino", "**ours, fp32**": OURS,
        "OpenVINO bf16": "openvino bf16", "**ours, auto**": OURS_AUTO,
    }  # fmt: skip
    rows = []
    for cell, row in _rows(data):
        best = row["ratios"].get(_BEST)
        against = f"{_ratio(row, _BEST)}, {best[0]}" if best else ""
        shown = [_ms(row, name) for name in columns.values()]
        rows.append([*_place(cell, row), *shown, against, _ratio(row, _GAIN), _chosen(cell, row)])
    ends = ["ours fp32 / best by hand", "ours auto / stock", "auto chose"]
    return _table(["network", "batch / threads", *columns, *ends], rows)


def _chosen(cell: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    plan = cell["plans"].get(OURS_AUTO, {}).get(str(row["batch"]))
    return f"{plan[0]} {plan[1]}" if plan else ""


def _forced(data: Mapping[str, Any]) -> str:
    names = [ours(engine, precision) for engine, precision in FORCED]
    kept = [n for n in names if any(n in row["errors"] for _, row in _rows(data))]
    rows = [[*_place(cell, row), *(_ms(row, name) for name in kept)] for cell, row in _rows(data) if kept]
    return _table(["network", "batch / threads", *(name.removeprefix("ours ") for name in kept)], rows)


def _ready(data: Mapping[str, Any]) -> str:
    rows = []
    for cell in _cells(data, "ready"):
        parts = ", ".join(f"{name} {value:.2f}" for name, value in cell["parts"].items())
        again = f"{cell['seconds_again']:.2f}" if "seconds_again" in cell else ""
        memory = [f"{cell[name]:.0f}" if name in cell else "" for name in ("kept_mib", "peak_mib")]
        weights = f"{data['networks'][cell['network']]['weights_mib']:.0f}"
        rows.append([cell["network"], cell["arm"], f"{cell['seconds']:.2f}", parts, again, *memory, weights])
    head = ["network", "arm", "seconds to the first answer", "of these", "again", "MiB kept", "MiB at the peak"]
    table = _table([*head, "MiB of weights"], rows)
    note = (
        "From the artifact, or the exported file, to the first answer at batch 1, in a process that has imported torch "
        "alone; by hand, the export comes before and is not counted. With the engine named, as a worker builds what it "
        "has chosen; without, trying all candidates is included, and *again* is a worker that finds the times of an "
        "earlier one. Memory is beyond the weights, counted once."
    )
    return f"{note}\n\n{table}" if table else ""


def _overhead(data: Mapping[str, Any]) -> str:
    rows = [
        [cell["network"], cell["arm"], "{:.0f} ({:.0f} to {:.0f})".format(*cell["microseconds"])]
        for cell in _cells(data, "overhead")
    ]
    return _table(["network", "engine", "microseconds beyond the engine's own call"], rows)


def _workers(data: Mapping[str, Any]) -> str:
    rows = [
        [cell["network"], cell["arm"], "{:.2f} ({:.2f} to {:.2f})".format(*cell["ratio"])]
        for cell in _cells(data, "workers")
    ]
    table = _table(["network", "arm", "two workers of one thread against one"], rows)
    return f"`control` counts in Python: what the machine gives to two processes.\n\n{table}" if table else ""


def _scores(data: Mapping[str, Any]) -> str:
    rows = []
    for cell in _cells(data, "scores"):
        found = cell["scores"].values()
        agreement = " / ".join(
            f"{100 * s['agreement']:.1f} ({100 * s['low']:.0f} to {100 * s['high']:.0f})" for s in found
        )
        said = "" if cell["recorded"] is None else f"{cell['recorded']:.3f}"
        rows.append([cell["network"], cell["arm"], agreement, " / ".join(f"{s['error']:.3f}" for s in found), said])
    return _table(["network", "arm", "agreement with fp32 on photographs, %", "error", "recorded error"], rows)


def _pruned(data: Mapping[str, Any]) -> str:
    rows = []
    for cell in _cells(data, "pruned"):
        for row in cell["rows"]:
            gains = [f"{t.partition(', ')[2]} {_ratio(row, t)}" for t in row["ratios"] if t.startswith("pruned")]
            rows.append([*_place(cell, row), cell["arm"], f"{cell['share']:.2f}", "<br>".join(gains)])
    return _table(["network", "batch / threads", "file", "MACs", "pruned against original, times as fast"], rows)


_SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "Times": _times,
    "Each engine and precision": _forced,
    "Until the first answer": _ready,
    "Overhead of a call": _overhead,
    "Two workers": _workers,
    "Lower precisions on photographs": _scores,
    "Pruned against original": _pruned,
}


def losing(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each cell of ours that is slower than by hand, wrong, unavailable or failed."""
    for cell in data["cells"]:
        if cell["status"] != "measured":
            yield f"{cell['kind']}, {cell['network']}, {cell['arm']}: {cell['status']}, {cell['reason']}"
    for cell, row in _rows(data):
        place = f"{cell['network']}, batch {row['batch']}, {cell['threads']} threads"
        for title, (other, ratio, low, high) in row["ratios"].items():
            if high < 1 and not title.startswith(ours(OWN, "fp32")):
                yield f"{place}: {title} is {ratio:.2f} ({low:.2f} to {high:.2f}), against {other}"
        for name, reason in row["not timed"].items():
            yield f"{place}: {name} is not timed: {reason}"
    for cell in _cells(data, "times"):
        for name, reason in cell["left_out"].items():
            yield f"{cell['network']}: {name} is left out: {reason}"
    for cell in _cells(data, "pruned"):
        for row in cell["rows"]:
            for title, (_, ratio, low, high) in row["ratios"].items():
                if title.startswith("pruned") and high < 1:
                    yield f"{cell['network']}, batch {row['batch']}: {title} {ratio:.2f} ({low:.2f} to {high:.2f})"


def goals(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each goal that there is a figure for, beginning with met or missed."""
    over_stock = OVER_STOCK if any(wide in data["environment"]["processor"] for wide in _WIDE) else {}
    for cell, row in _rows(data):
        place = f"{cell['network']}, batch {row['batch']}, {cell['threads']} threads"
        wanted = {_BEST: LEAST} | ({_GAIN: over_stock[cell["network"]]} if cell["network"] in over_stock else {})
        for title, least in wanted.items():
            if title in row["ratios"]:
                yield _verdict(row["ratios"][title][1] >= least, f"{place}: {title} {_ratio(row, title)}", least)
    for cell in _cells(data, "ready"):
        if "trying" in cell:
            text = f"{cell['network']}, {cell['arm']}: {cell['trying']:.1f} s of trying"
            yield _verdict(cell["trying"] <= MOST_TRYING, text, MOST_TRYING)
        elif ARMS[cell["arm"]].engine:
            place = f"{cell['network']}, {cell['arm']}"
            yield _verdict(cell["seconds"] <= MOST_READY, f"{place}: ready in {cell['seconds']:.2f} s", MOST_READY)
            text = f"{place}: {cell['kept_mib']:.0f} MiB kept beyond the weights"
            yield _verdict(cell["kept_mib"] <= MOST_KEPT, text, MOST_KEPT)
    for cell in _cells(data, "overhead"):
        text = f"{cell['network']}, {cell['arm']}: {cell['microseconds'][0]:.0f} us of overhead"
        yield _verdict(cell["microseconds"][0] <= MOST_OVERHEAD, text, MOST_OVERHEAD)
    for cell in _cells(data, "workers"):
        if cell["arm"] == OURS:
            text = f"{cell['network']}: two workers {cell['ratio'][0]:.2f} times one"
            yield _verdict(cell["ratio"][0] >= TWO_WORKERS, text, TWO_WORKERS)
    for cell in _cells(data, "scores"):
        for which, score in cell["scores"].items() if cell["recorded"] else ():
            ratio = cell["recorded"] / max(score["error"], 1e-9)
            text = f"{cell['network']}, {cell['arm']}: the recorded error is {ratio:.2f} of the one on {which}"
            yield _verdict(HONEST[0] <= ratio <= HONEST[1], text, "{:g} to {:g}".format(*HONEST))


def _verdict(met: bool, text: str, wanted: float | str) -> str:
    return f"{'met' if met else 'missed'}: {text}, wanted {wanted}"
