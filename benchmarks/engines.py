"""Compare the engines that serve a network with what its users would run by hand: ``python -m benchmarks.engines``.

A run goes on where it stopped; each cell, and each arm that is timed, runs in a process of its own, and no arm is timed
before its outputs are held against float64. On an idle machine all takes about an hour on one thread. Needs ``pip
install -e '.[peers]'`` and, for the networks, torchvision and timm; EfficientNet-Lite0 and the photographs are fetched
(`benchmarks.real_sources`).

``--pruned NETWORK FILE`` times a ``.mar`` or ``.redpp`` file against the network that it came from, at equal engine
and precision.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.engine_arms import (
    ARMS,
    COMPILED,
    NNCF,
    ON_PHOTOGRAPHS,
    OURS,
    OURS_AUTO,
    PLAN_SECONDS,
    STOCK,
    CellOptions,
    ours,
)
from benchmarks.engine_cell import KINDS
from benchmarks.engine_networks import NETWORKS, keep
from benchmarks.engine_table import markdown
from benchmarks.engine_worker import CLOCKS
from redpp_serve.engines import ENGINES, ON_CPU, processor
from redpp_serve.files import write_atomically
from redpp_serve.machine import describe_machine

OUT = Path("benchmarks/results/engines.json")
PRUNED = "pruned"
_TIMED = tuple(name for name in NETWORKS if name != "thin")
_READY = ("onnxruntime", "openvino", *(n for n, arm in ARMS.items() if arm.engine in ENGINES), OURS, OURS_AUTO)
_SCORED = ("openvino", "openvino bf16", NNCF, ON_PHOTOGRAPHS, OURS, *(ours("openvino", p) for p in ("bf16", "int8")))
_PACKAGES = ("openvino", "onnxruntime", "onnx", "nncf", "timm", "torchvision")
_WORKER_SECONDS = 3.0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--kinds", nargs="+", choices=[k for k in KINDS if k != PRUNED], default=None)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=1, help="of every arm (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing all arms at one batch size")
    parser.add_argument("--starts", type=int, default=1, help="how often the processes of all arms are started anew")
    parser.add_argument("--plan-seconds", type=float, default=PLAN_SECONDS, help="that ours may spend on its choices")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu where others use the machine")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too, which takes minutes a network")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=[], metavar="ARM", help="arms to time")
    parser.add_argument("--again", action="store_true", help="measure the chosen cells even where the file has them")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that a cell may take")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "redpp-engines",
                        help="keeps artifacts and exports")  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; tables go beside it as .md")
    parser.add_argument("--pruned", nargs=2, metavar=("NETWORK", "FILE"), help="time a pruned network alone, and end")
    parser.add_argument("--tables", action="store_true", help="only write the tables of the JSON file again")
    return parser.parse_args(arguments)


def read(path: Path) -> dict[str, Any]:
    """Return earlier results; empty ones where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"networks": {}, "cells": []}


def write(path: Path, data: dict[str, Any]) -> None:
    """Replace the file and its tables, after each cell."""
    data = {"environment": environment(), "networks": data["networks"], "cells": sorted(data["cells"], key=_order)}
    write_atomically(path, json.dumps(data, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(data))


def environment() -> dict[str, Any]:
    """Return the machine, what its processor can do, and the releases."""
    found = describe_machine()
    for package in _PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = "missing"
    memory = "freed blocks are kept, and huge pages asked for, as `serve` and the images do"
    return found | {"processor": processor.describe(), "flags": sorted(processor.flags()), "memory": memory}


def cells(options: argparse.Namespace) -> Iterator[CellOptions]:
    """Yield what to measure, in the order of measuring."""
    for kind in options.kinds or [k for k in KINDS if k != PRUNED]:
        for network in options.networks:
            for arm in _arms(kind, network):
                yield _cell(options, kind, network, arm)


def _arms(kind: str, network: str) -> tuple[str, ...]:
    if kind == "overhead":
        return ON_CPU if network == "thin" else ()
    if network == "thin":
        return ()
    if kind == "scores":
        return _SCORED if network == "lite0" else ()
    if kind == "workers":
        return ("control", STOCK, OURS) if network == "lite0" else ()
    return ("all",) if kind == "times" else _READY


def _cell(options: argparse.Namespace, kind: str, network: str, arm: str) -> CellOptions:
    return CellOptions(
        kind,
        network,
        arm,
        1 if kind in ("workers", "scores") else options.threads,
        str(options.scratch),
        tuple(options.batches),
        min(options.seconds, _WORKER_SECONDS) if kind == "workers" else options.seconds,
        options.plan_seconds,
        options.compile,
        tuple(options.arms),
        options.clock,
        options.starts,
    )


def _place(cell: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return cell["kind"], cell["network"], cell["arm"], cell["threads"]


def _order(cell: Mapping[str, Any]) -> tuple[int, int, int, str]:
    arms = ["all", *ARMS]
    arm = arms.index(cell["arm"]) if cell["arm"] in arms else len(arms)
    return (
        list(KINDS).index(cell["kind"]),
        list(NETWORKS).index(cell["network"]),
        arm,
        f"{cell['threads']}{cell['arm']}",
    )


def is_done(cell: CellOptions, data: Mapping[str, Any]) -> bool:
    """Say whether the results have a cell, with all of its batch sizes and with what is asked for now."""
    found = next((c for c in data["cells"] if _place(c) == _place(asdict(cell))), None)
    if found is None or found["status"] == "failed":
        return False
    rows = found.get("rows", [])
    if cell.kind == "times":
        compiled = not cell.compiled or COMPILED in rows[0]["errors"] if rows else False
        return compiled and set(cell.batches) <= {row["batch"] for row in rows}
    return True


def run_cell(cell: CellOptions, timeout: float) -> dict[str, Any]:
    """Measure a cell in a process of its own; one that dies or takes too long is a result, too."""
    surroundings = dict(os.environ) | {"OMP_NUM_THREADS": str(cell.threads)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cell.json"
        command = [sys.executable, "-m", "benchmarks.engine_cell", cell.write(), str(file)]
        try:
            code = subprocess.run(command, env=surroundings, timeout=timeout).returncode
            reason = f"the process ended with {code}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {timeout:g} s"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
    found = {name: getattr(cell, name) for name in ("kind", "network", "arm", "threads")}
    return found | {"status": "failed", "reason": reason}


def summary(cell: Mapping[str, Any]) -> str:
    """One cell in a line."""
    text = f"{cell['kind']:9} {cell['network']:16} {cell['arm']:24}"
    if cell["status"] != "measured":
        return f"{text} {cell['status']}: {cell['reason']}"
    if cell["kind"] in ("times", PRUNED):
        shown = {row["batch"]: row["ratios"] for row in cell["rows"]}
        parts = [f"{batch}: {t} {r[1]:.2f} ({r[0]})" for batch, ratios in shown.items() for t, r in ratios.items()]
        return "\n    ".join([text, *parts, *(f"{name}: {reason}" for name, reason in cell["left_out"].items())])
    if cell["kind"] == "scores":
        return f"{text} " + ", ".join(f"{n} {s['agreement']:.1%}" for n, s in cell["scores"].items())
    return f"{text} " + ", ".join(
        f"{k} {cell[k]}" for k in ("seconds", "peak_mib", "microseconds", "ratio") if k in cell
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    data = read(options.out)
    if options.tables:
        write_atomically(options.out.with_suffix(".md"), markdown(data))
        return
    todo = [_cell(options, PRUNED, *options.pruned)] if options.pruned else list(cells(options))
    for cell in todo:
        if not options.again and not options.pruned and is_done(cell, data):
            continue
        found = run_cell(cell, options.timeout)
        print(summary(found), flush=True)
        data["networks"][cell.network] = keep(NETWORKS[cell.network], options.scratch).facts
        data["cells"] = [*(c for c in data["cells"] if _place(c) != _place(found)), found]
        write(options.out, data)
    print(markdown(json.loads(options.out.read_text(encoding="utf-8"))) if options.out.exists() else "no cells")


if __name__ == "__main__":
    main()
