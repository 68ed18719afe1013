"""The package command: prune, build both archives, try them, and put everything in place at once."""

from __future__ import annotations

import io
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redpp_serve import __version__
from redpp_serve.capture import Captured
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import build, load
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import mac_count, parameter_count
from redpp_serve.graph.passes import in_precision
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.options import Options, Serving
from redpp_serve.packaging.mar import build_mar, check_name
from redpp_serve.packaging.output_folder import all_or_nothing, check_out, replace
from redpp_serve.packaging.readme import readme, sample_name
from redpp_serve.packaging.server_config import LOG4J2, config_properties, model_config
from redpp_serve.packaging.trials import run_trials, try_archive, try_model
from redpp_serve.packaging.triton_repository import (
    VERSIONS,
    build_repository,
    output_specs,
    to_json,
    to_text,
    triton_config,
    write_files,
)
from redpp_serve.pruning.accounting import totals
from redpp_serve.pruning.pipeline import Pruned, prune
from redpp_serve.pruning.verification import load_verify_data
from redpp_serve.report import write_reports
from redpp_serve.runtime.device import device_name
from redpp_serve.runtime.serving_graph import layer_inputs, serving_graph
from redpp_serve.stages import Stages

VARIANTS = {"original": "1.0", "pruned": "2.0"}
_FAR, _ALIKE = 0.5, 0.9  # relative output error, and agreement of classes, that nobody should deploy without a look


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
    if serving.precision in ("fp16", "bf16"):  # what cannot run in it is refused before hours of pruning, not after
        layer_inputs(
            serving_graph(captured.graph, torch.device("cpu"), serving.precision),
            torch.device("cpu"),
            serving.precision,
        )
    stages = stages or Stages(quiet=True)
    scale = (preprocess.mean, preprocess.std) if preprocess else None
    data = load_verify_data(verify_data, captured.graph, scale) if verify_data else None
    checkpoint = None if dry_run else out.parent / f".{out.name}.inputs.safetensors"
    with all_or_nothing(out, checkpoint):
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
            _write(out, name, captured.graph.inputs, (artifacts, archives), report, result, preprocess, serving, stages)
    report["stages"] = stages.to_json()
    return report


def _write(
    out: Path,
    name: str,
    inputs: tuple[InputSpec, ...],
    built: tuple[dict[str, bytes], dict[str, bytes]],
    report: dict[str, Any],
    result: Pruned,
    preprocess: Preprocess | None,
    serving: Serving,
    stages: Stages,
) -> None:
    """Fill a scratch folder beside ``out``, try the archives in it, and move it into place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir(mode=0o755)
        artifacts, archives = built
        for variant, archive in archives.items():
            (folder / f"{variant}.mar").write_bytes(archive)
        outputs = {v: _outputs(graph, result.samples) for v, graph in zip(VARIANTS, (result.original, result.pruned))}
        config = _triton_config(name, inputs, outputs, serving)
        first = [_array(x[0]) for x in result.samples]
        write_files(folder / "triton", build_repository(name, artifacts, to_text(config), first))
        texts = {
            "config.properties": config_properties(),
            "log4j2.xml": LOG4J2,
            "model-config.yaml": _model_config(serving),
            "README.md": readme(name, inputs, preprocess),
        }
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        np.savez(folder / "inputs.npz", **{spec.name: _array(x) for spec, x in zip(inputs, result.samples)})
        with stages.run("try") as stage:
            request = request_body(result.samples, 0, tuple(spec.name for spec in inputs))
            (folder / sample_name(inputs)).write_bytes(request)
            # in the handlers' precision, whose rounding is no error of theirs
            served = {
                v: _outputs(in_precision(graph, serving.precision), result.samples)
                for v, graph in zip(VARIANTS, (result.original, result.pruned))
            }
            expected = {v: [y.double().numpy() for y in ys] for v, ys in served.items()}
            report["smoke"] = run_trials(
                [
                    *(try_archive(folder / f"{v}.mar", request, expected[v], serving.precision) for v in VARIANTS),
                    *(
                        try_model(folder / "triton" / name / n, to_json(config), request, expected[v])
                        for v, n in VERSIONS.items()
                    ),
                ],
                serving.precision,
            )
            stage.reason = "both versions' handlers, for each server, answer one request as the networks do"
        report["stages"] = stages.to_json()
        write_reports(report, folder)
        replace(folder, out, Path(scratch) / "old")


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
    model = device_name(torch.device("cpu"))
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "device": f"{model}, {os.cpu_count()} cores{gpu}",
        "threads": torch.get_num_threads(),
        "versions": {
            "redpp-serve": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def doubts(verify: dict[str, Any]) -> list[str]:
    """What a reader of the verification should not overlook."""
    found = []
    agreement, error = verify["agreement"], verify["output_error"]
    if error > _FAR or (agreement is not None and agreement < _ALIKE):
        classes = "" if agreement is None else f", the same class on {agreement:.1%}"
        found.append(
            f"the pruned network's outputs are far from the original's (relative error {error:.2f}{classes} on held-out "
            "inputs): prune less, give more --time-budget and --distil, or check it with --verify-data"
        )
    if "cut short by --time-budget in" in verify["inputs"]:
        found.append(
            "error and agreement were measured on inputs that were not finished: a larger --time-budget measures better"
        )
    return found


def _report(
    captured: Captured, name: str, options: dict[str, Any], result: Pruned, artifacts: dict[str, bytes]
) -> dict[str, Any]:
    report = {
        "tool": {"name": "redpp-serve", "version": __version__},
        "name": name,
        "source": captured.source,
        "messages": [*captured.messages, *doubts(asdict(result.verify))],
        "options": options,
        "environment": describe_machine(),
        **result.to_json(),
    }
    counting = result.counting
    networks = {"original": (result.original, counting.dense), "pruned": (result.pruned, counting.kernel)}
    for variant, (graph, counts) in networks.items():
        stored = int(load(artifacts[variant]).description["bytes"])
        report[variant] = totals(graph, counts, stored)
    if result.accuracy:
        report["original"]["accuracy"], report["pruned"]["accuracy"] = result.accuracy
        report["accuracy_of"] = "verification data"  # a comparison's, on what was sent, does not replace it
    return report


def _build_archives(
    name: str, result: Pruned, preprocess: Preprocess | None, serving: Serving
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The artifact and the archive of each variant."""
    artifacts, archives = {}, {}
    for (variant, version), graph in zip(VARIANTS.items(), (result.original, result.pruned)):
        description = {
            "name": name,
            "variant": variant,
            "version": version,
            "preprocess": preprocess.to_json() if preprocess else None,
            "info": {"parameters": parameter_count(graph), "macs": mac_count(graph)},
        }
        artifacts[variant] = build(graph, description).data
        archives[variant] = build_mar(
            artifacts[variant], name=name, version=version, model_config=_model_config(serving)
        )
    return artifacts, archives


def _model_config(serving: Serving) -> str:
    return model_config(**asdict(serving))


def _triton_config(
    name: str, inputs: tuple[InputSpec, ...], outputs: dict[str, list[torch.Tensor]], serving: Serving
) -> dict[str, Any]:
    specs = {
        variant: [InputSpec("", tuple(y.shape), str(y.dtype).removeprefix("torch.")) for y in ys]
        for variant, ys in outputs.items()
    }
    return triton_config(name, inputs, output_specs(specs), **asdict(serving))


def _outputs(graph: Graph, samples: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Of the first of the kept inputs, without batch dimension."""
    with torch.no_grad():
        return [y[0] for y in Program(graph)(*(x[:1] for x in samples))]


def _check_preprocess(preprocess: Preprocess | None, inputs: tuple[InputSpec, ...]) -> None:
    if preprocess and (len(inputs) != 1 or preprocess.shape != inputs[0].shape):
        raise RedppError(
            f"--preprocess gives images of shape {preprocess.shape}",
            f"the network's input shape {[i.shape for i in inputs]}",
            "correct mode, height and width",
        )
