"""Runs each command on its parsed arguments; torch and server libraries are imported only by those that need them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redpp_serve.errors import RedppError
from redpp_serve.options import (
    RATIO,
    ComparisonOptions,
    Limits,
    ObserveOptions,
    Options,
    PlanOptions,
    ServerOptions,
    Serving,
    flag_of,
    from_arguments,
    given,
)

if TYPE_CHECKING:
    from redpp_serve.ab.spec import Spec
    from redpp_serve.capture import Captured
    from redpp_serve.handlers.preprocess import Preprocess
    from redpp_serve.serving.observing import Observing

Run = Callable[[argparse.Namespace], None]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def inspect(options: argparse.Namespace) -> None:
    """Print what a file is or, with the shape of its input, what could be pruned."""
    from redpp_serve.inspection import describe_file, describe_network
    from redpp_serve.layer_times import layer_times

    if options.input:
        captured, shown = _captured(options), options.json or not options.channels
        times = layer_times(captured.graph) if shown else None
        report = describe_network(captured, tuple(options.exclude), options.channels, times)
    elif options.channels:
        raise RedppError(
            "--channels without --input", "the shape of one input, to capture the network", "add --input 3x224x224"
        )
    else:
        report = describe_file(options.file)
    print(json.dumps(report.to_json(), indent=1) if options.json else report.to_text())


def package(options: argparse.Namespace) -> None:
    """Prune a network and write its package; all that the arguments alone can decide comes before any work."""
    from redpp_serve.channels.coupling import unmatched
    from redpp_serve.packaging.mar import check_name
    from redpp_serve.packaging.output_folder import check_out
    from redpp_serve.packaging.package import package as write_package
    from redpp_serve.report.text import package_summary
    from redpp_serve.runtime.device import parse_device
    from redpp_serve.stages import Stages

    if options.like is not None:
        return _package_tuned(options)
    name = options.file.stem if options.name is None else options.name
    check_name(name)
    out = options.out or Path("dist") / name
    check_out(out)
    _declared_preprocess(options.preprocess)
    choice = from_arguments(Options, options, **options.target, device=str(parse_device(options.device)))
    stages = Stages()
    with stages.run("capture") as stage:
        captured = _captured(options)
        stage.reason = f"{captured.source['kind']}, {len(captured.graph.nodes)} operations"
    for message in (*captured.messages, *unmatched(captured.graph, choice.exclude)):
        _note(f"note: {message}")
    report = write_package(
        captured,
        out,
        name=name,
        options=choice,
        serving=from_arguments(Serving, options),
        verify_data=options.verify_data,
        inputs=options.inputs,
        moments=options.moments,
        preprocess=_preprocess(options.preprocess, captured),
        stages=stages,
        dry_run=options.dry_run,
    )
    print(package_summary(report))
    for message in report.messages[len(captured.messages) :]:
        _note(f"note: {message}")
    print(_written(out, options.dry_run))


def _package_tuned(options: argparse.Namespace) -> None:
    """Package a fine-tuned network like an earlier package; whatever steers a search has no place here."""
    from redpp_serve.exporting.tuned import USED, Packaged, package_tuned, read_tuned
    from redpp_serve.report.text import package_summary
    from redpp_serve.runtime.device import parse_device
    from redpp_serve.stages import Stages

    flags = {item.name: flag_of(item) for item in fields(Options)}
    idle = [flags[name] for name in given(Options, options) if name not in USED]
    idle += [f"--{name}" for name in ("target", "input", "moments", "preprocess") if getattr(options, name)]
    if idle:
        raise RedppError(
            f"{', '.join(idle)} beside --like",
            "a fine-tuned network, which is packaged as it is, with the inputs of the earlier package",
            f"leave out {'it' if len(idle) == 1 else 'them'}, or --like",
        )
    device, stages = str(parse_device(options.device)), Stages()
    like = Packaged.read(options.like)
    with stages.run("capture") as stage:
        arch_args = _json_object("--arch-args", options.arch_args)
        tuned = read_tuned(options.file, like, arch=options.arch, arch_args=arch_args, trust=options.trust_file)
        stage.reason = f"{tuned.source['kind']}, {len(tuned.graph.nodes)} operations"
    out = options.out or Path("dist") / options.file.stem
    report = package_tuned(
        tuned,
        like,
        out,
        name=options.name,
        options=from_arguments(Options, options, device=device),
        serving=like.serving(given(Serving, options)),
        verify_data=options.verify_data,
        inputs=options.inputs,
        stages=stages,
        dry_run=options.dry_run,
    )
    print(package_summary(report))
    for message in report.messages:
        _note(f"note: {message}")
    print(_written(out, options.dry_run))


def _written(out: Path, dry_run: bool) -> str:
    if dry_run:
        return "\ndry run: nothing was written"
    return (
        f"\nwrote {out}: report.html, original.mar (1.0), pruned.mar (2.0), triton/ (1, 2)\n"
        f"next: redpp-serve compare {out}"
    )


def export(options: argparse.Namespace) -> None:
    """Write a packaged network for another program."""
    from redpp_serve.exporting.formats import FORMATS
    from redpp_serve.exporting.formats import export as write_file
    from redpp_serve.exporting.triton import export_repository

    if options.to in FORMATS:
        version, precision = options.version or "pruned", options.precision or "fp32"
        files = write_file(options.folder, options.to, options.out, version=version, precision=precision)
        _say(f"wrote {', '.join(map(str, files))}: the {version} version, checked on the package's inputs")
        return
    if alone := [f"--{word}" for word in ("version", "precision") if getattr(options, word) is not None]:
        raise RedppError(f"{alone[0]} beside --to {options.to}", "both versions, in fp32", f"leave out {alone[0]}")
    out, warnings = export_repository(options.folder, options.to, options.out)
    for warning in warnings:
        _note(f"note: {warning}")
    _say(f"wrote {out}: a model repository with versions 1 (original) and 2 (pruned)")


def plan(options: argparse.Namespace) -> None:
    """Time the kernels of both versions, print the choice, and add it to the package's report."""
    from redpp_serve.planning import plan as choose_kernels
    from redpp_serve.planning import record
    from redpp_serve.report.text import plan_text
    from redpp_serve.runtime.plan_cache import default_path

    wanted = from_arguments(PlanOptions, options)
    plans = choose_kernels(options.folder, wanted)
    print(json.dumps(plans, indent=1) if options.json else plan_text(plans))
    _note(f"times are kept in {default_path() or 'no file'}")
    changed = [wanted.precision, wanted.engine, wanted.batch_size, wanted.threads]
    as_packaged = all(value is None for value in changed) and wanted.time_budget > 0
    if as_packaged and record(options.folder, plans):
        _note(f"added to {options.folder / 'report.html'}")


def serve(options: argparse.Namespace) -> None:
    """Serve both versions until a signal."""
    from redpp_serve.serving.serve import serve as serve_folder

    serve_folder(options.folder, from_arguments(ServerOptions, options), observe=_observing(options), note=_say)


def roll_out(options: argparse.Namespace, variant: str) -> None:
    """Send requests that name no version to ``pruned`` (promote) or ``original`` (rollback)."""
    from redpp_serve.serving.serve import roll_out as switch

    running = switch(options.folder, variant, options.server)
    print(f"requests to {running.urls['default']} now go to {variant}")


def health(options: argparse.Namespace) -> None:
    """Ask the running server for predictions."""
    from redpp_serve.serving.health import check

    for result in check(options.folder, options.server):
        print(result.to_text())


def compare(options: argparse.Namespace) -> None:
    """Measure both versions side by side, print the verdict, and add it to the package's report."""
    from redpp_serve.comparison.folder import compare as compare_folder
    from redpp_serve.comparison.folder import record

    load, server = from_arguments(ComparisonOptions, options), from_arguments(ServerOptions, options)
    result = compare_folder(options.folder, load, server, note=_note)
    print(json.dumps(result.to_json(), indent=1) if options.json else result.to_text())
    if record(options.folder, result):
        _note(f"added to {options.folder / 'report.html'}")


def dashboard(options: argparse.Namespace) -> None:
    """Show live numbers until a signal."""
    from redpp_serve.dashboard.server import dashboard as show

    show(options.folder, port=options.port, urls=options.metrics_url, note=_say)


def ab_start(options: argparse.Namespace) -> None:
    """Start an A/B test."""
    from redpp_serve.ab.commands import start

    start(_spec(options), foreground=options.foreground, say=_say, note=_note)


def ab_status(options: argparse.Namespace) -> None:
    """Print the state of an A/B test, once or again and again."""
    from redpp_serve.ab.commands import status

    while True:
        found = status(options.folder.resolve())
        _say(json.dumps(found.to_json(), indent=1) if options.json else found.to_text())
        if not options.watch:
            return
        _say("")
        time.sleep(2.0)


def ab_send_all(options: argparse.Namespace, arm: str) -> None:
    """Give all users ``pruned`` (promote) or ``original`` (rollback)."""
    from redpp_serve.ab.commands import send_all

    _say(send_all(options.folder.resolve(), arm))


def ab_stop(options: argparse.Namespace) -> None:
    """End an A/B test."""
    from redpp_serve.ab.commands import stop

    _say(stop(options.folder.resolve(), options.keep))


def demo(options: argparse.Namespace) -> None:
    """Run the whole path on the shipped network."""
    from redpp_serve.demo import demo as run_demo

    run_demo(options.out, options.duration, options.time_budget)


def target(text: str) -> dict[str, float]:
    """Read ``macs=0.5`` or ``latency=0.6`` for argparse, as the option of that name.

    Raises:
        argparse.ArgumentTypeError: another word, or no share above 0 and at most 1.
    """
    word, _, share = text.partition("=")
    if word in ("macs", "latency"):
        try:
            return {f"target_{word}": RATIO.parse(share)}
        except argparse.ArgumentTypeError:
            pass
    raise argparse.ArgumentTypeError(f"{text!r} is not macs=R or latency=R with a share R above 0 and at most 1")


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, flush=True)


def _captured(options: argparse.Namespace) -> Captured:
    from redpp_serve.capture import capture_file
    from redpp_serve.capture.inputs import parse_input

    inputs = [parse_input(text, k) for k, text in enumerate(options.input)]
    arch_args = _json_object("--arch-args", options.arch_args)
    return capture_file(options.file, inputs, arch=options.arch, arch_args=arch_args, trust=options.trust_file)


def _observing(options: argparse.Namespace) -> Observing | None:
    from redpp_serve.serving.observing import observing

    wanted = from_arguments(ObserveOptions, options)
    return observing(options.folder, wanted.observe, wanted.observe_to)


def _spec(options: argparse.Namespace) -> Spec:
    from redpp_serve.ab.spec import Spec, parse_split

    split = options.split if options.split is not None else "100:0" if options.shadow else "90:10"
    limits = Limits(**{item.name: getattr(options, item.name) for item in fields(Limits)})
    return Spec(
        folder=options.folder.resolve(),
        candidate=options.candidate and options.candidate.resolve(),
        kind=options.server,
        split=parse_split(split),
        sticky=options.sticky_header,
        shadow=options.shadow,
        limits=limits,
        workers=options.workers,
        port=options.port,
        auth=not options.demo_auth_off,
        observe=_observing(options),
    )


def _preprocess(text: str | None, captured: Captured) -> Preprocess | None:
    """Complete what the user declared, or else the architecture, by the input's shape; None where neither did."""
    from redpp_serve.handlers.preprocess import Preprocess

    shape = captured.graph.inputs[0].shape
    declared = captured.hints if text is None else _declared_preprocess(text)
    if declared is None:
        return None
    if len(shape) != 3 or shape[0] not in (1, 3):
        if text is None:
            return None
        raise RedppError(
            f"--preprocess for an input of shape {shape}", "one image input, 1 or 3 channels", "leave out --preprocess"
        )
    mode = "L" if shape[0] == 1 else "RGB"
    complete = {"mode": mode, "height": shape[1], "width": shape[2], "mean": [0.0], "std": [1.0], **declared}
    for key in ("mean", "std"):  # one number serves every channel
        if isinstance(complete[key], list) and len(complete[key]) == 1:
            complete[key] = complete[key] * shape[0]
    return Preprocess.from_json(complete)


def _declared_preprocess(text: str | None) -> dict[str, Any]:
    if text == "imagenet":
        return IMAGENET
    if text is not None and not text.lstrip().startswith("{"):
        raise RedppError(
            f"--preprocess is {text}",
            "imagenet, or a JSON object with mean and std",
            'correct it, e.g. --preprocess \'{"mean": [0.5], "std": [0.5]}\'',
        )
    return _json_object("--preprocess", text)


def _json_object(flag: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RedppError(
            f"{flag} is no JSON: {error}", "a JSON object", f"quote it: {flag} '{{\"key\": 1}}'"
        ) from error
    if not isinstance(value, dict):
        raise RedppError(f"{flag} is {text}", "a JSON object", f"quote it: {flag} '{{\"key\": 1}}'")
    return value
