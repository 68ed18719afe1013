"""How users' requests are divided between the arms, as the user writes it: ``90:10``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from redpp_serve.errors import RedppError

ARMS = ("original", "redpp")  # the words of header, log and metrics, the baseline first
_PERCENT = r"\d{1,3}(?:\.\d{1,2})?"
_FORM = re.compile(rf"({_PERCENT})[:/]({_PERCENT})")


@dataclass(frozen=True)
class Split:
    """Percentages of users for each arm; they add up to 100. ``str()`` gives the form that `parse_split` reads."""

    original: Decimal
    redpp: Decimal

    def __str__(self) -> str:
        return f"{self.original}:{self.redpp}"

    def ratio(self, arm: str) -> float:
        """The share of ``arm``, 0 to 1."""
        return float(getattr(self, arm)) / 100


def parse_split(text: str) -> Split:
    """``original:redpp`` in per cent, up to two decimals, with ``:`` or ``/`` between.

    Raises:
        RedppError: another form, or numbers that do not add up to 100.
    """
    match = _FORM.fullmatch(text.strip())
    if not match:
        raise RedppError(f"--split {text!r}",
                         "per cent for the original and for the pruned version, up to two decimals",
                         "write for example --split 90:10")  # fmt: skip
    original, redpp = map(Decimal, match.groups())
    if original + redpp != 100:
        raise RedppError(f"--split {text} adds up to {original + redpp}", "two numbers that add up to 100",
                         f"write for example --split {max(0, 100 - min(redpp, 100))}:{min(redpp, 100)}")  # fmt: skip
    return Split(original, redpp)
