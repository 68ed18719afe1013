"""The command line: ``redpp-serve inspect | package | plan | serve | promote | rollback | health | compare | ab | demo``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redpp_serve.arguments import parser
from redpp_serve.errors import RedppError

_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 a server that does not answer, 2 bad input, 3 a verification number missed its limit, 130 Ctrl-C. SIGTERM and SIGHUP exit with 128 and their number.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    try:
        with _signals_unwind():
            _COMMANDS[options.command](options)
    except RedppError as error:
        print(f"redpp-serve {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"redpp-serve {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """The first of these signals ends the command as an exception, so that servers are stopped and scratch files removed
    on the way; whatever comes after it is ignored, for that must not be interrupted.
    """
    ours = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, _: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = {number: signal.signal(number, leave) for number in ours}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _captured(options: argparse.Namespace) -> Any:
    from redpp_serve.capture import capture_file
    from redpp_serve.capture.inputs import parse_input

    inputs = [parse_input(text, k) for k, text in enumerate(options.input)]
    return capture_file(
        options.file,
        inputs,
        arch=options.arch,
        arch_args=_json("--arch-args", options.arch_args),
        trust=options.trust_file,
    )


def _inspect(options: argparse.Namespace) -> None:
    from redpp_serve.inspection import describe_file, describe_network

    if not options.input:
        if options.channels:
            raise RedppError(
                "--channels without --input", "the shape of one input, to capture the network", "add --input 3x224x224"
            )
        report = describe_file(options.file)
    else:
        report = describe_network(_captured(options), tuple(options.exclude), options.channels)
    print(json.dumps(report.to_json(), indent=1) if options.json else report.to_text())


def _package(options: argparse.Namespace) -> None:
    from redpp_serve.channels.coupling import unmatched
    from redpp_serve.options import Options
    from redpp_serve.packaging.mar import check_name
    from redpp_serve.packaging.package import Serving, check_out, package
    from redpp_serve.report.text import package_summary
    from redpp_serve.stages import Stages

    name = options.file.stem if options.name is None else options.name
    check_name(name)  # all that the command line alone can decide comes before any work
    out = options.out or Path("dist") / name
    check_out(out)
    _declared_preprocess(options.preprocess)
    fields = (
        "hash",
        "hash_error",
        "hash_values",
        "merge",
        "keep",
        "max_error",
        "min_agreement",
        "max_accuracy_drop",
        "round_to",
        "seed",
        "time_budget",
        "distil",
    )
    choice = Options(
        **{f: getattr(options, f) for f in fields},
        **options.target,
        exclude=tuple(options.exclude),
        device=_device(options.device),
    )
    serving = Serving(options.batch_size, options.max_batch_delay, options.threads, options.precision)
    stages = Stages()
    with stages.run("capture") as stage:
        captured = _captured(options)
        stage.reason = f"{captured.source['kind']}, {len(captured.graph.nodes)} operations"
    for message in (*captured.messages, *unmatched(captured.graph, choice.exclude)):
        print(f"note: {message}", file=sys.stderr)
    report = package(
        captured,
        out,
        name=name,
        options=choice,
        serving=serving,
        verify_data=options.verify_data,
        preprocess=_preprocess(options.preprocess, captured),
        stages=stages,
        dry_run=options.dry_run,
    )
    print(package_summary(report))
    for message in report["messages"][len(captured.messages) :]:
        print(f"note: {message}", file=sys.stderr)
    print(
        "\ndry run: nothing was written"
        if options.dry_run
        else f"\nwrote {out}: report.html, original.mar (1.0), pruned.mar (2.0), triton/ (1, 2)\nnext: redpp-serve compare {out}"
    )


def _serve(options: argparse.Namespace) -> None:
    from redpp_serve.serving.serve import serve

    serve(
        options.folder,
        kind=options.server,
        workers=options.workers,
        ports=_ports(options.port, options.server),
        auth=not options.demo_auth_off,
        say=lambda line: print(line, flush=True),
    )


def _promote(options: argparse.Namespace) -> None:
    _roll_out(options, "pruned")


def _rollback(options: argparse.Namespace) -> None:
    _roll_out(options, "original")


def _roll_out(options: argparse.Namespace, variant: str) -> None:
    from redpp_serve.serving.serve import roll_out

    running = roll_out(options.folder, variant, options.server)
    print(f"requests to {running.urls['default']} now go to {variant}")


def _health(options: argparse.Namespace) -> None:
    from redpp_serve.serving.health import check

    for result in check(options.folder, options.server):
        print(result.to_text())


def _compare(options: argparse.Namespace) -> None:
    from redpp_serve.comparison.folder import compare, record

    result = compare(
        options.folder,
        inputs=options.inputs,
        concurrency=options.concurrency,
        seconds=options.duration,
        margin=options.margin,
        seed=options.seed,
        rate_rps=options.rate,
        server=options.server,
        workers=options.workers,
        ports=_ports(options.port, options.server),
        auth=not options.demo_auth_off,
        note=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(result.to_json(), indent=1) if options.json else result.to_text())
    if record(options.folder, result):
        print(f"added to {options.folder / 'report.html'}", file=sys.stderr)


def _plan(options: argparse.Namespace) -> None:
    from redpp_serve.planning import plan, record
    from redpp_serve.report.plans import plan_text
    from redpp_serve.runtime.plan_cache import default_path

    plans = plan(
        options.folder,
        device=options.device,
        precision=options.precision,
        batch=options.batch_size,
        threads=options.threads,
        seconds=options.time_budget,
        everything=options.all,
    )
    print(json.dumps(plans, indent=1) if options.json else plan_text(plans))
    print(f"times are kept in {default_path() or 'no file'}", file=sys.stderr)
    as_packaged = options.precision is None and options.batch_size is None and options.threads is None
    if as_packaged and record(options.folder, plans):
        print(f"added to {options.folder / 'report.html'}", file=sys.stderr)


def _ab(options: argparse.Namespace) -> None:
    from redpp_serve.ab import commands

    def say(line: str) -> None:
        try:
            print(line, flush=True)
        except BrokenPipeError:  # whoever reads, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
            raise SystemExit(128 + signal.SIGPIPE) from None

    folder = options.folder.resolve()
    if options.action == "start":
        commands.start(
            _experiment(options),
            foreground=options.foreground,
            say=say,
            note=lambda line: print(line, file=sys.stderr, flush=True),
        )
    elif options.action == "status":
        while True:
            status = commands.status(folder)
            say(json.dumps(status.to_json(), indent=1) if options.json else status.to_text())
            if not options.watch:
                break
            say("")
            time.sleep(2.0)
    elif options.action == "stop":
        say(commands.stop(folder, options.keep))
    else:
        say(commands.send_all(folder, "pruned" if options.action == "promote" else "original"))


def _experiment(options: argparse.Namespace) -> Any:
    from redpp_serve.ab.spec import Limits, Spec, parse_split

    split = options.split if options.split is not None else "100:0" if options.shadow else "90:10"
    limits = Limits(
        options.tolerance, options.margin, options.max_error_rate_gap, options.max_p99_ratio, options.min_agreement
    )
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
    )


def _demo(options: argparse.Namespace) -> None:
    from redpp_serve.demo import demo

    demo(options.out, options.duration, options.time_budget)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda") or (name.startswith("cuda") and not torch.cuda.is_available()):
        raise RedppError(f"--device {name}", "cpu, or cuda on a machine that has it", "leave out --device")
    return name


def _ports(first: int | None, kind: str) -> Any:
    from redpp_serve.loopback import Ports, TritonPorts, consecutive_ports

    return None if first is None else consecutive_ports(TritonPorts if kind == "triton" else Ports, first)


def _preprocess(text: str | None, captured: Any) -> Any:
    """What the user declared, completed by the input's shape; else what the architecture declares; else None."""
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
    complete = {
        "mode": "L" if shape[0] == 1 else "RGB",
        "height": shape[1],
        "width": shape[2],
        "mean": [0.0],
        "std": [1.0],
        **declared,
    }
    for key in ("mean", "std"):  # one number stands for every channel
        if isinstance(complete[key], list) and len(complete[key]) == 1:
            complete[key] = complete[key] * shape[0]
    return Preprocess.from_json(complete)


def _declared_preprocess(text: str | None) -> dict[str, Any]:
    if text == "imagenet":
        return _IMAGENET
    if text is not None and not text.lstrip().startswith("{"):
        raise RedppError(
            f"--preprocess is {text}",
            "imagenet, or a JSON object with mean and std",
            'correct it, e.g. --preprocess \'{"mean": [0.5], "std": [0.5]}\'',
        )
    return _json("--preprocess", text)


def _json(flag: str, text: str | None) -> dict[str, Any]:
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


def _dashboard(options: argparse.Namespace) -> None:
    from redpp_serve.dashboard.server import dashboard

    dashboard(options.folder, port=options.port, urls=options.metrics_url, say=lambda line: print(line, flush=True))


_COMMANDS = {
    "ab": _ab,
    "dashboard": _dashboard,
    "inspect": _inspect,
    "package": _package,
    "serve": _serve,
    "promote": _promote,
    "rollback": _rollback,
    "health": _health,
    "compare": _compare,
    "plan": _plan,
    "demo": _demo,
}

if __name__ == "__main__":
    sys.exit(main())
