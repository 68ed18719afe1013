"""What handlers meet in every test here: no time for engines, no metrics, and a process that stays as it was."""

from collections.abc import Iterator

import pytest
import torch

from redpp_serve.handlers.batching import PLAN_VARIABLE


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the own runtime serve unless a test says otherwise: to try engines would take a second for each network."""
    monkeypatch.setenv(PLAN_VARIABLE, "0")
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
