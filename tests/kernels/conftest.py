"""Memory that torch allocates without values is NaN during every test of the kernels."""

from collections.abc import Iterator

import pytest

from tests.support.interpreting import poisoned


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    with poisoned():
        yield
