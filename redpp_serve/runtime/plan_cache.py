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
from redpp_serve.files import cache_folder, locked, write_atomically
from redpp_serve.runtime.device import device_name
from redpp_serve.runtime.plan import Timing

log = logging.getLogger(__name__)

VARIABLE = "REDPP_PLAN_CACHE"
FORMAT = 1
SHIPPED = Path(__file__).with_name("plans.json")
MOST_BYTES = 64 << 20  # a larger file was not written by this project

Entries = dict[str, dict[str, dict[str, Timing]]]  # device and versions -> layer's signature -> kernel -> times


def default_path() -> Path | None:
    """Return ``$REDPP_PLAN_CACHE``, else ``plans.json`` in the user's cache folder; None for a user without a home."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    folder = cache_folder()
    return folder / "plans.json" if folder else None


class PlanCache:
    """Times by device and layer.

    Args:
        path: the JSON file; with None, or something else than a file in its place, times are kept in memory only.
        shipped: the table that comes with the package; the file has precedence.
    """

    def __init__(self, path: Path | None, shipped: Path | None = SHIPPED) -> None:
        self.path = _resolve(path) if path else None
        self._shipped = _read(shipped) if shipped else {}
        self._entries: Entries = {}
        self._reload()

    def find(self, device_key: str, signature: str) -> tuple[dict[str, Timing], str] | None:
        """Return the times of a layer's kernels and their source (``cached`` or ``shipped``); None if unknown."""
        for entries, source in ((self._entries, "cached"), (self._shipped, "shipped")):
            if found := entries.get(device_key, {}).get(signature):
                return dict(found), source
        return None

    def add(self, device_key: str, measured: Mapping[str, Mapping[str, Timing]]) -> None:
        """Keep times by signature, also in the file if it can be written, with what others wrote in the meantime."""
        self._reload()
        self._entries = _merged(self._entries, {device_key: measured})
        if self.path and measured:
            try:
                _write(self.path, self._entries)
            except OSError as error:
                log.warning("times of kernels are not kept: %s", error)

    @contextlib.contextmanager
    def locked(self, wait_s: float) -> Iterator[None]:
        """Hold the file's lock and read what others wrote; go on without the lock after ``wait_s`` seconds."""
        with contextlib.ExitStack() as stack:
            if self.path:
                start = time.monotonic()
                with contextlib.suppress(OSError):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(locked(self.path.with_name(f"{self.path.name}.lock"), wait_s))
                if not held and time.monotonic() - start >= wait_s:
                    log.warning("another worker has been timing kernels for %.0f s; going on without it", wait_s)
            self._reload()
            yield

    def _reload(self) -> None:
        if self.path:
            self._entries = _merged(self._entries, _read(self.path))


def device_key(device: torch.device, precision: str) -> str:
    """Name everything that a time depends on beside the layer: device, versions of the software, precision."""
    parts = [device_name(device), f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts.append(f"triton {_installed('triton')}")
    else:
        parts.append(f"{torch.get_num_threads()} threads")
    return ", ".join([*parts, f"kernels {_sources()}", precision])


def merge(path: Path, measured: Mapping[str, Mapping[str, Mapping[str, Timing]]]) -> int:
    """Add measured times, by device key and signature, to a table; return the number of layers that it then holds."""
    entries = _merged(_read(path), measured)
    _write(path, entries)
    return sum(map(len, entries.values()))


def _resolve(path: Path) -> Path | None:
    """Resolve links, so that they stay; return None, with a line in the log, for a path that is no regular file.

    Reading a device may never end, and a file must not take its place.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        log.warning("times of kernels are not kept: %s is no file", path)
        return None
    return Path(os.path.realpath(path))


def _read(path: Path) -> Entries:
    """Read a file's entries; return none, with a line in the log, if it is damaged."""
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
    if value is None:  # a kernel that failed
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
    write_atomically(path, json.dumps({"format": FORMAT, "entries": plain}, sort_keys=True, indent=1) + "\n")


def _merged(old: Entries, new: Mapping[str, Mapping[str, Mapping[str, Timing]]]) -> Entries:
    added = {key: {s: dict(times) for s, times in layers.items()} for key, layers in new.items()}
    return {key: {**old.get(key, {}), **added.get(key, {})} for key in {*old, *added}}


@cache
def _sources() -> str:
    """Return eight digits that differ between releases of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
