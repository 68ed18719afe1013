"""The clock of a run, and the pace of a network by it."""

import math

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


def test_a_pace_is_a_power_of_two():
    found = pace(network("chain"))
    assert math.log2(found).is_integer() and 0 < found < 1


def test_a_pace_is_the_fastest_of_the_rounds_for_one_input(monkeypatch):
    """Eight inputs at once, three times; a slow round counts for nothing."""
    for rounds, expected in (((0.8, 0.08, 40.0), 2.0**-7), ((16.0, 16.0, 16.0), 2.0), ((0.0, 1.0, 1.0), 2.0**-23)):
        times = iter([0.0, rounds[0], 50.0, 50.0 + rounds[1], 200.0, 200.0 + rounds[2]])
        monkeypatch.setattr(module, "spent", lambda times=times: next(times))
        assert pace(network("mlp")) == expected
        assert next(times, None) is None
