"""Load from many machines: what Locust's workers write down, and the figures that follow from it.

All users of all workers ask the same version at a time: the clock divides time into blocks, original, pruned, pruned,
original, and so on, so that each version is measured alone under the whole load, as `load.run_blocks` does it from one
machine. In both blocks of a pair a user sends the same inputs. Nobody begins a request near a block's ends: the
machines' clocks may differ by that much, as NTP keeps them.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from redpp_serve import __version__
from redpp_serve.comparison.client import Decoder, Endpoint, Exchange, Payload, Reply
from redpp_serve.comparison.compare import Comparison, Conditions, Measured, answered, conclude
from redpp_serve.comparison.figures import measurable
from redpp_serve.comparison.load import (
    FEWEST_BLOCKS,
    THERE_AND_BACK,
    BlockThroughput,
    Load,
    Throughput,
    block_throughput,
)
from redpp_serve.comparison.outputs import heads_of
from redpp_serve.comparison.payloads import payloads_of
from redpp_serve.errors import RedppError
from redpp_serve.options import SERVERS, ComparisonOptions
from redpp_serve.planning import served_as
from redpp_serve.report.folder import read_report
from redpp_serve.requirements import require_measured
from redpp_serve.variants import NAMES

FORMAT = 1
NOT_MEASURED = (
    "not measured with Locust: latency at a rate (--rate), and what engine, precision and pruning gain without a "
    "server; "
    "times are valid as far as the clocks of the machines agree within a tenth of a block"
)
GUARD = 0.1  # share of a block, at each of its ends, in which no request begins
SUFFIX = ".jsonl"
SHORTEST_BLOCK_S, LONGEST_BLOCK_S = 0.01, 86_400.0
_LATEST = 1e11  # seconds since 1970


class Turn(NamedTuple):
    """A block of time: its number, the arm that it belongs to, and when requests may begin, seconds since 1970."""

    block: int
    arm: int
    opens: float
    closes: float


def turn_at(now: float, block_s: float) -> Turn:
    """Return the block at a time, or the next one where no request may begin in this one any more."""
    block = math.floor(now / block_s)
    if now >= (block + 1 - GUARD) * block_s:
        block += 1
    return Turn(block, THERE_AND_BACK[block % 4], (block + GUARD) * block_s, (block + 1 - GUARD) * block_s)


def order_of(user: str, block: int, count: int) -> Iterator[int]:
    """Yield which inputs a user sends in a block, the same ones in both blocks of a pair."""
    seed = int.from_bytes(sha256(f"{user}/{block // 2}".encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(count).tolist()


def digest_of(payloads: Sequence[Payload]) -> str:
    """Return what tells these requests from others."""
    whole = sha256()
    for payload in payloads:
        whole.update(sha256(payload.body).digest() + payload.content_type.encode())
    return whole.hexdigest()


@dataclass(frozen=True)
class Header:
    """The first line of a worker's file.

    Attributes:
        requests: the `digest_of` what is sent.
        block_s: length of a block, seconds.
        urls: of the original and of the pruned version.
        server: ``torchserve`` or ``triton``.
        format: of the file.
    """

    requests: str
    block_s: float
    urls: tuple[str, str]
    server: str
    format: int = FORMAT


@dataclass(frozen=True)
class Sent:
    """One request and its reply, a line of a worker's file.

    Attributes:
        block: the number of the block that it began in.
        arm: 0 for the original, 1 for the pruned version.
        user: who sent it.
        turn: counts the user's requests in the block.
        payload: index of the input.
        start: when it was sent, seconds since 1970.
        seconds: until the last byte of the reply.
        handler: time in the handler, seconds; None where the server does not say.
        status: HTTP status; 0 where no reply came.
        error: why none came.
        body: the reply's, Base64; None where it is that of the last reply to this input by this arm.
    """

    block: int
    arm: int
    user: str
    turn: int
    payload: int
    start: float
    seconds: float
    handler: float | None
    status: int
    error: str = ""
    body: str | None = None


class Notebook:
    """Writes a worker's file.

    Args:
        file: where to.
        header: its first line.
    """

    def __init__(self, file: IO[str], header: Header) -> None:
        self._file = file
        self._last: dict[tuple[int, int], bytes] = {}
        self._write(asdict(header))

    def add(self, sent: Sent, body: bytes) -> None:
        """Write down a request with the body of its reply."""
        key = sent.arm, sent.payload
        known = self._last.get(key) == body
        if not known:
            self._last[key] = body
        self._write({**asdict(sent), "body": None if known else base64.b64encode(body).decode()})

    def _write(self, document: dict[str, Any]) -> None:
        self._file.write(json.dumps(document, separators=(",", ":")) + "\n")


@dataclass
class Recorded:
    """What all workers have written down.

    Attributes:
        header: common to all of them.
        sent: arm and block -> its requests.
        replies: reply by arm, block, user and turn.
    """

    header: Header
    sent: dict[tuple[int, int], list[Sent]] = field(default_factory=dict)
    replies: dict[tuple[int, int, str, int], Reply] = field(default_factory=dict)

    def pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of neighbouring blocks, original first, in which all users took part from end to end."""
        users = {block: {one.user for one in some} for (_, block), some in self.sent.items()}
        if not users:
            return []
        full = Counter(map(len, users.values())).most_common(1)[0][0]
        inner = sorted(users)[1:-1]  # the first and the last are cut by the run's own beginning and end
        firsts = [b for b in inner if b % 2 == 0 and b + 1 in inner and len(users[b]) == len(users[b + 1]) == full]
        return [(b, b + 1) if THERE_AND_BACK[b % 4] == 0 else (b + 1, b) for b in firsts]

    @property
    def users(self) -> int:
        """How many users asked at a time."""
        return max((len({one.user for one in some}) for some in self.sent.values()), default=0)


def read_recorded(places: Iterable[Path], payloads: Sequence[Payload]) -> Recorded:
    """Read the files of all workers.

    Args:
        places: files, or folders of them.
        payloads: what was sent.

    Raises:
        RedppError: there is none, one is damaged or belongs to another load, or too little was measured.
    """
    files = [path for place in places for path in (sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else [place])]
    found: Recorded | None = None
    requests = digest_of(payloads)
    for path in files:
        header, lines = _split(path)
        if header.requests != requests:
            raise RedppError(
                f"{path} was recorded with other inputs",
                "the inputs of this package, or of --inputs",
                "give the --inputs and --seed that Locust was given, or record again",
            )
        if found and found.header != header:
            raise RedppError(
                f"{path} and {files[0]} are of different runs",
                "files of the workers of one run",
                "leave out those of others",
            )
        found = found or Recorded(header)
        _add(found, path, _read(path, lines, header.block_s), len(payloads))
    if found is None:
        raise RedppError(
            f"no file ending in {SUFFIX} in {', '.join(map(str, places))}",
            "what the workers of deploy/load/locustfile.py have recorded",
            "give their files, or a folder of them",
        )
    if len(found.pairs()) < FEWEST_BLOCKS // 2:
        raise RedppError(
            f"{len(found.pairs())} pairs of blocks in which all users took part",
            f"at least {FEWEST_BLOCKS // 2}",
            f"record for longer than {4 * FEWEST_BLOCKS * found.header.block_s:g} s, or with a shorter --block",
        )
    return found


_DAMAGES = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _split(path: Path) -> tuple[Header, list[str]]:
    """Return a file's header and its other lines."""
    try:
        with path.open(encoding="utf-8") as file:
            return _header(json.loads(next(file, ""))), list(file)
    except _DAMAGES as error:
        raise _damaged(path, 1, error) from error


def _read(path: Path, lines: Sequence[str], block_s: float) -> list[Sent]:
    sent: list[Sent] = []
    for place, line in enumerate(lines, 2):
        if line.endswith("\n"):  # else its worker was killed in the middle of it
            try:
                sent.append(_checked(Sent(**json.loads(line)), block_s))
            except _DAMAGES as error:
                raise _damaged(path, place, error) from error
    return sent


def _damaged(path: Path, place: int, error: Exception) -> RedppError:
    return RedppError(
        f"{path}, line {place}: {' '.join(str(error).split())[:200]}",
        "a file that a worker of deploy/load/locustfile.py has recorded",
        "give such files, or leave this one out",
    )


def _header(first: dict[str, Any]) -> Header:
    if first.get("format") != FORMAT:
        raise ValueError(f"format {first.get('format')!r}, expected {FORMAT}")
    header = Header(**{**first, "urls": tuple(first["urls"])})
    if not _is_number(header.block_s) or not SHORTEST_BLOCK_S <= header.block_s <= LONGEST_BLOCK_S:
        raise ValueError(f"blocks of {header.block_s!r} s, expected {SHORTEST_BLOCK_S} to {LONGEST_BLOCK_S}")
    if len(header.urls) != len(NAMES) or not all(isinstance(x, str) for x in (*header.urls, header.requests)):
        raise ValueError("a header without the two URLs")
    if header.server not in SERVERS:
        raise ValueError(f"server {header.server!r}, expected one of {', '.join(SERVERS)}")
    return header


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _checked(one: Sent, block_s: float) -> Sent:
    numbers = (one.block, one.arm, one.turn, one.payload, one.status)
    times = (one.start, one.seconds, one.handler if one.handler is not None else 0.0)
    if not all(type(x) is int and x >= 0 for x in numbers) or one.arm > 1:
        raise ValueError("numbers that no request has")
    if not isinstance(one.user, str) or not isinstance(one.error, str):
        raise ValueError("a user or an error that is no text")
    if not all(_is_number(x) and 0 <= x < _LATEST for x in times):
        raise ValueError("times that no request has")
    if one.block > _LATEST / block_s or not 0 <= one.start - one.block * block_s <= block_s:
        raise ValueError("a request that did not begin in its block")
    if one.arm != THERE_AND_BACK[one.block % 4]:
        raise ValueError("a request to the version that was not asked in its block")
    if one.body is not None:
        base64.b64decode(one.body, validate=True)
    return one


def _add(found: Recorded, path: Path, sent: Sequence[Sent], count: int) -> None:
    bodies: dict[tuple[int, int], bytes] = {}
    decoder = Decoder(0.0)
    for one in sent:
        key, asked = (one.arm, one.payload), (one.arm, one.block, one.user, one.turn)
        if one.payload >= count or (one.body is None and key not in bodies):
            raise RedppError(
                f"{path} holds a reply to input {one.payload + 1} without its body or of {count} inputs",
                "a whole file of one worker",
                "record again",
            )
        if asked in found.replies:
            raise RedppError(
                f"{path} holds request {one.turn + 1} of user {one.user!r} in block {one.block}, which was read before",
                "each worker's file once",
                "leave out copies of files",
            )
        if one.body is not None:
            bodies[key] = base64.b64decode(one.body)
        exchange = Exchange(one.start, one.seconds, one.handler, one.status, bodies[key], one.error)
        found.sent.setdefault((one.arm, one.block), []).append(one)
        found.replies[asked] = decoder.reply(NAMES[one.arm], one.payload, exchange)


def paired(found: Recorded) -> list[list[tuple[Reply, Reply]]]:
    """Return for each pair of blocks, in order of time, the replies of both versions to what both were sent."""
    return [
        [
            (reply, found.replies[1, pruned, one.user, one.turn])
            for one in sorted(found.sent[0, original], key=lambda one: one.start)
            if (1, pruned, one.user, one.turn) in found.replies
            for reply in [found.replies[0, original, one.user, one.turn]]
        ]
        for original, pruned in found.pairs()
    ]


def throughput_of(found: Recorded, rng: np.random.Generator) -> BlockThroughput:
    """Return the closed-loop throughput of both versions, each under the whole load, with their ratio by block."""
    counts: tuple[list[Throughput], list[Throughput]] = ([], [])
    for blocks in found.pairs():
        for arm, block in enumerate(blocks):
            counts[arm].append(_count(found, arm, block))
    return block_throughput(counts, rng)


def _count(found: Recorded, arm: int, block: int) -> Throughput:
    sent = found.sent[arm, block]
    replies = [found.replies[arm, block, one.user, one.turn] for one in sent]
    good = [reply for reply in replies if reply.ok]
    opens = (block + GUARD) * found.header.block_s
    last = max(one.start + one.seconds for one in sent)
    error = next((reply.error for reply in replies if not reply.ok), "")
    return Throughput(len(good), len(replies) - len(good), max(last - opens, 1e-9), error)


def compare_recorded(
    folder: Path, places: Sequence[Path], options: ComparisonOptions, *, wanted: Sequence[str] = ()
) -> Comparison:
    """Return the comparison that workers of Locust have recorded.

    Args:
        folder: the package.
        places: the workers' files, or folders of them.
        options: the inputs that were sent, seed and margin; nothing else of them is read.
        wanted: figures that are required, by name.

    Raises:
        RedppError: see `read_recorded`; or a figure that is wanted was not measured.
    """
    payloads, heads = payloads_of(folder, options.inputs, options.seed), heads_of(read_report(folder))
    require_measured(wanted, measurable(options, payloads, heads), "require another figure, or compare without Locust")
    found = read_recorded(places, payloads)
    original, pruned = (Endpoint(name, url, {}) for name, url in zip(NAMES, found.header.urls, strict=True))
    load = Load(original, pruned, payloads, max(found.users, 1), options.seed)
    by_block = [pairs for pairs in paired(found) if pairs]
    pairs = [pair for some in by_block for pair in some]
    if not pairs:
        raise RedppError("no input was sent to both versions", "at least one", "record with a longer --block")
    together = math.ceil(len(pairs) / len(by_block))
    throughput = throughput_of(found, np.random.default_rng([options.seed, 3]))
    result = conclude(load, Measured(pairs, answered(load, pairs), throughput, None, together), options, heads)
    # Throughput and latency are of the same requests here: none is counted twice.
    arms = [
        replace(arm, requests=count.completed + count.failed, errors=count.failed)
        for arm, count in ((result.original, throughput.original), (result.pruned, throughput.pruned))
    ]
    seconds = round(2 * len(found.pairs()) * found.header.block_s * (1 - 2 * GUARD), 3)
    conditions = _conditions(folder, found, options, seconds)
    return replace(
        result, original=arms[0], pruned=arms[1], concurrency=load.concurrency, seconds=seconds, conditions=conditions
    )


def _conditions(folder: Path, found: Recorded, options: ComparisonOptions, seconds: float) -> Conditions:
    begun = datetime.fromtimestamp(min(one.start for some in found.sent.values() for one in some), timezone.utc)
    settings = {
        "concurrency": found.users,
        "seconds": seconds,
        "margin": options.margin,
        "seed": options.seed,
        "inputs": options.inputs.name if options.inputs else "the package's",
        "load": f"Locust, blocks of {found.header.block_s:g} s",
        **served_as(folder),
    }
    time, versions = begun.strftime("%Y-%m-%d %H:%M:%S"), {"redpp-serve": __version__}
    return Conditions(time, found.header.server, "not known to Locust", versions, settings)


def file_of(folder: Path, host: str) -> Path:
    """Return a new worker's file in a folder."""
    return folder / f"{''.join(c if c.isalnum() or c in '.-' else '-' for c in host)}-{os.getpid()}{SUFFIX}"
