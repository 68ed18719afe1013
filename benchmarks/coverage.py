"""Measure what can be merged in the networks people deploy: ``python -m benchmarks.coverage``.

A run takes about an hour and goes on where it stopped.

Each network (classifiers of torchvision and timm, and for other tasks own definitions and small models of torchvision
and transformers) is built with random weights, captured and coupled, one at a time in a process of its own. Its row
says how many channel sets are open, the share of parameters and multiply-accumulates in layers
that touch one, and why the others are closed. Two checks in float64 at batch 2 prove the sets: with copies planted
in a third of every open set, exact merging must take out as many channels and leave the outputs as they were; and
narrowing every set at random must equal the whole network with the columns of the removed channels at zero. The
multiply-accumulates stand beside half of what torch's FlopCounterMode counts in the network itself, with attention and
recurrent layers run as the matrix products that they are; they must agree within 1 %. What the network computes of
constants alone, as XCiT its position encoding, the graph holds computed, and does not count. A network that is refused
has its reason for a row. ``--counts`` captures and counts alone, which takes some seconds a network; rows of that kind
lack the other columns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.coverage_cases import CASES, Case
from benchmarks.coverage_networks import NETWORKS, arguments_of
from redpp_serve.capture.arch import build, import_library
from redpp_serve.capture.export import capture
from redpp_serve.capture.flat import flat_network
from redpp_serve.capture.inputs import parse_input, sample
from redpp_serve.channels.coupling import Coupling, couple
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import find_layers, mac_count, parameter_count
from redpp_serve.machine import describe_machine
from redpp_serve.pruning.merging import merge_exact
from redpp_serve.pruning.verification import exact_error
from redpp_serve.pruning.widths import ShapeModel

OUT = Path("benchmarks/results/coverage.json")
SIDES = (64, 96, 128, 224, 256, 299)  # pixels; the first that a network accepts is taken
COUNTED = 0.01  # share by which two counts of multiply-accumulates may differ
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


def exactness(coupling: Coupling) -> dict[str, Any]:
    """The two checks; figures are relative errors of the outputs."""
    exact = replace(coupling, graph=coupling.graph.to(torch.float64))
    graph, count = planted(exact)
    merged = merge_exact(exact.with_tensors(graph.tensors), 1)
    row: dict[str, Any] = {"planted": count, "merged": merged.removed}
    row["merge_error"] = exact_error(graph, merged.graph, coupling.graph, 1)
    del graph, merged
    generator = torch.Generator().manual_seed(2)
    kept = {
        c.name: torch.randperm(c.channels, generator=generator)[: -(-2 * c.channels // 3)].sort().values
        for c in coupling.open
    }
    row["drop_error"] = exact_error(without(exact, kept), exact.narrow(kept), coupling.graph, 1)
    return row


def counted_macs(network: nn.Module, inputs: Sequence[InputSpec]) -> int:
    """Half of the operations that torch's own counter finds for one input.

    The counter sees no fused operator: neither attention, nor oneDNN's recurrent layers, nor a whole encoder layer.
    """
    network.requires_grad_(False)  # the counter follows gradients
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            torch.no_grad(),
            torch.backends.mkldnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            network(*sample(inputs, 1, torch.Generator().manual_seed(0)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def plain(reason: str) -> str:
    """A reason without the names of layers and values."""
    reason = re.sub(r"read by \S+:", "read by a layer:", re.sub(r" \([^()]*\)", "", reason))
    reason = re.sub(r"read by \S+ in groups", "read by a layer in groups", reason)
    return re.sub(r"is all that \S+", "is all that a value", reason)


def measure(arch: str, counts: bool = False) -> dict[str, Any]:
    """The row of one network; with ``counts``, only what it takes, its operations and its parameters.

    Raises:
        SystemExit: a check fails, or the network cannot be built.
    """
    if case := CASES.get(arch):
        module = case.make().eval()
    else:
        module, side = smallest(arch)
        case = Case(lambda: module, f"3x{side}x{side}")
    randomise(module)
    start = time.perf_counter()
    try:
        inputs = [parse_input(word, k) for k, word in enumerate(case.inputs.split())]
        graph = capture(module, inputs, [], case.constants)
    except RedppError as error:
        return {"refused": str(error), "inputs": case.inputs}
    captured = time.perf_counter()
    row: dict[str, Any] = {
        "inputs": case.inputs,
        "outputs": ", ".join(graph.output_names),
        "parameters": parameter_count(graph),
        "macs": mac_count(graph),
        "counted_macs": counted_macs(flat_network(module, inputs, case.constants), graph.inputs),
    }
    if abs(row["macs"] - row["counted_macs"]) > COUNTED * row["counted_macs"]:
        raise SystemExit(f"torch counts {row['counted_macs']} MACs, and we {row['macs']}")
    if counts:
        return row
    coupling = couple(graph)
    coupled = time.perf_counter()
    layers = find_layers(graph)
    named = {p.tensor for c in coupling.open for p in (*c.parts, *c.readers)}
    touched = [layer for layer in layers if layer.weight in named]
    stored = {name for layer in touched for name in (layer.weight, layer.bias) if name} | named
    row |= {
        "sets": len(coupling.sets),
        "open": len(coupling.open),
        "channels": sum(c.channels for c in coupling.open),
        "layers": len(layers),
        "touched_layers": len(touched),
        "parameters_share": round(sum(graph.tensors[name].numel() for name in stored) / parameter_count(graph), 4),
        "macs_share": round(ShapeModel(coupling).touched_macs() / max(1, mac_count(graph)), 4),
        "closed": dict(Counter(plain(c.closed) for c in coupling.sets if c.closed).most_common()),
        "capture_seconds": round(captured - start, 2),
        "couple_seconds": round(coupled - captured, 2),
    }
    if coupling.open:
        row.update(exactness(coupling))
        if not (row["planted"] == row["merged"] and max(row["merge_error"], row["drop_error"]) < EXACT):
            raise SystemExit(f"{arch} is not exact: {json.dumps(row)}")
    return {**row, "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)}


def in_process(arch: str, counts: bool, timeout: float) -> dict[str, Any]:
    """Run `measure` in a process of its own, forked with the libraries loaded; a failure is a row with its message."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send_row, args=(arch, counts, send))
    child.start()
    send.close()
    try:
        row = receive.recv() if receive.poll(timeout) else {"failed": f"not done in {timeout:.0f} s"}
    except EOFError:
        row = {"failed": "its process died"}
    child.kill()
    child.join()
    return row


def _send_row(arch: str, counts: bool, send: Connection) -> None:
    try:
        send.send(measure(arch, counts))
    except (Exception, SystemExit) as error:
        send.send({"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})


def line(arch: str, row: Mapping[str, Any]) -> str:
    """One line of the table."""
    if wrong := row.get("refused") or row.get("failed"):
        return f"| {arch} | {_inputs(row)} | {wrong} |"
    reasons = "; ".join(f"{reason} ({count})" for reason, count in row.get("closed", {}).items())
    cells = [
        arch,
        _inputs(row),
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['open']} / {row['sets']}" if "sets" in row else "",
        row.get("channels", ""),
        *(f"{row[key]:.0%}" if key in row else "" for key in ("parameters_share", "macs_share")),
        f"{row['macs'] / row['counted_macs']:.4f}" if row.get("counted_macs") else "",
        *(f"{row[key]:.0e}" if key in row else "" for key in ("merge_error", "drop_error")),
        *(row.get(key, "") for key in ("capture_seconds", "couple_seconds")),
        reasons,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _inputs(row: Mapping[str, Any]) -> str:
    """What the network takes; an image's side in rows of former releases."""
    return str(row["inputs"] if "inputs" in row else f"3x{row['side']}x{row['side']}" if "side" in row else "")


def counting(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How many counts of multiply-accumulates agree with torch's, and the rest by name."""
    both = {arch: row["macs"] / row["counted_macs"] for arch, row in rows.items() if row.get("counted_macs")}
    other = ", ".join(f"{arch} ({share:.4f})" for arch, share in both.items() if share != 1)
    rest = f"; others: {other}" if other else ""
    return f"MACs of {len(both)} networks counted twice: {sum(s == 1 for s in both.values())} to the last digit{rest}."


def table(result: Mapping[str, Any]) -> str:
    """The results as a page."""
    head = (
        "network",
        "inputs",
        "M parameters",
        "open / all sets",
        "open channels",
        "parameters",
        "MACs",
        "MACs / FlopCounterMode",
        "merge error",
        "drop error",
        "capture s",
        "couple s",
        "closed, why (sets)",
    )
    rows, machine = result["networks"], result["environment"]
    counted = [row for row in rows.values() if "sets" in row]
    summary = (
        f"{len(counted)} networks; {sum(row['open'] > 0 for row in counted)} have open sets; largest error of a "
        f"merge {max((r.get('merge_error', 0) for r in counted), default=0):.0e}, "
        f"of a removal {max((r.get('drop_error', 0) for r in counted), default=0):.0e}. {counting(rows)}"
    )
    text = (__doc__ or "").split("\n\n")
    return "\n".join(
        [
            "# Coupled channels by network",
            "",
            " ".join(text[2].split()),
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
    parser.add_argument(
        "--networks", nargs="+", default=[*NETWORKS, *CASES], metavar="NAME", help="keys of the results"
    )
    parser.add_argument("--counts", action="store_true", help="capture and count alone, for every network")
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
        known = result["networks"].get(arch, {"failed": ""})
        if options.again or options.counts or "failed" in known:
            row = in_process(arch, options.counts, options.timeout)
            result["networks"][arch] = {**known, **row} if options.counts and "sets" in known else row
            print(line(arch, result["networks"][arch]), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
