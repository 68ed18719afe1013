"""Compare the CPU runtime with its peers: ``python -m benchmarks.cpu --out FILE.json`` (half an hour).

On each reference network and at each batch size, in one process and in turns: the stock handler's eager module, the
original and the pruned network in this project's runtime, and both in torch.compile (max-autotune, frozen weights) and
ONNX Runtime. Every arm's answers are first held against its own graph in float64; one that differs is not timed, and
the row says so. A round calls every arm once in a random order and once in the reverse, so each round gives a ratio of
any two; the table has medians, and bootstrap intervals of the ratios. Pruned networks are made once, for ``--target``
as `redpp-serve package` takes it, and kept in ``--scratch``. ``pip install '.[peers]'`` brings ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cpu_arms import Arm, Call, arms, served
from redpp_serve.capture.export import capture
from redpp_serve.files import write_atomically
from redpp_serve.graph.artifact import build, load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import mac_count
from redpp_serve.machine import describe_machine
from redpp_serve.options import Options
from redpp_serve.pruning.pipeline import prune
from redpp_serve.reference import catalog
from redpp_serve.report.data import PlanRecord
from redpp_serve.report.tables import kernel_rows
from redpp_serve.runtime.plan import Plan
from redpp_serve.statistics.intervals import percentile_interval

DISTIL_S, PRUNE_S = 60.0, 240.0
TOLERANCE = 1e-3  # of the largest output: float32 sums in another order
FEWEST_ROUNDS = 15
# numerator and denominator of the times, and the least ratio wanted
RATIOS = {
    "pruned over original, same runtime": ("original", "pruned", 1.5),
    "original here over the stock handler": ("stock", "original", 1.0),
    "original planned over dense": ("dense", "original", 0.98),
    "pruned planned over dense": ("dense_pruned", "pruned", 0.98),
    "pruned over torch.compile of the original": ("compiled", "pruned", None),
    "pruned over ONNX Runtime of the original": ("onnx", "pruned", None),
    "original over torch.compile": ("compiled", "original", None),
    "original over ONNX Runtime": ("onnx", "original", None),
}


def pruned_network(name: str, original: Graph, target: str, scratch: Path) -> Graph:
    """The network as `package` prunes it for a target such as ``macs=0.5``; kept as ``scratch/NAME-TARGET.redpp``."""
    path = scratch / f"{name}-{target}.redpp"
    if not path.exists():
        kind, _, share = target.partition("=")
        options = Options(**{f"target_{kind}": float(share)}, distil=DISTIL_S, time_budget=PRUNE_S)
        write_atomically(path, build(prune(original, options).pruned, {"name": name}).data)
    return load(path).graph


def checked(arm: Arm, x: Tensor) -> tuple[Call | None, str]:
    """The arm's call for inputs like x, or None and the reason why it cannot be timed."""
    expected = Program(arm.graph.to(torch.float64))(x.double())[0]
    try:
        call = arm.build(x)
        difference = float((call(x).double() - expected).abs().max() / expected.abs().max())
    except Exception as error:  # a peer's compiler or exporter, whatever it raises
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return (call, "") if difference <= TOLERANCE else (None, f"wrong by {difference:.2g} of the largest output")


def timed(calls: dict[str, Call], x: Tensor, seconds: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Seconds of each arm in each round, (rounds,): the mean of its two calls."""
    names, rounds = list(calls), []
    end = time.perf_counter() + seconds
    while len(rounds) < FEWEST_ROUNDS or time.perf_counter() < end:
        order, spent = rng.permutation(len(names)), np.zeros(len(names))
        for index in (*order, *order[::-1]):
            start = time.perf_counter()
            calls[names[index]](x)
            spent[index] += (time.perf_counter() - start) / 2
        rounds.append(spent)
    return dict(zip(names, np.array(rounds).T, strict=True))


def measure(every: list[Arm], x: Tensor, seconds: float, rng: np.random.Generator) -> dict[str, Any]:
    """One row: milliseconds of each arm, the ratios between them with 95 % intervals, and what could not be timed."""
    found = {arm.name: checked(arm, x) for arm in every}
    times = timed({name: call for name, (call, _) in found.items() if call}, x, seconds, rng)
    row: dict[str, Any] = {"batch": len(x), "rounds": len(next(iter(times.values()))), "ms": {}, "ratios": {}}
    for name, values in times.items():
        row["ms"][name] = [round(1e3 * float(q), 4) for q in np.quantile(values, (0.5, 0.1, 0.9))]
    for title, (over, under, _) in RATIOS.items():
        if over in times and under in times:
            ratio = percentile_interval(times[over] / times[under], 0.5, rng)
            row["ratios"][title] = [round(v, 3) for v in (ratio.value, ratio.low, ratio.high)]
    row["not timed"] = {name: reason for name, (call, reason) in found.items() if not call}
    return row


def accuracy(graph: Graph, task: str, plan_seconds: float) -> float:
    """Percent right on the held-out images, through the runtime that serves."""
    inputs, labels = catalog.held_out(task)
    model = served(graph, 100, plan_seconds)
    return round(
        100 * float((torch.cat([model(chunk)[0] for chunk in inputs.split(100)]).argmax(1) == labels).double().mean()),
        2,
    )


@torch.inference_mode()
def network_rows(
    name: str, module: torch.nn.Module, original: Graph, pruned: Graph, options: argparse.Namespace
) -> dict[str, Any]:
    """All rows of one network, with its plan tables."""
    rng, task = np.random.default_rng(0), catalog.NETWORKS[name].task.name
    images = catalog.held_out(task)[0]
    every = [
        arm
        for arm in arms(module, original, pruned, options.plan_seconds)
        if options.peers or not arm.name.startswith(("compiled", "onnx"))
    ]
    largest = max(options.batches)
    return {
        "network": name,
        "macs": [mac_count(original), mac_count(pruned)],
        "accuracy": [accuracy(graph, task, options.plan_seconds) for graph in (original, pruned)],
        "rows": [measure(every, images[:batch], options.seconds, rng) for batch in options.batches],
        "kernels": {
            v: kernel_lines(served(g, largest, options.plan_seconds).plan)
            for v, g in (("original", original), ("pruned", pruned))
        },
    }


def kernel_lines(plan: Plan) -> list[str]:
    """Write a line for each set of equal layers with a choice: what was chosen, and all candidates' times, also those
    that lost."""
    return [" | ".join(row) for row in kernel_rows(PlanRecord.from_json(plan.to_json()))]


def merged(networks: list[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The networks with one of them added or measured again; its rows at other batch sizes stay."""
    earlier = next((network for network in networks if network["network"] == found["network"]), {"rows": []})
    rows = {row["batch"]: row for row in (*earlier["rows"], *found["rows"])}
    whole = {**found, "rows": [rows[batch] for batch in sorted(rows)]}
    return [whole if network is earlier else network for network in networks] + ([] if earlier in networks else [whole])


def table(networks: list[dict[str, Any]]) -> str:
    """Milliseconds of each arm, and the ratios that have a target."""
    names = list(dict.fromkeys(arm for network in networks for row in network["rows"] for arm in row["ms"]))
    lines = [f"{'network':20}{'batch':>6}" + "".join(f"{n:>15}" for n in names) + "   pruned/original   original/stock"]
    for network in networks:
        for row in network["rows"]:
            cells = "".join(f"{row['ms'][n][0]:>12.3f} ms" if n in row["ms"] else f"{'-':>15}" for n in names)
            shown = [row["ratios"].get(title) for title in list(RATIOS)[:2]]
            ratios = "".join(f"  {r[0]:.2f} ({r[1]:.2f}-{r[2]:.2f})" if r else f"{'-':>18}" for r in shown)
            lines.append(f"{network['network']:20}{row['batch']:>6}{cells}{ratios}")
    return "\n".join(lines)


def markdown(networks: list[dict[str, Any]]) -> str:
    """Return the table of cpu.md: milliseconds by batch size, and the gain by pruning with its 95 % interval."""
    head = (
        "network",
        "batch",
        "stock eager",
        "torch.compile",
        "ONNX Runtime",
        "original here",
        "pruned: torch.compile",
        "ONNX Runtime",
        "**pruned here**",
        "pruned against original",
    )
    names = ("stock", "compiled", "onnx", "original", "compiled_pruned", "onnx_pruned", "pruned")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for network in networks:
        for row in network["rows"]:
            times = [f"{row['ms'][name][0]:.2f}" if name in row["ms"] else "–" for name in names]
            ratio = row["ratios"].get(next(iter(RATIOS)))
            gained = f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else "–"
            lines.append(
                f"| {network['network']} | {row['batch']} | {' | '.join(times[:-1])} | **{times[-1]}** | {gained} |"
            )
    return "\n".join(lines)


def targets(networks: list[dict[str, Any]]) -> list[str]:
    """Say for each network, ratio and batch what was wanted and whether the ratio's median reached it."""
    lines = []
    for title, (_, _, least) in RATIOS.items():
        for network in networks if least else ():
            for row in network["rows"]:
                ratio = row["ratios"].get(title)
                verdict = "not measured" if ratio is None else "met" if ratio[0] >= least else "missed"
                figure = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else "-"
                lines.append(
                    f"{verdict}: {network['network']}, batch {row['batch']}: {title} {figure}, "
                    f"at least {least:g} wanted"
                )
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", choices=list(catalog.NETWORKS), default=list(catalog.NETWORKS), metavar="NAME"
    )
    parser.add_argument(
        "--target", default="macs=0.5", help="macs=R or latency=R, as package takes it (default: %(default)s)"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=8.0, help="for all arms of one network at one batch size")
    parser.add_argument("--plan-seconds", type=float, default=20.0, help="time budget of each plan")
    parser.add_argument("--threads", type=int, default=1, help="of every arm")
    parser.add_argument(
        "--no-peers", dest="peers", action="store_false", help="leave out torch.compile and ONNX Runtime"
    )
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()) / "redpp-cpu", help="keeps the pruned networks"
    )
    parser.add_argument("--out", type=Path, help="a JSON file; rows that it has already are replaced one by one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.scratch.mkdir(parents=True, exist_ok=True)
    networks = json.loads(options.out.read_text())["networks"] if options.out and options.out.exists() else []
    for name in options.networks:
        module = catalog.load(name)
        original = capture(module, (InputSpec("x", catalog.NETWORKS[name].input_shape),), [])
        found = network_rows(
            name, module, original, pruned_network(name, original, options.target, options.scratch), options
        )
        networks = merged(networks, found)
        print(table([found]), flush=True)
        if options.out:
            result = {
                "environment": describe_machine(),
                "threads": options.threads,
                "target": options.target,
                "networks": networks,
            }
            write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())
    print(f"\n{table(networks)}\n\n" + "\n".join(targets(networks)))


if __name__ == "__main__":
    main()
