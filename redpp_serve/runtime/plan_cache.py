"""Times of kernels kept between runs: one JSON file that workers share, and a table that comes with the package.

The first worker of a machine measures while it holds the file's lock; those that start beside it wait and read. A file
that cannot be read counts as empty, one that cannot be written keeps its times in memory: a cache never stops a worker.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from redpp_serve import kernels
from redpp_serve.files import write_atomically
from redpp_serve.runtime.device import device_name
from redpp_serve.runtime.plan import Timing

try:
    import fcntl
except ImportError:  # where there are no such locks, workers may measure side by side
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

VARIABLE = "REDPP_PLAN_CACHE"
FORMAT = 1
SHIPPED = Path(__file__).with_name("plans.json")
MOST_BYTES = 64 << 20  # a larger file is none of ours
_POLL_S = 0.05

Entries = dict[str, dict[str, dict[str, Timing]]]  # device and versions -> layer's signature -> kernel -> times


def default_path() -> Path | None:
    """``$REDPP_PLAN_CACHE``, else ``redpp-serve/plans.json`` in the user's cache folder; None without a home."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "redpp-serve" / "plans.json"
    try:
        return Path.home() / ".cache" / "redpp-serve" / "plans.json"
    except RuntimeError:  # no home folder
        return None


class PlanCache:
    """Times by device and layer.

    Args:
        path: the JSON file; None, or what is there and no file, keeps times in memory only.
        shipped: the table that comes with the package; what the file has goes first.
    """

    def __init__(self, path: Path | None, shipped: Path | None = SHIPPED) -> None:
        self.path = _file(path) if path else None
        self._shipped = _read(shipped) if shipped else {}
        self._entries: Entries = {}
        self._reload()

    def find(self, device_key: str, signature: str) -> tuple[dict[str, Timing], str] | None:
        """Times of a layer's kernels and where they come from (``cached`` or ``shipped``); None where there are none."""
        for entries, source in ((self._entries, "cached"), (self._shipped, "shipped")):
            if found := entries.get(device_key, {}).get(signature):
                return dict(found), source
        return None

    def add(self, device_key: str, measured: Mapping[str, Mapping[str, Timing]]) -> None:
        """Keep times by signature, in the file too where it can be written; what others wrote meanwhile stays."""
        self._reload()
        self._entries = _merged(self._entries, {device_key: {s: dict(t) for s, t in measured.items()}})
        if self.path and measured:
            try:
                _write(self.path, self._entries)
            except OSError as error:
                log.warning("times of kernels are not kept: %s", error)

    @contextlib.contextmanager
    def locked(self, wait_s: float) -> Iterator[None]:
        """Hold the file's lock, after at most ``wait_s`` seconds without it too; then read what others wrote."""
        with contextlib.ExitStack() as stack:
            if self.path and fcntl:
                with contextlib.suppress(OSError):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    place = self.path.with_name(f"{self.path.name}.lock")
                    handle = stack.enter_context(open(place, "a", opener=_open_at_once))
                    _lock(handle, wait_s)
            self._reload()
            yield

    def _reload(self) -> None:
        if self.path:
            self._entries = _merged(self._entries, _read(self.path))


def device_key(device: torch.device, precision: str) -> str:
    """All that a time depends on beside the layer: device, releases of torch, triton and these kernels, precision."""
    parts = [device_name(device), f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts.append(f"triton {_installed('triton')}")
    else:
        parts.append(f"{torch.get_num_threads()} threads")
    return ", ".join([*parts, f"kernels {_sources()}", precision])


def merge(path: Path, measured: Mapping[str, Mapping[str, Mapping[str, Timing]]]) -> int:
    """Add measured times, by device key and signature, to a table such as the one that is shipped; how many layers it
    then holds.
    """
    entries = _merged(_read(path), {key: {s: dict(t) for s, t in layers.items()} for key, layers in measured.items()})
    _write(path, entries)
    return sum(map(len, entries.values()))


def _file(path: Path) -> Path | None:
    """Where links lead, so that they stay; None for a folder or a device: reading one may never end, and a file must not
    take its place.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        log.warning("times of kernels are not kept: %s is no file", path)
        return None
    return Path(os.path.realpath(path))


def _open_at_once(path: str, flags: int) -> int:
    """OSError where a pipe has the lock's name: opening one waits for a reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _lock(handle: Any, wait_s: float) -> None:
    """OSError where the file system has no locks."""
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                log.warning("another worker has been timing kernels for %.0f s; going on without it", wait_s)
                return
            time.sleep(_POLL_S)


def _read(path: Path) -> Entries:
    """A file's entries; none, and a line in the log, where it is damaged."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            return {}
        return {
            str(key): {str(s): {str(k): _timing(v) for k, v in times.items()} for s, times in layers.items()}
            for key, layers in document["entries"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        log.warning("the times of kernels in %s cannot be read (%s); they will be taken again", path, error)
        return {}


def _timing(value: Any) -> Timing:
    """Null stands for a kernel that failed."""
    if value is None:
        return Timing(math.inf, math.inf)
    seconds, high = map(float, value)
    if not (0 < seconds < math.inf and 0 < high < math.inf):
        raise ValueError(f"a time of {seconds} s, at most {high} of the dense kernel's")
    return Timing(seconds, high)


def _write(path: Path, entries: Entries) -> None:
    plain = {
        key: {
            s: {k: [t.seconds, t.high] if math.isfinite(t.seconds) else None for k, t in times.items()}
            for s, times in layers.items()
        }
        for key, layers in entries.items()
    }
    text = json.dumps({"format": FORMAT, "entries": plain}, sort_keys=True, indent=1)
    write_atomically(path, f"{text}\n".encode())


def _merged(old: Entries, new: Entries) -> Entries:
    keys = {*old, *new}
    return {key: {**old.get(key, {}), **new.get(key, {})} for key in keys}


@cache
def _sources() -> str:
    """Eight digits that differ between releases of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
