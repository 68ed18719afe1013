"""Measure pruning of real networks on photographs and digits that are never fitted: ``python -m benchmarks.real``.

A run goes on where it stopped. Each cell runs in a process of its own. Before any figure the originals are checked: on
labelled photographs and digits they must be as good as they are known to be. Needs ``torch-pruning==1.6.0`` and
``scikit-learn``; what else it needs is fetched (`benchmarks.real_sources`).

``--score FILE`` only holds one ``.mar`` or ``.redpp`` file against the network that it came from.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_arms import ARMS
from benchmarks.real_cell import code_digest
from benchmarks.real_data import check_set
from benchmarks.real_networks import NETWORKS, load_graph
from benchmarks.real_scores import evaluate, read_pruned, run, score
from benchmarks.real_table import markdown
from redpp_serve.graph.layers import mac_count, parameter_count
from redpp_serve.machine import describe_machine

OUT = Path("benchmarks/results/real.json")
POINTS = {
    "lite0": ("default", "macs=0.95", "macs=0.90", "macs=0.80", "macs=0.65"),
    "digit": ("default", "macs=0.90", "macs=0.80", "macs=0.65", "macs=0.50"),
    "mobilenetv2_050": ("keep=0.5",),
    "resnet50": ("macs=0.50",),
}
KNOWN = {"lite0": ("right_in_five", 0.9), "digit": ("right", 0.9695)}  # what the original must reach on labelled inputs


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=["lite0", "digit"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--points", nargs="+", metavar="POINT", help="such as default or macs=0.80; by default all")
    parser.add_argument("--again", action="store_true", help="measure the chosen cells even where the file has them")
    parser.add_argument("--stale", action="store_true", help="measure our cells again that other code has given")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds that a cell may take")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; tables go beside it as .md")
    parser.add_argument("--score", nargs=2, metavar=("NETWORK", "FILE"), help="score a .mar or .redpp file, and end")
    return parser.parse_args(arguments)


def read(path: Path) -> dict[str, Any]:
    """Return earlier results; empty ones where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"networks": {}, "cells": []}


def write(path: Path, data: dict[str, Any]) -> None:
    """Replace the file and its tables, after each cell."""
    environment = describe_machine()
    environment["versions"] |= {name: version(name) for name in ("torch-pruning", "scikit-learn")}
    data = {"environment": environment, "networks": data["networks"], "cells": sorted(data["cells"], key=_order)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    path.with_suffix(".md").write_text(markdown(data), encoding="utf-8")


def _place(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    return cell["network"], cell["arm"], cell["point"]


def _order(cell: Mapping[str, Any]) -> tuple[int, int, str]:
    return list(NETWORKS).index(cell["network"]), list(ARMS).index(cell["arm"]), cell["point"]


def is_current(cell: Mapping[str, Any], stale: bool) -> bool:
    """Say whether a cell need not be measured; ours must be no gap and, if asked, of this very code."""
    arm = ARMS[cell["arm"]]
    ours = cell["status"] != "unavailable" and (not stale or cell["code"] == code_digest())
    return cell["version"] == arm.version and (arm.kind == "peer" or ours)


def describe(name: str) -> dict[str, Any]:
    """Return a network's own figures.

    Raises:
        SystemExit: the original is worse than it is known to be, which would make every comparison void.
    """
    graph = load_graph(name)
    found = {"macs": mac_count(graph), "parameters": parameter_count(graph), "sets": evaluate(graph, name)}
    if name in KNOWN:
        checked = check_set(name)
        outputs = run(graph, checked.inputs)
        known = asdict(score(outputs, outputs, checked.labels))
        figure, wanted = KNOWN[name]
        if known[figure] < wanted * known["labelled"]:
            raise SystemExit(f"{name}: the original is right on {known[figure]} of {known['labelled']} labelled inputs")
        found["known"] = {key: known[key] for key in ("labelled", "right", "right_in_five")}
    return found


def run_cell(network: str, arm: str, point: str, timeout: float, threads: int | None) -> dict[str, Any]:
    """Measure a cell in a process of its own; one that dies or takes too long is a result, too."""
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cell.json"
        command = [sys.executable, "-m", "benchmarks.real_cell", network, arm, point, str(file)]
        try:
            code = subprocess.run(command, env=environment, timeout=timeout).returncode
            reason = f"the process ended with {code}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {timeout:g} s"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
    cell = {"network": network, "arm": arm, "point": point, "version": ARMS[arm].version, "code": code_digest()}
    return cell | {"status": "failed", "reason": reason, "cpu_seconds": 0.0, "seconds": timeout, "peak_mib": 0}


def summary(cell: Mapping[str, Any]) -> str:
    """One cell in a line."""
    text = f"{cell['network']:16} {cell['arm']:14} {cell['point']:10} {cell['cpu_seconds']:7.1f} CPU s  "
    if cell["status"] != "measured":
        return f"{text}{cell['status']}: {cell['reason']}"
    agreements = " / ".join(f"{s['agreement']:.1%}" for s in cell["scores"].values())
    return f"{text}{cell['share']:.3f} of the MACs, {agreements}"


def score_line(name: str, found: Mapping[str, Any]) -> str:
    """One set's figures in words."""
    text = f"{name}: {found['agreement']:.1%} agree ({found['low']:.1%} to {found['high']:.1%}) of {found['images']}"
    text += f", centred error {found['error']:.3f}"
    return text + (f", {found['right']} of {found['labelled']} right" if found["labelled"] else "")


def score_file(network: str, file: str) -> None:
    graph = read_pruned(Path(file))
    print(f"{mac_count(graph) / mac_count(load_graph(network)):.3f} of the multiply-accumulates")
    for name, found in evaluate(graph, network).items():
        print(score_line(name, found))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.score:
        score_file(*options.score)
        return
    data = read(options.out)
    for network in options.networks:
        points = [p for p in POINTS[network] if not options.points or p in options.points]
        wanted = [(network, arm, point) for arm in options.arms for point in points if _runs(network, arm, point)]
        known = {_place(c) for c in data["cells"] if not options.again and is_current(c, options.stale)}
        todo = [place for place in wanted if place not in known]
        if todo:
            data["networks"][network] = describe(network)
        for place in todo:
            cell = run_cell(*place, options.timeout, options.threads)
            print(summary(cell), flush=True)
            data["cells"] = [*(c for c in data["cells"] if _place(c) != place), cell]
            write(options.out, data)
    print(markdown(json.loads(options.out.read_text(encoding="utf-8"))) if options.out.exists() else "no cells")


def _runs(network: str, arm: str, point: str) -> bool:
    """Peers take a share of the multiply-accumulates, and time alone needs no peers."""
    trained = bool(NETWORKS[network].sets)
    return arm == "ours" if not trained else ARMS[arm].kind == "ours" or point.startswith("macs=")


if __name__ == "__main__":
    main()
