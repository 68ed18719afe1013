"""Names of devices: which the command line takes on which machine, and what a maker calls one."""

import pytest
import torch

from redpp_serve.errors import RedppError
from redpp_serve.runtime.device import device_name, parse_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize("gpus", [2], indirect=True)
def test_devices_of_a_machine_with_two_gpus(gpus: None) -> None:
    expected = {None: "cuda:0", "cpu": "cpu", "cuda": "cuda:0", "cuda:0": "cuda:0", "cuda:1": "cuda:1"}
    assert {text: str(parse_device(text)) for text in expected} == expected
    for text in (
        "cuda:2",
        "cuda:9",
        "cuda:",
        "cuda:-1",
        "cuda:x",
        "cuda:²",
        "cuda1",
        "cpu:",
        "cpu:0",
        "tpu",
        "tpu:0",
        "",
    ):
        with pytest.raises(RedppError, match=f"--device {text}"):
            raise AssertionError((text, parse_device(text)))


@pytest.mark.parametrize("gpus", [0], indirect=True)
def test_devices_of_a_machine_without_a_gpu(gpus: None) -> None:
    assert str(parse_device(None)) == str(parse_device("cpu")) == "cpu"
    for text in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(RedppError, match=f"--device {text}"):
            raise AssertionError((text, parse_device(text)))


def test_the_processor_has_a_name() -> None:
    assert device_name(torch.device("cpu")).strip()
