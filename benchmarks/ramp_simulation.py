"""Simulate a whole A/B test with ``--auto`` and a ramp: the counts are made up, all that decides is the product's."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy import ndarray

from benchmarks.verdict_simulation import SIZES, autoregression, load
from redpp_serve.ab.counts import HandlerTimes, Stratum, Totals, Traffic, Window
from redpp_serve.ab.decisions import PROMOTE, RAMP, ROLLBACK, Decision
from redpp_serve.ab.evidence import Evidence
from redpp_serve.ab.gateway import divide, set_split, switch
from redpp_serve.ab.pilot import Pilot
from redpp_serve.ab.spec import Spec, Started, parse_ramp, parse_split, split_at
from redpp_serve.ab.state import GATEWAY
from redpp_serve.ab.status import make_status
from redpp_serve.variants import NAMES

RAMP_STEPS = "1,5,25,50,100"
HOLD_S, LOOK_S, WINDOW_S, SECONDS = 120, 30, 5, 1800
USERS, RATE = 2000, 100.0  # users, and their requests a second on average
BOUNDS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, math.inf)
URLS = {"gateway": "http://127.0.0.1:1/predictions/m", "metrics": "http://127.0.0.1:2/metrics"}
_RESTART, _OUTAGE = (
    0.05,
    0.02,
)  # chances at a look that the supervisor is killed, and that both versions fail for a while


@dataclass(frozen=True)
class World:
    """What is true in a simulated test.

    Attributes:
        faster: time of the original / time of the pruned version, for a batch of the same size.
        gap: how much more often the pruned version fails.
        fault: share of requests of an ordinary user that fail.
        bad_users: share of users who fail far more often, whatever arm they have.
        bad_fault: share of their requests that fail.
        phi: correlation from second to second of each version's slowness (standard deviation 10 %).
    """

    faster: float = 1.0
    gap: float = 0.0
    fault: float = 0.001
    bad_users: float = 0.0
    bad_fault: float = 0.2
    phi: float = 0.8


class Simulated:
    """The counts of a made-up test, in place of `counts.Counting`; it survives its supervisors.

    Users send requests at rates that differ (log-normal, sigma 1), and fail with chances of their own, so that both
    are clustered by user. Arrivals are overdispersed (gamma, coefficient of variation 0.3) and follow the time of day
    by a factor of six, as do all times.
    """

    def __init__(self, rng: np.random.Generator, world: World) -> None:
        self._rng, self._world = rng, world
        self._at, weights = rng.random(USERS), rng.lognormal(size=USERS)
        self._weights = weights / weights.sum()
        bad = rng.random(USERS) < world.bad_users
        self._faults = np.where(bad, world.bad_fault, world.fault)
        self._busy = load(rng, 1, SECONDS)[0]
        self._own = np.exp(0.1 * autoregression(rng, (2, SECONDS), world.phi))
        self.windows: list[Window] = []
        self._taken = 0
        self._totals = Totals(Traffic(), HandlerTimes(), {})

    def totals(self) -> Totals:
        """The counts so far."""
        return self._totals

    def new_windows(self) -> list[Window]:
        """The windows since the last call."""
        new, self._taken = self.windows[self._taken :], len(self.windows)
        return new

    def forget(self) -> None:
        """Begin to read anew, as the next supervisor does, which misses a window."""
        self._taken = 0
        if self.windows:
            self.windows.pop()

    def run(self, start: int, split: str, *, outage: bool) -> None:
        """Let `LOOK_S` seconds pass while users are divided by ``split``."""
        seconds, pruned = slice(start, start + LOOK_S), self._at < float(parse_split(split).pruned) / 100
        counters = np.zeros((LOOK_S, len(SIZES), 4))
        stratum = self._totals.traffic.strata.setdefault(split, Stratum())
        times = self._totals.divided.setdefault(split, HandlerTimes())
        for arm, (name, mine) in enumerate(zip(NAMES, (~pruned, pruned), strict=True)):
            weight = float(self._weights[mine].sum())
            rate = RATE * weight * self._busy[seconds] * self._rng.gamma(11.0, 1 / 11.0, LOOK_S)
            speed = 1 / self._world.faster if arm else 1.0
            requests, row, durations = self._batches(rate, self._busy[seconds] * self._own[arm, seconds] * speed)
            counters[..., 2 * arm : 2 * arm + 2] = row
            chance = float((self._weights * self._faults)[mine].sum()) / weight if weight else 0.0
            chance = min(chance + self._world.gap * arm + 0.3 * outage, 1.0)
            self._count(stratum, name, requests, int(self._rng.binomial(requests, chance)))
            below = np.searchsorted(np.sort(durations), BOUNDS, side="right").tolist()
            for each in (times, self._totals.times):
                gained = zip(BOUNDS, below, strict=True)
                each.buckets[name] = {bound: each.buckets[name].get(bound, 0.0) + n for bound, n in gained}
        for rows in counters.reshape(-1, WINDOW_S, len(SIZES), 4).sum(axis=1):
            window = {int(size): row.tolist() for size, row in zip(SIZES, rows, strict=True) if row[0] or row[2]}
            if window:
                self.windows.append(window)

    def _batches(self, rate: ndarray, slowness: ndarray) -> tuple[int, ndarray, ndarray]:
        """(requests, (seconds, sizes, 2) batches and their times, every batch's time); fuller at higher rates."""
        fullness = np.log2(1 + 0.03 * rate)[:, None]
        weights = np.exp(-((np.log2(SIZES) - fullness) ** 2))
        counts = self._rng.poisson(rate[:, None] * weights / (weights * SIZES).sum(axis=1, keepdims=True))
        where = np.repeat(np.arange(counts.size), counts.ravel())
        base = ((0.005 + 0.002 * SIZES)[None, :] * slowness[:, None]).ravel()
        durations = self._rng.gamma(4.0, 0.25, len(where)) * base[where]
        spent = np.bincount(where, durations, counts.size).reshape(counts.shape)
        return int((counts * SIZES).sum()), np.stack([counts, spent], axis=-1), durations

    def _count(self, stratum: Stratum, arm: str, requests: int, faults: int) -> None:
        traffic = self._totals.traffic
        for counter, more in (
            (traffic.requests, requests),
            (traffic.errors, faults),
            (traffic.judged, requests),
            (traffic.faults, faults),
            (stratum.judged, requests),
            (stratum.faults, faults),
        ):
            counter[arm] += more


def fly(seed: int, world: World, ramp: str = RAMP_STEPS) -> list[Decision]:
    """Run one test from its start to a promotion, a roll-back or its end; return its journal."""
    rng = np.random.default_rng(seed)
    with TemporaryDirectory() as name:
        state = Path(name)
        test = Started(_spec(state, ramp), "m", 0.0)
        counts = Simulated(rng, world)
        (state / GATEWAY).mkdir()
        divide(state / GATEWAY)
        set_split(state / GATEWAY, test.spec.split)
        evidence, pilot = Evidence(state, test.spec, counts), Pilot(state, test.spec)  # type: ignore[arg-type]
        split, made = str(test.spec.split), []
        for start in range(0, SECONDS, LOOK_S):
            counts.run(start, split, outage=bool(rng.random() < _OUTAGE))
            if rng.random() < _RESTART:
                counts.forget()
                evidence, pilot = Evidence(state, test.spec, counts), Pilot(state, test.spec)  # type: ignore[arg-type]
            decision = pilot.decide(make_status(state, test, evidence, URLS, []), float(start + LOOK_S))
            if decision is None:
                continue
            made.append(decision)
            if decision.action == RAMP:
                split = decision.users
                set_split(state / GATEWAY, parse_split(split))
            elif decision.action in (PROMOTE, ROLLBACK):
                switch(state / GATEWAY, decision.users)
            pilot.write(decision)
            if decision.action in (PROMOTE, ROLLBACK):
                break
    return made


def _spec(state: Path, ramp: str) -> Spec:
    shares, package = parse_ramp(ramp), state / "package"
    package.mkdir()
    report = {"name": "m", "verify": {"agreement": 1.0, "output_error": 0.01, "images": 500}}
    (package / "report.json").write_text(json.dumps(report))
    split = split_at(shares[0])
    return Spec(package, None, "torchserve", split, "X-User-Id", False, auto=True, ramp=shares, hold=HOLD_S)
