"""The package command: prune, build both versions, try them, and put everything in place at once."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redpp_serve import __version__
from redpp_serve.capture import Captured
from redpp_serve.capture.any_size import other_sizes
from redpp_serve.capture.inputs import sample
from redpp_serve.errors import RedppError
from redpp_serve.graph.artifact import Artifact, build
from redpp_serve.graph.executor import Program
from redpp_serve.graph.graph import Graph, InputSpec
from redpp_serve.graph.layers import mac_count, parameter_count
from redpp_serve.graph.passes import half_of, in_precision
from redpp_serve.handlers.payload import read_image
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.machine import describe_machine
from redpp_serve.options import Options, Serving
from redpp_serve.packaging.bounds import body_limits
from redpp_serve.packaging.mar import CONFIG, build_mar, check_name
from redpp_serve.packaging.output_folder import (
    all_or_nothing,
    already_made,
    check_out,
    checkpoint_of,
    frontier_files,
    replaced,
    with_origin,
    write_files,
)
from redpp_serve.packaging.readme import readme
from redpp_serve.packaging.samples import INPUTS, as_array, example_image, request_body, sample_name
from redpp_serve.packaging.server_config import CONFIG as CONFIG_PROPERTIES
from redpp_serve.packaging.server_config import LOG4J2, config_properties, model_config
from redpp_serve.packaging.trials import Trial, run_trials, try_archive, try_model
from redpp_serve.packaging.triton_repository import build_repository, output_specs, to_json, triton_config
from redpp_serve.pruning.accounting import totals
from redpp_serve.pruning.choose import known_widths
from redpp_serve.pruning.families import Scale
from redpp_serve.pruning.inputs import Sources
from redpp_serve.pruning.pipeline import Pruned, prune
from redpp_serve.pruning.precisions import Precisions, measure_precisions
from redpp_serve.pruning.real_inputs import load_inputs
from redpp_serve.pruning.records import Verification
from redpp_serve.pruning.tiles import with_step
from redpp_serve.pruning.verification import load_verify_data
from redpp_serve.report.data import PrecisionError, Report, Verify
from redpp_serve.report.folder import read_report, write_report
from redpp_serve.runtime.moments_file import load_moments
from redpp_serve.runtime.serving_graph import layer_inputs, serving_graph
from redpp_serve.stages import Stages
from redpp_serve.variants import ORIGINAL, PRUNED, VARIANTS, Variant

_CHECKED, _CHECKED_BYTES = 4, 4 << 20  # inputs in an artifact
_FAR, _ALIKE = 0.5, 0.9  # relative output error, and agreement of classes, that nobody should deploy without a look


@dataclass(frozen=True)
class Model:
    """How the packaged network is called, what it takes, and how it is served."""

    name: str
    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess | None
    serving: Serving
    labels: tuple[str, ...] = ()

    @property
    def scale(self) -> Scale | None:
        """The value range that the preprocessing gives images."""
        return Scale(self.preprocess.mean, self.preprocess.std) if self.preprocess else None


@dataclass(frozen=True)
class _Version:
    """One version of the network, ready to be written."""

    variant: Variant
    graph: Graph
    artifact: Artifact
    archive: bytes


def package(  # noqa: PLR0913 - the options of the command, given by keyword
    captured: Captured,
    out: Path,
    *,
    name: str,
    options: Options = Options(),
    serving: Serving = Serving(),
    preprocess: Preprocess | None = None,
    labels: Sequence[str] = (),
    verify_data: Path | None = None,
    inputs: Path | None = None,
    moments: Path | None = None,
    stages: Stages | None = None,
    once: bool = False,
    dry_run: bool = False,
) -> Report:
    """Prune a captured network and write a folder that two versions are served from.

    The folder appears whole or not at all, and replaces an earlier package.

    Args:
        captured: the network.
        out: the folder.
        name: the model's name in URLs.
        options: what to prune and how far.
        serving: how both versions are served.
        preprocess: how images become the network's input.
        labels: the name of each class, in the order of the first output's scores.
        verify_data: labelled inputs to measure accuracy with, an .npz file.
        inputs: unlabelled inputs to fit to and judge by, see `load_inputs`; nothing of them is in the package.
        moments: second moments that a serving original has added up, see `load_moments`.
        stages: collects (and prints) the steps; where nothing is done, ``package`` alone, as skipped.
        once: do nothing where the folder holds the package of all of these already, and replace no other one.
        dry_run: do everything but the trial runs, and write nothing.

    Returns:
        The report.

    Raises:
        RedppError: a name or folder that cannot be used, or no space; or with ``once`` a folder with another package.
        GateFailed: a verification number missed its limit; nothing is written.
    """
    out = Path(os.path.abspath(out))  # '.' has no name of its own
    check_name(name)
    check_out(out)
    model = Model(name, captured.graph.inputs, preprocess, serving, tuple(labels))
    check_model(model, captured.graph)
    stages = stages or Stages(quiet=True)
    data = load_verify_data(verify_data, captured.graph, preprocess) if verify_data else None
    checkpoint = None if dry_run else checkpoint_of(out)
    sources = Sources(
        load_inputs(inputs, captured.graph, preprocess, options.seed) if inputs else (),
        model.scale,
        load_moments(moments, captured.graph) if moments else None,
        known_widths(frontier_files(out), captured.graph, options.keep_point) if options.keep_point else None,
    )
    captured = with_origin(captured, sources, (verify_data, moments), model, options)
    if once and already_made(out, captured):
        with stages.run("package") as stage:
            stage.skip(f"{out} holds the package of this network, with these options, already")
        return read_report(out)
    with all_or_nothing(out, checkpoint):
        options = with_step(options, stages, captured.graph, serving)
        pruned = prune(captured.graph, options, stages=stages, data=data, checkpoint=checkpoint, sources=sources)
        captured = replace(captured, messages=[*captured.messages, *doubts(pruned.verify)])
        chosen = {**options.to_json(), **asdict(serving)}
        return write_package(out, captured, model, pruned, options=chosen, stages=stages, dry_run=dry_run)


def write_package(
    out: Path,
    captured: Captured,
    model: Model,
    pruned: Pruned,
    *,
    options: Mapping[str, Any],
    stages: Stages,
    dry_run: bool = False,
) -> Report:
    """Build both versions, try them, and put the folder in place at once.

    Args:
        out: the folder.
        captured: where the original came from, and the messages to report.
        model: how the network is called and served.
        pruned: both networks, and what was measured of them.
        options: what the report names as the run's options, with the ``device`` to time networks on.
        stages: collects (and prints) the steps.
        dry_run: do everything but the trial runs, and write nothing.
    """
    with stages.run("precision") as stage:
        precisions = _precisions(pruned, model.serving.precision_error)
        stage.reason = "; ".join(f"{name}: {_in_words(found)}" for name, found in precisions.items())
    with stages.run("package") as stage:
        versions = [
            _build(model, variant, graph, pruned.samples, precisions[variant.name])
            for variant, graph in ((ORIGINAL, pruned.original), (PRUNED, pruned.pruned))
        ]
        stage.reason = ", ".join(f"{v.variant.archive} {len(v.archive) / 1e6:.2f} MB" for v in versions)
    report = _report(captured, model, options, pruned, versions)
    report.precisions = {
        version: {name: PrecisionError(**asdict(record)) for name, record in found.records.items()}
        for version, found in precisions.items()
    }
    if pruned.choice.points:
        with stages.run("frontier") as stage:
            frontier = pruned.frontier(options["device"], report.environment.device or "")
            report = Report.from_json({**report.to_json(), "frontier": frontier})
            stage.reason = f"{len(pruned.choice.points)} networks timed in turns"
    if not dry_run:
        with replaced(out) as folder:
            config = _triton_config(model, versions)
            write_files(folder, _files(model, versions, pruned.samples, config))
            with stages.run("try") as stage:
                trials = run_trials(_trials(folder, model, versions, pruned.samples, config))
                stage.reason = "both versions' handlers, for each server, answer one request as the networks do"
            report = Report.from_json({**report.to_json(), "smoke": trials, "stages": stages.to_json()})
            write_report(report, folder)
    return Report.from_json({**report.to_json(), "stages": stages.to_json()})


def doubts(verify: Verify | Verification) -> list[str]:
    """Return what a reader of the verification should not overlook."""
    found = []
    far = verify.output_error is not None and verify.output_error > _FAR
    if far or (verify.agreement is not None and verify.agreement < _ALIKE):
        classes = "" if verify.agreement is None else f", the same class on {verify.agreement:.1%}"
        found.append(
            f"the pruned network's outputs are far from the original's (relative error {verify.output_error:.2f}"
            f"{classes} on held-out inputs): prune less, give more --time-budget and --distil, or check it with "
            "--verify-data"
        )
    if "cut short by --time-budget in" in (verify.inputs or ""):
        found.append(
            "error and agreement were measured on inputs that were not finished: a larger --time-budget measures better"
        )
    return found


def check_model(model: Model, graph: Graph) -> None:
    """Refuse what can be told before any work.

    Raises:
        RedppError: images of another shape than the input, names of other classes than the network's, or a network
            that does not run in the precision.
    """
    if model.preprocess and (len(model.inputs) != 1 or model.preprocess.shape != model.inputs[0].shape):
        raise RedppError(
            f"--preprocess gives images of shape {model.preprocess.shape}",
            f"the network's input shape {[i.shape for i in model.inputs]}",
            "correct mode, height and width",
        )
    _check_labels(model.labels, graph)
    precision = model.serving.precision
    if precision in ("fp16", "bf16"):
        cpu = torch.device("cpu")
        layer_inputs(serving_graph(graph, cpu, precision), cpu, precision)


def _check_labels(labels: Sequence[str], graph: Graph) -> None:
    if not labels:
        return
    (name, scores), *_ = _outputs(graph, sample(graph.inputs, 1, torch.Generator().manual_seed(0))).items()
    if scores.numel() != len(labels):
        raise RedppError(
            f"--labels names {len(labels)} classes, and {name} gives {scores.numel()} numbers",
            "one name for each score of the network's first output",
            "correct --labels, or leave it out",
        )


def _precisions(pruned: Pruned, limit: float) -> dict[str, Precisions]:
    if pruned.inputs.unread:
        return {variant.name: Precisions() for variant in (ORIGINAL, PRUNED)}
    fit, families = pruned.inputs.fit, dict(pruned.inputs.reference.families)
    if not fit and len(families) > 1:  # nothing was fitted: one family gives the ranges, the others judge
        fit = families.pop(next(iter(families)))
    return {
        variant.name: measure_precisions(graph, fit, families, limit)
        for variant, graph in ((ORIGINAL, pruned.original), (PRUNED, pruned.pruned))
    }


def _in_words(precisions: Precisions) -> str:
    found = [
        f"{name} error {record.error:.3f}" + (f" ({record.note})" if record.note else "")
        for name, record in precisions.records.items()
    ]
    return ", ".join(found) or "fp32 alone"


def _some(samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return as many inputs as an artifact carries for the check of engines: a few, and few megabytes."""
    row = sum(x[0].numel() * x.element_size() for x in samples)
    return [x[: max(1, min(_CHECKED, _CHECKED_BYTES // max(1, row)))] for x in samples]


def _build(
    model: Model, variant: Variant, graph: Graph, samples: Sequence[torch.Tensor], precisions: Precisions
) -> _Version:
    description = {
        "name": model.name,
        "variant": variant.name,
        "version": variant.version,
        "preprocess": model.preprocess.to_json() if model.preprocess else None,
        **({"labels": list(model.labels)} if model.labels else {}),
        "info": {"parameters": parameter_count(graph), "macs": mac_count(graph)},
        "precision": precisions.description(model.serving.precision_error if variant is PRUNED else None),
    }
    artifact = build(graph, description, _some(samples))
    archive = build_mar(artifact, name=model.name, model_config=model_config(model.serving))
    return _Version(variant, graph, artifact, archive)


def _report(
    captured: Captured, model: Model, options: Mapping[str, Any], pruned: Pruned, versions: Sequence[_Version]
) -> Report:
    report: dict[str, Any] = {
        "tool": {"name": "redpp-serve", "version": __version__},
        "name": model.name,
        "source": captured.source,
        "messages": captured.messages,
        "options": dict(options),
        "environment": describe_machine(),
        **pruned.to_json(),
    }
    for version, counts in zip(versions, (pruned.counting.dense, pruned.counting.kernel), strict=True):
        stored = int(version.artifact.description["bytes"])
        report[version.variant.name] = totals(version.graph, counts, stored)
    if pruned.accuracy:
        for variant, accuracy in zip(VARIANTS, pruned.accuracy, strict=True):
            report[variant.name]["accuracy"] = accuracy
        report["accuracy_of"] = "verification data"  # a comparison's, on what was sent, does not replace it
    found = Report.from_json(report)
    costs = [(figures.macs, figures.multiplications) for figures in (found.original, found.pruned)]
    if costs[0] == costs[1]:
        what = "nothing was pruned: both versions compute the same; --target or --keep, without --method red++, narrow"
        found.messages = [*found.messages, what]
    return found


def _files(
    model: Model, versions: Sequence[_Version], samples: Sequence[torch.Tensor], config: Mapping[str, Any]
) -> dict[str, bytes]:
    """Return path -> content of everything in a package but its report."""
    first = [as_array(x[0]) for x in samples]
    artifacts = {version.variant.name: version.artifact.data for version in versions}
    texts = {
        CONFIG_PROPERTIES: config_properties(limits=body_limits(versions[0].graph, model.serving.batch_size)),
        "log4j2.xml": LOG4J2,
        CONFIG: model_config(model.serving),
        "README.md": readme(model.name, model.inputs, model.preprocess, versions[0].graph.output_names),
    }
    inputs = io.BytesIO()
    np.savez(inputs, **{spec.name: as_array(x) for spec, x in zip(model.inputs, samples, strict=True)})  # type: ignore[arg-type]
    repository = build_repository(model.name, artifacts, config, first, model.labels)
    return {
        **{version.variant.archive: version.archive for version in versions},
        **{f"triton/{path}": content for path, content in repository.items()},
        **{name: text.encode() for name, text in texts.items()},
        INPUTS: inputs.getvalue(),
        sample_name(model.inputs): _sample(model, samples),
    }


def _sample(model: Model, samples: Sequence[torch.Tensor]) -> bytes:
    return request_body({spec.name: as_array(x[0]) for spec, x in zip(model.inputs, samples, strict=True)})


def _trials(
    folder: Path, model: Model, versions: Sequence[_Version], samples: Sequence[torch.Tensor], config: Mapping[str, Any]
) -> list[Trial]:
    request, precision = _sample(model, samples), model.serving.precision
    archives, models = [], []
    for version in versions:
        # In the handlers' precision, whose rounding is no error of theirs.
        graph, half = in_precision(version.graph, precision), half_of(version.graph)
        outputs = _numbers(graph, samples)
        archive, place = folder / version.variant.archive, folder / "triton" / model.name
        if model.preprocess:  # an image, so that what the archive promises is tried
            image = example_image(model.preprocess)
            shown = _numbers(graph, [read_image(image, model.inputs[0], model.preprocess)[None]])
            archives.append(try_archive(archive, image, shown, precision, half))
        else:
            archives.append(try_archive(archive, request, outputs, precision, half))
        models.append(try_model(place / version.variant.triton_version, to_json(config), request, outputs, half))
        for small in _smallest(model):
            body, outputs = _sample(model, small), _numbers(graph, small)
            archives.append(try_archive(archive, body, outputs, precision, half))
            models.append(try_model(place / version.variant.triton_version, to_json(config), body, outputs, half))
    return [*archives, *models]


def _smallest(model: Model) -> list[tuple[torch.Tensor, ...]]:
    """Return one random input of the smallest sizes, (1, ...) for each of the network's; nothing where none varies."""
    return [sample(specs, 1, torch.Generator().manual_seed(0)) for specs in other_sizes(model.inputs)[:1]]


def _numbers(graph: Graph, samples: Sequence[torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: y.double().numpy() for name, y in _outputs(graph, samples).items()}


def _triton_config(model: Model, versions: Sequence[_Version]) -> dict[str, Any]:
    outputs = output_specs({version.variant.name: version.graph for version in versions})
    return triton_config(model.name, model.inputs, outputs, model.serving, bool(model.labels))


def _outputs(graph: Graph, samples: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the network's outputs by name for the first sample, without the batch dimension."""
    with torch.no_grad():
        outputs = Program(graph)(*(x[:1] for x in samples))
    return {name: y[0] for name, y in zip(graph.output_names, outputs, strict=True)}
