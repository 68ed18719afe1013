"""Loops in the machine code of an NVIDIA GPU, as cuobjdump prints it, and the matrix products that they hold."""

import re
from collections.abc import Iterable
from typing import NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;")
# Rows, columns and reduction of one matrix instruction: "16816" is 16 x 8 x 16 for a warp, "64x128x16" for four.
_WARP = re.compile(r"\b(?:H|B|I|Q|D)MMA\.(16)(8)(4|8|16|32)\b")
_FOUR_WARPS = re.compile(r"\b(?:H|B|I|Q|D)GMMA\.(\d+)x(\d+)x(\d+)\b")


class Instruction(NamedTuple):
    """One instruction: its address and its text, with the predicate that guards it."""

    address: int
    text: str

    @property
    def products(self) -> int:
        """Multiply-accumulates on tensor cores, for each warp."""
        if found := _WARP.search(self.text):
            return int(found[1]) * int(found[2]) * int(found[3])
        if found := _FOUR_WARPS.search(self.text):
            return int(found[1]) * int(found[2]) * int(found[3]) // 4
        return 0

    @property
    def target(self) -> int | None:
        """Where a branch goes, also one that is written as a call."""
        found = re.search(r"\b(?:BRA|CALL)\b.*?\b0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        return not re.match(r"(?:BRA(?:\.U)?(?:\.ANY)? 0x|EXIT|RET|BRX|JMX)", self.text)


def instructions(sass: str) -> list[Instruction]:
    """The one function of a dump.

    Raises:
        ValueError: no function, or several of them.
    """
    found = [Instruction(int(m[1], 16), m[2]) for m in _LINE.finditer(sass)]
    if [i.address for i in found].count(0) != 1:
        raise ValueError("expected the machine code of one kernel")
    return found


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The natural loops: all that lies on a way from a loop's first instruction back to it.

    A branch back is a loop only if there is no other way to it than through its target; code that was moved behind the
    end and comes back from there is none.
    """
    place = {instruction.address: k for k, instruction in enumerate(code)}
    after = [_successors(code, place, k) for k in range(len(code))]
    before: list[list[int]] = [[] for _ in code]
    for k, successors in enumerate(after):
        for s in successors:
            before[s].append(k)
    reachable = _flood([0], after)
    bodies: dict[int, set[int]] = {}
    for k in sorted(reachable):
        for head in after[k]:
            if head <= k and (head == 0 or k == head or k not in _flood([0], after, without=head)):
                bodies.setdefault(head, set()).update({head} | _flood([k], before, without=head))
    return [[code[k] for k in sorted(body)] for body in bodies.values()]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The longest loop without a loop in it; only loops with matrix products count where there are any. Or nothing."""
    found = loops(code)
    found = [body for body in found if any(i.products for i in body)] or found
    inner = [body for body in found if not any(set(other) < set(body) for other in found)]
    return max(inner, key=len, default=[])


def _successors(code: list[Instruction], place: dict[int, int], k: int) -> list[int]:
    found = [place[t] for t in (code[k].target,) if t in place]
    if waits := re.search(r"\bBSYNC\b.*?\b(B\d+)", code[k].text):  # goes on where its barrier was announced
        announced = rf"\bBSSY\b.*?\b{waits[1]}, 0x([0-9a-f]+)"
        found += [place[int(m[1], 16)] for i in code[:k] if (m := re.search(announced, i.text))]
    if code[k].goes_on and k + 1 < len(code):
        found.append(k + 1)
    return sorted(set(found))


def _flood(start: Iterable[int], edges: list[list[int]], without: int | None = None) -> set[int]:
    seen = {k for k in start if k != without}
    waiting = list(seen)
    while waiting:
        for k in edges[waiting.pop()]:
            if k not in seen and k != without:
                seen.add(k)
                waiting.append(k)
    return seen
