"""Adds up second moments of what a network reads while it serves, on a thread of its own and for few of the requests.

The request path hands over references and goes on. The thread runs the stored network once more on the CPU, with one
torch thread and for at most a quarter of the time, one input at a time, and gives way to requests; what it does not get
to is not observed.
"""

from __future__ import annotations

import atexit
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import Graph
from redpp_serve.runtime.moments import Adder, Sums
from redpp_serve.runtime.moments_file import LEAST, add_to_file

log = logging.getLogger(__name__)

_WAITING = 2  # inputs that wait for the thread
_SHARE = 0.25  # of the time that the thread may work
_PATIENCE_S = 0.1  # how long a step waits for a request to end
_IDLE_S, _WRITE_S = 1.0, 10.0  # sums are written when no input came for so long, or when the last were so long ago
_WRITE_SHARE = 0.05  # of the time that writing may take
_CLOSE_S = 3.0


class Observer:
    """Observes one input in ``every`` on average, chosen at random, and adds the sums to a file now and then.

    Memory: the stored weights, sums of at most `moments.MOST_BYTES` (one more tensor of them while they are written),
    the values that layers read for one input, and references to at most three batches.

    Args:
        graph: the original network as it is stored, on the CPU.
        every: how many inputs there are for each that is observed, at least 1.
        path: the file; several processes may add to it.

    Attributes:
        busy: set by the request path while the network answers; the thread then waits a little between its steps.
        missed: chosen inputs that came while the thread was busy.
    """

    def __init__(self, graph: Graph, every: int, path: Path) -> None:
        self.busy, self.missed = False, 0
        self._every, self._path, self._random = every, path, random.Random()
        self._next = self._gap() - 1  # rows before the next chosen one
        self._queue: queue.Queue[tuple[Tensor, ...] | None] = queue.Queue(_WAITING)
        self._ended = False
        started = threading.Event()
        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, args=(graph, started), name="redpp-observer", daemon=True)
        self._thread.start()
        started.wait()
        # The thread's number of torch threads is its own, but also what threads made later begin with.
        torch.set_num_threads(threads)
        atexit.register(self.close)
        log.warning(  # what servers show of a worker's log
            "observing: of one input in %d, second moments of what each layer reads are added up and written to %s, "
            "%d or more inputs at a time; no input and no output is kept",
            every,
            path,
            LEAST,
        )

    def offer(self, inputs: Sequence[Tensor]) -> None:
        """Hand over a batch that was answered; never waits.

        Args:
            inputs: (N, ...) for each of the network's inputs, on the CPU. Nobody may write to them any more.
        """
        rows = len(inputs[0])
        while self._next < rows:
            self._hand_over(tuple(x[self._next : self._next + 1] for x in inputs))
            self._next += self._gap()
        self._next -= rows

    def close(self) -> None:
        """Write what may be written, and end the thread; the last fewer than `LEAST` inputs are forgotten."""
        atexit.unregister(self.close)
        self._ended = True
        with suppress(queue.Full):  # the thread looks at `_ended` before each input
            self._queue.put_nowait(None)
        self._thread.join(_CLOSE_S)

    def _hand_over(self, item: tuple[Tensor, ...]) -> None:
        if self._ended:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.missed += 1

    def _gap(self) -> int:
        """Draw the distance to the next chosen input: geometric, so that no rhythm of the requests matters."""
        if self._every == 1:
            return 1
        return 1 + int(math.log(1.0 - self._random.random()) / math.log1p(-1.0 / self._every))

    def _work(self, graph: Graph, started: threading.Event) -> None:
        torch.set_num_threads(1)
        started.set()
        try:
            self._observe(graph)
        except RedppError as error:
            log.warning("observing has ended: %s", error)
        except Exception:  # such as memory that ran out: requests must not suffer
            log.exception("observing has ended")
        finally:
            self._ended = True

    def _observe(self, graph: Graph) -> None:
        adder = Adder(graph)
        written, cost = -math.inf, 0.0
        while True:
            idle = False
            try:
                item = self._queue.get(timeout=_IDLE_S)
            except queue.Empty:
                item, idle = None, True
            begun = time.perf_counter()
            if item is not None and not self._ended:
                adder.add(item, self._give_way)
                del item
                self._rest((time.perf_counter() - begun) * (1 / _SHARE - 1))
            since = time.monotonic() - written
            due = (idle or since >= _WRITE_S) and since >= cost / _WRITE_SHARE
            if adder.sums.images >= LEAST and (due or self._ended):
                begun = time.monotonic()
                if self._written(adder.sums, graph):
                    adder.sums = Sums()
                written = time.monotonic()
                cost = written - begun
            if self._ended:
                return

    def _give_way(self) -> None:
        end = time.monotonic() + _PATIENCE_S
        while self.busy and not self._ended and time.monotonic() < end:
            time.sleep(0.002)

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._ended and time.monotonic() < end:
            time.sleep(min(0.1, max(0.0, end - time.monotonic())))

    def _written(self, sums: Sums, graph: Graph) -> bool:
        try:
            if add_to_file(self._path, sums, graph):
                return True
            log.warning("moments wait: the lock of %s cannot be had", self._path)
        except OSError as error:  # such as a full disk; the sums are kept and tried again
            log.warning("moments wait: %s cannot be written: %s", self._path, error)
        return False
