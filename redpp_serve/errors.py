"""Errors a user can cause. Each says what was found, what was expected and what to do."""


class RedppError(Exception):
    """A refusal: one paragraph for the user, exit code 2 on the command line.

    Args:
        found: what is wrong, naming the offender (a file, layer, option or number).
        expected: what would have been accepted.
        do: the next step, with the flag or command where there is one.
    """

    exit_code = 2

    def __init__(self, found: str, expected: str, do: str) -> None:
        self.found, self.expected, self.do = found, expected, do
        super().__init__(f"{found.rstrip('.')}. Expected: {expected.rstrip('.')}. What to do: {do.rstrip('.')}.")


class GateFailed(RedppError):
    """A verification number missed its limit; nothing was written. Exit code 3."""

    exit_code = 3
