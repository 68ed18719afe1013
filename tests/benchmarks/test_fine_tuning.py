"""A network that was pruned hard wins its accuracy back by ordinary training, and is packaged again."""

from pathlib import Path

import pytest

from benchmarks.fine_tuning import recover


@pytest.mark.exhaustive
def test_fine_tuning_wins_back_what_pruning_lost(tmp_path: Path) -> None:
    found = recover(tmp_path)
    assert found.original > 0.99 and found.macs < 0.1
    assert found.pruned < found.original - 0.01, "there is nothing to win back: prune harder"
    assert found.tuned > found.pruned + 0.5 * (found.original - found.pruned)
    assert {path.name for path in tmp_path.iterdir()} >= {"pruned", "tuned", "tuned.pt"}
