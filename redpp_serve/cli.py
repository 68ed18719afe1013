"""The command line: which commands there are, what they take, and how they end.

Parsing needs neither torch nor a server library; `commands` imports what a command needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from redpp_serve import __version__, commands
from redpp_serve.errors import RedppError
from redpp_serve.options import (
    EXPORTS,
    POSITIVE,
    SERVERS,
    Checked,
    ComparisonOptions,
    Limits,
    ObserveOptions,
    Options,
    PlanOptions,
    ServerOptions,
    Serving,
    Source,
    add_options,
    option,
    whole,
)
from redpp_serve.signals import exit_of_a_command, stopped_by_signal
from redpp_serve.variants import NAMES

EXIT_CODES = (
    "exit codes: 0 done; 1 a server does not answer; 2 bad input; 3 a number missed its limit or target; 130 Ctrl-C"
)
FIRST_STEPS = """Prune a trained PyTorch network without data, serve it beside the original, and measure both.

Try it:       redpp-serve demo
Your network: redpp-serve inspect model.pt --arch torchvision:resnet50 --input 3x224x224
              redpp-serve package model.pt --arch torchvision:resnet50 --input 3x224x224 --preprocess imagenet
              redpp-serve compare dist/model
All commands: redpp-serve --help
"""


@dataclass(frozen=True)
class InspectOptions:
    """What `inspect` shows."""

    exclude: tuple[str, ...] = option((), "layers to leave alone; repeatable", metavar="PATTERN")
    channels: bool = option(False, "list every set of coupled channels, and why the closed ones are closed")


@dataclass(frozen=True)
class PackageOptions:
    """Where `package` writes, and what it is given besides the options of pruning and serving."""

    out: Path | None = option(
        None, "folder to write; an earlier package there is replaced (default: dist/NAME)", metavar="FOLDER", takes=Path
    )
    name: str | None = option(
        None, "the model's name in URLs (default: the file's name without its ending)", metavar="NAME"
    )
    verify_data: Path | None = option(
        None, "arrays inputs and labels, used only to measure accuracy", metavar="FILE.npz", takes=Path
    )
    inputs: Path | None = option(
        None,
        "a few unlabelled real inputs, which make the fit and its error better; none of them is kept: an .npz file, or "
        "a folder of .npy files or images",
        metavar="PATH",
        takes=Path,
    )
    moments: Path | None = option(
        None, "what `serve --observe` or `ab start --observe` has added up", metavar="FILE", takes=Path
    )
    preprocess: str | None = option(
        None,
        'how the server turns images into inputs: {{"mode": "RGB", "mean": [..], "std": [..]}} '
        "(default: what the architecture declares)",
        metavar="JSON|imagenet",
    )
    like: Path | None = option(
        None,
        "take FILE as the pruned version, beside the original, inputs, name and serving options of an earlier package, "
        "without a search; FILE is the state_dict of redpp_serve.load(FOLDER) after fine-tuning, or any network with "
        "the same inputs and outputs; only limits that are given gate",
        metavar="FOLDER",
        takes=Path,
    )
    dry_run: bool = option(False, "do everything but write")


@dataclass(frozen=True)
class ExportOptions(Checked):
    """What `export` writes, and where."""

    to: str = option(
        "onnx",
        "pt2: torch.export with a dynamic batch; module: a Python module that needs torch alone, with its weights; "
        "triton-*: a model repository of both versions for a back end of Triton's own (default: {default})",
        takes=EXPORTS,
    )
    version: str | None = option(None, "version to export (default: pruned)", takes=NAMES)
    precision: str | None = option(
        None,
        "precision to compute in: fp32, for onnx and openvino also int8, for pt2 and module bf16 (default: fp32)",
        takes=("fp32", "bf16", "int8"),
    )
    out: Path | None = option(
        None,
        "file, or for triton-* new folder (default: NAME_VERSION with the format's ending, or NAME_triton_BACKEND)",
        metavar="PATH",
        takes=Path,
    )


@dataclass(frozen=True)
class Json:
    """The form of the output."""

    json: bool = option(False, "print JSON")


@dataclass(frozen=True)
class AnyServer:
    """Which of several running servers is meant."""

    server: str | None = option(None, "which server, if both kinds serve the folder", takes=SERVERS)


@dataclass(frozen=True)
class DashboardOptions:
    """Where the dashboard is, and what it reads."""

    port: int | None = option(None, "port of the page (default: a free one)", metavar="N", takes=whole(1, 65535))
    metrics_url: tuple[str, ...] = option(
        (), "where metrics are; repeatable (default: those of the server that runs for the folder)", metavar="URL"
    )


@dataclass(frozen=True)
class DemoOptions:
    """How long the demo takes, and where it writes."""

    out: Path = option(Path("redpp-demo"), "folder to write (default: {default})", metavar="FOLDER", takes=Path)
    duration: float = option(30.0, "seconds of load (default: {default:g})", metavar="S", takes=POSITIVE)
    time_budget: float = option(
        90.0, "seconds for making inputs and fitting (default: {default:g})", metavar="S", takes=POSITIVE
    )


@dataclass(frozen=True)
class StartOptions:
    """How `ab start` divides or mirrors traffic."""

    split: str | None = option(
        None,
        "per cent of users for the original and for the pruned version (default: 90:10, with --shadow 100:0)",
        metavar="O:P",
    )
    sticky_header: str | None = option(
        None,
        "request header that names the user, who then keeps one version; without it every request is assigned anew",
        metavar="NAME",
    )
    shadow: bool = option(False, "replay users' requests on both versions, and compare outputs and times")
    candidate: Path | None = option(
        None, "take the pruned version from another package with the same inputs", metavar="FOLDER", takes=Path
    )
    foreground: bool = option(False, "stay until Ctrl-C instead of returning")


@dataclass(frozen=True)
class GatewayOptions(ServerOptions):
    """The server behind `ab start`, whose ports begin with the gateway's."""

    port: int | None = option(
        None,
        "port of the gateway; recorder, metrics and server take those after it (default: free ones)",
        metavar="N",
        takes=whole(1, 65_000),
    )


@dataclass(frozen=True)
class StatusOptions:
    """How `ab status` prints."""

    watch: bool = option(False, "print it again every two seconds until Ctrl-C")


@dataclass(frozen=True)
class StopOptions:
    """What `ab stop` keeps."""

    keep: Path | None = option(
        None, "new folder to copy pairs, windows, counts and logs to", metavar="FOLDER", takes=Path
    )


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        run: the function that runs it on the parsed arguments.
        help: one line.
        records: the option records that it takes.
        examples: command lines without the program's name.
        positional: what it works on: ``file``, ``folder`` or nothing.
    """

    run: commands.Run
    help: str
    records: tuple[type, ...] = ()
    examples: tuple[str, ...] = ()
    positional: str = "folder"


def _completion(options: argparse.Namespace) -> None:
    import shtab  # noqa: PLC0415 - no other command needs it

    print(shtab.complete(parser(), shell=options.shell))


_MODEL = "model.pt --arch torchvision:resnet50 --input 3x224x224"
COMMANDS = {
    "inspect": Command(
        commands.inspect,
        "say what a file is, what could be pruned and what each layer costs; write nothing",
        (Source, InspectOptions, Json),
        ("inspect model.pt", f"inspect {_MODEL} --channels"),
        "file",
    ),
    "package": Command(
        commands.package,
        "prune, verify, and write a folder that both versions are served from",
        (Source, PackageOptions, Options, Serving),
        (
            f"package {_MODEL} --preprocess imagenet",
            f"package {_MODEL} --target macs=0.5 --out dist/half",
            "package tuned.pt --like dist/model --out dist/tuned",
        ),
        "file",
    ),
    "export": Command(
        commands.export,
        "write a packaged network for another program, checked against the network before it is in place",
        (ExportOptions,),
        (
            "export dist/model --to onnx",
            "export dist/model --to pt2 --version original --out original.pt2",
            "export dist/model --to triton-onnxruntime --out repository",
        ),
    ),
    "plan": Command(
        commands.plan,
        "time the kernels that could run each layer on this machine, and choose",
        (PlanOptions, Json),
        ("plan dist/model", "plan dist/model --all"),
    ),
    "serve": Command(
        commands.serve,
        "serve both versions on the loopback address",
        (ServerOptions, ObserveOptions),
        ("serve dist/model", "serve dist/model --server triton --workers 2", "serve dist/model --observe"),
    ),
    "promote": Command(
        partial(commands.roll_out, variant="pruned"),
        "send requests that name no version to the pruned network",
        (AnyServer,),
        ("promote dist/model",),
    ),
    "rollback": Command(
        partial(commands.roll_out, variant="original"),
        "send requests that name no version to the original",
        (AnyServer,),
        ("rollback dist/model",),
    ),
    "health": Command(
        commands.health,
        "ask the running server for predictions; exit 1 if one is missing",
        (AnyServer,),
        ("health dist/model",),
    ),
    "compare": Command(
        commands.compare,
        "send the same inputs to both versions and say which is faster",
        (ServerOptions, ComparisonOptions, Json),
        ("compare dist/model", "compare dist/model --inputs images/ --rate 50"),
    ),
    "dashboard": Command(
        commands.dashboard,
        "show a page with live numbers of both versions while they are served",
        (DashboardOptions,),
        ("dashboard dist/model",),
    ),
    "ab start": Command(
        commands.ab_start,
        "start server and gateway, and return when they take requests",
        (StartOptions, Limits, GatewayOptions, ObserveOptions),
        ("ab start dist/model --split 90:10 --sticky-header X-User-Id", "ab start dist/model --shadow"),
    ),
    "ab status": Command(
        commands.ab_status,
        "show requests, times, the running verdict and advice",
        (Json, StatusOptions),
        ("ab status dist/model --watch",),
    ),
    "ab promote": Command(
        partial(commands.ab_send_all, arm="pruned"),
        "give all users the pruned version from their next request on",
        (),
        ("ab promote dist/model",),
    ),
    "ab rollback": Command(
        partial(commands.ab_send_all, arm="original"),
        "give all users the original from their next request on",
        (),
        ("ab rollback dist/model",),
    ),
    "ab stop": Command(
        commands.ab_stop,
        "end the A/B test and every process of it",
        (StopOptions,),
        ("ab stop dist/model --keep results/",),
    ),
    "demo": Command(
        commands.demo,
        "run all of it on the shipped digits network, in two to three minutes",
        (DemoOptions,),
        ("demo",),
        "",
    ),
    "completion": Command(
        _completion, "print a completion script for a shell", (), ("completion bash >> ~/.bash_completion",), "shell"
    ),
}
_POSITIONALS = {
    "file": "state_dict (.pt, .pth, .safetensors), or with --trust-file a module, TorchScript or .pt2",
    "folder": "packaged folder, such as dist/NAME",
}
_AB = "split or mirror live traffic, and get a running verdict"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code, see `EXIT_CODES`. SIGTERM and SIGHUP exit with 128 and their number.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words:
        print(FIRST_STEPS, end="")
        return 0
    options = parser().parse_args(words)
    try:
        with stopped_by_signal(exit_of_a_command):
            COMMANDS[options.command].run(options)
    except RedppError as error:
        print(f"redpp-serve {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"redpp-serve {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
        return 128 + signal.SIGPIPE
    return 0


class _Parser(argparse.ArgumentParser):
    """Say what is wrong in one line instead of below twenty lines of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. What to do: see '{self.prog} --help'.\n")


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; ``command`` in its result is the key in `COMMANDS`."""
    root = _new_parser(
        "Prune a trained PyTorch network without data, serve it beside the original, and measure both.",
        ("demo", f"package {_MODEL}", "compare dist/model"),
        prog="redpp-serve",
    )
    root.add_argument("--version", action="version", version=f"redpp-serve {__version__}")
    groups = {"": root.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)}
    for name, command in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            above = groups[""].add_parser(group, **_texts(_AB, ()))
            groups[group] = above.add_subparsers(required=True, metavar="ACTION", parser_class=_Parser)
        one = groups[group].add_parser(word, **_texts(command.help, command.examples))
        one.set_defaults(command=name)
        if command.positional == "shell":
            one.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="shell to complete for")
        elif command.positional:
            one.add_argument(command.positional, type=Path, help=_POSITIONALS[command.positional])
        for record in command.records:
            if record is Options:
                one.add_argument(
                    "--target",
                    type=commands.target,
                    default={},
                    metavar="macs=R|latency=R",
                    help="share to keep of the multiply-accumulates, or of the latency measured here at batch 1",
                )
                add_options(one, record, ("target_macs", "target_latency", "device"), given_only=True)
                one.add_argument("--device", help="device to prune on (default: cuda where there is one, else cpu)")
            else:
                add_options(one, record, given_only=record is Serving)
    return root


def _texts(text: str, examples: Sequence[str]) -> dict[str, Any]:
    shown = "".join(f"  redpp-serve {example}\n" for example in examples)
    epilog = (f"examples:\n{shown}\n" if examples else "") + EXIT_CODES
    return {
        "help": text,
        "description": f"{text[0].upper()}{text[1:]}.".replace("..", "."),
        "epilog": epilog,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def _new_parser(description: str, examples: Sequence[str], prog: str) -> _Parser:
    texts = _texts(description, examples)
    del texts["help"]
    return _Parser(prog=prog, **texts)


if __name__ == "__main__":
    sys.exit(main())
