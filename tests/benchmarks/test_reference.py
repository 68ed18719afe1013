"""The shipped reference networks are what their catalog says: they load, they are accurate, they can be captured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from redpp_serve.capture.arch import build
from redpp_serve.capture.export import capture
from redpp_serve.graph.graph import InputSpec
from redpp_serve.reference import catalog, train

FLOORS = {"digits": 0.97, "fonts": 0.85}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reference.json"


SMALLEST = "digits_resnet20"
NAMES = [pytest.param(n, marks=() if n == SMALLEST else pytest.mark.exhaustive) for n in catalog.NETWORKS]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_as_accurate_as_the_results_say(name: str) -> None:
    network, entry = catalog.load(name), json.loads(RESULTS.read_text())[name]
    assert not network.training and all(p.dtype is torch.float32 for p in network.parameters())
    assert entry["task"] == catalog.NETWORKS[name].task.name
    assert entry["parameters"] == sum(p.numel() for p in network.parameters())
    inputs, labels = catalog.held_out(entry["task"])
    measured = train.accuracy(network, inputs[:200], labels[:200])
    assert measured >= FLOORS[entry["task"]]
    assert measured == pytest.approx(entry["held_out_accuracy"], abs=0.06)  # three deviations of 200 images


@pytest.mark.parametrize("name", NAMES)
def test_a_network_can_be_captured_from_what_arch_names(name: str) -> None:
    network = build(catalog.NETWORKS[name].arch, {})
    graph = capture(network.eval(), [InputSpec("image", catalog.NETWORKS[name].input_shape)], [])
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in network.modules())
    assert sum(node.op in ("aten.conv2d.default", "aten.linear.default") for node in graph.nodes) == layers


@pytest.mark.parametrize("task", catalog.TASKS.values(), ids=catalog.TASKS)
def test_a_task_s_files_hold_what_it_says(task: catalog.Task) -> None:
    inputs, labels = catalog.held_out(task.name)
    sample = catalog.real_sample(task.name)
    assert inputs.shape[1:] == sample.shape[1:] == (1, 32, 32) and len(inputs) == len(labels) and len(sample) == 512
    assert labels.unique().tolist() == list(range(task.classes))
    assert abs(sample.mean()) < 0.15 and 0.85 < sample.std() < 1.15  # normalised
    held = {image.tobytes() for image in np.load(task.held_out)["inputs"]}
    assert not held & {image.tobytes() for image in np.load(task.sample)["inputs"]}


def test_the_digits_files_are_those_of_the_loader() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn holds the digits")
    assert datasets is not None
    from redpp_serve.reference import digits

    images, labels, held_images, held_labels = digits.load_digits()
    held, sample = np.load(catalog.DIGITS.held_out), np.load(catalog.DIGITS.sample)
    assert np.array_equal(held["inputs"], held_images) and np.array_equal(held["labels"], held_labels)
    assert np.array_equal(sample["inputs"], images[: digits.SAMPLE])
    assert np.array_equal(sample["labels"], labels[: digits.SAMPLE])


def test_finishing_measures_the_norms_again_with_rounded_weights() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    network[1].running_mean.fill_(7.0)  # left from a training that saw other inputs
    images = torch.randn(512, 1, 8, 8)
    train.finish(network, images)
    weight = network[0].weight
    assert torch.equal(weight, weight.half().float()) and not network[1].training
    y = nn.functional.conv2d(images, weight)
    torch.testing.assert_close(network[1].running_mean, y.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network[1].running_var, y.var((0, 2, 3)), atol=1e-2, rtol=1e-2)


def test_recording_keeps_the_other_networks_and_what_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "reference.json"
    train.record(path, "digits_vgg", {"epochs": 3, "held_out_accuracy": 0.5})
    train.record(path, "digits_resnet20", {"epochs": 1})
    train.record(path, "digits_vgg", {"held_out_accuracy": 0.75})
    expected = {"digits_resnet20": {"epochs": 1}, "digits_vgg": {"epochs": 3, "held_out_accuracy": 0.75}}
    assert json.loads(path.read_text()) == expected


def test_every_network_has_a_recipe() -> None:
    assert set(train.RECIPES) == set(catalog.NETWORKS)
