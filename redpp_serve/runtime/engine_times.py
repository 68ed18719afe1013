"""The times of engines on a network: each builds it in a process of its own, is checked there, and then timed in turns.

What crashes, fails, is late or gives other outputs than the network on the artifact's stored inputs is left out, with
its reason. The others are read once or twice in each bucket, from the smallest batch: one that is far behind there is
not read at larger ones, and its process ends. What large batches take is worked out from smaller ones once reading has
taken its share of the time. Those near the fastest take turns with it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from redpp_serve.engines import OWN
from redpp_serve.engines.trial import READING_S, Arrays, Trial, TrialError, seconds_of
from redpp_serve.graph.executor import Program
from redpp_serve.graph.sizes import choice_in_words
from redpp_serve.runtime.buckets import AS_DECLARED, Bucket, Sizes
from redpp_serve.runtime.engine_network import Candidate, Network, Run, own_run, recorded_error
from redpp_serve.runtime.plan import Timing
from redpp_serve.runtime.timing import FEWEST_ROUNDS, in_turns, rounds, timings

_NEAR = 1.15  # times as slow as the fastest: candidates beyond do not take turns with it
_CLEAR = 1.5  # times as slow as the fastest: one reading is enough, and larger batches are not read
_WORK_SECONDS = 5e-3  # of a call: where the fastest takes less, larger batches are read, since calls cost something too
# A ratio of single readings may be so much too small; one of processor times that costs no precision is decided sooner.
_UNSURE, _LITTLE_UNSURE = 1.15, 1.05
_TURNS, _MOST_TURNS = 3, 15  # rounds between candidates that are all surely faster than the incumbent
_TURNS_WORTH = 0.5  # seconds that more than the fewest of them may take in a bucket
_LONG_SECONDS = 0.1  # of a call by the processor's clock, which then says enough alone
_REST_S = 0.01  # behind a call of torch's threads, which spin on for some 6 ms on the cores of the next candidate
_READING = 0.7  # of a candidate's seconds, after which larger batches are no longer read
_SHARE = 0.5  # of the seconds that are left: what a candidate may take that is not the last
_TURNS_SECONDS = 60.0  # after which a network that takes turns hangs
_EXACT = 1e-3  # largest error of fp32, relative to the spread of the outputs: sums in another order
# Limits for other precisions, of the error that was recorded, on a few stored inputs: eight bits are held against what
# the pass says of them, from which right engines differ by 0 to 0.035 (one that drops a scale in ConvNeXt by 0.096);
# bfloat16 is held against fp32.
_SLACK, _LEAST_LIMITS = {"int8": 1.0}, {"int8": 0.05}
_MOST_SLACK, _LEAST_LIMIT = 4.0, 0.1
_CPU = torch.device("cpu")
_ODD_CHECK, _LARGEST_CHECK = 3, 8  # a batch between the buckets; rows of the largest batch that is checked


@dataclass
class Measured:
    """What is known of the candidates.

    Attributes:
        times: by bucket, the time of each candidate that runs the network, and of the own runtime.
        left_out: why other candidates do not run it.
        built: the seconds that building took, by candidate, with the engine's import.
    """

    times: dict[Bucket, dict[str, Timing]]
    left_out: dict[str, str] = field(default_factory=dict)
    built: dict[str, float] = field(default_factory=dict)


def measure(
    network: Network,
    own: Mapping[str, Run],
    candidates: Sequence[Candidate],
    buckets: Sequence[Bucket],
    *,
    seconds: float,
    everywhere: bool = False,
) -> Measured:
    """Check and time candidates beside the own runtime.

    Args:
        network: the network.
        own: the own runtime with dense kernels, by precision; the first is the incumbent.
        candidates: the engines with their precisions.
        buckets: the buckets, batch sizes ascending.
        seconds: about how long all may take.
        everywhere: read candidates at all buckets, however slow they are.
    """
    race = _Race(network, buckets, time.monotonic() + seconds, str(Candidate(OWN, next(iter(own)))), everywhere)
    try:
        expected = Expected(network, next(iter(own.values())))
        ordered = sorted(candidates, key=lambda c: c.precision == "fp32")  # the fastest are among the narrow
        for candidate in ordered:
            race.enter(candidate, expected, 1.0 if candidate is ordered[-1] else _SHARE)
        for precision, run in own.items():
            race.enter_own(str(Candidate(OWN, precision)), run, _SHARE)
        for done, bucket in enumerate(buckets):
            race.finish(bucket, (race.end - time.monotonic()) / (len(buckets) - done))
    finally:
        race.close()
    return race.measured


class Expected:
    """What engines are held against on the stored inputs, each computed when it is first needed.

    Args:
        network: the network.
        run: the own runtime's run of it, in its first precision.
    """

    def __init__(self, network: Network, run: Run) -> None:
        self._network, self._run = network, run
        self._outputs: dict[tuple[bool, Sizes], tuple[Tensor, ...]] = {}

    def wrong(self, candidate: Candidate, found: Sequence[Sequence[Tensor]], sizes: Sizes = AS_DECLARED) -> str:
        """Return what is wrong with outputs for batches of the stored inputs; empty where nothing is.

        Args:
            candidate: what gave them.
            found: for each batch, the outputs (N, ...).
            sizes: the sizes of the inputs, where they vary.
        """
        outputs = self._of(candidate.precision, max(len(parts[0]) for parts in found), sizes)
        recorded = recorded_error(self._network.artifact.description, candidate.precision)
        slack = _SLACK.get(candidate.precision, _MOST_SLACK)
        least = _LEAST_LIMITS.get(candidate.precision, _LEAST_LIMIT)
        limit = _EXACT if candidate.precision == "fp32" else max(least, slack * recorded)
        worst = 0.0
        for k, expected in enumerate(outputs):
            got = [parts[k] for parts in found]
            if shapes := [tuple(y.shape) for y in got if y.shape != expected[: len(y)].shape]:
                return f"output {k} has other shapes than the network's, such as {shapes[0]}"
            right, mine = torch.cat([expected[: len(y)] for y in got]), torch.cat(got)
            if sizes:  # a mask that is cut to a few places may hide all of them, and then there is no answer
                answered = right.flatten(1).isfinite().all(1)
                right, mine = right[answered], mine[answered]
            worst = max(worst, _error(right, mine) if len(right) else 0.0)
        at = f" at {choice_in_words(dict(sizes))}" if sizes else ""
        return "" if worst <= limit else f"its outputs{at} differ by {worst:.2g} of their spread, more than {limit:.2g}"

    def _of(self, precision: str, rows: int, sizes: Sizes) -> tuple[Tensor, ...]:
        """Return the outputs for at least that many rows of the stored inputs."""
        key = precision == "int8", sizes
        if key not in self._outputs or len(self._outputs[key][0]) < rows:
            run = own_run(Program(self._network.in_int8()), _CPU) if key[0] else self._run
            self._outputs[key] = run(self._network.inputs(rows if sizes else max(rows, _LARGEST_CHECK), sizes))
        return self._outputs[key]


def _error(expected: Tensor, found: Tensor) -> float:
    """Return the root mean square difference, relative to the spread of the expected values; infinite for NaN.

    The spread is that between inputs, or between the values of one input that is alone.
    """
    x, y = expected.double(), found.double()
    centred = x - (x.mean(0) if len(x) > 1 else x.mean())
    spread = max(float(centred.square().mean().sqrt()), 1e-3 * float(x.square().mean().sqrt()), 1e-30)
    error = float((x - y).square().mean().sqrt()) / spread
    return error if error == error else math.inf


class _Race:
    """The candidates on their way to their times.

    Args:
        network: the network.
        buckets: the buckets, batch sizes ascending.
        end: the time of the monotonic clock at which to stop.
        first: the incumbent.
        everywhere: as for `measure`.

    Attributes:
        end: as given.
        measured: what is known so far.
    """

    def __init__(self, network: Network, buckets: Sequence[Bucket], end: float, first: str, everywhere: bool) -> None:
        self._network, self._buckets, self.end = network, buckets, end
        self._first, self._everywhere = first, everywhere
        self.measured = Measured({bucket: {} for bucket in buckets})
        self._trials: dict[str, Trial] = {}
        self._calls: dict[str, Callable[[Bucket], float]] = {}
        self._quick: dict[Bucket, dict[str, float]] = {bucket: {} for bucket in buckets}

    def enter_own(self, name: str, run: Run, share: float) -> None:
        """Read the own runtime in one of its precisions, for a share of the seconds that are left."""
        network, until = self._network, time.monotonic() + _READING * share * (self.end - time.monotonic())

        def call(bucket: Bucket) -> float:
            seconds = seconds_of(partial(run, network.inputs(bucket.batch, bucket.sizes)), network.clock)
            if network.clock is not time.process_time:
                time.sleep(_REST_S)
            return seconds

        self._calls[name] = call
        self._read(name, call, call, until)

    def enter(self, candidate: Candidate, expected: Expected, share: float) -> None:
        """Build a candidate, check it, and read it at each bucket; leave it out where it fails.

        Args:
            candidate: the candidate.
            expected: what it has to compute.
            share: of the seconds that are left, what it may take.
        """
        name, left = str(candidate), self.end - time.monotonic()
        if left <= 0:
            self._leave_out(name, "not tried for want of time")
            return
        try:
            model = self._network.model(candidate)
            self._enter(candidate, model, expected, share * left)
        except (Exception, SystemExit) as error:  # whatever a library raises, as it is imported too
            self._leave_out(name, one_line(error))
        self._retire()

    def finish(self, bucket: Bucket, seconds: float) -> None:
        """Have the candidates near the fastest take turns at a bucket, as far as the seconds reach."""
        while True:
            try:
                self.measured.times[bucket] = self._finished(bucket, seconds)
                return
            except _Failed as failure:
                self._leave_out(failure.name, failure.reason)

    def close(self) -> None:
        """End all processes."""
        for trial in self._trials.values():
            trial.close()
        self._trials.clear()

    def _enter(self, candidate: Candidate, model: Path, expected: Expected, seconds: float) -> None:
        name, network, until = str(candidate), self._network, time.monotonic() + _READING * seconds
        stored = [x.contiguous().numpy() for x in network.inputs(network.stored)]
        trial = Trial(
            candidate.engine, candidate.precision, model, stored, network.threads, seconds, network.device.index or 0
        )
        trial.allow(max(self.end - time.monotonic(), seconds))  # reading ends by itself; what hangs is late
        self._trials[name] = trial
        self.measured.built[name] = trial.seconds
        found: dict[Sizes, list[list[Tensor]]] = {}

        def answer(bucket: Bucket) -> None:
            shapes = network.shapes(bucket.sizes)
            found.setdefault(bucket.sizes, []).append(_tensors(trial.outputs(bucket.batch, shapes)))

        def check(bucket: Bucket) -> None:
            if bucket.batch > _LARGEST_CHECK:
                read(bucket)
                return
            answer(bucket)
            if reason := expected.wrong(candidate, found[bucket.sizes], bucket.sizes):
                raise TrialError(reason)

        def read(bucket: Bucket) -> float:
            return trial.time(bucket.batch, network.shapes(bucket.sizes))

        answer(Bucket(_ODD_CHECK, network.sizes[0]))
        for sizes in network.checked[len(network.sizes) :]:
            check(Bucket(_ODD_CHECK, sizes))
        self._read(name, check, read, until)
        trial.allow(_TURNS_SECONDS)
        self._calls[name] = partial(self._turn, name)

    def _read(
        self, name: str, prepare: Callable[[Bucket], object], call: Callable[[Bucket], float], until: float
    ) -> None:
        """Read a candidate at the buckets for which it may be chosen.

        Args:
            name: its name.
            prepare: what is called once before a bucket is read.
            call: returns the seconds of a call.
            until: the time of the monotonic clock from which on larger batches are worked out, not read.
        """
        lost, read = set[Sizes](), dict[Sizes, Bucket]()
        for bucket in self._buckets:
            if bucket.sizes in lost:
                continue
            quick, smaller = self._quick[bucket], read.get(bucket.sizes)
            if smaller and time.monotonic() > until and not self._everywhere:
                quick[name] = self._quick[smaller][name] * bucket.batch / smaller.batch
                continue
            read[bucket.sizes] = bucket
            prepare(bucket)
            once = call(bucket)
            best = min(quick.values(), default=once)
            behind = once > _CLEAR * best
            enough = behind or (once > _LONG_SECONDS and self._network.clock is time.process_time)
            quick[name] = once if enough else min(once, call(bucket))
            if behind and best > _WORK_SECONDS and not self._everywhere:
                lost.add(bucket.sizes)

    def _turn(self, name: str, bucket: Bucket) -> float:
        try:
            return self._trials[name].time(bucket.batch, self._network.shapes(bucket.sizes))
        except TrialError as error:
            raise _Failed(name, str(error)) from error

    def _retire(self) -> None:
        """End the processes of those that will not take turns at any bucket."""
        for name in list(self._trials):
            if all(quick.get(name, math.inf) > _NEAR * min(quick.values()) for quick in self._quick.values()):
                self._trials.pop(name).close()

    def _leave_out(self, name: str, reason: str) -> None:
        self.measured.left_out[name] = reason
        self.measured.built.pop(name, None)
        for bucket in self._buckets:
            self._quick[bucket].pop(name, None)
            self.measured.times[bucket].pop(name, None)
        if name in self._trials:
            self._trials.pop(name).close()

    def _finished(self, bucket: Bucket, seconds: float) -> dict[str, Timing]:
        quick, first = self._quick[bucket], self._first
        if not quick:  # all that ran at this bucket failed later
            quick[first] = self._calls[first](bucket)
        incumbent, best = quick.get(first, math.inf), min(quick.values())
        far = _UNSURE / _CLEAR  # of an incumbent that was not read here: it was so much behind at a smaller batch
        known = math.isfinite(incumbent)
        found = {n: Timing(s, self._unsure(n) * s / incumbent if known else far) for n, s in quick.items()}
        names = [name for name, once in quick.items() if name != first and once <= _NEAR * best]
        clear = incumbent > _CLEAR * best
        names = names if clear else [first, *names]
        spent = 2 * (_TURNS if clear else FEWEST_ROUNDS) * sum(max(quick[name], READING_S) for name in names)
        if len(names) < 2 or spent > seconds:
            return found
        calls = [partial(self._calls[name], bucket) for name in names]
        if not clear:
            return found | timings(names, in_turns(calls, time.perf_counter() + seconds))
        turns = min(max(_TURNS, int(_TURNS * _TURNS_WORTH / spent)), _MOST_TURNS)
        columns = zip(*itertools.islice(rounds(calls), turns), strict=True)
        medians = {name: statistics.median(column) for name, column in zip(names, columns, strict=True)}
        return found | {name: Timing(median, found[name].high) for name, median in medians.items()}

    def _unsure(self, name: str) -> float:
        same = Candidate.parse(name).precision == Candidate.parse(self._first).precision
        return _LITTLE_UNSURE if same and self._network.clock is time.process_time else _UNSURE


class _Failed(Exception):
    """A candidate that failed while it was timed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


def _tensors(arrays: Arrays) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def one_line(error: BaseException) -> str:
    """Return an exception in a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
