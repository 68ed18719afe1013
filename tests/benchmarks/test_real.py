"""The benchmark on real networks measures what it says, and never evaluates on what may be fitted."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torch_pruning")
pytest.importorskip("sklearn")
from benchmarks import real, real_arms, real_cell, real_data, real_scores, real_table
from benchmarks.baselines.inversion import invert
from benchmarks.real_data import Photograph, is_evaluated, split_by_photograph, webp_images, without_copies
from benchmarks.real_scores import centred_error, clopper_pearson, score

torch.set_num_threads(1)  # networks this small wait for threads longer than they compute


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_constant_that_all_inputs_share_is_no_error() -> None:
    expected = torch.randn(50, 7, generator=generator())
    assert centred_error(expected + torch.arange(7.0), expected) == pytest.approx(0, abs=1e-6)


def test_a_common_constant_does_not_make_an_error_look_small() -> None:
    expected = torch.randn(50, 7, generator=generator())
    noise = 0.3 * torch.randn(50, 7, generator=generator(1))
    plain = centred_error(expected + noise, expected)
    assert centred_error(100 + expected + noise, 100 + expected) == pytest.approx(plain, rel=1e-4)
    assert plain == pytest.approx(0.3, rel=0.15)


def test_an_output_that_ignores_its_input_has_error_one() -> None:
    expected = torch.randn(50, 7, generator=generator())
    assert centred_error(torch.ones(50, 7), expected) == pytest.approx(1)


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"), [(16, 16, 0.7941, 1.0), (0, 10, 0.0, 0.3085), (81, 100, 0.7193, 0.8816)]
)
def test_intervals_are_those_of_tables(hits: int, trials: int, low: float, high: float) -> None:
    assert clopper_pearson(hits, trials) == pytest.approx((low, high), abs=2e-4)


def test_a_score_counts_agreement_and_labels_apart() -> None:
    expected = torch.eye(8)[:4]
    outputs = torch.eye(8)[[0, 1, 2, 7]] + 0.5 * torch.eye(8)[[1, 2, 3, 3]] - 0.01 * torch.arange(8)
    found = score(outputs, expected, [(0,), (2, 5), (), (6,)])
    assert (found.images, found.agreement, found.labelled) == (4, 0.75, 3)
    assert (found.right, found.right_in_five) == (1, 2)  # the third label is among the five, the last is not
    assert found.low < 0.75 < found.high


def test_without_labels_there_is_no_accuracy() -> None:
    assert score(torch.eye(3), torch.eye(3), [()] * 3).right is None


def of_names(*names: str) -> list[Photograph]:
    return [Photograph(name, bytes) for name in names]


def test_halves_share_no_photograph_and_do_not_move_with_what_is_missing() -> None:
    everything = of_names(*(f"p{k}" for k in range(300)))
    evaluated, fitted = ({p.name for p in half} for half in split_by_photograph(everything, 0.6))
    assert not evaluated & fitted and len(evaluated | fitted) == 300
    assert 0.5 < len(evaluated) / 300 < 0.7
    fewer, _ = split_by_photograph(everything[::3], 0.6)
    assert {p.name for p in fewer} == evaluated & {p.name for p in everything[::3]}
    assert all(is_evaluated(p.name, 0.6) for p in fewer)


def test_a_second_view_of_a_scene_is_left_out() -> None:
    rng = np.random.default_rng(0)
    left, other = rng.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    right = (0.8 * left + 10 + rng.normal(0, 3, left.shape)).astype(np.uint8)
    kept = without_copies(of_names("left", "right", "other"), [left, right, other])
    assert [p.name for p in kept] == ["left", "other"]


def test_images_are_found_in_a_resource_file() -> None:
    first, second = (b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body for body in (b"one", b"RIFFtwo"))
    box = b"head" + first + b"RIFF\x04\0\0\0WAVE" + second + b"RIFF\xff\xff\0\0WEBPcut"
    assert list(webp_images(box)) == [first, second]


def test_crops_follow_from_the_name_alone() -> None:
    rng = np.random.default_rng(1)
    image = real_data.Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8))
    crops = [real_data.random_crop(image, real_data._generator(name)) for name in ("a", "a", "b")]
    assert crops[0].shape == (real_data.SIDE, real_data.SIDE, 3)
    assert np.array_equal(crops[0], crops[1]) and not np.array_equal(crops[0], crops[2])
    assert real_data.middle(image).shape == crops[0].shape


def test_modules_and_graphs_run_in_chunks() -> None:
    module = nn.Linear(3, 2).eval()
    inputs = torch.randn(19, 3, generator=generator())
    torch.testing.assert_close(real_scores.run(module, inputs), module(inputs), rtol=1e-5, atol=1e-6)


def scored(agreement: float, error: float = 0.2) -> dict[str, Any]:
    interval = {"low": agreement - 0.05, "high": agreement + 0.05}
    return {"images": 100, "agreement": agreement, **interval, "error": error, "labelled": 0, "right": None}


def cell(arm: str, point: str, agreement: float, **more: Any) -> dict[str, Any]:
    place = {"network": "lite0", "arm": arm, "point": point, "version": 1, "code": real_cell.code_digest()}
    cost = {"cpu_seconds": 5.0, "seconds": 7.0, "peak_mib": 900, "status": "measured", "reason": ""}
    scores = {"A": scored(agreement), "B": scored(agreement, 0.1)}
    found = {**place, **cost, "share": 0.8, "scores": scores, "reported": {}, "reported_to_real": {}, "stages": []}
    if real_arms.ARMS[arm].kind == "ours":
        found["reported"] = {"output_error": 0.15, "agreement": 1.0}
        found["reported_to_real"] = real_cell.reported_to_real(found["reported"], scores)
    return found | more


def results(*cells: dict[str, Any]) -> dict[str, Any]:
    sets = {"A": scored(1.0), "B": scored(1.0)}
    network = {"macs": 385_187_552, "parameters": 4_652_008, "sets": sets}
    network["known"] = {"labelled": 24, "right": 20, "right_in_five": 23}
    environment = {"device": "a processor", "versions": {"torch": "2"}}
    return {"environment": environment, "networks": {"lite0": network}, "cells": list(cells)}


def test_the_reported_error_is_a_multiple_of_the_real_one() -> None:
    assert real_cell.reported_to_real({"output_error": 0.1}, {"A": scored(0.5, 0.4)}) == {"A": pytest.approx(0.25)}
    assert real_cell.reported_to_real({"output_error": None}, {"A": scored(0.5)}) == {"A": None}
    assert real_cell.reported_to_real({"output_error": 0.1}, {"A": scored(1.0, 0.0)}) == {"A": None}


def test_lies_refusals_and_better_peers_are_losing_cells() -> None:
    honest, behind = cell("ours", "macs=0.80", 0.5), cell("l1", "macs=0.80", 0.6)
    assert not list(real_table.losing(results(honest, cell("l1", "macs=0.80", 0.4))))
    assert [line for line in real_table.losing(results(honest, behind)) if "10.0 points" in line]
    seeing = cell("l1_inputs", "macs=0.80", 0.6)
    assert not list(real_table.losing(results(honest, seeing)))  # it has seen photographs, ours has not
    fair = cell("ours_inputs", "macs=0.80", 0.5)
    assert len(list(real_table.losing(results(fair, seeing)))) == 1
    lying = cell("ours", "macs=0.80", 0.5, reported_to_real={"A": 0.3, "B": None})
    assert len(list(real_table.losing(results(lying)))) == 2
    refused = cell("ours", "macs=0.80", 0.5, status="refused", reason="below the floor")
    assert "below the floor" in next(real_table.losing(results(refused)))


def test_goals_are_met_missed_or_not_measured() -> None:
    def verdict(data: dict[str, Any]) -> str:
        return next(line for line in real_table.goals(data) if "lite0, macs=0.80, no data" in line).partition(":")[0]

    assert verdict(results()) == "not measured"
    assert verdict(results(cell("ours", "macs=0.80", 0.61))) == "met"
    assert verdict(results(cell("ours", "macs=0.80", 0.59))) == "missed"
    assert verdict(results(cell("ours", "macs=0.80", 0.9, status="refused"))) == "missed"


def test_tables_show_each_cell_and_what_the_tool_said() -> None:
    far = cell("l1", "macs=0.80", 0.25, share=0.9)
    text = real_table.markdown(results(cell("ours", "macs=0.80", 0.5), far))
    assert "| redpp-serve | 50.0 / 50.0 |" in text
    assert "(25.0 / 25.0 at 0.90)" in text
    assert "of 24 labelled inputs 20 first and 23 among the first five right" in text
    assert "| macs=0.80, no data | 0.80 | 50.0 (45 to 55) / 50.0 (45 to 55) | 0.200 / 0.100 | 0.150, 100.0 % |" in text
    assert "0.75 / 1.50" in text


def test_a_run_goes_on_with_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[str, str, str]] = []

    def run_cell(network: str, arm: str, point: str, timeout: float, threads: int | None) -> dict[str, Any]:
        ran.append((network, arm, point))
        return cell(arm, point, 0.5)

    monkeypatch.setattr(real, "run_cell", run_cell)
    monkeypatch.setattr(real, "describe", lambda name: results()["networks"]["lite0"])
    out = ["--out", str(tmp_path / "real.json"), "--networks", "lite0", "--points", "default", "macs=0.80"]
    real.main([*out, "--arms", "l1"])
    assert ran == [("lite0", "l1", "macs=0.80")]  # peers have no default
    real.main([*out, "--arms", "ours", "l1"])
    assert ran[1:] == [("lite0", "ours", "default"), ("lite0", "ours", "macs=0.80")]
    data = json.loads((tmp_path / "real.json").read_text())
    assert len(data["cells"]) == 3 and {"device", "versions"} <= data["environment"].keys()
    assert "## Losing cells" in (tmp_path / "real.md").read_text()
    real.main([*out, "--arms", "ours", "--stale"])
    assert len(ran) == 3
    monkeypatch.setattr(real, "code_digest", lambda: "other")
    real.main([*out, "--arms", "ours", "l1", "--stale"])
    assert len(ran) == 5


def test_a_cell_that_dies_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real.sys, "executable", "false")
    found = real.run_cell("lite0", "l1", "macs=0.80", 60, None)
    assert (found["status"], found["reason"]) == ("failed", "the process ended with 1")


def test_a_gap_of_ours_is_tried_again() -> None:
    assert not real.is_current(cell("ours_moments", "macs=0.80", 0.5, status="unavailable"), stale=False)
    assert real.is_current(cell("l1", "macs=0.80", 0.5, status="unavailable"), stale=False)
    assert not real.is_current(cell("l1", "macs=0.80", 0.5, version=0), stale=False)


def test_points_are_options() -> None:
    assert real_arms.point_options("default") == {}
    assert real_arms.point_options("macs=0.80") == {"target_macs": 0.8}
    assert real_arms.point_options("keep=0.5") == {"keep": 0.5}


def test_inverted_images_match_the_stored_statistics() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
    seen = module[0](2 + 0.5 * torch.randn(64, 1, 8, 8, generator=generator()))
    module[1].running_mean, module[1].running_var = seen.mean((0, 2, 3)), seen.var((0, 2, 3))

    def mismatch(images: torch.Tensor) -> float:
        return float((module[0](images).mean((0, 2, 3)) - module[1].running_mean).norm())

    images = invert(module, (1, 8, 8), 6, steps=30, batch=4)
    assert images.shape == (6, 1, 8, 8)
    assert mismatch(images) < 0.5 * mismatch(torch.randn(6, 1, 8, 8, generator=generator()))


def test_an_original_that_is_worse_than_known_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = real_data.EvaluationSet("check", torch.eye(10), tuple((k,) for k in range(10)))
    monkeypatch.setattr(real, "load_graph", lambda name: nn.Identity())
    monkeypatch.setattr(real, "evaluate", lambda graph, name: {})
    monkeypatch.setattr(real, "mac_count", lambda graph: 1)
    monkeypatch.setattr(real, "parameter_count", lambda graph: 1)
    monkeypatch.setattr(real, "check_set", lambda name: checked)
    assert real.describe("digit")["known"]["right"] == 10
    monkeypatch.setattr(real, "run", lambda graph, inputs: inputs.roll(1, 1))
    with pytest.raises(SystemExit, match="0 of 10"):
        real.describe("digit")
