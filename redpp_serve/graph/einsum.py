"""What an einsum's equation says: a label for each dimension, and which sizes are multiplied, as torch does it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Axis = tuple[str, int]


def contractions(equation: str, operands: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[tuple[Axis, ...], ...]:
    """Return, for each pair of operands that are multiplied and summed, the axes whose sizes multiply.

    Operands are taken from left to right. A pair without a common index to sum over makes no matrix product.

    Args:
        equation: such as ``bhid,bhjd->bhij``, with an ellipsis or without an arrow too.
        operands: name and shape of each operand.
    """
    subscripts, result = spelled(equation, [len(shape) for _, shape in operands])
    place: dict[str, tuple[int, Axis]] = {}
    for part, (name, shape) in zip(subscripts, operands, strict=True):
        for axis, label in enumerate(part):
            place[label] = max(place.get(label, (0, (name, axis))), (shape[axis], (name, axis)))
    terms = []
    current = set(subscripts[0])
    for k, part in enumerate(subscripts[1:], 1):
        needed = set(result).union(*subscripts[k + 1 :])
        both = current | set(part)
        if (current & set(part)) - needed:
            terms.append(tuple(place[label][1] for label in sorted(both)))
        current = both & needed
    return tuple(terms)


def spelled(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Return the labels of each operand's dimensions, and those of the result.

    Dimensions under an ellipsis have labels that count from the right: ``...1``, ``...0``.

    Args:
        equation: such as ``bhid,bhjd->bhij``, with an ellipsis or without an arrow too.
        ranks: the number of dimensions of each operand.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    subscripts = [_labels(part, rank) for part, rank in zip(left.split(","), ranks, strict=True)]
    free = max(([label for label in part if label.startswith("...")] for part in subscripts), key=len)
    if arrow:
        return subscripts, [label for token in _tokens(right) for label in (free if token == "..." else [token])]
    counts = Counter(label for part in subscripts for label in part)
    return subscripts, free + sorted(label for label, count in counts.items() if count == 1 and label not in free)


def _tokens(text: str) -> list[str]:
    """Split subscripts into letters and the ellipsis."""
    front, dots, back = text.partition("...")
    return [*front, *([dots] if dots else []), *back]


def _labels(text: str, dims: int) -> list[str]:
    """Return a label for each dimension; those under an ellipsis count from the right: ``...1``, ``...0``."""
    tokens = _tokens(text)
    under = [f"...{k}" for k in reversed(range(dims - sum(token != "..." for token in tokens)))]
    return [label for token in tokens for label in (under if token == "..." else [token])]
