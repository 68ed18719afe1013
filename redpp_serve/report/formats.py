"""Numbers and untrusted text for people; what is unknown shows as an en dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

DASH = "–"


def printable(value: object) -> str:
    """One safe line: white space collapsed; control, direction and surrogate characters replaced.

    Layer and file names come from untrusted files; raw, they could move the cursor or break XML.
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(value).split()))


def shorten(value: object, limit: int) -> str:
    """`printable(value)` in at most `limit` characters: the middle goes first, both ends tell layers apart."""
    line = printable(value)
    if len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return f"{line[: limit - 1 - tail]}…{line[len(line) - tail :]}"


def dig(tree: Any, *keys: str) -> Any:
    """`tree[k0][k1]...`, or None where a key is missing or a level is not a mapping."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def number(value: Any) -> float | None:
    """A finite real number, else None (missing, NaN, infinite, text, bool)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if math.isfinite(value) else None


def _fixed(value: Any, template: str) -> str:
    found = number(value)
    return DASH if found is None else template.format(found)


def _scaled(value: float, suffixes: Sequence[str], digits: Callable[[float], int]) -> str:
    shown = f"{value:.{digits(value)}f}"
    if abs(float(shown)) < 1000 or len(suffixes) == 1:
        return f"{shown} {suffixes[0]}"
    return _scaled(value / 1000, suffixes[1:], digits)


def count(value: Any) -> str:
    """Three significant digits: 512, 1.09 M, 2.31 G."""
    found = number(value)
    if found is None or abs(found) < 1000:
        return _fixed(found, "{:.4g}")
    return _scaled(found / 1000, ("k", "M", "G", "T", "P"), lambda v: 2 if abs(v) < 10 else 1 if abs(v) < 100 else 0)


def exact(value: Any) -> str:
    """All digits, for numbers people compare one by one: 2048."""
    return _fixed(value, "{:.0f}")


def size(value: Any) -> str:
    """Bytes in decimal units: 512 B, 4.2 MB."""
    found = number(value)
    if found is None or abs(found) < 1000:
        return _fixed(found, "{:.0f} B")
    return _scaled(found / 1000, ("kB", "MB", "GB", "TB"), lambda v: 1)


def percent(value: Any) -> str:
    """A share as a percentage: 0.984 -> 98.40 %."""
    found = number(value)
    return DASH if found is None else f"{100 * found:.{2 if abs(found) < 10 else 0}f} %"


def error(value: Any) -> str:
    """A relative error: 2.10 %, or 3.1e-13 where a percentage would show only zeros."""
    found = number(value)
    if not found:
        return DASH if found is None else "0"
    return percent(found) if abs(found) >= 1e-3 else f"{found:.1e}"


def milliseconds(value: Any) -> str:
    found = number(value) or 0.0
    return _fixed(value, "{:.3f} ms" if found < 1 else "{:.2f} ms" if found < 10 else "{:.1f} ms")


def seconds(value: Any) -> str:
    return _fixed(value, "{:.2f} s" if (number(value) or 0.0) < 10 else "{:.1f} s")


def rate(value: Any) -> str:
    return _fixed(value, "{:.1f} /s" if (number(value) or 0.0) < 100 else "{:.0f} /s")


def bits(value: Any) -> str:
    return _fixed(value, "{:.2f}")


def times(value: Any) -> str:
    return _fixed(value, "{:.2f}x")


def shape(sides: Any) -> str:
    """[16, 8, 3, 3] -> 16x8x3x3."""
    return "x".join(exact(side) for side in sides) if isinstance(sides, Sequence) and sides else DASH


def of(part: Any, whole: Any) -> str:
    """`part/whole` in full; a dash when both are unknown."""
    return DASH if number(part) is None and number(whole) is None else f"{exact(part)}/{exact(whole)}"


def quotient(top: Any, bottom: Any) -> float | None:
    """`top / bottom`, or None where either is unknown or the bottom is zero."""
    above, below = number(top), number(bottom)
    return None if above is None or not below else above / below
