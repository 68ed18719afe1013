"""The GPU runtime against its peers: ``python -m benchmarks.gpu --out FILE.json`` (under eight minutes on one GPU).

Run it from the repository's root; the project need not be installed, torch, triton, numpy and safetensors must be.
Linear layers, the convolutions of ResNet-50 and MobileNetV2, and whole networks; every answer is checked before it is
timed, and again after. Times are of passes inside CUDA graphs, all contenders of a cell in turns (A B B A), with a warm
and with a cold L2; medians with 10th and 90th percentiles. What loses is kept, what fails or is not reached is named.

Kernels are compiled in several processes first; then a process of its own measures. If a kernel takes it down or never
ends, a new one goes on behind that kernel.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checkout
from benchmarks.gpu_journal import Budget, hung, read
from benchmarks.gpu_settings import FULL, QUICK, REHEARSAL
from benchmarks.gpu_targets import evaluate, text
from benchmarks.gpu_timing import Monitor

SETTINGS = {"full": FULL, "quick": QUICK, "rehearse": REHEARSAL}
NO_GPU = (
    "benchmarks.gpu needs a CUDA GPU, and torch finds none here (torch.cuda.is_available() is False); nothing was "
    "written. Run it where one is; --rehearse tries the benchmark itself on a CPU."
)
MOST_STARTS = 8
LAST_S = 12.0  # kept for stopping the worker and for writing
START_S = 20.0  # with less, no new worker is started
POLL_S = 0.5


def measure(journal: Path, how: str, budget: Budget) -> list[str]:
    """Run workers until one ends by itself or the time is over; why the others ended."""
    ends: list[str] = []
    while len(ends) < MOST_STARTS and (not ends or budget.left > START_S):
        end = watch(_start(journal, how, budget.left - LAST_S), journal, budget)
        if not end:
            break
        ends.append(end)
        print(f"worker: {end}", file=sys.stderr, flush=True)
        if end == "out of time":
            break
    return ends


def compile_first(folder: Path, how: str, budget: Budget) -> None:
    """Compile the project's kernels in several processes at once; nothing is timed meanwhile."""
    settings = SETTINGS[how]
    seconds = min(settings.warm_seconds, budget.left / 3)
    if seconds <= 0:
        return
    start = functools.partial(_start, how=how, seconds=seconds)
    children = [
        start(folder / f"warm{k}.jsonl", share=(k, settings.warm_processes)) for k in range(settings.warm_processes)
    ]
    limit = Budget(seconds)
    while limit.left and any(child.poll() is None for child in children):
        time.sleep(POLL_S)
    for child in children:
        child.kill()
        child.wait()


def _start(journal: Path, how: str, seconds: float, share: tuple[int, int] | None = None) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(gpu_checkout.ROOT), os.environ.get("PYTHONPATH")]))
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_worker",
        str(journal),
        f"{max(1.0, seconds):.1f}",
        how,
        *map(str, share or ()),
    ]
    return subprocess.Popen(command, cwd=gpu_checkout.ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=sys.stderr)


def watch(child: subprocess.Popen[bytes], journal: Path, budget: Budget) -> str:
    """Wait for a worker; empty when it ended well, else how it ended. One that hangs or outstays the time is killed."""
    started = time.time()
    while child.poll() is None:
        time.sleep(POLL_S)
        written = max(started, journal.stat().st_mtime) if journal.exists() else started
        if budget.left <= LAST_S / 2 or hung(read(journal), time.time() - written):
            child.kill()
            child.wait()
            return "out of time" if budget.left <= LAST_S / 2 else "hung and was stopped"
    return "" if child.returncode == 0 else f"ended with status {child.returncode}"


def assemble(records: list[dict[str, Any]], ends: list[str]) -> dict[str, Any]:
    """The result of a journal."""
    rows = [record["row"] for record in records if record["kind"] == "cell"]
    machine = next((r for r in records if r["kind"] == "machine"), {})
    crashed = {r["key"]: r["reason"] for r in records if r["kind"] == "crashed"}
    not_reached = {r["key"]: r["reason"] for r in records if r["kind"] == "not reached"}
    done = {r["key"] for r in records if r["kind"] == "cell"}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": machine.get("device"),
        "driver": driver(),
        "versions": machine.get("versions"),
        "peaks": machine.get("peaks"),
        "rows": rows,
        "plans": [{k: v for k, v in r.items() if k != "kind"} for r in records if r["kind"] == "plan"],
        "crashed": crashed,
        "workers ended early": ends,
        "not reached": {key: why for key, why in not_reached.items() if key not in done},
        "targets": [target.to_json() for target in evaluate(rows)],
    }


def driver() -> str | None:
    """The version of the GPU's driver, where nvidia-smi is there to say it."""
    try:
        call = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.SubprocessError):
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"for the whole run (default {FULL.seconds:.0f}); more reaches more of torch.compile",
    )
    parser.add_argument(
        "--table",
        type=Path,
        help="merge the measured layer times into this plan table (redpp_serve/runtime/plans.json)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--quick", dest="how", action="store_const", const="quick", default="full", help="a look, in a minute"
    )
    kind.add_argument(
        "--rehearse",
        dest="how",
        action="store_const",
        const="rehearse",
        help="for development: every step on tiny shapes on the CPU; its times mean nothing",
    )
    options = parser.parse_args(arguments)
    if options.how != "rehearse" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    start, monitor = time.monotonic(), Monitor()
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "journal.jsonl"
        try:
            budget = Budget(options.seconds or SETTINGS[options.how].seconds)
            compile_first(Path(folder), options.how, budget)
            ends = measure(journal, options.how, budget)
        finally:
            clocks = monitor.stop()
        result = {
            **assemble(read(journal), ends),
            "clocks": clocks,
            "kind": options.how,
            "seconds": round(time.monotonic() - start, 1),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if options.table:
            merge_table(journal, options.table)
    print(f"{result['device']}, {result['versions']}, {result['seconds']} s\n\n{text(result)}")
    return 0 if result["rows"] else 1


def merge_table(journal: Path, table: Path) -> None:
    """Add the times that this run's planner measured to a plan table."""
    from benchmarks.gpu_worker import PLANS
    from redpp_serve.runtime.plan import Timing
    from redpp_serve.runtime.plan_cache import merge

    measured = journal.with_suffix(PLANS)
    if measured.exists():
        entries = json.loads(measured.read_text(encoding="utf-8"))["entries"]
        failed = Timing(math.inf, math.inf)
        merge(
            table,
            {
                key: {
                    signature: {kernel: Timing(*times) if times else failed for kernel, times in found.items()}
                    for signature, found in layers.items()
                }
                for key, layers in entries.items()
            },
        )


if __name__ == "__main__":
    sys.exit(main())
