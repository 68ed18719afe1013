"""The GPU benchmark without a GPU: arithmetic, no time for a wrong or hanging kernel, and a whole rehearsal."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_worker
from benchmarks.gpu_cells import Cell, Contender, error_limit, measure_cell, relative_error
from benchmarks.gpu_journal import Budget, DeviceLost, Journal, hung, unfinished
from benchmarks.gpu_layers import ConvShape, codebook_weight, conv_shapes
from benchmarks.gpu_models import MODELS
from benchmarks.gpu_peers import grouped_int4, ungrouped
from benchmarks.gpu_settings import FULL, QUICK, REHEARSAL
from benchmarks.gpu_targets import COMPILED, Target, evaluate, text
from benchmarks.gpu_timing import Bench, Monitor, Peaks, in_turns, quantile, ratio, spread

ROOT = Path(__file__).parents[2]
CPU = Bench(torch.device("cpu"), torch.float32, rehearse=True)
PEAKS = Peaks(bandwidth=4e12, matrix=8e14, floor=2e-6, l2=50 << 20)


class Clock:
    """A clock that goes on only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_over_goes_to_the_next() -> None:
    clock = Clock()
    budget = Budget(100.0, clock)
    first = budget.part(1.0, 4.0)
    assert first.left == 25.0 and first.at_most(7.0) == 7.0
    clock.now = 5.0
    assert first.left == 20.0 and budget.part(1.0, 3.0).left == pytest.approx(95 / 3)
    clock.now = 300.0
    assert budget.left == first.left == 0.0


def test_the_longest_run_stays_under_eight_minutes() -> None:
    assert FULL.seconds + 10 < 480 and QUICK.seconds <= 60
    for settings in (FULL, QUICK, REHEARSAL):
        assert sum(share for _, share in settings.shares) == pytest.approx(1.0)
        assert [name for name, _ in settings.shares] == ["linear", "conv", "networks"]


def test_rounds_go_there_and_back_and_the_first_is_dropped() -> None:
    clock, order = Clock(), []

    def run(name: str, seconds: float) -> Callable[[], float]:
        def call() -> float:
            order.append(name)
            clock.now += 1.0
            return seconds if len(order) > 4 else 100.0

        return call

    times = in_turns({"a": run("a", 1.0), "b": run("b", 2.0)}, 50.0, clock)
    assert order[:8] == ["a", "b", "b", "a"] * 2
    assert set(times["a"]) == {1.0} and set(times["b"]) == {2.0} and len(times["a"]) == len(order) / 4 - 1
    assert ratio(times["b"], times["a"]).median == 2.0


def test_quantiles_are_those_of_everyone_else() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 10.0]
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert quantile(values, q) == pytest.approx(float(torch.quantile(torch.tensor(values, dtype=torch.float64), q)))
    assert spread([2e-6, 1e-6, 4e-6]).micro()[0] == 2.0


def test_the_roofline_takes_the_slower_of_memory_and_matrix_unit() -> None:
    assert PEAKS.roofline(4_000_000, 8) == 1e-6 and PEAKS.roofline(4, 8_000_000_000) == 1e-5
    assert PEAKS.copies(33_554_432) == 5 and PEAKS.copies(10**9) == 2 and PEAKS.copies(1) == 256
    assert PEAKS.calls(8, 8) == 24 and PEAKS.calls(4 * 10**9, 0) == 4


def test_clocks_are_read_even_where_a_field_is_missing() -> None:
    found = Monitor.summary("1980, 2619, 250.10, 40\n1200, 2619, [N/A], 42\nbroken\n")
    assert found["clocks.sm"] == [1200.0, 1590.0, 1980.0] and found["power.draw"] == [250.1] * 3
    assert Monitor("no-such-program").stop() == {}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


def right(x: Tensor) -> Tensor:
    return torch.relu(x)


def contender(name: str, call: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> Contender:
    def fresh() -> Callable[[], Tensor]:
        own = x.clone()
        return lambda: call(own)

    return Contender(name, fresh, 400, 100, **options)


def unwritten(x: Tensor) -> Tensor:
    y = right(x)
    y[-1] = float("nan")
    return y


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


def sleeps(x: Tensor) -> Tensor:
    while True:
        with suppress(Exception):  # as compilers do
            time.sleep(5)


class Flaky:
    """Right at first, wrong once it is timed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return right(x) if self.calls < 30 else 2 * right(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_only_what_is_right_gets_a_time(journal: Journal, dtype: torch.dtype) -> None:
    x = torch.randn(10, 10).to(dtype)
    wrong = {
        "off by a little": lambda v: right(v) * 1.01,
        "unwritten": unwritten,
        "shape": lambda v: right(v)[:5],
        "infinite": lambda v: right(v) / 0,
        "raises": raises,
    }
    rows = [
        contender("dense", right, x),
        *(contender(name, call, x) for name, call in wrong.items()),
        contender("good", lambda v: v.clamp(min=0), x),
        contender("flaky", Flaky(), x),
        contender("slow", sleeps, x, limit_s=0.2),
    ]
    peer = contender("peer", lambda v: 3 * v, x, expected=lambda: 3 * x.double(), exact=False)
    row = measure_cell(
        Cell("linear", {"rows": 1}, [*rows, peer], lambda: right(x).double(), {"absent": "not here"}),
        CPU,
        PEAKS,
        journal,
        0.0,
    )
    cells = row["contenders"]
    timed = {name for name, cell in cells.items() if "cold_us" in cell}
    assert timed == {"dense", "good", "peer"} and all("warm_ratio" in cells[name] for name in timed)
    assert {name for name, cell in cells.items() if "failed" in cell} == set(cells) - timed
    assert (
        "relative error 0.01" in cells["off by a little"]["failed"].replace("0.0099", "0.01")
        and "inf" in cells["unwritten"]["failed"]
    )
    assert (
        cells["raises"]["failed"] == "RuntimeError: no kernel image is available"
        and "not done" in cells["slow"]["failed"]
    )
    assert "after its timing" in cells["flaky"]["failed"] and cells["absent"]["failed"] == "not here"
    assert cells["good"]["roofline_us"] == pytest.approx(1e6 * PEAKS.roofline(400, 100), abs=1e-3)


def test_errors_are_relative_and_nan_is_the_largest() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a * 1.1, a) == pytest.approx(0.1) and relative_error(a[:1], a) == float("inf")
    assert relative_error(torch.tensor([3.0, float("nan")]), a) == float("inf")
    many = torch.ones(10**6)
    assert relative_error(many.index_fill(0, torch.tensor(7), 1.5), many) == 0.5
    assert error_limit(1e-3, torch.float16) == 2e-3 + 2**-10


def test_a_worker_goes_on_behind_what_killed_the_last(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    assert first.attempt("fine", 5.0, lambda: 3) == (3, "")
    first.add("try", key="deadly", seconds=1.0)
    path.open("a").write('{"kind": "torn')
    second = Journal(path)
    called: list[int] = []
    assert second.attempt("deadly", 5.0, lambda: called.append(1)) == (None, "crashed: its process died or hung")
    assert second.attempt("late", 0.0, lambda: called.append(1)) == (None, "not reached") and not called
    assert unfinished(second.records) is None and Journal(path).crashed == {"deadly": "its process died or hung"}


def test_a_lost_device_ends_the_worker_with_its_reason(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("illegal memory access")

    journal = Journal(tmp_path / "journal.jsonl", broken)
    with pytest.raises(DeviceLost):
        journal.attempt("bad kernel", 5.0, broken)
    assert Journal(tmp_path / "journal.jsonl").crashed == {"bad kernel": "RuntimeError: illegal memory access"}


def test_silence_is_no_hang_until_a_try_outstays_its_limit() -> None:
    pending = [{"kind": "try", "key": "k", "seconds": 10.0}]
    assert not hung(pending, 20.0) and hung(pending, 26.0) and not hung([*pending, {"kind": "tried", "key": "k"}], 1e6)


@pytest.fixture
def child() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    children: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
        return children[-1]

    yield start
    for process in children:
        process.kill()
        process.wait()


def test_workers_that_die_hang_or_outstay_the_time_are_told_apart(
    child: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "POLL_S", 0.02)
    path = tmp_path / "journal.jsonl"
    assert gpu.watch(child("pass"), path, Budget(60.0)) == ""
    assert gpu.watch(child("import os; os._exit(3)"), path, Budget(60.0)) == "ended with status 3"
    assert gpu.watch(child("import time; time.sleep(60)"), path, Budget(1.0)) == "out of time"
    monkeypatch.setattr("benchmarks.gpu_journal.GRACE_S", 0.1)
    Journal(path).add("try", key="hangs", seconds=0.1)
    assert gpu.watch(child("import time; time.sleep(60)"), path, Budget(60.0)) == "hung and was stopped"


def layer(rows: int, n_in: int, **cold: float) -> dict[str, Any]:
    cells = {name.replace("_", ":"): {"cold_us": [us, us, us], "warm_us": [us, us, us]} for name, us in cold.items()}
    return {"section": "linear", "n_out": 4096, "n_in": n_in, "rows": rows, "reference": "dense", "contenders": cells}


def whole(name: str, batch: int, peer: bool = False, **us: float) -> dict[str, Any]:
    cells = {arm.replace("_", " "): {"device_us": [t, t, t], "host_us": [t, t, t]} for arm, t in us.items()}
    row = {"section": "network", "network": name, "batch": batch, "reference": "x", "contenders": cells}
    return {**row, **({"peer": "torch.compile"} if peer else {})}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, Target]:
    return {target.name.partition(",")[0]: target for target in evaluate(rows)}


def test_targets_are_met_missed_or_not_measured() -> None:
    rows = [
        layer(1, 4096, dense=10.0, codebook16_pair=5.0, codebook16_auto=9.0, nf4=4.9),
        layer(8, 4096, dense=10.0, codebook16_pair=4.0, nf4=8.0),
        layer(64, 4096, dense=10.0, codebook16_pair=20.0),
        layer(4, 25088, dense=60.0, codebook16_auto=21.0),
        layer(2, 25088, dense=60.0),
    ]
    found = evaluate(rows)
    by = {(t.name, t.verdict): t for t in found}
    small = next(t for t in found if "of 16 over cuBLAS fp16, 4096x4096" in t.name)
    assert small.verdict == "met" and small.value == 2.0 and "worst at 1 rows with pair" in small.detail
    large = next(t for t in found if "of 16 over cuBLAS fp16, 4096x25088" in t.name)
    assert large.verdict == "missed" and large.value == pytest.approx(60 / 21) and "without 2 rows" in large.detail
    assert next(t for t in found if "over nf4" in t.name).verdict == "missed"
    assert {t.verdict for t in found if "gemlite" in t.name or "of 8" in t.name} == {"not measured"} and len(by) == len(
        found
    )
    assert {t.verdict for t in evaluate([])} == {"not measured"}


def test_network_targets_name_what_was_not_reached() -> None:
    times = {"stock_fp32": 4000.0, "stock_fp16": 3100.0, "original": 900.0, "pruned": 1000.0}
    rows = [
        whole("a", 1, **times),
        whole("a", 8, **times),
        whole("b", 8, **times),
        whole("a", 8, True, pruned=1000.0, **{COMPILED.replace(" ", "_"): 1290.0}),
    ]
    found = evaluate(rows)
    compiled = next(t for t in found if COMPILED in t.name)
    assert (
        compiled.verdict == "missed"
        and compiled.value == pytest.approx(1.29)
        and "without b, batch 8" in compiled.detail
    )
    assert [t.verdict for t in found if "stock" in t.name] == ["met", "met"]
    planned = {
        "section": "planned",
        "network": "a",
        "version": "pruned",
        "layer": "fc",
        "batch": 1,
        "reference": "dense",
        "contenders": {"dense": {"warm_ratio": [1.0, 1, 1]}, "codebook:pair": {"warm_ratio": [0.97, 0.9, 1.0]}},
    }
    assert (
        evaluate([*rows, planned])[-1].verdict == "missed"
        and "fc batch 1 (codebook:pair)" in evaluate([planned])[-1].detail
    )


def test_int4_numbers_stand_for_nearly_the_weight() -> None:
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    number, scale, zero = grouped_int4(weight, 128)
    assert (
        number.min() == 0 and number.max() == 15 and relative_error(ungrouped(number, scale, zero, 128), weight) < 0.12
    )


def test_networks_are_those_of_the_papers() -> None:
    with torch.device("meta"):
        found = {name: sum(p.numel() for p in make().parameters()) for name, make in MODELS.items()}
    del found["rehearsal"]
    assert found == {"resnet50": 25557032, "mobilenet_v2": 3504872, "efficientnet_b0": 5288548, "vgg16": 138357544}


def test_convolutions_come_from_the_networks() -> None:
    shapes = conv_shapes("resnet50")
    assert (
        ConvShape(3, 64, 7, 2, 3, 1, 224, "relu", False) in shapes
        and ConvShape(64, 64, 3, 1, 1, 1, 56, "relu", False) in shapes
    )
    assert ConvShape(512, 2048, 1, 1, 0, 1, 7, "relu", True) in shapes and len(shapes) == len(set(shapes)) > 20
    mobile = conv_shapes("mobilenet_v2")
    assert (
        ConvShape(96, 96, 3, 2, 1, 96, 112, "relu6", False) in mobile
        and ConvShape(96, 24, 1, 1, 0, 1, 56, "none", False) in mobile
    )
    half = ConvShape(96, 96, 3, 2, 1, 96, 112, "relu6", False).at_width(0.5)
    assert (half.n_in, half.n_out, half.groups) == (48, 48, 48) and shapes[0].at_width(0.5).n_in == 3


def test_kernels_are_compiled_in_shares(tmp_path: Path) -> None:
    tried = []
    for share in range(2):
        journal = Journal(tmp_path / f"{share}.jsonl")
        gpu_worker.warm_up(journal, CPU, Budget(60.0), REHEARSAL, share, 2)
        tried.append({record["key"] for record in journal.of("tried")})
    assert not tried[0] & tried[1] and any("depthwise" in key for key in tried[0] | tried[1])
    assert any("codebook8:prmt8" in key for key in tried[0] | tried[1]) and not any(
        key.endswith("dense") for key in tried[0]
    )


def test_codebook_weights_use_every_value() -> None:
    book = codebook_weight(CPU, 64, 128, 16)
    assert len(book.values) == 16 and torch.equal(book.values[book.index], book.weight)
    assert (
        book.index.unique().numel() == 16
        and 0.005 < book.index.flatten().bincount().min() / book.index.numel() < 1 / 16
    )


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out)]) == 2 and not list(tmp_path.iterdir())
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Result and plan table of a whole rehearsal from the command line."""
    folder = tmp_path_factory.mktemp("gpu")
    assert gpu.main(["--rehearse", "--out", str(folder / "gpu.json"), "--table", str(folder / "plans.json")]) == 0
    return json.loads((folder / "gpu.json").read_text()), json.loads((folder / "plans.json").read_text())


@pytest.mark.exhaustive
def test_a_rehearsal_runs_every_section(rehearsal: tuple[dict[str, Any], dict[str, Any]]) -> None:
    result, table = rehearsal
    assert {row["section"] for row in result["rows"]} >= {"linear", "conv", "network"} and "rehearsal" in result[
        "device"
    ]
    assert (
        not result["crashed"] and not result["workers ended early"] and not result["not reached"] and table["entries"]
    )
    assert {plan["version"] for plan in result["plans"]} == {"original", "pruned"}
    assert result["peaks"]["bandwidth"] > 0 and result["versions"]["torch"] == torch.__version__
    lines = text(result)
    assert "Linear, microseconds" in lines and "not measured: codebook of 16 over gemlite" in lines


@pytest.mark.exhaustive
def test_in_a_rehearsal_all_that_a_cpu_can_do_is_right_and_timed(
    rehearsal: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    on_gpu_only = {"cudnn", "int4pack", "fp8", "nf4", "gemlite"}
    for row in rehearsal[0]["rows"]:
        for name, cell in row["contenders"].items():
            if name not in on_gpu_only:
                assert "failed" not in cell, (row, name)
                assert cell["error"] < 1e-4 and (cell.get("cold_us") or cell["device_us"])[0] > 0
        assert row["section"] == "planned" or len(row["contenders"]) > 1
    linear = next(row for row in rehearsal[0]["rows"] if row["section"] == "linear")
    assert {"dense", "fused", "split", "codebook16:auto", "codebook16:pair", "codebook8:prmt8"} <= set(
        linear["contenders"]
    )


@pytest.mark.exhaustive
def test_a_bare_checkout_is_enough(stock_python: Path) -> None:
    code = "from benchmarks import gpu_worker; import redpp_serve.kernels, sys; print(redpp_serve.kernels.__file__)"
    run = subprocess.run([stock_python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), run.stderr[-2000:]
