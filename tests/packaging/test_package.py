"""The package command's work: a folder that appears whole or not at all, and a report that says what was done."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import redpp_serve.packaging.package as module
from redpp_serve.capture import Captured
from redpp_serve.capture.export import capture
from redpp_serve.errors import GateFailed, RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.machine import describe_machine
from redpp_serve.options import Options, Serving
from redpp_serve.packaging.package import doubts, package
from redpp_serve.packaging.samples import as_array, request_body
from redpp_serve.pruning import choose as lossy
from redpp_serve.pruning import steps, tiles
from redpp_serve.pruning.matching import Matcher
from redpp_serve.report.data import Record, Verify
from redpp_serve.stages import Stages
from tests.support.small import SHAPE, arguments, captured, network, outputs, randomise, write_data, write_model
from tests.support.small_networks import Flat, Two

FILES = {
    "original.mar",
    "pruned.mar",
    "config.properties",
    "log4j2.xml",
    "model-config.yaml",
    "README.md",
    "inputs.npz",
    "sample.npy",
    "triton",
    "report.json",
    "report.html",
}
FRONTIER = ".small.frontier.json"  # beside the package, for --keep-point
EXACT = Options(method="red++")
FAST = Options(keep=0.5, round_to=4, distil=0, max_error=2.0, time_budget=1)  # half of random weights says little

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial run of both archives, which takes seconds and has tests of its own."""
    monkeypatch.setattr(module, "run_trials", lambda *_: [])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "in")


def everything(folder: Path) -> dict[str, bytes]:
    """Relative path to content, hidden files included; folders count, so an empty one is seen."""
    paths = sorted(p for p in folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"folder" for p in paths}


def undefined(part: Any) -> list[str]:
    """Return the keys of a report that no record defines, explicit nulls of optional keys aside."""
    if isinstance(part, Record):
        own = [key for key, value in part.undefined.items() if value is not None]
        return own + [key for item in fields(part) for key in undefined(getattr(part, item.name))]
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [key for item in inner for key in undefined(item)]


def check_report(report: dict[str, Any], accuracy: bool) -> None:
    counts = {"parameters", "macs", "multiplications", "additions", "bytes"} | ({"accuracy"} if accuracy else set())
    assert set(report["original"]) == set(report["pruned"]) == counts
    assert [s["name"] for s in report["stages"][:3]] == ["hash", "merge", "inputs"]
    for stage in report["stages"]:
        assert set(stage) == {"name", "status", "reason", "seconds"}
        assert stage["status"] in ("done", "skipped") and stage["reason"] and stage["seconds"] >= 0
    assert {"kernel", "weight"} == set(report["counting"])
    for reading in report["counting"].values():
        assert {k: len(v) for k, v in reading.items()} == {"multiplications": 2, "additions": 2, "bytes": 2}
    assert {
        "method",
        "target",
        "predicted_error_typical",
        "predicted_error_bound",
        "measured_error",
        "predicted_ratio",
        "measured_ratio",
    } == set(report["hash"])
    for layer in report["layers"]:
        assert {"name", "op", "shape", "pruned_shape", "parameters", "macs", "hash", "merge", "split", "error"} == set(
            layer
        )
        assert {"channels", "kept", "error", "reason"} == set(layer["merge"])
        if layer["hash"]:
            assert {"values", "entropy", "error", "zero_kernels", "bandwidth", "alternatives", "density"} == set(
                layer["hash"]
            )
    assert {"merge_exact", "narrow_exact", "split_exact", "output_error", "agreement", "images"} <= set(
        report["verify"]
    )
    shares = {"stage", "error", "agreement", "macs", "seconds"} | ({"accuracy"} if accuracy else set())
    assert [share["stage"] for share in report["stages_share"]][:2] == ["merge", "reconstruct"]
    assert all(set(share) == shares for share in report["stages_share"])
    point = {
        "macs",
        "macs_ratio",
        "error",
        "agreement",
        "predicted_error",
        "widths",
        "latency_ratio",
        "latency_low",
        "latency_high",
        "chosen",
        "flag",
    }
    assert report["frontier"]["latency_on"] and sum(p["chosen"] for p in report["frontier"]["points"]) == 1
    assert all(set(p) == point for p in report["frontier"]["points"])
    assert {"device", "threads", "versions"} == set(report["environment"])
    assert {"redpp-serve", "python", "torch", "numpy"} == set(report["environment"]["versions"])


@pytest.mark.usefixtures("untried")
def test_once_makes_a_package_once_and_replaces_no_other(model: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "small", captured(model)
    data = write_data(tmp_path / "data.npz")

    def run(given: Captured = made, options: Options = EXACT, **changes: Any) -> list[str]:
        stages = Stages(quiet=True)
        report = package(given, out, **{"name": "small", "once": True, **changes}, options=options, stages=stages)
        assert report.name == "small" and report.source["sha256"] == made.source["sha256"]
        return [f"{stage.name} {stage.status}" for stage in stages.stages]

    assert "verify done" in run()
    before, inode = everything(out), out.stat().st_ino
    assert run() == ["package skipped"] and (everything(out), out.stat().st_ino) == (before, inode)
    biased = made.graph.with_tensors({"head.bias": made.graph.tensors["head.bias"] + 1})
    others: list[dict[str, Any]] = [
        {"given": replace(made, graph=biased)},
        {"given": replace(made, graph=replace(made.graph, classes=frozenset()))},
        {"options": replace(EXACT, seed=1)},
        {"serving": Serving(4, 7, 2)},
        {"labels": ("a", "b", "c", "d", "e")},
        {"name": "other"},
        {"verify_data": data},
    ]
    for other in others:
        with pytest.raises(RedppError, match="small holds the package of another network.*new folder with --out"):
            run(**other)
    assert everything(out) == before
    assert "verify done" in run(once=False, verify_data=data) and run(verify_data=data) == ["package skipped"]
    write_data(data, images=39)
    with pytest.raises(RedppError, match="another network"):
        run(verify_data=data)
    shutil.rmtree(out)
    out.mkdir()
    assert "verify done" in run(), "an empty folder is as good as none"


def test_a_whole_package_with_every_file_and_key(model: Path, tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "data.npz"), tmp_path / "new" / "folder" / "small"
    report = package(captured(model), out, name="small", options=FAST, serving=Serving(4, 7, 2), verify_data=data)
    assert {p.name for p in out.iterdir()} == FILES
    assert {p.name for p in out.parent.iterdir()} == {"small", FRONTIER}
    on_disk = json.loads((out / "report.json").read_text())
    check_report(on_disk, accuracy=True)
    assert report.to_json() == on_disk and [stage.name for stage in report.stages or []][-2:] == ["frontier", "try"]
    assert not undefined(report), "every record of a new report is defined in report.data"
    original, pruned = on_disk["original"], on_disk["pruned"]
    assert original["parameters"] == sum(t.numel() for k, t in network().state_dict().items() if "num_batches" not in k)
    # convolutions at 12x12 and 6x6 positions, then the classifier
    assert original["macs"] == 144 * 8 * 9 + 36 * 16 * 8 * 9 + 16 * 5
    assert all(pruned[key] < original[key] for key in ("parameters", "macs", "bytes"))
    assert original["accuracy"] == 1.0 and 0 <= pruned["accuracy"] <= 1
    layers = {layer["name"]: layer for layer in on_disk["layers"]}
    assert layers["body.0"]["shape"] == [16, 8, 3, 3] and layers["body.0"]["pruned_shape"] == [4, 4, 3, 3]
    assert layers["head"]["merge"]["reason"] == "is an output of the network"
    assert on_disk["source"]["kind"] == "torch.save state_dict" and len(on_disk["source"]["sha256"]) == 64
    assert (on_disk["options"]["keep"], on_disk["options"]["batch_size"], on_disk["options"]["threads"]) == (0.5, 4, 2)
    assert [s["archive"] for s in on_disk["smoke"]] == [
        "original.mar",
        "pruned.mar",
        "triton version 1",
        "triton version 2",
    ]
    assert all(s["milliseconds"] > 0 for s in on_disk["smoke"])
    config = (out / "model-config.yaml").read_text()
    assert "batchSize: 4\n" in config and "maxBatchDelay: 7\n" in config and "threads: 2\n" in config
    x = torch.randn(SHAPE)
    with torch.no_grad():
        assert outputs(out / "original.mar", x)[0] == pytest.approx(network()(x[None])[0].tolist(), rel=1e-4, abs=1e-5)


def test_exact_merging_removes_the_twins_and_keeps_the_function(packaged: Path) -> None:
    report = json.loads((packaged / "report.json").read_text())
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert (layers["body.0"]["merge"]["kept"], layers["stem.0"]["merge"]["kept"]) == (8, 8)
    assert report["verify"]["merge_exact"] < 1e-9 and report["verify"]["split_exact"] < 1e-9
    statuses = {stage["name"]: (stage["status"], stage["reason"]) for stage in report["stages"]}
    assert not any("nothing was pruned" in message for message in report["messages"])
    assert statuses["reconstruct"] == ("skipped", "--method red++") and "8 duplicate channels" in statuses["merge"][1]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    original, pruned = (outputs(packaged / f"{v}.mar", x)[0] for v in ("original", "pruned"))
    assert np.linalg.norm(np.subtract(original, pruned)) <= 0.1 * np.linalg.norm(original)


@pytest.mark.exhaustive
def test_equal_input_gives_equal_archives_in_every_process(model: Path, tmp_path: Path) -> None:
    words = [
        "package",
        *arguments(model),
        "--keep",
        "0.5",
        "--round-to",
        "4",
        "--distil",
        "1",
        "--time-budget",
        "60",
        "--name",
        "same",
    ]
    code = (
        "import sys, redpp_serve.packaging.package as p, redpp_serve.pruning.pipeline as q, redpp_serve.cli as c\n"
        "from redpp_serve.pruning.effort import Effort\n"
        "from redpp_serve.pruning.matching import SynthesisBudget\n"  # fewer inputs and no trial runs: faster
        "p.run_trials, inf = lambda *_: [], float('inf')\n"  # a busy machine must not cut the distillation short
        "q.STANDARD_EFFORT = Effort(SynthesisBudget(32, 16, 4), latency_seconds=0.01, distillation_patience=inf)\n"
        "sys.exit(c.main(sys.argv[1:]))"
    )
    children = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, *words, "--out", str(tmp_path / seed)]
        children.append(
            subprocess.Popen(
                command,
                env={**os.environ, "PYTHONHASHSEED": seed},
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
    for child in children:
        _, printed = child.communicate(timeout=300)
        assert child.returncode == 0 and "not reproducible" not in printed, printed
    for name in ("original.mar", "pruned.mar"):
        first, second = (tmp_path / seed / name for seed in ("1", "2"))
        assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "1" / "original.mar").read_bytes() != (tmp_path / "1" / "pruned.mar").read_bytes()


def test_a_dry_run_writes_nothing_at_all(model: Path, tmp_path: Path) -> None:
    before = everything(tmp_path)
    report = package(captured(model), tmp_path / "dist" / "small", name="small", options=FAST, dry_run=True)
    assert everything(tmp_path) == before
    found = report.to_json()
    check_report(found, accuracy=False)
    assert "smoke" not in found and found["pruned"]["bytes"] < found["original"]["bytes"]


def test_the_step_of_widths_follows_the_engine_that_serves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_FEWEST_STEPS", 0.1)  # as in a network of more channels
    options, serving = replace(FAST, round_to="auto"), Serving(engine="redpp")
    stages = Stages(quiet=True)
    report = package(
        captured(model), tmp_path / "small", name="small", options=options, serving=serving, stages=stages, dry_run=True
    )
    assert report.options["round_to"] == 8
    assert stages.named("step").reason == "widths are multiples of 8: the own runtime serves here"
    assert "step" in [stage.name for stage in report.stages or ()]


@pytest.mark.parametrize(
    ("choice", "number"),
    [
        (
            {"keep": 0.5, "round_to": 4, "distil": 0, "max_error": 0.0001},
            r"relative output error is \d\.\d+ on the worst family of inputs \(measured: output error .*\)\. "
            r"Expected: at most 0\.0001 \(--max-error\)",
        ),
        (
            {"method": "red++", "min_agreement": 1.0, "hash_error": 0.9},
            r"top-1 agreement is \d+\.\d% \(\d+% to \d+%\) on the worst family of inputs \(measured: .* agreement "
            r".*\)\. Expected: at least 1 \(--min-agreement\)",
        ),
        (
            {
                "keep": 0.05,
                "round_to": 1,
                "distil": 0,
                "hash_error": 0.9,
            },  # the floor that holds where no limit was given
            r"relative output error is \d\.\d+ on the worst family .*\. Expected: at most 0\.5 \(--max-error\)",
        ),
        (
            {"method": "red++", "max_accuracy_drop": 0.01, "hash_error": 0.9},
            r"accuracy falls by \d+\.\d\d points, from 100.00% to .*\(--max-accuracy-drop\)",
        ),
    ],
)
def test_a_missed_gate_names_its_number_and_leaves_nothing(
    model: Path, tmp_path: Path, choice: dict[str, Any], number: str
) -> None:
    data, options = write_data(tmp_path / "data.npz"), Options(time_budget=1, **choice)
    before = everything(tmp_path)
    with pytest.raises(GateFailed, match=number) as caught:
        package(captured(model), tmp_path / "new" / "small", name="small", options=options, verify_data=data)
    assert caught.value.exit_code == 3
    left = {"new", f"new/{FRONTIER}"} if options.method == "narrow" else set()
    assert everything(tmp_path).keys() - before.keys() == left and before.items() <= everything(tmp_path).items()


def test_an_earlier_package_is_replaced_whole(model: Path, tmp_path: Path, untried: None) -> None:
    out = tmp_path / "small"
    package(captured(model), out, name="first", options=EXACT)
    (out / "key_file.json").write_text("{}")  # TorchServe leaves these where it is started
    (out / "logs").mkdir()
    package(captured(model), out, name="second", options=EXACT)
    assert {p.name for p in out.iterdir()} == FILES
    assert json.loads((out / "report.json").read_text())["name"] == "second"
    assert {p.name for p in tmp_path.iterdir()} == {"in", "small"}


def _foreign(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("work of years")


def _foreign_report(out: Path) -> None:
    out.mkdir()
    (out / "report.json").write_text('{"tool": {"name": "other"}}')


def _beside(out: Path) -> None:
    out.mkdir()
    (out / "report.json").write_text('{"tool": {"name": "redpp-serve"}}')
    (out / "thesis.txt").write_text("work of years")


def test_a_folder_with_anything_else_is_refused(model: Path, tmp_path: Path) -> None:
    for k, make in enumerate((_foreign, _foreign_report, _beside, lambda out: out.write_text("a file"))):
        out = tmp_path / str(k) / "small"
        out.parent.mkdir()
        make(out)
        before = everything(tmp_path)
        with pytest.raises(RedppError, match="small .*not written by this tool.*--out"):
            package(captured(model), out, name="small", options=EXACT)
        assert everything(tmp_path) == before


def test_an_empty_folder_is_filled(model: Path, tmp_path: Path, untried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path / "small")
    package(captured(model), Path("."), name="small", options=EXACT)
    assert {p.name for p in (tmp_path / "small").iterdir()} == FILES


def test_a_full_disk_leaves_the_earlier_package_as_it_was(
    model: Path, tmp_path: Path, untried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, network = tmp_path / "small", captured(model)
    package(network, out, name="small", options=EXACT)
    before = everything(tmp_path)
    for owner, where in ((np, "savez"), (module, "write_report"), (os, "replace")):
        real = getattr(owner, where)

        def full(*args: Any, real: Any = real, moving: bool = where == "replace", **_: Any) -> None:
            if not moving or Path(args[0]).name == "new":
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, where, full)
            with pytest.raises(RedppError, match="No space left on device.*--out"):
                package(network, out, name="other", options=EXACT)
        assert everything(tmp_path) == before, where


@pytest.mark.parametrize(
    "stage", ["package", *(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in ("reconstruct", "codebooks"))]
)
def test_an_interrupt_leaves_what_was_made_for_the_next_run_and_nothing_else(
    model: Path, tmp_path: Path, untried: None, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    owner, name = {
        "reconstruct": (lossy, "reconstruct"),
        "codebooks": (steps, "hash_within"),
        "package": (module, "write_report"),
    }[stage]
    real = getattr(owner, name)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before, network = everything(tmp_path), captured(model)
    options = Options(keep=0.5, round_to=4, distil=1, max_error=2.0, time_budget=30)
    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        package(network, tmp_path / "small", name="small", options=options)
    kept = {"reconstruct": ("",), "codebooks": ("", ".distil"), "package": ("", ".distil", ".tune")}[stage]
    left = {f".small.inputs.safetensors{part}" for part in kept} | ({FRONTIER} if stage != "reconstruct" else set())
    assert set(everything(tmp_path)) - set(before) == left
    monkeypatch.setattr(owner, name, real)
    monkeypatch.setattr(Matcher, "optimise", lambda *_: pytest.fail("inputs were matched again"))
    package(network, tmp_path / "small", name="small", options=options)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "small", FRONTIER}


def test_excluded_layers_keep_their_weights(model: Path, tmp_path: Path, untried: None) -> None:
    out = tmp_path / "small"
    report = package(captured(model), out, name="small", options=Options(method="red++", exclude=("body.*",)))
    layers = {layer["name"]: layer for layer in report.to_json()["layers"]}
    assert layers["body.0"]["hash"] is None and layers["body.0"]["pruned_shape"] == [16, 8, 3, 3]
    assert layers["body.0"]["merge"]["reason"] == "excluded"
    assert layers["stem.0"]["merge"]["reason"] == "body.0, which goes with it, is excluded" and layers["stem.0"]["hash"]
    assert report.options["exclude"] == ["body.*"]


def test_nothing_to_prune_is_a_good_outcome_with_reasons(tmp_path: Path, untried: None) -> None:
    model = write_model(tmp_path / "in", randomise(Flat()))
    network = captured(model, "Flat", (InputSpec("x", (6,)),))
    options = Options(time_budget=1, distil=0, exclude=("*",), accept_unmeasured=True)
    report = package(network, tmp_path / "flat", name="flat", options=options).to_json()
    assert {p.name for p in (tmp_path / "flat").iterdir()} == FILES
    assert report["original"]["parameters"] == report["pruned"]["parameters"] == 28
    assert report["verify"]["output_error"] == 0
    statuses = {s["name"]: s for s in report["stages"]}
    assert all(
        statuses[name]["status"] == "skipped" and statuses[name]["reason"] for name in ("hash", "reconstruct", "split")
    )
    assert [layer["merge"]["reason"] for layer in report["layers"]] == ["is an output of the network"]
    assert [m for m in report["messages"] if m.startswith("nothing was pruned")]


@pytest.mark.exhaustive
def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    two = randomise(Two())
    model = write_model(tmp_path / "in", two)
    network = captured(model, "Two", (InputSpec("input_0", (1, 9, 9)), InputSpec("input_1", (4,))))
    package(network, tmp_path / "two", name="two", options=FAST)
    with np.load(tmp_path / "two" / "inputs.npz") as file:
        x = {name: torch.from_numpy(file[name]) for name in file.files}
    assert {k: tuple(v.shape[1:]) for k, v in x.items()} == {"image": (1, 9, 9), "vector": (4,)}
    got = outputs(tmp_path / "two" / "original.mar", x["image"][0], x["vector"][0])
    with torch.no_grad():
        expected = two(x["image"][:1], x["vector"][:1])
    assert [len(y) for y in got] == [3, 8]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs[0].tolist(), rel=1e-4, abs=1e-5)
    with np.load(tmp_path / "two" / "sample.npz") as file, np.load(tmp_path / "two" / "inputs.npz") as kept:
        assert set(file.files) == set(kept.files) and all((file[k] == kept[k][0]).all() for k in file.files)
    assert "--data-binary @sample.npz" in (tmp_path / "two" / "README.md").read_text()


class Masked(torch.nn.Module):
    """Hides with the least number of float32, which no 16 bits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y.masked_fill(y > 1, torch.finfo(torch.float32).min)


def test_a_network_that_does_not_run_in_the_precision_is_refused_before_the_work(tmp_path: Path) -> None:
    source = Captured(capture(Masked().eval(), [InputSpec("x", (8,))], []), {})
    for precision in ("fp16", "bf16"):
        with pytest.raises(RedppError, match=f"does not run in {precision}.*precision fp32"):
            package(source, tmp_path / "out", name="masked", serving=Serving(precision=precision))
    assert not list(tmp_path.iterdir())


def test_names_and_preprocessing_are_checked_first(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RedppError, match="model name '../x'"):
        package(captured(model), tmp_path / "x", name="../x")
    wrong = Preprocess("RGB", 12, 12, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(RedppError, match=r"images of shape \(3, 12, 12\)"):
        package(captured(model), tmp_path / "x", name="x", preprocess=wrong)
    with pytest.raises(RedppError, match="--verify-data .* cannot be read"):
        package(captured(model), tmp_path / "x", name="x", verify_data=tmp_path / "absent.npz")
    assert not (tmp_path / "x").exists()


def test_the_archive_holds_no_paths_or_times_of_this_machine(
    packaged: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made_below = str(tmp_path_factory.getbasetemp().parent).encode()
    with zipfile.ZipFile(packaged / "pruned.mar") as file:
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert not any(made_below in file.read(name) for name in file.namelist())


def test_a_request_holds_one_input_without_batch() -> None:
    x = torch.arange(3.0)
    assert np.load(io.BytesIO(request_body({"x": as_array(x)}))).tolist() == [0, 1, 2]
    both = np.load(io.BytesIO(request_body({"a": as_array(x.bfloat16()), "b": as_array(x.int())})))
    assert both["a"].dtype == np.float32 and both["b"].tolist() == [0, 1, 2]


def test_the_machine_is_described_in_words() -> None:
    machine = describe_machine()
    assert "cores" in machine["device"] and machine["threads"] >= 1
    assert machine["versions"]["torch"] == torch.__version__


def test_doubts_are_said() -> None:
    short = "cut short by --time-budget in batch 1 of 2: a larger budget fits better"
    for changes, words in (
        ({}, []),
        ({"output_error": 0.6}, ["relative error 0.60, the same class on 95.0%"]),
        ({"agreement": 0.5}, ["the same class on 50.0%"]),
        ({"output_error": 1.35, "agreement": None}, ["relative error 1.35 on held-out inputs"]),
        ({"inputs": short}, ["inputs that were not finished"]),
        ({"output_error": 0.5, "agreement": 0.9}, []),  # the limits themselves
    ):
        found = doubts(Verify.from_json({"output_error": 0.1, "agreement": 0.95, "inputs": "matched", **changes}))
        assert len(found) == len(words), changes
        assert all(word in text for word, text in zip(words, found, strict=True)), changes
