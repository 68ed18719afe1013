"""The clock of a run, and the pace of a network by it."""

import pytest
import torch

from redpp_serve.pruning import effort as module
from redpp_serve.pruning.effort import pace, spent
from tests.support.networks import network


def test_the_clock_is_that_of_the_threads_without_a_gpu_and_of_the_wall_with_one(monkeypatch):
    monkeypatch.setattr(module.time, "process_time", lambda: 36.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: 5.0)
    for gpu, threads, seconds in ((False, 1, 36.0), (False, 2, 20.0), (False, 6, 7.2), (True, 2, 5.0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert spent() == pytest.approx(seconds)


def test_a_pace_follows_from_the_network_and_the_threads_alone(monkeypatch):
    graph = network("chain")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = pace(graph)
    assert 0 < alone < 1 and pace(network("chain")) == alone
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert pace(graph) == pytest.approx(alone / 1.8)
    wide = graph.with_tensors({"head.weight": graph.tensors["head.weight"]})
    monkeypatch.setattr(module, "mac_count", lambda _: 10**12)
    assert pace(wide) > 10  # seconds: 10^12 operations take longer than any overhead
