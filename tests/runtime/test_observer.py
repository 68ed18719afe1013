"""The observer beside the request path: it never waits, samples at random, and writes what many inputs add up to."""

import threading
import time
from pathlib import Path

import pytest
import torch

from redpp_serve.runtime import observer as module
from redpp_serve.runtime.moments import Adder, fingerprint
from redpp_serve.runtime.moments_file import LEAST, load_moments
from redpp_serve.runtime.observer import Observer
from tests.support.served import SHAPE, network


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE_S", 0.05)
    monkeypatch.setattr(module, "_SHARE", 1.0)


def inputs(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def fed(observer: Observer, x: torch.Tensor) -> None:
    """Offer each input when there is room for it."""
    for row in x.split(1):
        wait_for(lambda: not observer._queue.full())
        observer.offer([row])


def test_what_was_offered_is_added_up_and_written(tmp_path: Path) -> None:
    graph, path, x = network(), tmp_path / "moments", inputs(LEAST + 20)
    observer = Observer(graph, 1, path)
    fed(observer, x[:LEAST])
    wait_for(path.exists)
    fed(observer, x[LEAST:])
    wait_for(observer._queue.empty)
    observer.close()
    assert observer.missed == 0 and not observer._thread.is_alive()
    adder = Adder(graph)
    for row in x[:LEAST].split(1):
        adder.add([row])
    found, wanted = load_moments(path, graph), adder.sums.moments(fingerprint(graph))
    assert found.images == LEAST  # the last few are forgotten
    for name, value in wanted.values.items():
        torch.testing.assert_close(found.values[name].squares, value.squares)


def test_offering_never_waits_and_keeps_no_more_than_a_few_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, go = threading.Event(), threading.Event()

    def add(self: Adder, *_: object) -> None:
        busy.set()
        go.wait(60)

    monkeypatch.setattr(Adder, "add", add)
    observer = Observer(network(), 1, tmp_path / "moments")
    observer.offer([inputs(1)])
    assert busy.wait(60)
    observer.offer([inputs(1000)])  # while the thread stands still
    assert observer.missed == 1000 - module._WAITING
    go.set()
    observer.close()
    observer.offer([inputs(4)])
    assert observer._queue.qsize() <= module._WAITING


def test_one_in_so_many_is_chosen_over_batches_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[float] = []
    monkeypatch.setattr(Observer, "_hand_over", lambda self, item: chosen.extend(item[0].view(-1).tolist()))
    observer = Observer(network(), 10, tmp_path / "moments")
    observer._random.seed(0)
    numbers = torch.arange(20_000).view(-1, 1)
    for batch in numbers.split([1, 7, 12] * 1000):
        observer.offer([batch])
    observer.close()
    assert len(set(chosen)) == len(chosen) == pytest.approx(2000, abs=150)  # 3.5 standard deviations
    gaps = torch.tensor(chosen).diff()
    assert gaps.min() == 1 and gaps.max() > 40  # no rhythm


def test_torch_threads_of_the_request_path_stay(tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        observer = Observer(network(), 1, tmp_path / "moments")
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        observer.close()
        assert torch.get_num_threads() == 2 and seen == [2]
    finally:
        torch.set_num_threads(before)


def test_a_failure_ends_observing_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Adder, "add", lambda *_: 1 / 0)
    observer = Observer(network(), 1, tmp_path / "moments")
    observer.offer([inputs(1)])
    observer._thread.join(60)
    observer.offer([inputs(3)])
    assert "observing has ended" in caplog.text and observer._queue.empty()
    observer.close()


def test_sums_wait_where_they_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, failed = module.add_to_file, threading.Event()

    def full(*_: object) -> bool:
        failed.set()
        raise OSError("no space left")

    monkeypatch.setattr(module, "add_to_file", full)
    observer = Observer(network(), 1, tmp_path / "moments")
    fed(observer, inputs(LEAST))
    assert failed.wait(60)
    monkeypatch.setattr(module, "add_to_file", real)
    wait_for((tmp_path / "moments").exists)
    observer.close()
    assert "no space left" in caplog.text
    assert load_moments(tmp_path / "moments", network()).images == LEAST


def test_the_thread_gives_way_to_a_request_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, at = [], threading.Event()

    def add(self: Adder, item: object, pause) -> None:
        for step in range(3):
            pause()
            steps.append(step)
        at.set()

    monkeypatch.setattr(Adder, "add", add)
    monkeypatch.setattr(module, "_PATIENCE_S", 60.0)
    observer = Observer(network(), 1, tmp_path / "moments")
    observer.busy = True
    observer.offer([inputs(1)])
    wait_for(observer._queue.empty)
    assert not at.wait(0.1) and steps == []
    observer.busy = False
    assert at.wait(60) and steps == [0, 1, 2]
    at.clear()
    monkeypatch.setattr(module, "_PATIENCE_S", 0.01)
    observer.busy = True  # a request that never ends
    observer.offer([inputs(1)])
    assert at.wait(60)
    observer.close()
