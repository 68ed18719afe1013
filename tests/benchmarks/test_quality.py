"""The quality benchmark's baselines are no weaker than their descriptions, and its harness keeps what it measured."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_pruning")
pytest.importorskip("sklearn")
from benchmarks.baselines import cells, folding, magnitude, merging, table
from benchmarks.baselines.clusters import cluster
from benchmarks.baselines.coupled import CoupledNetwork
from benchmarks.baselines.subject import Subject
from benchmarks.baselines.widths import CostModel, cost_model, layer_macs, spreads, uniform_widths
from redpp_serve.pruning.matching import SynthesisBudget

torch.set_num_threads(1)  # networks this small wait for threads longer than they compute

EXAMPLE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(9))


class Residual(nn.Module):
    """A stem, a depthwise block with squeeze-excite on a residual stream, and a classifier behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        return self.head(x + self.project(y * self.gate(y)))


class Dense(nn.Module):
    """Two layers whose outputs are concatenated with their inputs, a batch norm on each sum of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (16, 32, 48))
        self.convs = nn.ModuleList(nn.Conv2d(n, 16, 3, padding=1) for n in (16, 32))
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return self.head(torch.relu(self.norms[2](x)).mean((2, 3)))


class Tokens(nn.Module):
    """A transformer's block without attention: a layer norm closes the stream, the hidden layer is open."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head((x + self.mlp(self.norm(x))).mean(1))


NETWORKS = {"residual": Residual, "dense": Dense, "tokens": Tokens}


def make(name: str) -> nn.Module:
    """A network with random weights and random, lived-in statistics."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.weight.data, 0.5),
                (module.bias.data, -0.5),
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
            ):
                tensor.uniform_(low, low + 1)
    return network


def plant(module: nn.Module) -> dict[str, int]:
    """Make the last 8 channels of every class equal to its first 8; the widths that lose nothing."""
    network = CoupledNetwork(module, EXAMPLE)
    for cls in network.sets:
        for member in network.members(cls):
            layer = module.get_submodule(member.name)
            parts = [layer.weight, layer.bias] if member.out else []
            parts += [layer.running_mean, layer.running_var] if member.is_norm else []
            for part in parts:
                if part is not None:
                    part.data[member.spots[-8:]] = part.data[member.spots[:8]].clone()
    return {cls.root: cls.channels - 8 for cls in network.sets}


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def macs(module: nn.Module) -> int:
    return sum(layer_macs(module, EXAMPLE).values())


def cost_of(module: nn.Module) -> CostModel:
    return cost_model(CoupledNetwork(module, EXAMPLE), EXAMPLE)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_open_classes() -> None:
    found = {name: CoupledNetwork(make(name), EXAMPLE) for name in NETWORKS}
    assert sorted(c.channels for c in found["residual"].sets) == [16, 16, 24, 32]
    assert [c.channels for c in found["dense"].sets] == [16, 16, 16]
    assert [c.root for c in found["tokens"].sets] == ["mlp.0"]
    assert all("head" in " ".join(f.closed) for f in found.values())


def test_inner_channels_are_all_but_residual_streams() -> None:
    cost = cost_of(make("residual"))
    stream = next(cls for cls in cost.sets if cls.root not in cost.inner)
    assert stream.root in ("stem.0", "project.0") and len(cost.inner) == 3
    (_, everywhere), (name, inside) = spreads(cost, 0.3 * cost.open_macs, 4, cost.open_macs)
    assert name == "inner channels" and inside[stream.root] == 16 > everywhere[stream.root]
    assert [name for name, _ in spreads(cost_of(make("tokens")), 1000.0, 4, 1e9)] == ["all sets"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("absorb", [False, True])
def test_means_of_planted_duplicates_change_nothing(name: str, absorb: bool) -> None:
    module = make(name)
    widths = plant(module)
    merged = merging.cluster_mean(module, EXAMPLE, widths, absorb)
    assert macs(merged) < macs(module)
    torch.testing.assert_close(merged(images()), module(images()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("repair", [False, True])
def test_folding_of_planted_duplicates_changes_nothing(name: str, normalise: bool, repair: bool) -> None:
    module = make(name)
    network = CoupledNetwork(module, EXAMPLE)
    plant(module)
    labels = {c.root: torch.cat([torch.arange(c.channels - 8), torch.arange(8)]) for c in network.sets}
    folded = folding.fold(module, EXAMPLE, labels, normalise, repair)
    torch.testing.assert_close(folded(images()), module(images()), rtol=1e-3, atol=1e-4)


def test_folding_finds_duplicates_that_are_read_alike() -> None:
    module = make("residual")
    widths = plant(module)
    network = CoupledNetwork(module, EXAMPLE)
    for cls in network.sets:  # folding also looks at the readers
        for member in network.members(cls):
            if not member.out:
                columns = module.get_submodule(member.name).weight.data.transpose(0, 1)
                columns[member.spots[-8:]] = columns[member.spots[:8]].clone()
    for cls in network.sets:
        labels = folding.fold_labels(module, EXAMPLE, widths, normalise=False)[cls.root]
        assert torch.equal(labels[:8], labels[-8:])


def test_approximate_repair_restores_the_variance_of_a_mean() -> None:
    """Independent rows of equal size, white inputs: the mean of n of them has 1/n of the variance."""
    torch.manual_seed(0)
    module = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(64, 16, 1, bias=False),
            norm=nn.BatchNorm2d(16),
            read=nn.Conv2d(16, 16, 1),
            out=nn.Conv2d(16, 4, 1),
        )
    ).eval()
    inputs = torch.randn(256, 64, 4, 4)
    values = module.conv(inputs)
    module.norm.running_mean, module.norm.running_var = values.mean((0, 2, 3)), values.var((0, 2, 3))
    labels = {
        c.root: torch.arange(c.channels) // 4 if c.root == "conv" else torch.arange(c.channels)
        for c in CoupledNetwork(module, inputs[:1]).sets
    }
    deviations = [
        folding.fold(module, inputs[:1], labels, n, r)[:2](inputs).std((0, 2, 3)).mean()
        for n in (False, True)
        for r in (False, True)
    ]
    torch.testing.assert_close(torch.stack(deviations), torch.tensor([0.5, 1.0, 0.5, 1.0]), rtol=0.1, atol=0)


def test_estimated_statistics_are_those_of_the_images() -> None:
    module = folding.estimate_statistics(make("residual"), images(64))
    seen = module.stem[0](images(64))
    torch.testing.assert_close(module.stem[1].running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(module.stem[1].running_var, seen.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert not any(m.training for m in module.modules())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scale", [False, True])
def test_absorbing_norms_keeps_the_function(name: str, scale: bool) -> None:
    module = make(name)
    network = CoupledNetwork(module, EXAMPLE)
    merging.absorb_norms(network, scale)
    torch.testing.assert_close(network.module(images()), module(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_every_baseline_reaches_the_cost(name: str, share: float) -> None:
    module = make(name)
    cost = cost_of(module)
    widths = uniform_widths(cost, share * cost.open_macs, 4)
    expected = macs(module) - cost.removed(widths)
    assert abs(cost.removed(widths) / cost.open_macs - share) < 0.1
    made = {
        "random": merging.random_channels(module, EXAMPLE, widths, 0),
        "mean": merging.cluster_mean(module, EXAMPLE, widths),
        "fold": folding.fold(module, EXAMPLE, folding.fold_labels(module, EXAMPLE, widths, False), repair=True),
        **{i: magnitude.prune_uniformly(module, EXAMPLE, widths, i) for i in ("l1", "fpgm")},
    }
    for method, pruned in made.items():
        assert macs(pruned) == pytest.approx(expected), method
        assert pruned(images()).isfinite().all(), method
    ranked = magnitude.prune_globally(module, EXAMPLE, share * cost.open_macs, 4, "l1")
    assert abs((macs(module) - macs(ranked)) / cost.open_macs - share) < 0.15


def test_magnitude_takes_the_smallest_channels() -> None:
    module = make("tokens")
    small = torch.tensor([1, 5, 8, 30])
    module.mlp[0].weight.data[small] *= 1e-3
    module.mlp[0].bias.data[small] = 0
    module.mlp[2].weight.data[:, small] *= 1e-3
    pruned = magnitude.prune_uniformly(module, EXAMPLE, {"mlp.0": 28}, "l1")
    torch.testing.assert_close(pruned(images()), module(images()), rtol=1e-4, atol=1e-5)


def test_random_channels_follow_the_seed() -> None:
    module = make("tokens")
    one, same, other = (merging.random_channels(module, EXAMPLE, {"mlp.0": 16}, seed)(images()) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_clusters_are_those_of_the_features() -> None:
    centres = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    labels = cluster(centres.repeat_interleave(3, 0) + 1e-3 * torch.randn(12, 100), 4)
    assert torch.equal(labels.view(4, 3), labels.view(4, 3)[:, :1].expand(4, 3)) and len(labels.unique()) == 4


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    module = make("residual")
    labels = module(images()).argmax(1)
    return Subject("digits_resnet20", "digits", module, images(), labels, images(), tmp_path)


def test_a_cell_holds_what_was_measured(subject: Subject) -> None:
    with torch.enable_grad():
        cell = cells.measure_cell(subject, "cluster_mean", 0.5, cells.Timing(2, 0.05), lambda line: None)
    assert cell["removed"] == pytest.approx((subject.macs - cell["macs"]) / subject.cost.open_macs)
    assert cell["latency"]["low"] <= cell["latency"]["ratio"] <= cell["latency"]["high"]
    assert cell["accuracy"] == pytest.approx(
        next(s["accuracy"] for s in cell["settings"] if s["setting"] == cell["setting"]), abs=0.3
    )
    assert len(cell["settings"]) == 2


def test_the_best_setting_near_the_target_is_chosen() -> None:
    tried = [
        ({"accuracy": 90.0, "removed": 0.3}, "far"),
        ({"accuracy": 70.0, "removed": 0.49}, "a"),
        ({"accuracy": 80.0, "removed": 0.51}, "b"),
    ]
    assert cells.choose(tried, 0.5)[1] == "b"
    assert cells.choose(tried, 0.8)[1] == "b"


def example_cell(method: str, ratio: float, accuracy: float, key: str = "k", removed: float | None = None) -> dict:
    return {
        "network": "digits_resnet20",
        "method": method,
        "ratio": ratio,
        "key": key,
        "macs": 1,
        "parameters": 1,
        "seconds": 1.0,
        "removed": ratio if removed is None else removed,
        "accuracy": accuracy,
        "latency": None,
    }


def test_the_store_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    store = cells.Store(path)
    store.put(example_cell("l1", 0.5, 50.0))
    store.put(example_cell("l1", 0.3, 60.0))
    again = cells.Store(path)
    assert again.find("digits_resnet20", "l1", 0.5, "k")["accuracy"] == 50.0
    assert again.find("digits_resnet20", "l1", 0.5, "other") is None
    again.put(example_cell("l1", 0.5, 55.0, key="other"))
    assert [c["accuracy"] for c in json.loads(path.read_text())["cells"]] == [60.0, 55.0]
    assert "torch-pruning" in json.loads(path.read_text())["environment"]["versions"]


def test_the_key_follows_method_and_timing() -> None:
    keys = {
        cells.cell_key("digits_resnet20", m, t)
        for m in ("l1", "distilled")
        for t in (cells.Timing(1, 1.0), cells.Timing(8, 1.0))
    }
    assert len(keys) == 4


def report(*found: dict) -> dict:
    network = {"task": "digits", "macs": 100, "open_macs": 90, "accuracy": 99.0, "parameters": 10, "images": 500}
    return {
        "environment": {"device": "a machine", "threads": 1, "versions": {"torch": "2"}},
        "networks": {"digits_resnet20": network},
        "cells": list(found),
    }


def test_targets_are_judged() -> None:
    met = table.targets(
        report(example_cell("distilled", 0.5, 98.6), example_cell("l1", 0.5, 60.0), example_cell("ceiling", 0.5, 98.6))
    )
    assert [line.split(":")[0] for line in met] == ["met", "met", "met"]
    missed = table.targets(
        report(example_cell("distilled", 0.5, 98.4), example_cell("l1", 0.5, 98.5), example_cell("ceiling", 0.5, 98.6))
    )
    assert [line.split(":")[0] for line in missed] == ["missed", "missed", "missed"]
    short = table.targets(report(example_cell("distilled", 0.5, 99.0, removed=0.4)))
    assert short[0].startswith("missed")


def test_the_table_marks_points_that_missed_their_cost() -> None:
    text = table.markdown(report(example_cell("l1", 0.5, 61.25), example_cell("l1", 0.3, 71.5, removed=0.2)))
    assert "| L1 (Torch-Pruning) | (71.50 at 20%) | 61.25 |" in text


@pytest.mark.parametrize("method", ["random", "fpgm", "fold_ar", "fold_dir"])
def test_every_baseline_gives_a_cell(subject: Subject, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = SynthesisBudget(8, 4, 2, 2)
    monkeypatch.setattr("benchmarks.baselines.subject.synthesis_budget", lambda *_: few)
    with torch.enable_grad():
        cell = cells.measure_cell(subject, method, 0.2, cells.Timing(2, 0), lambda line: None)
    assert cell["macs"] < subject.macs and cell["latency"] is None and 0 <= cell["accuracy"] <= 100


def test_the_stages_go_from_dense_to_split(subject: Subject) -> None:
    with torch.enable_grad():
        original, hashed, merged, split = cells.measure_stages(subject, cells.Timing(2, 0))["rows"]
    assert original["multiplications"] == hashed["multiplications"] == merged["multiplications"] == subject.macs
    assert split["multiplications"] < subject.macs and hashed["bytes"] < original["bytes"]
    assert split["accuracy"] == merged["accuracy"]
