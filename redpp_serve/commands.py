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

from redpp_serve.errors import RedppError, without_controls
from redpp_serve.options import (
    ComparisonOptions,
    ContractOptions,
    Limits,
    ObserveOptions,
    Options,
    PlanOptions,
    RecordedOptions,
    ServerOptions,
    Serving,
    SweepOptions,
    WatchOptions,
    flag_of,
    from_arguments,
    given,
)

if TYPE_CHECKING:
    from redpp_serve.ab.spec import Spec
    from redpp_serve.capture import Captured
    from redpp_serve.comparison.compare import Comparison
    from redpp_serve.comparison.sweep import Sweep
    from redpp_serve.serving.observing import Observing

Run = Callable[[argparse.Namespace], None]


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
    from redpp_serve.capture.labels import read_labels
    from redpp_serve.capture.preprocessing import choose_preprocess, read_declared
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
    if options.preprocess is not None:
        read_declared(options.preprocess)
    labels = read_labels(options.labels) if options.labels is not None else ()
    choice = from_arguments(Options, options, **(options.target or {}), device=str(parse_device(options.device)))
    stages = Stages()
    with stages.run("capture") as stage:
        captured = _captured(options)
        stage.reason = f"{captured.source['kind']}, {len(captured.graph.nodes)} operations"
    preprocess, lines = choose_preprocess(options.preprocess, captured.hints, captured.graph.inputs)
    captured.messages.extend(lines)
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
        preprocess=preprocess,
        labels=labels,
        stages=stages,
        once=options.once,
        dry_run=options.dry_run,
    )
    print(package_summary(report))
    for message in report.messages[len(captured.messages) :]:
        _note(f"note: {message}")
    left = stages.named("package").status == "skipped"
    print(f"\n{out} holds this package already: nothing was done" if left else _written(out, options.dry_run))


def _package_tuned(options: argparse.Namespace) -> None:
    """Package a fine-tuned network like an earlier package; whatever steers a search has no place here."""
    from redpp_serve.exporting.tuned import USED, Packaged, package_tuned, read_tuned
    from redpp_serve.report.text import package_summary
    from redpp_serve.runtime.device import parse_device
    from redpp_serve.stages import Stages

    flags = {item.name: flag_of(item) for item in fields(Options)}
    idle = [flags[name] for name in given(Options, options) if name not in USED]
    idle += [
        f"--{name}"
        for name in ("target", "input", "range", "classes", "moments", "preprocess", "labels", "once")
        if getattr(options, name)
    ]
    if idle:
        raise RedppError(
            f"{', '.join(idle)} beside --like",
            "a fine-tuned network, which is packaged as it is, with the inputs of the earlier package",
            f"leave out {'it' if len(idle) == 1 else 'them'}, or --like",
        )
    device, stages = str(parse_device(options.device)), Stages()
    like = Packaged.read(options.like)
    with stages.run("capture") as stage:
        tuned = read_tuned(options.file, like, **_reading(options))
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
    kept = default_path()
    _note(f"times are kept in {kept if kept and kept.is_file() else 'no file'}")
    changed = [wanted.precision, wanted.engine, wanted.batch_size, wanted.threads]
    as_packaged = all(value is None for value in changed) and wanted.time_budget > 0
    if as_packaged and record(options.folder, plans):
        _note(f"added to {options.folder / 'report.html'}")


def serve(options: argparse.Namespace) -> None:
    """Serve both versions until a signal."""
    from redpp_serve.serving.serve import serve as serve_folder

    if options.systemd:
        return _run_by_systemd(options)
    server, log_format = from_arguments(ServerOptions, options), options.log_format
    serve_folder(options.folder, server, observe=_observing(options), log_format=log_format, note=_say)


def roll_out(options: argparse.Namespace, variant: str) -> None:
    """Send requests that name no version to ``pruned`` (promote) or ``original`` (rollback)."""
    from redpp_serve.serving.serve import roll_out as switch

    print(switch(options.folder, variant, options.server))


def health(options: argparse.Namespace) -> None:
    """Ask the running servers for predictions, and hold their times against what is required."""
    from redpp_serve.requirements import judge, require_met
    from redpp_serve.serving.health import Unhealthy, check, require_healthy

    try:
        servers = check(options.folder, options.server)
    except Unhealthy:
        if options.json:
            print("[]")
        raise
    required = [each for some in options.require for each in some]
    outcomes = [
        judge(required, x.figures(), x.kind if len(servers) > 1 else "") if not x.problem else [] for x in servers
    ]
    if options.json:
        shown = [x.to_json() for x in servers]
        for k, found in enumerate(outcomes if required else ()):
            shown[k]["requirements"] = [each.to_json() for each in found]
        print(json.dumps(shown, indent=1))
    else:
        for server, found in zip(servers, outcomes, strict=True):
            if len(servers) > 1:
                print(f"{server.kind} of process {server.pid}")
            print("\n".join([server.to_text(), *(each.to_text() for each in found)]))
    require_healthy(servers)
    require_met([each for found in outcomes for each in found])


def compare(options: argparse.Namespace) -> None:
    """Measure both versions side by side, print the verdict, add it to the package's report, and judge it."""
    from redpp_serve.comparison.contract import Contract
    from redpp_serve.comparison.distributed import NOT_MEASURED, compare_recorded
    from redpp_serve.comparison.folder import compare as compare_folder
    from redpp_serve.comparison.folder import sweep
    from redpp_serve.comparison.history import record
    from redpp_serve.requirements import Outcome, require_met

    load, server = from_arguments(ComparisonOptions, options), from_arguments(ServerOptions, options)
    folder, axes = options.folder, from_arguments(SweepOptions, options).sweep
    recorded = from_arguments(RecordedOptions, options).from_locust
    if recorded:
        _refuse_beside_records(load, server, bool(axes))
    suite = f"redpp-serve compare {folder.resolve().name} on {server.server}"
    contract = Contract(from_arguments(ContractOptions, options), suite)

    def measure() -> Comparison | Sweep:
        result: Comparison | Sweep
        if recorded:
            result = compare_recorded(folder, recorded, load, wanted=contract.names)
            _note(f"note: {NOT_MEASURED}")
        elif axes:
            result = sweep(folder, axes, load, server, wanted=contract.names, note=_note)
        else:
            result = compare_folder(folder, load, server, wanted=contract.names, note=_note)
        added, page = record(folder, result), folder / "report.html"
        _note(f"added to {page}" if added else f"note: not added to {page}, which cannot be read or written")
        return result

    result = contract.judged(measure)
    if options.json:
        judged = {"requirements": [each.to_json() for each in contract.outcomes]} if contract.requirements else {}
        print(json.dumps({**result.to_json(), **judged}, indent=1))
    else:
        print(
            "\n".join(
                [result.to_text(), *([""] if contract.outcomes else []), *map(Outcome.to_text, contract.outcomes)]
            )
        )
    require_met(contract.outcomes)


def _refuse_beside_records(load: ComparisonOptions, server: ServerOptions, sweeps: bool) -> None:
    """Refuse what `compare` would do to its own load or server, where neither is run."""
    own: list[tuple[Any, Any]] = [
        (load, item) for item in fields(load) if item.name in ("concurrency", "duration", "rate")
    ]
    own += [(server, item) for item in fields(server)]
    idle = [flag_of(item) for record, item in own if getattr(record, item.name) != item.default]
    if idle or sweeps:
        raise RedppError(
            f"{', '.join([*idle, *(['--sweep'] if sweeps else [])])} beside --from-locust",
            "the load and the server that were recorded",
            "leave it out, or record again with such a load",
        )


def dashboard(options: argparse.Namespace) -> None:
    """Show live numbers until a signal."""
    from redpp_serve.dashboard.server import dashboard as show

    show(options.folder, port=options.port, urls=options.metrics_url, note=_say)


def ab_start(options: argparse.Namespace) -> None:
    """Start an A/B test."""
    from redpp_serve.ab.commands import start
    from redpp_serve.serving.serve import checked_name

    if options.systemd:
        _spec(options)  # refuses what the unit would be refused
        return _run_by_systemd(options)
    spec, server = _spec(options), ServerOptions(options.server, trust_package=options.trust_package)
    for folder in [] if spec.attach else filter(None, (spec.folder, spec.candidate)):  # `serve` has looked at its own
        checked_name(folder, server)
    start(spec, foreground=options.foreground, say=_say, note=_note)


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


def ab_watch(options: argparse.Namespace) -> None:
    """Watch a deployment until a signal."""
    from redpp_serve.ab.prometheus import Prometheus, only_model
    from redpp_serve.ab.spec import Spec, parse_ramp, parse_split
    from redpp_serve.ab.splits import split_of
    from redpp_serve.ab.watch import Watched, watch
    from redpp_serve.serving.serve import model_name

    wanted = from_arguments(WatchOptions, options)
    given_split = parse_split(wanted.split or "90:10")
    if options.auto and not (wanted.route or wanted.split_folder):
        raise RedppError("--auto without a split to change", "--route or --split-folder", "add one of them")
    if options.ramp is not None and wanted.split_folder:
        raise RedppError("--ramp with --split-folder", "a route, since nginx's split is fixed", "leave --ramp out")
    split = split_of(wanted.route, wanted.split_folder, given_split)
    prometheus = Prometheus(wanted.prometheus, wanted.token_file)
    spec = Spec(
        folder=wanted.package or Path(),
        candidate=None,
        kind=str(split),
        split=given_split,
        sticky=None,
        shadow=False,
        limits=from_arguments(Limits, options),
        auto=options.auto,
        ramp=parse_ramp(options.ramp) if options.ramp is not None else (),
        hold=options.hold,
        webhook=options.webhook,
    )
    name = wanted.model or (model_name(wanted.package) if wanted.package else only_model(prometheus, wanted.match))
    watched = Watched(spec, name, wanted.test, wanted.match, wanted.window, wanted.since)
    watch(watched, prometheus, split, (wanted.port or 0, wanted.address), _say)


def ab_split(options: argparse.Namespace) -> None:
    """Divide users by another split."""
    from redpp_serve.ab.commands import change_split
    from redpp_serve.ab.spec import parse_share_or_split

    _say(change_split(options.folder.resolve(), parse_share_or_split(options.split)))


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


def _run_by_systemd(options: argparse.Namespace) -> None:
    """Print or install the unit that runs this very command."""
    from redpp_serve.serving.serve import model_name
    from redpp_serve.serving.systemd import unit_of

    model_name(options.folder)
    unit = unit_of(options.command, options.folder, options.arguments)
    _say(unit.text().rstrip() if options.systemd == "print" else "\n".join(unit.install()))


def _note(line: str) -> None:
    print(without_controls(line), file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(line, flush=True)


def _captured(options: argparse.Namespace) -> Captured:
    from redpp_serve.capture import capture_file
    from redpp_serve.capture.inputs import parse_input, parse_sizes, require_used

    sizes = parse_sizes(options.range)
    inputs = [parse_input(text, k, sizes) for k, text in enumerate(options.input)]
    require_used(sizes, inputs)
    input_args = _json_object("--input-args", options.input_args)
    classes = tuple(options.classes)
    return capture_file(options.file, inputs, **_reading(options), input_args=input_args, classes=classes)


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    """Return how the file of a network is read, as `capture_file` takes it."""
    return {
        "arch": options.arch,
        "arch_args": _json_object("--arch-args", options.arch_args),
        "trust": options.trust_file,
        "weights_key": options.weights_key,
    }


def _observing(options: argparse.Namespace) -> Observing | None:
    from redpp_serve.serving.observing import observing

    wanted = from_arguments(ObserveOptions, options)
    return observing(options.folder, wanted.observe, wanted.observe_to)


def _spec(options: argparse.Namespace) -> Spec:
    from redpp_serve.ab.spec import Spec, parse_ramp, parse_split, split_at

    split = options.split if options.split is not None else "100:0" if options.shadow else "90:10"
    ramp = parse_ramp(options.ramp) if options.ramp is not None else ()
    if ramp and options.split is not None:
        raise RedppError(
            "--split and --ramp", "one of them, since the first share of --ramp is the split", "leave --split out"
        )
    limits = Limits(**{item.name: getattr(options, item.name) for item in fields(Limits)})
    return Spec(
        folder=options.folder.resolve(),
        candidate=options.candidate and options.candidate.resolve(),
        kind=options.server,
        split=split_at(ramp[0]) if ramp else parse_split(split),
        sticky=options.sticky_header,
        shadow=options.shadow,
        limits=limits,
        workers=options.workers,
        port=options.port,
        auth=not options.demo_auth_off,
        observe=_observing(options),
        auto=options.auto,
        ramp=ramp,
        hold=options.hold,
        webhook=options.webhook,
        attach=options.attach,
        log_format=options.log_format,
    )


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
