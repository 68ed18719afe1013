"""The command line: ``redpp-serve inspect | package | serve | compare | demo``."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .errors import RedppError


_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 2 bad input, 3 a verification number missed its limit, 130 Ctrl-C, 143 SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        with _sigterm_unwinds():
            options.run(options)
    except RedppError as error:
        print(f"redpp-serve {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"redpp-serve {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the command as an exception, so that servers are stopped and scratch files removed on the way."""

    def leave(*_: object) -> None:
        raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _whole(low: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least ``low``."""

    def parse(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def _positive(text: str) -> float:
    """For argparse: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of below twenty lines of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. What to do: see '{self.prog} --help'.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="redpp-serve", description="Prune a trained PyTorch network without data, "
                     "serve it beside the original, and measure both.")  # fmt: skip
    parser.add_argument("--version", action="version", version=f"redpp-serve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="say what a file is and what could be pruned; writes nothing")
    _add_source(inspect)
    inspect.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="layers to leave alone")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    package = commands.add_parser("package", help="prune, verify, and write a folder that both versions are served from")
    _add_source(package)
    _add_pruning(package)
    package.set_defaults(run=_package)
    serve = commands.add_parser("serve", help="serve both versions with TorchServe on the loopback address")
    _add_server(serve)
    serve.set_defaults(run=_serve)
    compare = commands.add_parser("compare", help="send the same inputs to both versions and say which is faster")
    _add_server(compare)
    _add_load(compare)
    compare.set_defaults(run=_compare)
    demo = commands.add_parser("demo", help="all of it on the shipped digits network, in two to three minutes")
    demo.add_argument("--out", type=Path, default=Path("redpp-demo"), help="folder to write (default: %(default)s)")
    demo.add_argument("--duration", type=_positive, default=30.0, metavar="S", help="seconds of load (default: %(default)g)")
    demo.add_argument("--time-budget", type=_positive, default=90.0, metavar="S", help="seconds for making inputs and fitting "
                      "(default: %(default)g)")  # fmt: skip
    demo.set_defaults(run=_demo)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="state_dict (.pt, .pth, .safetensors), or with --trust-file a module, TorchScript or .pt2")
    parser.add_argument("--arch", help="the network that a state_dict belongs to: torchvision:NAME, timm:NAME or path/to/file.py:factory")
    parser.add_argument("--arch-args", metavar="JSON", help='keyword arguments of the architecture, e.g. \'{"num_classes": 10}\'')
    parser.add_argument("--input", action="append", default=[], metavar="SHAPE", help="shape of one input without batch, 3x224x224[:dtype]; repeat it for a network with several inputs")
    parser.add_argument("--trust-file", action="store_true", help="load a format that can run code; only for files you trust")


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    from .pruning.options import Options

    default = Options()
    add = parser.add_argument
    add("--out", type=Path, help="folder to write; an earlier package there is replaced (default: dist/NAME)")
    add("--name", help="the model's name in URLs (default: the file's name without its ending)")
    add("--hash", default=default.hash, choices=("kde", "kmeans", "uniform"), help="how weights become codebooks (default: %(default)s)")
    add("--hash-error", type=float, metavar="E", help="relative RMS error of each layer's weights (default: 0.02)")
    add("--hash-values", type=int, metavar="N", help="instead: at most N values a layer")
    add("--merge", default=default.merge, choices=("reconstruct", "exact"), help="which channels may go (default: %(default)s)")
    add("--keep", type=float, metavar="R", help="share of inner channels to keep, e.g. 0.5")
    add("--max-error", type=float, metavar="E", help="relative output error on held-out synthetic inputs; without --keep it "
        "decides how much is pruned (default then: 0.1)")  # fmt: skip
    add("--min-agreement", type=float, metavar="A", help="gate: top-1 agreement with the original on those inputs, 0 to 1")
    add("--max-accuracy-drop", type=float, metavar="P", help="gate: points of accuracy lost on --verify-data")
    add("--round-to", type=_whole(1), default=default.round_to, metavar="N", help="widths are multiples of N (default: %(default)s)")
    add("--exclude", action="append", default=[], metavar="PATTERN", help="layers to leave alone, e.g. 'layer4.*'; repeatable")
    add("--verify-data", type=Path, metavar="FILE.npz", help="arrays inputs and labels, only to measure accuracy with")
    add("--preprocess", metavar="JSON|imagenet", help="how the server turns images into inputs: "
        '{"mode": "RGB", "mean": [..], "std": [..]} (default: what the architecture declares)')  # fmt: skip
    add("--batch-size", type=_whole(1), default=8, metavar="N", help="requests the server may put in one batch (default: %(default)s)")
    add("--max-batch-delay", type=_whole(0), default=2, metavar="MS", help="how long a batch waits for more requests (default: %(default)s ms)")
    add("--threads", type=_whole(1), default=1, metavar="N", help="torch threads of each worker (default: %(default)s)")
    add("--seed", type=_whole(0), default=default.seed, metavar="N", help="of the synthetic inputs (default: %(default)s)")
    add("--time-budget", type=_positive, default=default.time_budget, metavar="S", help="seconds for making inputs and fitting (default: %(default)g)")
    add("--device", default=None, help="where to make inputs and fit (default: cuda when there is one, else cpu)")
    add("--dry-run", action="store_true", help="do everything but write")


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="what package wrote, such as dist/NAME")
    parser.add_argument("--workers", type=_whole(1), default=1, metavar="N", help="worker processes for each version (default: %(default)s)")
    parser.add_argument("--port", type=_whole(1), metavar="N", help="first of six consecutive ports (default: free ones)")
    parser.add_argument("--demo-auth-off", action="store_true", help="take requests without a token")


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--inputs", type=Path, metavar="PATH", help=".npz with inputs (and labels), or a folder of images or .npy files "
        "(default: synthetic inputs kept in the folder)")  # fmt: skip
    add("--concurrency", type=_whole(1), default=4, metavar="N", help="requests in flight (default: %(default)s)")
    add("--duration", type=_positive, default=30.0, metavar="S", help="seconds of load (default: %(default)g)")
    add("--margin", type=_positive, default=0.02, metavar="R", help="relative difference that counts as none (default: %(default)g)")
    add("--seed", type=_whole(0), default=0, metavar="N", help="of the order of requests (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")


def _captured(options: argparse.Namespace) -> Any:
    from .capture import capture_file
    from .capture.inputs import parse_input

    inputs = [parse_input(text, k) for k, text in enumerate(options.input)]
    return capture_file(options.file, inputs, arch=options.arch, arch_args=_json("--arch-args", options.arch_args),
                        trust=options.trust_file)  # fmt: skip


def _inspect(options: argparse.Namespace) -> None:
    from .inspection import describe_file, describe_network

    if not options.input:
        report = describe_file(options.file)
    else:
        report = describe_network(_captured(options), tuple(options.exclude))
    print(json.dumps(report.to_json(), indent=1) if options.json else report.to_text())


def _package(options: argparse.Namespace) -> None:
    from .packaging.mar import check_name
    from .packaging.package import Serving, check_out, package
    from .pruning.options import Options
    from .pruning.stages import Stages
    from .report.text import package_summary

    name = options.file.stem if options.name is None else options.name
    check_name(name)  # all that the command line alone can decide comes before any work
    out = options.out or Path("dist") / name
    check_out(out)
    _json("--preprocess", None if options.preprocess == "imagenet" else options.preprocess)
    fields = ("hash", "hash_error", "hash_values", "merge", "keep", "max_error", "min_agreement", "max_accuracy_drop",
              "round_to", "seed", "time_budget")  # fmt: skip
    choice = Options(**{f: getattr(options, f) for f in fields}, exclude=tuple(options.exclude), device=_device(options.device))
    serving = Serving(options.batch_size, options.max_batch_delay, options.threads)
    stages = Stages()
    with stages.run("capture") as stage:
        captured = _captured(options)
        stage.reason = f"{captured.source['kind']}, {len(captured.graph.nodes)} operations"
    for message in captured.messages:
        print(f"note: {message}", file=sys.stderr)
    report = package(captured, out, name=name, options=choice, serving=serving, verify_data=options.verify_data,
                     preprocess=_preprocess(options.preprocess, captured), stages=stages, dry_run=options.dry_run)  # fmt: skip
    print(package_summary(report))
    print("\ndry run: nothing was written" if options.dry_run else
          f"\nwrote {out}: report.html, original.mar (1.0), redpp.mar (2.0)\nnext: redpp-serve compare {out}")  # fmt: skip


def _serve(options: argparse.Namespace) -> None:
    from .serving.folder import serve

    serve(options.folder, workers=options.workers, ports=_ports(options.port), auth=not options.demo_auth_off,
          say=lambda line: print(line, flush=True))  # fmt: skip


def _compare(options: argparse.Namespace) -> None:
    from .comparison.folder import compare

    result = compare(
        options.folder, inputs=options.inputs, concurrency=options.concurrency, seconds=options.duration, margin=options.margin,
        seed=options.seed, workers=options.workers, ports=_ports(options.port), auth=not options.demo_auth_off,
        note=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    print(json.dumps(result.to_json(), indent=1) if options.json else result.to_text())


def _demo(options: argparse.Namespace) -> None:
    from .demo import demo

    demo(options.out, options.duration, options.time_budget)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda") or name.startswith("cuda") and not torch.cuda.is_available():
        raise RedppError(f"--device {name}", "cpu, or cuda on a machine that has it", "leave out --device")
    return name


def _ports(first: int | None) -> Any:
    from .serving.ports import Ports

    return None if first is None else Ports(*range(first, first + 6))


def _preprocess(text: str | None, captured: Any) -> Any:
    """What the user declared, completed by the input's shape; else what the architecture declares; else None."""
    from .handlers.preprocess import Preprocess

    shape = captured.graph.inputs[0].shape
    declared = _IMAGENET if text == "imagenet" else captured.hints if text is None else _json("--preprocess", text)
    if declared is None:
        return None
    if len(shape) != 3 or shape[0] not in (1, 3):
        if text is None:
            return None
        raise RedppError(f"--preprocess for an input of shape {shape}", "one image input, 1 or 3 channels", "leave out --preprocess")
    complete = {"mode": "L" if shape[0] == 1 else "RGB", "height": shape[1], "width": shape[2]}
    return Preprocess.from_json({**complete, "mean": [0.0] * shape[0], "std": [1.0] * shape[0], **declared})


def _json(flag: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RedppError(f"{flag} is no JSON: {error}", "a JSON object", f"quote it: {flag} '{{\"key\": 1}}'") from error
    if not isinstance(value, dict):
        raise RedppError(f"{flag} is {text}", "a JSON object", f"quote it: {flag} '{{\"key\": 1}}'")
    return value


if __name__ == "__main__":
    sys.exit(main())
