"""The process that measures for `benchmarks.gpu`: it goes on where the journal ends, and may die without loss.

``python -m benchmarks.gpu_worker JOURNAL SECONDS full|quick|rehearse [SHARE OF]``; with the last two it measures
nothing but runs its share of the project's kernels once, so that they are compiled (Triton keeps them on disk).
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checkout  # noqa: F401 - before the project
from benchmarks.gpu_cells import Cell, measure_cell
from benchmarks.gpu_journal import Budget, DeviceLost, Journal, one_line
from benchmarks.gpu_layers import conv_cells, linear_cells
from benchmarks.gpu_networks import ARMS, COMPILED_ARMS, PREPARE_S, Network, measure_network, place, plan, prepare
from benchmarks.gpu_planned import planned_cells
from benchmarks.gpu_settings import FULL, QUICK, REHEARSAL, Settings
from benchmarks.gpu_timing import Bench, Peaks
from redpp_serve.runtime.plan_cache import PlanCache

SETTINGS = {"full": FULL, "quick": QUICK, "rehearse": REHEARSAL}
ROUNDS_S = {
    "linear": 0.3,
    "conv": 0.15,
    "planned": 0.1,
}  # of timing for all contenders of a cell in one state of the cache
OWN = ("fused", "codebook", "depthwise", "split")  # kernels that Triton compiles
LEAST_S = 1.0  # no cell is begun with less
KEPT_BYTES = 16 << 30  # of GPU memory that torch may keep between cells
PLANS = ".plans.json"


class Worker:
    """One process's part of a run."""

    def __init__(self, journal: Journal, bench: Bench, budget: Budget, settings: Settings) -> None:
        self.journal, self.bench, self.budget, self.settings = journal, bench, budget, settings
        self.done = {record["key"] for record in journal.of("cell")}
        self.peaks = self._machine()

    def run(self) -> None:
        """All sections, each with its share of what is left."""
        sections: dict[str, Callable[[Budget], None]] = {
            "linear": self._linear,
            "conv": self._conv,
            "networks": self._networks,
        }
        finished = {record["section"] for record in self.journal.of("finished")}
        shares = {name: share for name, share in self.settings.shares if name not in finished}
        while shares:
            remaining = sum(shares.values())
            name = next(iter(shares))
            try:
                sections[name](self.budget.part(shares.pop(name), remaining))
            except DeviceLost:
                raise
            except Exception as error:  # a section that breaks must not take the others with it
                traceback.print_exc()
                self._not_reached(f"rest of {name}", one_line(error))
            self.journal.add("finished", section=name)
            self.bench.works()

    def _machine(self) -> Peaks:
        known = self.journal.of("machine")
        if not known:
            self.journal.add("machine", **machine(self.bench), peaks=self.bench.peaks().to_json())
            known = self.journal.of("machine")
        return Peaks(**known[0]["peaks"])

    def _linear(self, budget: Budget) -> None:
        self._cells(linear_cells(self.bench, self.settings.shapes, self.settings.rows), budget)

    def _conv(self, budget: Budget) -> None:
        settings = self.settings
        self._cells(
            conv_cells(self.bench, settings.conv_networks, settings.conv_batches, settings.every, settings.side), budget
        )

    def _cells(self, cells: Iterator[Cell], budget: Budget) -> None:
        for cell in cells:
            if cell.key not in self.done:
                if budget.left < LEAST_S:
                    self._not_reached(cell.key)
                    continue
                seconds = 0.0 if self.bench.rehearse else ROUNDS_S[cell.section]
                self._keep(cell.key, measure_cell(cell, self.bench, self.peaks, self.journal, seconds))

    def _networks(self, budget: Budget) -> None:
        """Everything of each network first; torch.compile, the slowest by far, with what is left."""
        networks: dict[str, Network] = {}
        names, seen = list(self.settings.networks), set()
        first = budget.part(0.6, 1.0)
        for index, name in enumerate(names):
            own = first.part(1.0, len(names) - index)
            network = self._prepared(name, own)
            if network is None:
                continue
            networks[name] = network
            for batch in self.settings.batches:
                self._network(network, batch, ARMS, own)
            for version in network.plans:
                self._cells(planned_cells(network, version, self.bench, self.settings.batches, seen), own)
        for name, batch in self.settings.compiled:
            if name in networks:
                self._network(networks[name], batch, COMPILED_ARMS, budget)

    def _prepared(self, name: str, budget: Budget) -> Network | None:
        attempt, settings = self.journal.attempt, self.settings
        network, reason = attempt(
            f"network {name}", budget.at_most(PREPARE_S), lambda: prepare(name, self.bench, settings.side)
        )
        if network is None:
            self._not_reached(f"network {name}", reason)
            return None
        cache = PlanCache(self.journal.path.with_suffix(PLANS), shipped=None)
        for version in network.graphs:
            seconds = min(settings.plan_seconds, budget.left / 6)
            choose = functools.partial(plan, network, version, self.bench, settings.batches, cache, seconds)
            _, reason = attempt(f"network {name} plan {version}", 4 * seconds + 20, choose)
            if reason:
                self._not_reached(f"network {name} plan {version}", f"{reason}; its kernels are dense")
            elif not any((r["network"], r["version"]) == (name, version) for r in self.journal.of("plan")):
                self.journal.add("plan", network=name, version=version, plan=network.plans[version].to_json())
            set_up = functools.partial(place, network, version, self.bench, settings.batches)
            _, reason = attempt(f"network {name} programs {version}", PREPARE_S, set_up)
            if reason:
                self._not_reached(f"network {name} programs {version}", reason)
        return network

    def _network(self, network: Network, batch: int, arms: dict[str, Any], budget: Budget) -> None:
        key = f"network {network.name} batch={batch} {'torch.compile' if arms is COMPILED_ARMS else ''}".strip()
        if key not in self.done:
            if budget.left < LEAST_S:
                self._not_reached(key)
            else:
                self._keep(key, measure_network(network, batch, arms, self.bench, self.journal, budget.left))

    def _keep(self, key: str, row: dict[str, Any]) -> None:
        self.done.add(key)
        self.journal.add("cell", key=key, row=row)
        if not self.bench.rehearse and torch.cuda.memory_reserved() > KEPT_BYTES:
            torch.cuda.empty_cache()

    def _not_reached(self, key: str, reason: str = "no time left") -> None:
        self.journal.add("not reached", key=key, reason=reason)


def warm_up(journal: Journal, bench: Bench, budget: Budget, settings: Settings, share: int, of: int) -> None:
    """Run every ``of``-th call of this project's kernels once. A failure here shows again where it is measured."""
    cells = itertools.chain(
        linear_cells(bench, settings.shapes, settings.rows),
        conv_cells(bench, settings.conv_networks, settings.conv_batches, settings.every, settings.side),
    )
    calls = ((cell, contender) for cell in cells for contender in cell.contenders if contender.name.startswith(OWN))
    for cell, contender in itertools.islice(calls, share, None, of):
        if budget.left > LEAST_S:
            journal.attempt(
                f"{cell.key} {contender.name}",
                budget.at_most(contender.limit_s),
                lambda contender=contender: contender.fresh()(),
            )


def machine(bench: Bench) -> dict[str, Any]:
    """The device and all versions that a time depends on."""
    device = "CPU (rehearsal: not a measurement)" if bench.rehearse else torch.cuda.get_device_name(bench.device)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if bench.rehearse else torch.backends.cudnn.version(),
    }
    for package in ("triton", "numpy", "bitsandbytes", "gemlite"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": device, "versions": versions}


def main(arguments: list[str]) -> int:
    path, seconds, how = Path(arguments[0]), float(arguments[1]), arguments[2]
    rehearse = how == "rehearse"
    bench = Bench(torch.device("cpu" if rehearse else "cuda:0"), torch.float32 if rehearse else torch.float16, rehearse)
    torch.set_grad_enabled(False)
    if rehearse:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(bench.device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        journal, budget = Journal(path, bench.works), Budget(seconds)
        if len(arguments) > 3:
            warm_up(journal, bench, budget, SETTINGS[how], int(arguments[3]), int(arguments[4]))
        else:
            Worker(journal, bench, budget, SETTINGS[how]).run()
    except DeviceLost as error:
        print(f"the GPU failed: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
