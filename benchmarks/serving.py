"""Put live servers under load, faults and roll-outs: ``python -m benchmarks.serving --out FILE.json``.

Both servers in turn serve one packaged pair on the loopback address. Every answer is held against the outputs that
the version's graph gives, so a lost request is one without the right answer. Four parts for each server:

load      many clients, one bad request in ten: good ones lost, bad ones without a 4xx of their own, memory over time
crash     a worker (TorchServe) or a stub (Triton) of the pruned version is killed under load: lost requests, recovery
roll-out  promote, roll back and promote again under unversioned requests: lost requests, when the switch took effect
overhead  the handler over the barest one, and metrics over none, in one process

With ``--faults`` another run: a live A/B test whose parts are killed or taken away, see `serving_faults`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.serving_faults import STRETCH_S, fault_targets, faults_part
from benchmarks.serving_load import UNVERSIONED, Cases, Run, Sent, run_load
from benchmarks.serving_overhead import overhead
from redpp_serve.capture import capture_file
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.loopback import ask
from redpp_serve.machine import describe_machine
from redpp_serve.options import Options, ServerOptions, Serving
from redpp_serve.packaging.package import package
from redpp_serve.reference import ARCH, CHECKPOINT
from redpp_serve.reference.digits import MEAN, STD
from redpp_serve.report.folder import read_report
from redpp_serve.serving.serve import KINDS, model_name, open_server
from redpp_serve.serving.server import LocalServer
from redpp_serve.serving.switching import switch
from redpp_serve.variants import NAMES

BAD_SHARE, FAULT_CLIENTS, CRASH_S, ROLL_OUT_S = 0.1, 8, 40.0, 16.0


def load_part(server: LocalServer, cases: Cases, clients: int, seconds: float) -> dict[str, Any]:
    """Good and bad requests to both versions from many clients."""
    run = run_load(server, cases, clients=clients, seconds=seconds, bad_share=BAD_SHARE, targets=NAMES)
    good, bad = ([sent for sent in run.sent if sent.good is kind] for kind in (True, False))
    latencies = {
        variant: np.quantile([x.end_s - x.start_s for x in good if x.target == variant], [0.5, 0.99])
        for variant in NAMES
    }
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": len(run.sent),
        "good": len(good),
        "bad": len(bad),
        "good_lost": sum(x.lost for x in good),
        "bad_misjudged": sum(x.misjudged for x in bad),
        "throughput_rps": round(len(run.sent) / run.sent[-1].end_s, 1),
        "latency_ms": {name: [round(1e3 * float(x), 2) for x in both] for name, both in latencies.items()},
        "memory": _memory(run),
        "first_error": _first_error(run),
    }


def crash_part(server: LocalServer, cases: Cases) -> dict[str, Any]:
    """A process of the pruned version is killed under load; the other version must not notice."""
    killed = CRASH_S / 4
    run = run_load(
        server,
        cases,
        clients=FAULT_CLIENTS,
        seconds=CRASH_S,
        bad_share=BAD_SHARE,
        targets=NAMES,
        events=[(killed, "kill", lambda: os.kill(worker_of(server, "pruned"), signal.SIGKILL))],
    )
    at = run.events["kill"][0]
    lost = [x for x in run.sent if x.lost]
    recovered = max((x.end_s for x in lost if x.target == "pruned"), default=at)
    later = [x for x in run.sent if x.start_s > recovered and x.target == "pruned" and x.good]
    return {
        "requests": len(run.sent),
        "lost_original": sum(x.target == "original" for x in lost),
        "lost_before_the_kill": sum(x.end_s < at for x in lost),
        "lost_pruned": sum(x.target == "pruned" for x in lost),
        "recovery_s": round(recovered - at, 2),
        "longest_wait_s": round(max(x.end_s - x.start_s for x in run.sent if x.end_s > at), 2),
        "served_after_recovery": len(later),
        "lost_after_recovery": sum(x.lost for x in later),
        "first_error": _first_error(run),
    }


def roll_out_part(server: LocalServer, cases: Cases) -> dict[str, Any]:
    """Unversioned requests while the default version moves three times."""
    running = server.running()
    moves = (("promote", "pruned"), ("rollback", "original"), ("promote again", "pruned"))
    events = [
        (ROLL_OUT_S * (k + 1) / 4, name, partial(switch, running, variant)) for k, (name, variant) in enumerate(moves)
    ]
    run = run_load(
        server, cases, clients=FAULT_CLIENTS, seconds=ROLL_OUT_S, bad_share=0.0, targets=(UNVERSIONED,), events=events
    )
    switch(running, "original")
    edges = [0.0, *(x for at in run.events.values() for x in at), ROLL_OUT_S * 2]
    wanted = ("original", "pruned", "original", "pruned")
    wrong = [
        x
        for k, variant in enumerate(wanted)
        for x in _between(run, edges[2 * k], edges[2 * k + 1])
        if x.answered_by and variant not in x.answered_by
    ]
    return {
        "requests": len(run.sent),
        "lost": sum(x.lost for x in run.sent),
        "answered_by_the_wrong_version": len(wrong),
        "switch_s": {name: round(end - begin, 2) for name, (begin, end) in run.events.items()},
        "first_error": _first_error(run),
    }


def _between(run: Run, start: float, end: float) -> list[Sent]:
    """Requests that were wholly under way between two switches."""
    return [x for x in run.sent if start < x.start_s and x.end_s < end]


def worker_of(server: LocalServer, variant: str) -> int:
    """The process that runs a version's handler."""
    number = server.versions[NAMES.index(variant)]
    if server.kind == "torchserve":
        _, body = ask(f"{server.management_url}/models/{server.name}/{number}", server.headers("management"))
        return int(json.loads(body)[0]["workers"][0]["pid"])
    stubs = [p for p in psutil.Process().children(recursive=True) if "triton_python_b" in p.name()]
    return next(p.pid for p in stubs if any(f"/{number}/model.py" in word for word in p.cmdline()))


def _memory(run: Run) -> dict[str, float]:
    """Median resident MiB of the second and the last quarter of the run: the first one still fills caches."""
    sizes = np.array([size for _, size in run.memory]) / 2**20
    quarters = np.array_split(sizes, 4)
    early, late = float(np.median(quarters[1])), float(np.median(quarters[3]))
    return {
        "early_mib": round(early, 1),
        "late_mib": round(late, 1),
        "growth_percent": round(100 * (late / early - 1), 2),
    }


def _first_error(run: Run) -> str:
    return next((f"{x.target}: {x.status} {x.error}"[:300] for x in run.sent if x.lost or x.misjudged), "")


def targets(results: dict[str, Any]) -> list[str]:
    """Each target with what was measured, as met or missed."""
    lines = []

    def add(met: bool, text: str) -> None:
        lines.append(f"{'met' if met else 'missed'}: {text}")

    for kind in KINDS:
        load, crash, roll = (results[kind][part] for part in ("load", "crash", "roll_out"))
        add(
            not load["good_lost"],
            f"{kind}: {load['good_lost']} of {load['good']} good requests lost, "
            f"{load['clients']} clients, {load['seconds']:g} s",
        )
        add(
            not load["bad_misjudged"],
            f"{kind}: {load['bad_misjudged']} of {load['bad']} bad requests without a 4xx of their own",
        )
        growth = load["memory"]["growth_percent"]
        add(growth < 5, f"{kind}: memory grows by {growth:g} % from the second to the last quarter, below 5 % wanted")
        add(
            crash["served_after_recovery"] > 0 and not crash["lost_after_recovery"] and not crash["lost_original"],
            f"{kind}: pruned version killed: {crash['lost_pruned']} lost, "
            f"recovered after {crash['recovery_s']:g} s, then {crash['lost_after_recovery']} of "
            f"{crash['served_after_recovery']} lost; {crash['lost_original']} of the original's lost",
        )
        add(
            not roll["lost"] and not roll["answered_by_the_wrong_version"],
            f"{kind}: promote, roll back, promote: {roll['lost']} of {roll['requests']} lost, "
            f"{roll['answered_by_the_wrong_version']} answered by the version that was not the default",
        )
    for row in results["overhead"]:
        for name, limit in (("handler", 5.0), ("metrics", 2.0)):
            value, low, high = row[f"{name}_percent"]
            add(
                value <= limit,
                f"{name} adds {value:g} % ({low:g} to {high:g}) at batch {row['batch']}, at most {limit:g} % wanted",
            )
    return lines


def table(results: dict[str, Any]) -> str:
    """Both servers side by side, as Markdown."""
    titles = {"torchserve": "TorchServe", "triton": "Triton Inference Server"}
    rows = [["", *titles.values()], ["---"] * (1 + len(titles))]

    def row(title: str, cell: Any) -> None:
        rows.append(
            [
                title,
                *(cell(results[kind]["load"], results[kind]["crash"], results[kind]["roll_out"]) for kind in titles),
            ]
        )

    first = results["torchserve"]["load"]
    row(
        f"{first['clients']} clients, {first['seconds']:g} s: good requests lost",
        lambda load, *_: f"{load['good_lost']} of {load['good']:,}",
    )
    row("bad ones without a 4xx of their own", lambda load, *_: f"{load['bad_misjudged']} of {load['bad']:,}")
    row("memory, second to last quarter", lambda load, *_: f"{load['memory']['growth_percent']:+.1f} %")
    row("promote, roll back, promote: requests lost", lambda _, __, roll: f"{roll['lost']} of {roll['requests']:,}")
    row(
        "a worker of the pruned version killed: lost",
        lambda _, crash, __: f"{crash['lost_pruned']} of {crash['requests']:,}",
    )
    row(
        "last one lost after; longest wait",
        lambda _, crash, __: f"{crash['recovery_s']:g} s; {crash['longest_wait_s']:g} s",
    )
    row("lost after that", lambda _, crash, __: f"{crash['lost_after_recovery']} of {crash['served_after_recovery']:,}")
    row("requests of the original lost by it", lambda _, crash, __: str(crash["lost_original"]))
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    costs = "; ".join(
        f"batch {x['batch']}: handler {_percent(x['handler_percent'])}, metrics {_percent(x['metrics_percent'])}"
        for x in results["overhead"]
    )
    return "\n".join([*lines, "", f"Added to the time of a bare handler by ours, and to ours by its metrics: {costs}."])


def _percent(interval: list[float]) -> str:
    value, low, high = interval
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def _digits(folder: Path) -> Path:
    """The reference digits network, half of its multiply-accumulates pruned, without distillation."""
    captured = capture_file(CHECKPOINT, [InputSpec("image", (1, 32, 32))], arch=ARCH)
    package(
        captured,
        folder / "digits",
        name="digits",
        options=Options(target_macs=0.5, distil=0, time_budget=60),
        serving=Serving(precision="fp32"),  # answers are held against the network's outputs
        preprocess=Preprocess("L", 32, 32, (MEAN,), (STD,)),
    )
    return folder / "digits"


def require_fp32(folder: Path) -> None:
    """End where answers cannot be held against the network's outputs.

    Raises:
        RedppError: a version may be served in a lower precision.
    """
    found = read_report(folder).options.get("precision")
    if found != "fp32":
        raise RedppError(
            f"{folder} is served in the precision {found}",
            "fp32, so that each answer can be held against the network's outputs",
            "package it with --precision fp32",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="a packaged folder (default: the digits network, packaged anew)"
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=2000, help="of the overhead")
    parser.add_argument("--faults", action="store_true", help="harm a live A/B test instead")
    parser.add_argument("--servers", nargs="+", choices=KINDS, default=KINDS, help="for --faults")
    parser.add_argument("--stretch", type=float, default=STRETCH_S, help="seconds of load after each fault")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or _digits(Path(scratch))
        require_fp32(folder)
        if options.faults:
            return _harm(folder, options)
        cases = Cases(folder)
        results: dict[str, Any] = {
            "environment": describe_machine(),
            "model": model_name(folder),
            "versions": {name: version(name) for name in ("torchserve", "tritonclient")},
        }
        for kind in KINDS:
            with open_server(folder, ServerOptions(kind), name=model_name(folder), note=_note) as server:
                _note(f"{kind}: load")
                results[kind] = {"load": load_part(server, cases, options.clients, options.seconds)}
                _note(f"{kind}: roll-out")
                results[kind]["roll_out"] = roll_out_part(server, cases)
                _note(f"{kind}: crash")
                results[kind]["crash"] = crash_part(server, cases)
        results["overhead"] = overhead(folder, options.rounds)
    results["targets"] = targets(results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join([*results["targets"], "", table(results)]))


def _harm(folder: Path, options: argparse.Namespace) -> None:
    others = round(os.getloadavg()[0], 2)
    measured = {
        kind: faults_part(folder, kind, options.clients, stretch_s=options.stretch, note=_note)
        for kind in options.servers
    }
    command = (
        f"python -m benchmarks.serving --faults --clients {options.clients} --stretch {options.stretch:g} "
        f"--servers {' '.join(options.servers)}"
    )
    environment = {**describe_machine(), "load_average_before": others}
    results = {"command": command, "environment": environment, "model": model_name(folder), **measured}
    results["targets"] = fault_targets(measured)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(results["targets"]))


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
