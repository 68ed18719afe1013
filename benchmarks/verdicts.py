"""Count how often verdicts are wrong when one looks all the time, and how soon they are right:
``python -m benchmarks.verdicts`` (about fifteen minutes on one core).

Every run is looked at whenever its interval changes, and the first decision counts. Without a difference between the
arms any decision for one is a false alarm; a method keeps its promise where at most 5 % of the runs have one. Cells
with a difference say after how many observations half and nine tenths of the runs have found it. Before anything is
counted, the replays of many runs at once are checked against the product's own sequences.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from benchmarks import verdict_guardrails as rails
from benchmarks.verdict_simulation import ALPHA, PAIRED, SIZES, arm_stops, paired_stops, split_windows, t_test_stops
from redpp_serve.machine import describe_machine
from redpp_serve.statistics.sequences import RatioSequence
from redpp_serve.statistics.unequal_traffic import ArmSequence

OUT = Path("benchmarks/results/verdicts.json")
PAIRED_RUNS, RUNS, PAIRS, WINDOWS, REQUESTS = 4000, 2000, 8000, 4000, 4000
POWER_RUNS, NOISE = 400, 0.5  # standard deviation of one pair's log-ratio
EFFECTS = {0.02: 200_000, 0.05: 40_000, 0.10: 12_000}  # of the ratio; pairs after which a run is given up
POWER_WINDOWS = 10_000
CHUNK = 100  # runs held at once
SPLITS: dict[str, dict[str, Any]] = {
    "90:10, 100/s, independent": {"share": 0.1, "rate": 100},
    "90:10, 100/s, load swings": {"share": 0.1, "rate": 100, "swings": True},
    "90:10, 100/s, load swings, AR(1) 0.5": {"share": 0.1, "rate": 100, "swings": True, "phi": 0.5},
    "90:10, 100/s, load swings, AR(1) 0.8": {"share": 0.1, "rate": 100, "swings": True, "phi": 0.8},
    "90:10, 100/s, load swings, outliers": {"share": 0.1, "rate": 100, "swings": True, "outliers": 0.01},
    "90:10, 1000/s, load swings, AR(1) 0.8": {"share": 0.1, "rate": 1000, "swings": True, "phi": 0.8},
    "90:10, 5/s, load swings, AR(1) 0.8": {"share": 0.1, "rate": 5, "swings": True, "phi": 0.8},
    "99:1, 100/s, independent": {"share": 0.01, "rate": 100},
    "99:1, 100/s, load swings, AR(1) 0.8": {"share": 0.01, "rate": 100, "swings": True, "phi": 0.8},
    "99:1, 100/s, load swings, outliers": {"share": 0.01, "rate": 100, "swings": True, "outliers": 0.01},
    "50:50, 100/s, load swings, AR(1) 0.8": {"share": 0.5, "rate": 100, "swings": True, "phi": 0.8},
}
SPLIT_POWER = ("90:10, 100/s, independent", "90:10, 100/s, load swings, AR(1) 0.8", "99:1, 100/s, independent")
Noise = Callable[[np.random.Generator, int, int], ndarray]
Cells = Iterator[tuple[str, str, dict[str, Any]]]  # method, data, numbers
Guard = tuple[str, Callable[..., tuple[ndarray, ndarray]], tuple[float, ...], dict[str, Any], int]
# In words, how it is simulated, and which answer is wrong: 0 advice to roll back, 1 "kept".
GUARDS_NULL: list[Guard] = [
    ("errors: both arms at 1 %", rails.error_stops, (0.01, 0.0), {}, 0),
    ("errors: both arms at 1 %, common outages", rails.error_stops, (0.01, 0.0), {"outages": True}, 0),
    ("errors: gap at the limit", rails.error_stops, (0.01, rails.MAX_GAP), {}, 0),
    ("errors: gap just above the limit, called kept", rails.error_stops, (0.01, rails.MAX_GAP + 1e-9), {}, 1),
    ("p99: equal tails", rails.p99_stops, (1.0,), {}, 0),
    ("p99: ratio at the limit", rails.p99_stops, (rails.MAX_RATIO,), {}, 0),
    ("p99: ratio at the limit, common load AR(1) 0.8", rails.p99_stops, (rails.MAX_RATIO, 0.8), {}, 0),
    ("agreement: share at the limit", rails.agreement_stops, (rails.LIMIT,), {}, 0),
    ("agreement: share just below the limit, called kept", rails.agreement_stops, (rails.LIMIT - 1e-9,), {}, 1),
]
GUARDS_POWER: list[Guard] = [
    ("errors: 6 % against 1 %, rolled back", rails.error_stops, (0.01, 0.05), {}, 0),
    ("errors: both arms at 0.1 %, called kept", rails.error_stops, (0.001, 0.0), {}, 1),
    ("p99: 3 times as long, rolled back", rails.p99_stops, (3.0,), {}, 0),
    ("p99: equal tails, called kept", rails.p99_stops, (1.0,), {}, 1),
    ("agreement: 95 %, rolled back", rails.agreement_stops, (0.95,), {}, 0),
    ("agreement: 99.9 %, called kept", rails.agreement_stops, (0.999,), {}, 1),
]


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z2, share = 1.96**2, hits / trials
    centre, half = share + z2 / (2 * trials), math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2)))
    return max((centre - half) / (1 + z2 / trials), 0.0), (centre + half) / (1 + z2 / trials)


def alarms(stops: ndarray, observations: int, unit: str) -> dict[str, Any]:
    """A cell without a difference; ``stops`` (runs,) is infinite where nothing was decided."""
    count, runs = int(np.isfinite(stops).sum()), len(stops)
    low, high = wilson(count, runs)
    numbers = {"rate": round(count / runs, 5), "low": round(low, 5), "high": round(high, 5)}
    return {"runs": runs, "observations": observations, "unit": unit, "false_alarms": count, **numbers}


def stopping(stops: ndarray, limit: int, unit: str) -> dict[str, Any]:
    """A cell with a difference; a quantile beyond the limit is None."""
    half, most = (float(np.quantile(stops, q, method="higher")) for q in (0.5, 0.9))
    quantiles = {name: int(x) if math.isfinite(x) else None for name, x in (("median", half), ("p90", most))}
    found = round(float(np.isfinite(stops).mean()), 4)
    return {"runs": len(stops), "given_up_after": limit, "unit": unit, "found": found, **quantiles}


def in_chunks(runs: int, stops: Callable[[int], ndarray]) -> ndarray:
    """Run a simulation ``CHUNK`` runs at a time, to bound the memory."""
    return np.concatenate([stops(min(CHUNK, runs - done)) for done in range(0, runs, CHUNK)])


def check() -> None:
    """The replays decide when the product's sequences do, which see one observation after the other."""
    rng = np.random.default_rng(5)
    values = 0.2 + PAIRED["AR(1) 0.5"](rng, 3, 1000)
    windows = split_windows(rng, 3, 600, share=0.1, rate=20, effect=0.15, phi=0.5, swings=True)
    stops: list[float] = []
    for run in values:
        pairs = RatioSequence(ALPHA)
        stops.append(_first(pairs, ([value] for value in run)))
    for run in windows:
        split = ArmSequence(ALPHA)
        stops.append(_first(split, ([dict(zip(SIZES.tolist(), w.tolist(), strict=True))] for w in run)))
    expected = [*paired_stops(values), *arm_stops(windows)]
    if stops != expected or not np.isfinite(stops).any():
        raise SystemExit(f"the replays stop at {expected}, the product's sequences at {stops}")


def _first(sequence: RatioSequence | ArmSequence, observations: Iterator[Any]) -> float:
    for count, observation in enumerate(observations, 1):
        sequence.update(observation)
        low, high = sequence.interval()
        if low > 0 or high < 0:
            return count
    return math.inf


def false_alarm_cells(rng: np.random.Generator) -> Cells:
    """Yield cells of arms that are equally fast."""
    for name, noise in PAIRED.items():
        stops = in_chunks(PAIRED_RUNS, lambda n, noise=noise: paired_stops(noise(rng, n, PAIRS)))
        yield "pairs", name, alarms(stops, PAIRS, "pairs")
    for name, pairs in (("independent", 1000), ("independent", PAIRS), ("AR(1) 0.8", PAIRS)):
        stops = in_chunks(PAIRED_RUNS, lambda n, noise=PAIRED[name], pairs=pairs: t_test_stops(noise(rng, n, pairs)))
        yield "t-test at every pair (foil)", name, alarms(stops, pairs, "pairs")
    for name, options in SPLITS.items():
        stops = in_chunks(RUNS, lambda n, options=options: arm_stops(split_windows(rng, n, WINDOWS, **options)))
        yield "split", name, alarms(stops, WINDOWS, "windows of 1 s")


def guard_stops(guard: Guard, rng: np.random.Generator) -> Callable[[int], ndarray]:
    """Return what simulates so many runs of a guardrail."""
    _, simulate, arguments, options, answer = guard
    return lambda n: simulate(rng, n, REQUESTS, *arguments, **options)[answer]


def guardrail_alarm_cells(rng: np.random.Generator) -> Cells:
    """Yield cells of limits that are kept."""
    for guard in GUARDS_NULL:
        yield "guardrail", guard[0], alarms(in_chunks(RUNS, guard_stops(guard, rng)), REQUESTS, "requests")


def power_cells(rng: np.random.Generator) -> Cells:
    """Yield cells of arms that are not."""
    for name in ("independent", "AR(1) 0.5", "AR(1) 0.8", "Student t, 3 degrees", "log-normal, skewed"):
        for effect, limit in EFFECTS.items():
            shift, noise = math.log1p(effect), PAIRED[name]

            def shifted(n: int, shift: float = shift, noise: Noise = noise, limit: int = limit) -> ndarray:
                return paired_stops(shift + NOISE * noise(rng, n, limit))

            stops = in_chunks(POWER_RUNS, shifted)
            yield "pairs", f"{effect:.0%}, {name}", stopping(stops, limit, "pairs")
    for name in SPLIT_POWER:
        for effect in EFFECTS:
            options = {**SPLITS[name], "effect": math.log1p(effect)}

            def unequal(n: int, options: dict[str, Any] = options) -> ndarray:
                return arm_stops(split_windows(rng, n, POWER_WINDOWS, **options))

            stops = in_chunks(POWER_RUNS, unequal)
            yield "split", f"{effect:.0%}, {name}", stopping(stops, POWER_WINDOWS, "windows of 1 s")


def guardrail_power_cells(rng: np.random.Generator) -> Cells:
    """Yield cells of limits that are clearly kept or broken."""
    for guard in GUARDS_POWER:
        yield "guardrail", guard[0], stopping(in_chunks(POWER_RUNS, guard_stops(guard, rng)), REQUESTS, "requests")


def table(result: Mapping[str, Any]) -> str:
    """Markdown of both kinds of cells."""
    kept = [x for x in result["false_alarms"] if "foil" not in x["method"]]
    above, doubtful = [x for x in kept if x["low"] > ALPHA], [x for x in kept if x["high"] > ALPHA]
    lines = [
        "# Verdicts under continuous peeking",
        "",
        " ".join(__doc__.split("\n\n")[1].split()),
        "",
        f"{len(kept)} cells; in {len(above)} false alarms are significantly above 5 %, in {len(doubtful)} the upper "
        f"bound of their share is above 5 %{': ' if doubtful else ''}"
        f"{'; '.join(x['data'] for x in doubtful)}. Guardrails are asked after every request of the pruned arm "
        f"(errors: after every {rails.EVERY}), beside {rails.SHARE} of the original each.",
        "",
        "| method | data without a difference | observations | runs | false alarms (95 % interval) |",
        "|---|---|---|---|---|",
    ]
    for x in result["false_alarms"]:
        share = f"{x['rate']:.1%} ({x['low']:.1%} to {x['high']:.1%})"
        lines.append(f"| {x['method']} | {x['data']} | {x['observations']:,} {x['unit']} | {x['runs']:,} | {share} |")
    lines += [
        "",
        f"Noise of a pair: standard deviation {NOISE:g} of the log-ratio, whatever its shape. Splits as above.",
        "",
        "| method | difference, data | median | 90 % of runs | found | given up after |",
        "|---|---|---|---|---|---|",
    ]
    for x in result["power"]:
        half, most = (f"{x[q]:,}" if x[q] is not None else "-" for q in ("median", "p90"))
        end = f"{x['given_up_after']:,} {x['unit']}"
        lines.append(f"| {x['method']} | {x['data']} | {half} | {most} | {x['found']:.1%} | {end} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Simulate, and write the JSON with the table beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the first group of cells; the others take the next")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; the table goes beside it as .md")
    options = parser.parse_args()
    check()
    start = time.perf_counter()
    result: dict[str, Any] = {"environment": describe_machine(), "seed": options.seed, "noise": NOISE}
    groups = (
        ("false_alarms", false_alarm_cells),
        ("power", power_cells),
        ("false_alarms", guardrail_alarm_cells),
        ("power", guardrail_power_cells),
    )
    for number, (kind, cells) in enumerate(groups):
        for method, data, cell in cells(np.random.default_rng(options.seed + number)):
            result.setdefault(kind, []).append({"method": method, "data": data, **cell})
            print(f"{time.perf_counter() - start:6.0f} s  {json.dumps(result[kind][-1])}", flush=True)
    result["seconds"] = round(time.perf_counter() - start)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(result))


if __name__ == "__main__":
    main()
