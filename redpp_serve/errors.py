"""Errors a user can cause. Each says what was found, what was expected and what to do.

Names in them come from files and servers; raw, they could move the terminal's cursor or forge a line.
"""


class RedppError(Exception):
    """A refusal: one paragraph for the user, exit code 2 on the command line.

    Args:
        found: what is wrong, naming the offender (a file, layer, option or number).
        expected: what would have been accepted.
        do: the next step, with the flag or command where there is one.
    """

    exit_code = 2

    def __init__(self, found: str, expected: str, do: str) -> None:
        found, expected, do = map(without_controls, (found, expected, do))
        self.found, self.expected, self.do = found, expected, do
        super().__init__(f"{found.rstrip('.')}. Expected: {expected.rstrip('.')}. What to do: {do.rstrip('.')}.")


class GateFailed(RedppError):
    """A verification number missed its limit; nothing was written. Exit code 3."""

    exit_code = 3


def printable(value: object) -> str:
    """Make one safe line: collapse white space; replace control, direction and surrogate characters.

    Layer and file names come from untrusted files; raw, they could move the cursor or break XML.
    """
    return without_controls(" ".join(str(value).split()))


def without_controls(text: str) -> str:
    """Replace control, direction and surrogate characters; lines and tabs stay."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
