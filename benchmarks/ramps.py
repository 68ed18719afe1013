"""Count how often ``ab start --auto --ramp`` acts without a reason, and how soon with one:
``python -m benchmarks.ramps`` (a few minutes on two idle cores).

Each test is simulated from its start to its end (`ramp_simulation`): users' arrivals and faults are clustered by user
and overdispersed, load and times follow the time of day by a factor of six, both versions fail for half a minute now
and then, and the supervisor is killed and started anew. Evidence, limits, verdict, pilot, journal and the files of the
split are the product's own.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ramp_simulation import HOLD_S, LOOK_S, RAMP_STEPS, SECONDS, World, fly
from benchmarks.verdicts import wilson
from redpp_serve.ab.decisions import PROMOTE, ROLLBACK, Decision
from redpp_serve.machine import describe_machine

OUT = Path("benchmarks/results/ramps.json")
RUNS, POWER_RUNS = 1000, 100
WORLDS = {
    "A/A: equal versions, 1 % of users fail in 5 % of their requests": (World(bad_users=0.01, bad_fault=0.05), RUNS),
    "A/A, a few users fail in 20 % of theirs": (World(bad_users=0.005, bad_fault=0.2), POWER_RUNS),
    "pruned is 1.25 times as fast": (World(faster=1.25, bad_users=0.01, bad_fault=0.05), POWER_RUNS),
    "pruned takes 1.25 times as long": (World(faster=0.8, bad_users=0.01, bad_fault=0.05), POWER_RUNS),
    "pruned fails 5 points more often": (World(faster=1.25, gap=0.05), POWER_RUNS),
}


def cell(journals: list[list[Decision]]) -> dict[str, Any]:
    """Sum up the journals of one world."""
    ends = [made[-1] for made in journals]
    acted = {kind: [end.time for end in ends if end.action == kind] for kind in (PROMOTE, ROLLBACK)}
    count = sum(map(len, acted.values()))
    low, high = wilson(count, len(ends))
    seconds = {kind: float(np.median(times)) if times else None for kind, times in acted.items()}
    return {
        "runs": len(ends),
        "promoted": len(acted[PROMOTE]),
        "rolled_back": len(acted[ROLLBACK]),
        "acted": round(count / len(ends), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "median_seconds": seconds,
        "rolled_back_since": _reasons(ends),
    }


def _reasons(ends: list[Decision]) -> dict[str, int]:
    reasons = [end.numbers["advice"] for end in ends if end.action == ROLLBACK]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def table(result: dict[str, Any]) -> str:
    """Markdown of all cells."""
    lines = [
        "# Decisions of `ab start --auto --ramp`",
        "",
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
        f"Ramp {RAMP_STEPS}, at least {HOLD_S} s at each share, a look every {LOOK_S} s, given up after {SECONDS} s.",
        "",
        "| world | runs | promoted | rolled back | acted (95 % interval) | median time to act |",
        "|---|---|---|---|---|---|",
    ]
    for x in result["cells"]:
        share = f"{x['acted']:.1%} ({x['low']:.1%} to {x['high']:.1%})"
        times = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in x["median_seconds"].items() if seconds)
        counts = f"{x['runs']} | {x['promoted']} | {x['rolled_back']}"
        lines.append(f"| {x['world']} | {counts} | {share} | {times or '-'} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Simulate, and write the JSON with the table beside it after each world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the first test of each world; the others take the next")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; the table goes beside it as .md")
    options = parser.parse_args()
    start, cells = time.perf_counter(), []
    with ProcessPoolExecutor(options.workers) as pool:
        for name, (world, runs) in WORLDS.items():
            seeds = range(options.seed, options.seed + runs)
            cells.append({"world": name, **cell(list(pool.map(partial(fly, world=world), seeds, chunksize=5)))})
            print(f"{time.perf_counter() - start:6.0f} s  {json.dumps(cells[-1])}", flush=True)
            result = {"environment": describe_machine(), "seed": options.seed, "cells": cells}
            options.out.write_text(json.dumps(result, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
