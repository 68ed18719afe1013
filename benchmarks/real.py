"""Measure pruning of real networks on photographs and digits that are never fitted: ``python -m benchmarks.real``.

``--score FILE`` holds one ``.mar`` or ``.redpp`` file against the network that it came from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_networks import NETWORKS, load_graph
from benchmarks.real_scores import evaluate, read_pruned
from redpp_serve.graph.layers import mac_count


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = [name for name, network in NETWORKS.items() if network.sets]
    parser.add_argument("--network", choices=trained, default="lite0", help="what the scored file came from")
    parser.add_argument("--score", type=Path, metavar="FILE", required=True, help="a .mar or .redpp file to score")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    return parser.parse_args(arguments)


def score_line(name: str, score: Mapping[str, Any]) -> str:
    """One set's figures in words."""
    text = f"{name}: {score['agreement']:.1%} agree ({score['low']:.1%} to {score['high']:.1%}) of {score['images']}"
    text += f", centred error {score['error']:.3f}"
    return text + (f", {score['right']} of {score['labelled']} right" if score["labelled"] else "")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    graph = read_pruned(options.score)
    scores = evaluate(graph, options.network)
    print(f"{mac_count(graph) / mac_count(load_graph(options.network)):.3f} of the multiply-accumulates")
    print("\n".join(score_line(name, score) for name, score in scores.items()))
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
