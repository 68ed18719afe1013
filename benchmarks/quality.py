"""Measure accuracy against cost of data-free pruning: ``python -m benchmarks.quality``.

A run takes hours and goes on where it stopped.

For each reference network, method and share of multiply-accumulates removed: the held-out accuracy, the cost, and the
latency in turns with the original. Peers run side by side on the same networks, the same channel sets and the
same count. Needs ``torch-pruning==1.6.0`` and ``scikit-learn``. Correctness comes before figures: a graph that differs
from its module, or a runtime that differs from its graph, ends the run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.baselines.cells import Store, Timing, cell_key, measure_cell, measure_stages
from benchmarks.baselines.methods import METHODS
from benchmarks.baselines.subject import load_subject
from benchmarks.baselines.table import markdown, targets
from redpp_serve.reference import catalog

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
OUT = Path("benchmarks/results/quality.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    trained = [name for name, network in catalog.NETWORKS.items() if network.checkpoint.exists()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", choices=trained, default=trained, metavar="NAME", help=f"of {', '.join(trained)}"
    )
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "stages"], default=[*METHODS, "stages"])
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS, help="shares of open sets' MACs removed")
    parser.add_argument("--batch", type=int, default=8, help="inputs in a timed call")
    parser.add_argument("--latency-seconds", type=float, default=2.0, help="for each cell; 0 for none")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--again", action="store_true", help="measure the chosen cells even where the file has them")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()) / "redpp-quality",
        help="keeps synthetic images between runs",
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; tables go beside it as .md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    store, timing = Store(options.out), Timing(options.batch, options.latency_seconds)
    for name in options.networks:
        cells = [
            (method, ratio)
            for method in options.methods
            for ratio in ((None,) if method == "stages" else options.ratios)
        ]
        todo = [
            (method, ratio)
            for method, ratio in cells
            if options.again or not store.find(name, method, ratio, cell_key(name, method, timing))
        ]
        if not todo:
            continue
        subject = load_subject(name, options.scratch)
        store.describe(subject, subject.accuracy(subject.graph))
        for method, ratio in todo:
            if ratio is None:
                store.put(measure_stages(subject, timing))
            else:
                store.put(measure_cell(subject, method, ratio, timing, lambda line: print(line, flush=True)))
    report = markdown(store.data)
    options.out.with_suffix(".md").write_text(report, encoding="utf-8")
    print(report)
    print("\n".join(targets(store.data)))


if __name__ == "__main__":
    main()
