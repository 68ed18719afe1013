"""What a user can ask of the pruning; values are checked when the object is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from redpp_serve.errors import RedppError
from redpp_serve.pruning.hashing import METHODS, Target

MERGES = ("reconstruct", "exact")
DEFAULT_MAX_ERROR = 0.1
DEFAULT_DISTIL = 60.0
NO_HASH = "none"  # leave the weights as they are
_WIDTHS = ("keep", "target_macs", "target_latency")  # at most one of them


@dataclass(frozen=True)
class Options:
    """Options of one pruning run; the command line's flags have the same names.

    ``hash_error`` is a relative RMS error of each layer's weights, ``hash_values`` a number of values a layer (one
    of them); without them the final codebooks are as small as the error budget allows. What is pruned follows from one
    of: ``keep``, the share of every class's channels that stays; ``target_macs`` or ``target_latency``, the share of
    the network's multiply-accumulates or of its measured latency that stays; ``max_error``, the relative output error
    on held-out synthetic inputs. ``min_agreement`` (top-1, 0..1, same inputs) and ``max_accuracy_drop`` (points, needs
    data) only gate. ``distil``, the budget of distillation, and ``time_budget``, that of everything else, in seconds.
    """

    hash: str = "kde"
    hash_error: float | None = None
    hash_values: int | None = None
    merge: str = "reconstruct"
    keep: float | None = None
    target_macs: float | None = None
    target_latency: float | None = None
    max_error: float | None = None
    min_agreement: float | None = None
    max_accuracy_drop: float | None = None
    round_to: int = 8
    exclude: tuple[str, ...] = ()
    seed: int = 0
    time_budget: float = 600.0
    distil: float = DEFAULT_DISTIL
    device: str = "cpu"

    def __post_init__(self) -> None:
        _one_of("hash", self.hash, (*METHODS, NO_HASH))
        _one_of("merge", self.merge, MERGES)
        for name, low, high in (
            ("hash_error", 1e-4, 1.0),
            ("max_error", 0.0, 10.0),
            ("min_agreement", 0.0, 1.0),
            ("max_accuracy_drop", 0.0, 100.0),
            ("distil", 0.0, 1e6),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise _bad(name, value, f"a number from {low:g} to {high:g}")
        for name in _WIDTHS:
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise _bad(name, value, "a number above 0 and at most 1")
        for name, low in (("hash_values", 2), ("round_to", 1), ("time_budget", 1)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise _bad(name, value, f"a number of at least {low}")
        if self.hash_error is not None and self.hash_values is not None:
            raise _bad("hash_values", self.hash_values, "either --hash-error or --hash-values")
        chosen = [name for name in _WIDTHS if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise _bad(chosen[1], getattr(self, chosen[1]), f"not together with {_flag(chosen[0])}")
        if self.merge == "exact" and chosen:
            raise _bad(
                chosen[0], getattr(self, chosen[0]), "no ratio with --merge exact, which keeps what is not a duplicate"
            )

    @property
    def hash_target(self) -> Target:
        if self.hash_values is not None:
            return Target(values=self.hash_values)
        return Target(error=0.02 if self.hash_error is None else self.hash_error)

    @property
    def error_budget(self) -> float | None:
        """The held-out error that decides the widths; None where a ratio does, or nothing lossy is merged."""
        if self.merge == "exact" or any(getattr(self, name) is not None for name in _WIDTHS):
            return None
        return DEFAULT_MAX_ERROR if self.max_error is None else self.max_error

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "exclude": list(self.exclude)}


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _bad(name, value, " or ".join(choices))


def _flag(name: str) -> str:
    return f"--target {name.removeprefix('target_')}" if name.startswith("target_") else "--" + name.replace("_", "-")


def _bad(name: str, value: object, expected: str) -> RedppError:
    flag = _flag(name)
    found = f"{flag}={value}" if name.startswith("target_") else f"{flag} is {value}"
    return RedppError(found, expected, f"change or leave out {flag}")
