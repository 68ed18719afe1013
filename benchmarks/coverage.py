"""Measure what can be merged in the networks people deploy: ``python -m benchmarks.coverage``.

A run takes about an hour and goes on where it stopped.

Each torchvision or timm classifier is built with random weights, captured and coupled, one at a time in a process of
its own. Its row says how many channel sets are open, the share of parameters and multiply-accumulates in layers
that touch one, and why the others are closed. Two checks in float64 at batch 2 prove the sets: with copies planted
in a third of every open set, exact merging must take out as many channels and leave the outputs as they were; and
narrowing every set at random must equal the whole network with the columns of the removed channels at zero.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage_networks import NETWORKS, arguments_of
from redpp_serve.capture.arch import build, import_library
from redpp_serve.capture.export import capture
from redpp_serve.channels.coupling import Coupling, couple
from redpp_serve.errors import RedppError
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import find_layers, parameter_count
from redpp_serve.machine import describe_machine
from redpp_serve.pruning.merging import merge_exact

OUT = Path("benchmarks/results/coverage.json")
SIDES = (64, 96, 128, 224, 256, 299)  # pixels; the first that a network accepts is taken
EXACT = 1e-10  # relative error in float64 that re-association explains in the deepest network


def randomise(module: nn.Module) -> None:
    """Statistics of batch norms and constant parameters (zeros, ones, small scales) to numbers that differ."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.copy_(0.1 * torch.randn(part.running_mean.shape, generator=generator))
            part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
    for parameter in module.parameters():
        first = parameter.flatten()[0]
        if parameter.is_floating_point() and parameter.numel() > 1 and bool((parameter == first).all()):
            zero = bool(first == 0)
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.data = 0.2 * noise - 0.1 if zero else 0.5 + noise


def smallest(arch: str) -> tuple[nn.Module, int]:
    """The network with random weights, and the smallest of `SIDES` that it accepts."""
    errors = []
    for side in SIDES:
        for arguments in arguments_of(arch, side):
            try:
                module = build(arch, arguments).eval()
                with torch.no_grad():
                    module(torch.zeros(2, 3, side, side))
                return module, side
            except Exception as error:
                errors.append(str(error).split("\n")[0])
    raise SystemExit(f"{arch} accepts no size: {errors[-1]}")


def planted(coupling: Coupling) -> tuple[Graph, int]:
    """Make the second third of every open set a copy of the first; return the graph and the number of copies."""
    tensors, count = dict(coupling.graph.tensors), 0
    for channel_set in coupling.open:
        third = channel_set.channels // 3
        count += third
        for part in channel_set.parts:
            source, target = part.positions[:third].flatten(), part.positions[third : 2 * third].flatten()
            value = tensors[part.tensor]
            tensors[part.tensor] = value.index_copy(part.dim, target, value.index_select(part.dim, source))
    return coupling.graph.with_tensors(tensors), count


def without(coupling: Coupling, kept: Mapping[str, Tensor]) -> Graph:
    """The whole network with the readers' columns of the channels that are not kept at zero."""
    tensors = dict(coupling.graph.tensors)
    for channel_set in coupling.open:
        gone = torch.ones(channel_set.channels, dtype=torch.bool)
        gone[kept[channel_set.name]] = False
        for reader in channel_set.readers:
            tensors[reader.tensor] = tensors[reader.tensor].index_fill(reader.dim, reader.positions[gone].flatten(), 0)
    return coupling.graph.with_tensors(tensors)


@torch.no_grad()
def outputs(graph: Graph) -> tuple[Tensor, ...]:
    """What the graph gives for two fixed random images, in the precision of its tensors."""
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(2, *i.shape, generator=generator, dtype=torch.float64) for i in graph.inputs)
    return Program(graph)(*inputs)


def gap(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """The largest relative difference."""
    return max(
        float((x - y).norm() / x.norm()) if x.shape == y.shape else float("inf") for x, y in zip(a, b, strict=True)
    )


def exactness(coupling: Coupling) -> dict[str, Any]:
    """The two checks; figures are relative errors of the outputs."""
    exact = replace(coupling, graph=coupling.graph.to(torch.float64))
    graph, count = planted(exact)
    merged = merge_exact(exact.with_tensors(graph.tensors), 1)
    row = {"planted": count, "merged": merged.removed, "merge_error": gap(outputs(graph), outputs(merged.graph))}
    del graph, merged
    generator = torch.Generator().manual_seed(2)
    kept = {
        c.name: torch.randperm(c.channels, generator=generator)[: -(-2 * c.channels // 3)].sort().values
        for c in coupling.open
    }
    return {**row, "drop_error": gap(outputs(without(exact, kept)), outputs(exact.narrow(kept)))}


def plain(reason: str) -> str:
    """A reason without the names of layers and values."""
    reason = re.sub(r"read by \S+:", "read by a layer:", re.sub(r" \([^()]*\)", "", reason))
    reason = re.sub(r"read by \S+ in groups", "read by a layer in groups", reason)
    return re.sub(r"is all that \S+", "is all that a value", reason)


def measure(arch: str) -> dict[str, Any]:
    """The row of one network.

    Raises:
        SystemExit: an exactness check fails, or the network cannot be built.
    """
    module, side = smallest(arch)
    randomise(module)
    start = time.perf_counter()
    try:
        graph = capture(module, [InputSpec("x", (3, side, side))], [])
    except RedppError as error:
        return {"refused": str(error), "side": side}
    captured = time.perf_counter()
    coupling = couple(graph)
    coupled = time.perf_counter()
    layers = find_layers(graph)
    named = {p.tensor for c in coupling.open for p in (*c.parts, *c.readers)}
    touched = [layer for layer in layers if layer.weight in named]
    stored = {name for layer in touched for name in (layer.weight, layer.bias) if name} | named
    row = {
        "side": side,
        "parameters": parameter_count(graph),
        "macs": sum(layer.macs for layer in layers),
        "sets": len(coupling.sets),
        "open": len(coupling.open),
        "channels": sum(c.channels for c in coupling.open),
        "layers": len(layers),
        "touched_layers": len(touched),
        "parameters_share": round(sum(graph.tensors[name].numel() for name in stored) / parameter_count(graph), 4),
        "macs_share": round(sum(layer.macs for layer in touched) / max(1, sum(layer.macs for layer in layers)), 4),
        "closed": dict(Counter(plain(c.closed) for c in coupling.sets if c.closed).most_common()),
        "capture_seconds": round(captured - start, 2),
        "couple_seconds": round(coupled - captured, 2),
    }
    if coupling.open:
        row.update(exactness(coupling))
        if not (row["planted"] == row["merged"] and max(row["merge_error"], row["drop_error"]) < EXACT):
            raise SystemExit(f"{arch} is not exact: {json.dumps(row)}")
    return {**row, "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)}


def in_process(arch: str, timeout: float) -> dict[str, Any]:
    """Run `measure` in a process of its own, forked with the libraries loaded; a failure is a row with its message."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send_row, args=(arch, send))
    child.start()
    send.close()
    try:
        row = receive.recv() if receive.poll(timeout) else {"failed": f"not done in {timeout:.0f} s"}
    except EOFError:
        row = {"failed": "its process died"}
    child.kill()
    child.join()
    return row


def _send_row(arch: str, send: Connection) -> None:
    try:
        send.send(measure(arch))
    except (Exception, SystemExit) as error:
        send.send({"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def line(arch: str, row: Mapping[str, Any]) -> str:
    """One line of the table."""
    if "sets" not in row:
        return f"| {arch} | {row.get('refused') or row.get('failed')} |"
    errors = [f"{row[key]:.0e}" if key in row else "" for key in ("merge_error", "drop_error")]
    reasons = "; ".join(f"{reason} ({count})" for reason, count in row["closed"].items())
    cells = [
        arch,
        row["side"],
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['open']} / {row['sets']}",
        row["channels"],
        f"{row['parameters_share']:.0%}",
        f"{row['macs_share']:.0%}",
        *errors,
        row["capture_seconds"],
        row["couple_seconds"],
        reasons,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(result: Mapping[str, Any]) -> str:
    """The results as a page."""
    head = (
        "network",
        "pixels",
        "M parameters",
        "open / all sets",
        "open channels",
        "parameters",
        "MACs",
        "merge error",
        "drop error",
        "capture s",
        "couple s",
        "closed, why (sets)",
    )
    rows, machine = result["networks"], result["environment"]
    counted = [row for row in rows.values() if "sets" in row]
    summary = (
        f"{len(rows)} networks; {sum(row['open'] > 0 for row in counted)} have open sets; largest error of a "
        f"merge {max((r.get('merge_error', 0) for r in counted), default=0):.0e}, "
        f"of a removal {max((r.get('drop_error', 0) for r in counted), default=0):.0e}."
    )
    text = (__doc__ or "").split("\n\n")
    return "\n".join(
        [
            "# Coupled channels by network",
            "",
            " ".join(text[1].split()),
            "",
            summary,
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *(line(*item) for item in rows.items()),
            "",
            f"Device: {machine['device']}; {machine['versions']}",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="torchvision:NAME or timm:NAME")
    parser.add_argument("--again", action="store_true", help="also those that the file has without a failure")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each network")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; the table goes beside it as .md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import_library("timm")
    capture(nn.Linear(3, 2), [InputSpec("x", (3,))], [])  # loads what capturing needs, once for all processes
    result = json.loads(options.out.read_text()) if options.out.exists() else {"networks": {}}
    result = {"environment": describe_machine(), "networks": result["networks"]}
    for arch in options.networks:
        if options.again or "failed" in result["networks"].get(arch, {"failed": ""}):
            result["networks"][arch] = in_process(arch, options.timeout)
            print(line(arch, result["networks"][arch]), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
