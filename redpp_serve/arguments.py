"""The words of the command line: each command's arguments, their types, defaults and help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from redpp_serve import __version__


def _whole(low: int, high: int = 2**62) -> Callable[[str], int]:
    """For argparse: a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        if int(text) > high:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {high}")
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


def _seconds(text: str) -> float:
    """For argparse: 0 or a finite number above it."""
    try:
        return 0.0 if text.strip() in ("0", "0.0") else _positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a number above it") from None


def _target(text: str) -> dict[str, float]:
    """For argparse: ``macs=0.5`` or ``latency=0.6`` as the option of that name."""
    what, _, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if what not in ("macs", "latency") or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not macs=R or latency=R with a share R above 0 and at most 1")
    return {f"target_{what}": value}


_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
_SERVERS = ("torchserve", "triton")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of below twenty lines of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. What to do: see '{self.prog} --help'.\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``command`` in its result is the one that was given."""
    root = _Parser(
        prog="redpp-serve",
        description="Prune a trained PyTorch network without data, serve it beside the original, and measure both.",
    )
    root.add_argument("--version", action="version", version=f"redpp-serve {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="say what a file is and what could be pruned; writes nothing")
    _add_source(inspect)
    inspect.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="layers to leave alone")
    inspect.add_argument(
        "--channels",
        action="store_true",
        help="list every class of coupled channels, and why the closed ones are closed",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    package = commands.add_parser(
        "package", help="prune, verify, and write a folder that both versions are served from"
    )
    _add_source(package)
    _add_pruning(package)
    plan = commands.add_parser("plan", help="time the kernels that could run each layer on this machine, and choose")
    plan.add_argument("folder", type=Path, help="what package wrote")
    plan.add_argument("--device", help="cpu or cuda:N (default: a GPU where there is one)")
    plan.add_argument("--precision", choices=_PRECISIONS, help="default: the package's")
    plan.add_argument("--batch-size", type=_whole(1, 4096), metavar="N", help="largest batch (default: the package's)")
    plan.add_argument("--threads", type=_whole(1, 1024), metavar="N", help="torch threads (default: the package's)")
    plan.add_argument(
        "--time-budget",
        type=_seconds,
        default=20.0,
        metavar="S",
        help="seconds of timing for each version (default: %(default)g)",
    )
    plan.add_argument("--all", action="store_true", help="time also kernels that a rule holds for hopeless")
    plan.add_argument("--json", action="store_true", help="print JSON")
    serve = commands.add_parser("serve", help="serve both versions on the loopback address")
    _add_server(serve)
    for word, text in (
        ("promote", "give requests that name no version to the pruned network"),
        ("rollback", "give requests that name no version to the original"),
        ("health", "ask the running server for predictions; exit 1 where one is missing"),
    ):
        command = commands.add_parser(word, help=text)
        command.add_argument("folder", type=Path, help="what serve was given")
        command.add_argument("--server", choices=_SERVERS, help="which one, where both kinds serve the folder")
    compare = commands.add_parser("compare", help="send the same inputs to both versions and say which is faster")
    _add_server(compare)
    _add_load(compare)
    dashboard = commands.add_parser("dashboard", help="a page with live numbers of both versions while they are served")
    dashboard.add_argument("folder", type=Path, help="what package wrote, such as dist/NAME")
    dashboard.add_argument("--port", type=_whole(1, 65535), metavar="N", help="of the page (default: a free one)")
    dashboard.add_argument(
        "--metrics-url",
        action="append",
        default=[],
        metavar="URL",
        help="where metrics are; repeatable (default: those of the server that runs for the folder)",
    )
    _add_experiment(commands.add_parser("ab", help="split or mirror live traffic, and get a running verdict"))
    demo = commands.add_parser("demo", help="all of it on the shipped digits network, in two to three minutes")
    demo.add_argument("--out", type=Path, default=Path("redpp-demo"), help="folder to write (default: %(default)s)")
    demo.add_argument(
        "--duration", type=_positive, default=30.0, metavar="S", help="seconds of load (default: %(default)g)"
    )
    demo.add_argument(
        "--time-budget",
        type=_positive,
        default=90.0,
        metavar="S",
        help="seconds for making inputs and fitting (default: %(default)g)",
    )
    return root


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        help="state_dict (.pt, .pth, .safetensors), or with --trust-file a module, TorchScript or .pt2",
    )
    parser.add_argument(
        "--arch",
        help="the network that a state_dict belongs to: torchvision:NAME, timm:NAME or path/to/file.py:factory",
    )
    parser.add_argument(
        "--arch-args", metavar="JSON", help="keyword arguments of the architecture, e.g. '{\"num_classes\": 10}'"
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="shape of one input without batch, 3x224x224[:dtype]; repeat it for a network with several inputs",
    )
    parser.add_argument(
        "--trust-file", action="store_true", help="load a format that can run code; only for files you trust"
    )


def _add_pruning(parser: argparse.ArgumentParser) -> None:
    from redpp_serve.options import Options

    default = Options()
    add = parser.add_argument
    add("--out", type=Path, help="folder to write; an earlier package there is replaced (default: dist/NAME)")
    add("--name", help="the model's name in URLs (default: the file's name without its ending)")
    add(
        "--hash",
        default=default.hash,
        choices=("kde", "kmeans", "uniform", "none"),
        help="how weights become codebooks (default: %(default)s)",
    )
    add(
        "--hash-error",
        type=float,
        metavar="E",
        help="relative RMS error of each layer's weights (default: "
        "0.02 before merging; behind it the fewest values a layer, from 16 on, that the error budget allows)",
    )
    add("--hash-values", type=int, metavar="N", help="instead: at most N values a layer")
    add(
        "--merge",
        default=default.merge,
        choices=("reconstruct", "exact"),
        help="which channels may go (default: %(default)s)",
    )
    add(
        "--target",
        type=_target,
        default={},
        metavar="macs=R|latency=R",
        help="share of the multiply-accumulates, or of the latency measured on this device at batch 1, to keep",
    )
    add("--keep", type=float, metavar="R", help="instead: share of every class of channels to keep, e.g. 0.5")
    add(
        "--max-error",
        type=float,
        metavar="E",
        help="relative output error on held-out synthetic inputs; without --target and --keep it "
        "decides how much is pruned (default then: 0.1)",
    )
    add(
        "--distil",
        type=_seconds,
        default=default.distil,
        metavar="S",
        help="seconds of distillation on synthetic inputs, 0 for none (default: %(default)g)",
    )
    add(
        "--min-agreement",
        type=float,
        metavar="A",
        help="gate: top-1 agreement with the original on those inputs, 0 to 1",
    )
    add("--max-accuracy-drop", type=float, metavar="P", help="gate: points of accuracy lost on --verify-data")
    add(
        "--round-to",
        type=_whole(1),
        default=default.round_to,
        metavar="N",
        help="widths are multiples of N (default: %(default)s)",
    )
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="layers to leave alone, e.g. 'layer4.*'; repeatable",
    )
    add("--verify-data", type=Path, metavar="FILE.npz", help="arrays inputs and labels, only to measure accuracy with")
    add(
        "--preprocess",
        metavar="JSON|imagenet",
        help="how the server turns images into inputs: "
        '{"mode": "RGB", "mean": [..], "std": [..]} (default: what the architecture declares)',
    )
    add(
        "--batch-size",
        type=_whole(1, 4096),
        default=8,
        metavar="N",
        help="requests the server may put in one batch (default: %(default)s)",
    )
    add(
        "--max-batch-delay",
        type=_whole(0, 60_000),
        default=2,
        metavar="MS",
        help="how long a batch waits for more requests (default: %(default)s ms)",
    )
    add(
        "--threads",
        type=_whole(1, 1024),
        default=1,
        metavar="N",
        help="torch threads of each worker (default: %(default)s)",
    )
    add(
        "--precision",
        choices=_PRECISIONS,
        default="fp32",
        help="that both versions are served in (default: %(default)s)",
    )
    add(
        "--seed",
        type=_whole(0),
        default=default.seed,
        metavar="N",
        help="of the synthetic inputs (default: %(default)s)",
    )
    add(
        "--time-budget",
        type=_positive,
        default=default.time_budget,
        metavar="S",
        help="seconds for making inputs and fitting, before distillation (default: %(default)g)",
    )
    add("--device", default=None, help="where to make inputs and fit (default: cuda when there is one, else cpu)")
    add("--dry-run", action="store_true", help="do everything but write")


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="what package wrote, such as dist/NAME")
    parser.add_argument("--server", default=_SERVERS[0], choices=_SERVERS, help="which server (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=_whole(1),
        default=1,
        metavar="N",
        help="worker processes for each version (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=_whole(1),
        metavar="N",
        help="first of six consecutive ports, of three for triton (default: free ones)",
    )
    parser.add_argument("--demo-auth-off", action="store_true", help="take requests without a token")


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--inputs",
        type=Path,
        metavar="PATH",
        help=".npz with inputs (and labels), or a folder of images or .npy files "
        "(default: synthetic inputs kept in the folder)",
    )
    add("--concurrency", type=_whole(1), default=4, metavar="N", help="requests in flight (default: %(default)s)")
    add("--duration", type=_positive, default=30.0, metavar="S", help="seconds of load (default: %(default)g)")
    add(
        "--rate",
        type=_positive,
        metavar="R",
        help="also measure latency at R requests a second, whether or not earlier ones are answered",
    )
    add(
        "--margin",
        type=_positive,
        default=0.02,
        metavar="R",
        help="relative difference that counts as none (default: %(default)g)",
    )
    add("--seed", type=_whole(0), default=0, metavar="N", help="of the order of requests (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")


def _share(text: str) -> float:
    """For argparse: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    start = actions.add_parser("start", help="start server and gateway, and return when they take requests")
    _add_split(start)
    status = actions.add_parser("status", help="requests, times, running verdict and advice")
    promote = actions.add_parser("promote", help="all users get the pruned version from their next request on")
    rollback = actions.add_parser("rollback", help="all users get the original from their next request on")
    stop = actions.add_parser("stop", help="end the experiment and every process of it")
    for action in (start, status, promote, rollback, stop):
        action.add_argument("folder", type=Path, help="what package wrote, such as dist/NAME")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--watch", action="store_true", help="print it again every two seconds until Ctrl-C")
    stop.add_argument("--keep", type=Path, metavar="PATH", help="new folder to copy pairs, windows, counts and logs to")


def _add_split(parser: argparse.ArgumentParser) -> None:
    from redpp_serve.ab.spec import Limits

    add, default = parser.add_argument, Limits()
    add(
        "--split",
        metavar="O:R",
        help="per cent of users for the original and for the pruned version (default: 90:10, with --shadow 100:0)",
    )
    add(
        "--sticky-header",
        metavar="NAME",
        help="request header that names the user, who then keeps one arm; without it every request is assigned anew",
    )
    add("--shadow", action="store_true", help="replay users' requests on both versions, and compare outputs and times")
    add(
        "--candidate",
        type=Path,
        metavar="FOLDER",
        help="take the pruned version from another package with the same inputs",
    )
    add("--server", choices=("torchserve", "triton"), default="torchserve", help="(default: %(default)s)")
    add(
        "--tolerance",
        type=_positive,
        default=default.tolerance,
        metavar="R",
        help="relative difference up to which outputs agree (default: the same class; 0.1 where they are no classes)",
    )
    add(
        "--min-agreement",
        type=_share,
        default=default.min_agreement,
        metavar="A",
        help="share of shadowed requests whose outputs have to agree (default: %(default)g)",
    )
    add(
        "--margin",
        type=_positive,
        default=default.margin,
        metavar="R",
        help="relative difference in speed that counts as none (default: %(default)g)",
    )
    add(
        "--max-error-rate-gap",
        type=_share,
        default=default.max_error_rate_gap,
        metavar="G",
        help="by how much the pruned version's share of errors may exceed the original's (default: %(default)g)",
    )
    add(
        "--max-p99-ratio",
        type=_positive,
        default=default.max_p99_ratio,
        metavar="R",
        help="how many times the original's p99 the pruned version's may be (default: %(default)g)",
    )
    add(
        "--workers",
        type=_whole(1),
        default=1,
        metavar="N",
        help="worker processes for each version (default: %(default)s)",
    )
    add(
        "--port",
        type=_whole(1, 65_000),
        metavar="N",
        help="of the gateway; recorder, metrics and server take those behind it (default: free ones)",
    )
    add("--demo-auth-off", action="store_true", help="take requests without a token")
    add("--foreground", action="store_true", help="stay until Ctrl-C instead of returning")
