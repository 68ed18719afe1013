"""One cell of `benchmarks.real`, in a process of its own so that its time and memory are its own.

Time for what a user would already have (inputs, moments, a peer's synthetic images) does not count.

``python -m benchmarks.real_cell NETWORK ARM POINT FILE`` writes the cell to FILE as JSON.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import redpp_serve
from benchmarks.real_arms import ARMS, NEAR, Candidate, UnavailableError, point_options
from benchmarks.real_networks import capture_as, load_graph
from benchmarks.real_scores import evaluate
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph
from redpp_serve.graph.layers import mac_count, parameter_count

SOME = 4  # settings of an arm are compared on every fourth image
_PARTS = ("capture", "channels", "graph", "pruning", "options.py")  # of the package: what decides our own cells


def code_digest() -> str:
    """Return a digest of the code that decides how this project prunes."""
    root = Path(redpp_serve.__file__).parent
    files = sorted(f for part in _PARTS for f in [root / part, *(root / part).rglob("*.py")] if f.is_file())
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def measure(network: str, arm: str, point: str) -> dict[str, Any]:
    """Prune, then score; only the former is timed."""
    load_graph(network)
    cell: dict[str, Any] = {"network": network, "arm": arm, "point": point, "version": ARMS[arm].version}
    cell |= {"code": code_digest(), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    candidates: list[Candidate] = []
    status, reason = "measured", ""
    start, busy = time.perf_counter(), time.process_time()
    try:
        ARMS[arm].prepare(network)
        start, busy = time.perf_counter(), time.process_time()
        candidates += ARMS[arm].run(network, point)
    except UnavailableError as error:
        status, reason = "unavailable", str(error)
    except RedppError as error:
        status, reason = "refused", str(error)
    except Exception as error:  # a crash is a result, too
        status, reason = "failed", f"{type(error).__name__}: {error}"
    cell |= {"status": status, "reason": reason, "cpu_seconds": round(time.process_time() - busy, 1)}
    cell |= {"seconds": round(time.perf_counter() - start, 1)}
    cell |= {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    return cell | (_best(network, point, candidates) if status == "measured" else {})


def _best(network: str, point: str, candidates: list[Candidate]) -> dict[str, Any]:
    """The figures of the best candidate near the point, chosen on some of the images; of the nearest if none is near.

    Choosing with hindsight favours whoever has several settings.
    """
    best, settings = candidates[0], []
    if len(candidates) > 1:
        wanted, original = point_options(point).get("target_macs", 0.0), mac_count(load_graph(network))
        rows = []
        for candidate in candidates:
            share = mac_count(_graph(network, candidate)) / original
            missed = abs(share - wanted)
            agreement = _agreement(evaluate(candidate.network, network, every=SOME))
            settings.append({"setting": candidate.setting, "share": share, "agreement_on_some": agreement})
            rows.append((missed <= NEAR, agreement if missed <= NEAR else -missed, candidate))
        best = max(rows, key=lambda row: row[:2])[2]
    return {**_scored(network, best), **({"settings": settings} if settings else {})}


def _agreement(scores: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the mean agreement over evaluation sets; 0 where there are none."""
    return sum(s["agreement"] for s in scores.values()) / max(1, len(scores))


def _graph(network: str, candidate: Candidate) -> Graph:
    found = candidate.network
    return found if isinstance(found, Graph) else capture_as(network, found.eval())


def _scored(network: str, candidate: Candidate) -> dict[str, Any]:
    graph, original = _graph(network, candidate), load_graph(network)
    scores = evaluate(graph, network)
    row = {"setting": candidate.setting, "macs": mac_count(graph), "share": mac_count(graph) / mac_count(original)}
    row |= {"parameters": parameter_count(graph), "scores": scores}
    if candidate.reported:
        row |= {"reported": candidate.reported, "stages": candidate.stages}
        row["reported_to_real"] = reported_to_real(candidate.reported, scores)
    return row


def reported_to_real(reported: Mapping[str, Any], scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the tool's error as a multiple of the real one, by set; None where either is unknown or zero."""
    error = reported.get("output_error", reported.get("error"))
    known = isinstance(error, (int, float))
    return {name: error / s["error"] if known and s["error"] else None for name, s in scores.items()}


def main(arguments: list[str]) -> None:
    network, arm, point, file = arguments
    cell = measure(network, arm, point)
    Path(file).write_text(json.dumps(cell, default=str), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
