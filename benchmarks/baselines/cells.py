"""One cell of the benchmark, measured; and the file that keeps all of them, so that a run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import mac_count, parameter_count
from redpp_serve.machine import describe_machine
from redpp_serve.pruning.latency import paired_latency
from redpp_serve.reference import catalog

from .methods import DISTIL_SECONDS, METHODS, NEAR, ROUND_TO
from .stages import stage_rows
from .subject import Subject
from .widths import layer_macs


@dataclass(frozen=True)
class Timing:
    """How latency is measured: inputs in a call, and seconds for each cell (0: not at all)."""

    batch: int
    seconds: float


class Store:
    """The results as one JSON file, written whole after every cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"networks": {}, "cells": []}
        if path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))

    def find(self, network: str, method: str, ratio: float | None, key: str) -> dict[str, Any] | None:
        """The cell that was measured with the same key, if there is one."""
        return next((c for c in self.data["cells"] if _place(c) == (network, method, ratio) and c["key"] == key), None)

    def put(self, cell: dict[str, Any]) -> None:
        """Add a cell in the place of an older one."""
        self.data["cells"] = sorted([c for c in self.data["cells"] if _place(c) != _place(cell)] + [cell], key=_order)
        self.write()

    def describe(self, subject: Subject, accuracy: float) -> None:
        """Note a network's own figures."""
        self.data["networks"][subject.name] = {
            "task": subject.task,
            "macs": subject.macs,
            "open_macs": subject.cost.open_macs,
            "accuracy": accuracy,
            "parameters": parameter_count(subject.graph),
            "images": len(subject.labels),
        }

    def write(self) -> None:
        environment = describe_machine()
        environment["versions"] |= {name: version(name) for name in ("torch-pruning", "scikit-learn")}
        self.data = {"environment": environment, **{k: self.data[k] for k in ("networks", "cells")}}
        text = json.dumps(self.data, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def _place(cell: dict[str, Any]) -> tuple[str, str, float | None]:
    return cell["network"], cell["method"], cell["ratio"]


def _order(cell: dict[str, Any]) -> tuple[int, int, float]:
    networks, methods = list(catalog.NETWORKS), list(METHODS)
    place = [
        names.index(name) if name in names else len(names)
        for names, name in ((networks, cell["network"]), (methods, cell["method"]))
    ]
    return place[0], place[1], cell["ratio"] or 0.0


def cell_key(network: str, method: str, timing: Timing) -> str:
    """Changes with whatever changes a cell's figures: the checkpoint, the method's version, and how it is measured."""
    checkpoint = hashlib.sha256(catalog.NETWORKS[network].checkpoint.read_bytes()).hexdigest()
    version = METHODS[method].version if method in METHODS else 1
    distil = DISTIL_SECONDS if method in ("distilled", "codebooks") else 0
    return hashlib.sha256(repr((checkpoint, version, ROUND_TO, distil, asdict(timing))).encode()).hexdigest()[:12]


def measure_cell(
    subject: Subject, method: str, ratio: float, timing: Timing, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run all settings of a method; the most accurate of those near the target is the cell's figure."""
    start = time.perf_counter()
    tried: list[tuple[dict[str, Any], nn.Module | Graph]] = []
    for setting, network in METHODS[method].run(subject, ratio):
        graph = network if isinstance(network, Graph) else None
        macs = mac_count(graph) if graph else sum(layer_macs(network, subject.example).values())
        accuracy = subject.accuracy(graph) if graph else subject.module_accuracy(network)
        tried.append(({"setting": setting, "accuracy": accuracy, "removed": subject.removed(macs)}, network))
    best, network = choose(tried, ratio)
    seconds = time.perf_counter() - start
    graph = network if isinstance(network, Graph) else subject.capture(network)
    cell = {
        "network": subject.name,
        "method": method,
        "ratio": ratio,
        "key": cell_key(subject.name, method, timing),
        "setting": best["setting"],
        "macs": mac_count(graph),
        "removed": subject.removed(mac_count(graph)),
        "parameters": parameter_count(graph),
        "accuracy": subject.accuracy(graph),
        "seconds": round(seconds, 1),
        "settings": [row for row, _ in tried],
        "latency": _latency(subject.graph, graph, timing),
    }
    accuracy = cell["accuracy"]
    if abs(accuracy - best["accuracy"]) > 0.3:
        raise SystemExit(
            f"{subject.name}, {method}: the module has {best['accuracy']:.2f} %, its graph {accuracy:.2f} %"
        )
    removed = f"{cell['removed']:5.1%} removed"
    say(f"{subject.name:20} {method:14} {ratio:4.0%}: {removed}, {accuracy:6.2f} %, {seconds:5.1f} s")
    return cell


def choose(tried: list[tuple[dict[str, Any], Any]], ratio: float) -> tuple[dict[str, Any], Any]:
    """The most accurate of the settings near the target; where none is near, the nearest."""
    near = [pair for pair in tried if abs(pair[0]["removed"] - ratio) <= NEAR]
    if near:
        return max(near, key=lambda pair: pair[0]["accuracy"])
    return min(tried, key=lambda pair: abs(pair[0]["removed"] - ratio))


def measure_stages(subject: Subject, timing: Timing) -> dict[str, Any]:
    """RED++'s own stages, as the cell of the method ``stages``."""
    return {
        "network": subject.name,
        "method": "stages",
        "ratio": None,
        "key": cell_key(subject.name, "stages", timing),
        "rows": stage_rows(subject),
    }


def _latency(original: Graph, pruned: Graph, timing: Timing) -> dict[str, Any] | None:
    """Time of the pruned network as a share of the original's, both in the serving runtime and measured in turns."""
    if not timing.seconds:
        return None
    before, after = paired_latency([original, pruned], timing.batch, seconds=timing.seconds)
    ratios = {name: round(getattr(after, name), 4) for name in ("ratio", "low", "high")}
    times = {"original_ms": round(1000 * before.median, 4), "ms": round(1000 * after.median, 4)}
    return {"batch": timing.batch, **times, **ratios, "rounds": after.rounds}
