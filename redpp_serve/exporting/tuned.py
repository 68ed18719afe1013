"""Package a network that its owner has fine-tuned, beside the original of an earlier package, without a search."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from redpp_serve.capture import Captured, capture_file
from redpp_serve.capture.checkpoints import load_into
from redpp_serve.capture.load import load_file
from redpp_serve.capture.ranges import with_ranges
from redpp_serve.errors import RedppError
from redpp_serve.exporting.module import graph_module
from redpp_serve.graph.artifact import LoadedArtifact
from redpp_serve.graph.executor import output_types
from redpp_serve.graph.graph import Graph
from redpp_serve.handlers.preprocess import Preprocess
from redpp_serve.options import Options, Serving
from redpp_serve.packaging.mar import check_name, read_artifact
from redpp_serve.packaging.output_folder import all_or_nothing, check_out
from redpp_serve.packaging.package import Model, check_model, write_package
from redpp_serve.packaging.samples import read_samples
from redpp_serve.pruning.inputs import Sources
from redpp_serve.pruning.pipeline import judge
from redpp_serve.pruning.real_inputs import load_inputs
from redpp_serve.pruning.verification import load_verify_data
from redpp_serve.report.data import Report
from redpp_serve.report.folder import read_report
from redpp_serve.stages import Stages
from redpp_serve.variants import ORIGINAL, PRUNED

USED = ("max_error", "min_agreement", "max_accuracy_drop", "seed", "device")  # of `Options`; the others steer a search


@dataclass(frozen=True)
class Packaged:
    """An earlier package, as far as a later one takes after it.

    Attributes:
        folder: where it is.
        report: what it says about itself.
        original: the original network and its description.
        pruned: the pruned network and its description.
    """

    folder: Path
    report: Report
    original: LoadedArtifact
    pruned: LoadedArtifact

    @classmethod
    def read(cls, folder: Path) -> Packaged:
        """Read a folder that `package` wrote.

        Raises:
            RedppError: it is none, or damaged.
        """
        original, pruned = (read_artifact(variant.archive_in(folder)) for variant in (ORIGINAL, PRUNED))
        return cls(folder, read_report(folder), original, pruned)

    @property
    def preprocess(self) -> Preprocess | None:
        """How its servers turn images into inputs."""
        declared = self.original.description.get("preprocess")
        return Preprocess.from_json(declared) if declared else None

    def serving(self, changes: Mapping[str, Any] | None = None) -> Serving:
        """Return how it is served, but for ``changes``."""
        known = {}
        for item in fields(Serving):
            value = self.report.options.get(item.name)
            if type(value) is type(item.default):
                known[item.name] = value
        return Serving(**{**known, **(changes or {})})


def read_tuned(
    file: Path,
    like: Packaged,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    trust: bool = False,
    weights_key: str | None = None,
) -> Captured:
    """Read a fine-tuned network.

    Args:
        file: a state_dict of the module that `load` gives for the package's pruned network; with ``arch`` one of that
            architecture; or any other file that `capture_file` reads.
        like: the package whose inputs and outputs the network must have.
        arch: see `capture_file`.
        arch_args: see `capture_file`.
        trust: load formats that can run code.
        weights_key: see `capture_file`.

    Raises:
        RedppError: the weights have other names or shapes, or the network other inputs or outputs.
    """
    inputs = like.original.graph.inputs
    loaded = load_file(file, trust=trust, key=weights_key)
    if loaded.state_dict is not None and arch is None:
        module = graph_module(like.pruned.graph)
        do = f"save the state_dict of redpp_serve.load({str(like.folder)!r}) after training, or give --arch"
        changed = load_into(module, loaded.state_dict, f"the pruned network in {like.folder}", do)
        source = {"file": file.name, "kind": loaded.kind.value, "sha256": loaded.sha256, "arch": None}
        found = Captured(module.graph(), source, [*loaded.messages, *changed])
    else:
        try:
            found = capture_file(
                file,
                inputs,
                arch=arch,
                arch_args=arch_args,
                trust=trust,
                weights_key=weights_key,
                input_args=like.report.source.get("input_args"),
            )
        except RedppError as error:
            if "--input" not in error.do:
                raise
            do = f"give a network that takes the inputs of {like.folder}, or package it on its own without --like"
            raise RedppError(error.found, f"inputs {inputs}", do) from error
    names = {mine.name: spec.name for mine, spec in zip(found.graph.inputs, inputs, strict=True)}
    graph = found.graph.renamed({mine: name for mine, name in names.items() if mine != name})
    expected, given = _outputs(like.original.graph), _outputs(graph)
    if expected != given:
        raise RedppError(
            f"the network in {file} has outputs {_words(given)}",
            f"those of the original in {like.folder}: {_words(expected)}",
            "give a network for the same task, or package it on its own without --like",
        )
    known = like.original.graph
    return replace(found, graph=replace(graph, output_names=known.output_names, classes=known.classes))


def package_tuned(  # noqa: PLR0913 - the options of the command, given by keyword
    tuned: Captured,
    like: Packaged,
    out: Path,
    *,
    name: str | None = None,
    options: Options = Options(),
    serving: Serving | None = None,
    verify_data: Path | None = None,
    inputs: Path | None = None,
    stages: Stages | None = None,
    dry_run: bool = False,
) -> Report:
    """Write a folder that the original of an earlier package and a fine-tuned network are served from.

    The fine-tuned network takes the place of the pruned one as it is: nothing is hashed, narrowed or fitted. It is
    compared with the original on the families of inputs that `package` judges by; only limits in ``options`` gate.

    Args:
        tuned: the network, see `read_tuned`.
        like: gives the original, the kept inputs, and by default the name and how both are served.
        out: the folder; it may be that of ``like``.
        name: the model's name in URLs.
        options: limits, seed and device; the rest is not used.
        serving: how both versions are served.
        verify_data: labelled inputs to measure the accuracy of both networks with, an .npz file.
        inputs: unlabelled inputs that judge beside the synthetic ones.
        stages: collects (and prints) the steps.
        dry_run: do everything but the trial runs, and write nothing.

    Raises:
        RedppError: a name or folder that cannot be used, or no space.
        GateFailed: a number missed a limit that was given; nothing is written.
    """
    out = Path(os.path.abspath(out))
    name = str(like.original.description.get("name")) if name is None else name
    check_name(name)
    check_out(out)
    original, preprocess = with_ranges(like.original.graph), like.preprocess
    labels = tuple(like.original.description.get("labels") or ())
    model = Model(name, original.inputs, preprocess, serving or like.serving(), labels)
    check_model(model, tuned.graph)
    stages = stages or Stages(quiet=True)
    data = load_verify_data(verify_data, original, preprocess) if verify_data else None
    given = load_inputs(inputs, original, preprocess, options.seed) if inputs else ()
    sources = Sources(given, model.scale)
    samples = read_samples(like.folder, original.inputs)
    with all_or_nothing(out, None):
        judged = judge(original, tuned.graph, options, stages=stages, data=data, sources=sources)
        chosen = {key: getattr(options, key) for key in USED}
        return write_package(
            out,
            _described(tuned, like),
            model,
            replace(judged, samples=samples),
            options={"like": like.folder.name, **chosen, **asdict(model.serving)},
            stages=stages,
            dry_run=dry_run,
        )


def _described(tuned: Captured, like: Packaged) -> Captured:
    """Say where both networks came from."""
    note = (
        f"the pruned version is {tuned.source['file']}, trained further by its owner: nothing was hashed, narrowed or "
        "fitted here, and its error is the distance from the original, which it may rightly have"
    )
    source = {**like.report.source, "tuned": tuned.source}
    return Captured(like.original.graph, source, [*tuned.messages, note])


def _outputs(graph: Graph) -> list[tuple[tuple[int, ...], Any]]:
    return [(shape[1:], dtype) for shape, dtype in output_types(graph, "cpu").values()]


def _words(outputs: list[tuple[tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{'x'.join(map(str, shape)) or 'a number'}:{str(dtype)[6:]}" for shape, dtype in outputs)
