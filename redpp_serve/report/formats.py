"""Format numbers and untrusted text for people; the unknown shows as an en dash."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from redpp_serve.errors import printable

DASH = "–"


def shorten(value: object, limit: int) -> str:
    """Return ``printable(value)`` in at most ``limit`` characters; both ends stay, since they tell layers apart."""
    line = printable(value)
    if len(line) <= limit:
        return line
    tail = (limit - 1) // 2
    return f"{line[: limit - 1 - tail]}…{line[len(line) - tail :]}"


def number(value: Any) -> float | None:
    """Return a finite real number, or None for anything else: missing, NaN, infinite, a text or a truth value."""
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
    """Show three significant digits: 512, 1.09 M, 2.31 G."""
    found = number(value)
    if found is None or abs(found) < 1000:
        return _fixed(found, "{:.4g}")
    return _scaled(found / 1000, ("k", "M", "G", "T", "P"), lambda v: 2 if abs(v) < 10 else 1 if abs(v) < 100 else 0)


def exact(value: Any) -> str:
    """Show all digits, for numbers that people compare one by one: 2048."""
    return _fixed(value, "{:.0f}")


def size(value: Any) -> str:
    """Show bytes in decimal units: 512 B, 4.2 MB."""
    found = number(value)
    if found is None or abs(found) < 1000:
        return _fixed(found, "{:.0f} B")
    return _scaled(found / 1000, ("kB", "MB", "GB", "TB"), lambda v: 1)


def percent(value: Any) -> str:
    """Show a share as a percentage: 0.984 -> 98.40 %."""
    found = number(value)
    return DASH if found is None else f"{100 * found:.{2 if abs(found) < 10 else 0}f} %"


def error(value: Any) -> str:
    """Show a relative error: 2.10 %, or 3.1e-13 where a percentage would show only zeros."""
    found = number(value)
    if not found:
        return DASH if found is None else "0"
    return percent(found) if abs(found) >= 1e-3 else f"{found:.1e}"


def milliseconds(value: Any) -> str:
    """Show a time in milliseconds: 0.742 ms, 12.3 ms."""
    found = number(value) or 0.0
    return _fixed(value, "{:.3f} ms" if found < 1 else "{:.2f} ms" if found < 10 else "{:.1f} ms")


def seconds(value: Any) -> str:
    """Show a time in seconds: 1.24 s, 31.7 s."""
    return _fixed(value, "{:.2f} s" if (number(value) or 0.0) < 10 else "{:.1f} s")


def bare_milliseconds(value: Any) -> str:
    """Show a time in milliseconds without its unit, for a column that names it: 0.031, 12.400."""
    return _fixed(value, "{:.3f}")


def rate(value: Any) -> str:
    """Show a throughput: 98.2 /s, 223 /s."""
    return _fixed(value, "{:.1f} /s" if (number(value) or 0.0) < 100 else "{:.0f} /s")


def bits(value: Any) -> str:
    """Show an entropy: 3.18."""
    return _fixed(value, "{:.2f}")


def share(value: Any) -> str:
    """Show a share of a cost with one digit: 52.0 %."""
    found = number(value)
    return DASH if found is None else f"{100 * found:.1f} %"


def times(value: Any) -> str:
    """Show a ratio: 1.71x."""
    return _fixed(value, "{:.2f}x")


def shape(sides: Any) -> str:
    """Show the sides of a tensor: 16x8x3x3."""
    return "x".join(exact(side) for side in sides) if isinstance(sides, Sequence) and sides else DASH


def of(part: Any, whole: Any) -> str:
    """Show ``part/whole`` in full; a dash where both are unknown."""
    return DASH if number(part) is None and number(whole) is None else f"{exact(part)}/{exact(whole)}"


def quotient(top: Any, bottom: Any) -> float | None:
    """Return ``top / bottom``, or None where either is unknown or the bottom is zero."""
    above, below = number(top), number(bottom)
    return None if above is None or not below else above / below


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), indent: str = "") -> list[str]:
    """Align rows of equal length: the columns in ``left`` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (
            indent
            + "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        ).rstrip()
        for row in rows
    ]
