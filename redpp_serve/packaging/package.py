"""The package command: prune, build both archives, try them, and put everything in place at once."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..capture import Captured
from ..errors import RedppError
from ..graph.layers import mac_count, parameter_count
from ..handlers.preprocess import Preprocess
from ..pruning.accounting import totals
from ..pruning.options import Options
from ..pruning.pipeline import Pruned, prune
from ..pruning.stages import Stages
from ..pruning.verify import load_verify_data
from ..report import write_reports
from ..runtime.artifact import build, load
from ..runtime.graph import Graph, InputSpec
from ..runtime.program import Program
from .mar import build_mar, check_name
from .readme import readme, sample_name
from .server_config import LOG4J2, config_properties, model_config
from .smoke import run_archives

VARIANTS = {"original": "1.0", "redpp": "2.0"}
_WRITTEN = {
    "original.mar", "redpp.mar", "config.properties", "log4j2.xml", "model-config.yaml", "README.md", "inputs.npz",
    "sample.npy", "sample.npz",
    "report.json", "report.html", "key_file.json", "logs",  # the last two by TorchServe
}  # fmt: skip


@dataclass(frozen=True)
class Serving:
    """How the archives are to be served: requests in a batch, how long a batch waits, torch threads of a worker."""

    batch_size: int = 8
    max_batch_delay_ms: int = 2
    threads: int = 1


def package(
    captured: Captured,
    out: Path,
    *,
    name: str,
    options: Options = Options(),
    serving: Serving = Serving(),
    preprocess: Preprocess | None = None,
    verify_data: Path | None = None,
    stages: Stages | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Prune a captured network and write a folder that two versions are served from. Returns the report.

    The folder appears whole or not at all; an earlier one of this tool is replaced. With ``dry_run`` everything but
    the archives' trial runs and nothing is written.

    Raises:
        RedppError: a name or folder that cannot be used, no space.
        GateFailed: a verification number missed its limit; nothing is written.
    """
    out = Path(os.path.abspath(out))  # '.' has no name of its own
    check_name(name)
    check_out(out)
    _check_preprocess(preprocess, captured.graph.inputs)
    stages = stages or Stages(quiet=True)
    scale = (preprocess.mean, preprocess.std) if preprocess else None
    data = load_verify_data(verify_data, captured.graph, scale) if verify_data else None
    checkpoint = None if dry_run else out.parent / f".{out.name}.inputs.safetensors"
    with _all_or_nothing(out, checkpoint):
        result = prune(captured.graph, options, stages=stages, data=data, checkpoint=checkpoint)
        with stages.run("package") as stage:
            artifacts, archives = _build_archives(name, result, preprocess, serving)
            stage.reason = ", ".join(f"{variant}.mar {len(a) / 1e6:.2f} MB" for variant, a in archives.items())
        report = _report(captured, name, {**options.to_json(), **asdict(serving)}, result, artifacts)
        if result.choice.points:
            with stages.run("frontier") as stage:
                report["frontier"] = result.frontier(options.device, report["environment"]["device"])
                stage.reason = f"{len(result.choice.points)} networks timed in turns"
        if not dry_run:
            _write(out, name, captured.graph.inputs, archives, report, result, preprocess, serving, stages)
    report["stages"] = stages.to_json()
    return report


@contextmanager
def _all_or_nothing(out: Path, checkpoint: Path | None) -> Iterator[None]:
    """Only an interrupted run leaves its inputs behind, for the next one; a failed one not even an empty folder."""
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        yield
    except Exception as error:
        _forget(checkpoint)
        for folder in filter(Path.is_dir, made):
            if not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            raise RedppError(f"{out} cannot be written: {error}", "a folder with enough free space and write permission",
                             "free some space or choose another folder with --out") from error  # fmt: skip
        raise
    _forget(checkpoint)


def _forget(checkpoint: Path | None) -> None:
    for path in (checkpoint, *(checkpoint.with_name(f"{checkpoint.name}.{x}") for x in ("distil", "tune"))) if checkpoint else ():
        with suppress(OSError):  # where it could not be written it cannot be removed either
            path.unlink(missing_ok=True)


def _write(
    out: Path, name: str, inputs: tuple[InputSpec, ...], archives: dict[str, bytes], report: dict[str, Any],
    result: Pruned, preprocess: Preprocess | None, serving: Serving, stages: Stages,
) -> None:  # fmt: skip
    """Fill a scratch folder beside ``out``, try the archives in it, and move it into place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir(mode=0o755)
        for variant, archive in archives.items():
            (folder / f"{variant}.mar").write_bytes(archive)
        texts = {
            "config.properties": config_properties(), "log4j2.xml": LOG4J2, "model-config.yaml": _model_config(serving),
            "README.md": readme(name, inputs, preprocess),
        }  # fmt: skip
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        np.savez(folder / "inputs.npz", **{spec.name: _array(x) for spec, x in zip(inputs, result.samples)})
        with stages.run("try") as stage:
            request = request_body(result.samples, 0, tuple(spec.name for spec in inputs))
            (folder / sample_name(inputs)).write_bytes(request)
            expected = [_outputs(graph, result.samples) for graph in (result.original, result.pruned)]
            report["smoke"] = run_archives([folder / f"{v}.mar" for v in VARIANTS], request, expected)
            stage.reason = "both archives' handlers answer one request as the networks do"
        report["stages"] = stages.to_json()
        write_reports(report, folder)
        _replace(folder, out, Path(scratch) / "old")


def request_body(inputs: tuple[torch.Tensor, ...], index: int, names: tuple[str, ...] = ()) -> bytes:
    """One input as a request: .npy for a network with one input, .npz with the inputs' names for several."""
    stream = io.BytesIO()
    if len(inputs) == 1:
        np.save(stream, _array(inputs[0][index]))
    else:
        np.savez(stream, **{name: _array(x[index]) for name, x in zip(names, inputs)})
    return stream.getvalue()


def _array(x: torch.Tensor) -> np.ndarray:
    """NumPy has no bfloat16; the handler takes float32 for it."""
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def describe_machine() -> dict[str, Any]:
    """Device and versions that a figure was measured with."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "device": f"{model}, {os.cpu_count()} cores{gpu}",
        "threads": torch.get_num_threads(),
        "versions": {
            "redpp-serve": __version__, "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        },
    }  # fmt: skip


def _report(
    captured: Captured, name: str, options: dict[str, Any], result: Pruned, artifacts: dict[str, bytes]
) -> dict[str, Any]:
    report = {
        "tool": {"name": "redpp-serve", "version": __version__},
        "name": name,
        "source": captured.source,
        "messages": captured.messages,
        "options": options,
        "environment": describe_machine(),
        "counting": result.counting,
        "hash": result.hash,
        "layers": result.layers,
        "verify": result.verify,
        "stages_share": result.shares,
    }
    for key, variant, graph in (("original", "original", result.original), ("pruned", "redpp", result.pruned)):
        stored = int(load(artifacts[variant]).description["bytes"])
        report[key] = totals(graph, result.counts[key], stored)
    if result.accuracy:
        report["original"]["accuracy"], report["pruned"]["accuracy"] = result.accuracy
    return report


def _build_archives(
    name: str, result: Pruned, preprocess: Preprocess | None, serving: Serving
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The artifact and the archive of each variant."""
    artifacts, archives = {}, {}
    for (variant, version), graph in zip(VARIANTS.items(), (result.original, result.pruned)):
        description = {
            "name": name, "variant": variant, "version": version, "preprocess": preprocess.to_json() if preprocess else None,
            "info": {"parameters": parameter_count(graph), "macs": mac_count(graph)},
        }  # fmt: skip
        artifacts[variant] = build(graph, description)
        archives[variant] = build_mar(artifacts[variant], name=name, version=version, model_config=_model_config(serving))
    return artifacts, archives


def _model_config(serving: Serving) -> str:
    return model_config(serving.batch_size, serving.max_batch_delay_ms, serving.threads)


def _outputs(graph: Graph, samples: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    with torch.no_grad():
        return [y[0].double().numpy() for y in Program(graph)(*(x[:1] for x in samples))]


def check_out(out: Path) -> None:
    """Refuse to replace anything but an earlier package and what TorchServe writes when it is started in one.

    Raises:
        RedppError: names what would be lost.
    """
    if not out.exists() and not out.is_symlink():
        return
    try:
        entries = sorted(path.name for path in out.iterdir())
        ours = not entries or json.loads((out / "report.json").read_text(encoding="utf-8"))["tool"]["name"] == "redpp-serve"
    except (OSError, ValueError, KeyError, TypeError):
        entries, ours = [], False
    foreign = [name for name in entries if name not in _WRITTEN]
    if not ours or foreign:
        lost = f"holds {', '.join(foreign[:5])}, which" if ours else "exists and"
        raise RedppError(f"{out} {lost} was not written by this tool", "a new or empty folder, or an earlier package",
                         "choose another folder with --out, or move away what is there")  # fmt: skip


def _check_preprocess(preprocess: Preprocess | None, inputs: tuple[InputSpec, ...]) -> None:
    if preprocess and (len(inputs) != 1 or preprocess.shape != inputs[0].shape):
        raise RedppError(f"--preprocess gives images of shape {preprocess.shape}",
                         f"the network's input shape {[i.shape for i in inputs]}", "correct mode, height and width")  # fmt: skip


def _replace(new: Path, out: Path, aside: Path) -> None:
    try:
        if out.exists():
            os.replace(out, aside)
        os.replace(new, out)
    except BaseException:  # also Ctrl-C between the two
        if aside.exists() and not out.exists():
            os.replace(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
