"""The command line: which commands there are, what they take, and how they end.

Parsing needs neither torch nor a server library; `commands` imports what a command needs when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from redpp_serve import __version__, commands, config
from redpp_serve.errors import RedppError, printable
from redpp_serve.options import (
    EXPORTS,
    POSITIVE,
    SECONDS,
    SERVERS,
    Checked,
    ComparisonOptions,
    ConfigOptions,
    ContractOptions,
    Json,
    Limits,
    LogOptions,
    ObserveOptions,
    Options,
    PlanOptions,
    RecordedOptions,
    ServerOptions,
    Serving,
    Source,
    SweepOptions,
    SystemdOptions,
    TargetOptions,
    WatchOptions,
    add_options,
    option,
    whole,
)
from redpp_serve.requirements import HEALTH, Requirement
from redpp_serve.requirements import parse as parse_requirements
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
        "how the server turns images into inputs: words such as imagenet, bytes, squash, pad, bgr, bicubic, joined by "
        "commas; a JSON object; a preprocessor_config.json; or none (default: what the architecture declares)",
        metavar="HOW",
    )
    labels: str | None = option(
        None,
        "the names of the classes, which both servers tell on request: a file with one a line, a JSON list, a Hugging "
        "Face config.json, or torchvision or timm for those of ImageNet",
        metavar="FILE",
    )
    like: Path | None = option(
        None,
        "take FILE as the pruned version, beside the original, inputs, name and serving options of an earlier package, "
        "without a search; FILE is the state_dict of redpp_serve.load(FOLDER) after fine-tuning, or any network with "
        "the same inputs and outputs; only limits that are given gate",
        metavar="FOLDER",
        takes=Path,
    )
    once: bool = option(
        False,
        "where the folder holds the package of the same network, options and releases already, say so and do nothing; "
        "replace no other one",
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
class AnyServer:
    """Which of several running servers is meant."""

    server: str | None = option(None, "which server, if both kinds serve the folder", takes=SERVERS)


@dataclass(frozen=True)
class SchemaOptions:
    """What `config` prints."""

    schema: bool = option(False, "print the JSON schema of such files, for editors")


@dataclass(frozen=True)
class HealthOptions:
    """What `health` requires."""

    require: tuple[tuple[Requirement, ...], ...] = option(
        (),
        "exit with 3 where the time of one request is above its limit, such as pruned_ms<=50; there are "
        f"{', '.join(HEALTH)}; repeatable",
        metavar="LIMITS",
        takes=partial(parse_requirements, names=HEALTH),
    )


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
    attach: bool = option(False, "use the server that `serve` runs for the folder, and leave it running in the end")
    candidate: Path | None = option(
        None, "take the pruned version from another package with the same inputs", metavar="FOLDER", takes=Path
    )
    foreground: bool = option(False, "stay until Ctrl-C instead of returning")


@dataclass(frozen=True)
class PilotOptions:
    """What an A/B test does on its verdict, and whom it tells."""

    auto: bool = option(
        False, "act on the verdict: promote a version that is faster, roll back one that is slower or beyond a limit"
    )
    ramp: str | None = option(
        None,
        "with --auto: per cent of users for the pruned version, one share after the other while every limit is kept; "
        "100 promotes it",
        metavar="P,P,...",
    )
    hold: float = option(
        300.0, "seconds that each share of --ramp lasts at least (default: {default:g})", metavar="S", takes=SECONDS
    )
    webhook: str | None = option(
        None,
        "tell a chat or pager what was decided, as JSON with a text as Slack and Mattermost take it",
        metavar="URL",
    )


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


def _config(options: argparse.Namespace) -> None:
    if options.schema == (options.file is not None):
        found = "a file beside --schema" if options.schema else "neither a file nor --schema"
        raise RedppError(found, "one of them", "name the file, such as redpp.yaml")
    if options.schema:
        print(json.dumps(config.schema(_sections()), indent=1))
    else:
        for line in config.as_commands(config.read(options.file, _sections())):
            print(line)


def _sections() -> dict[str, tuple[type, ...]]:
    """Return the option records of the commands that take ``--config``."""
    return {name: command.records for name, command in COMMANDS.items() if ConfigOptions in command.records}


def _configured(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options of a command with those of its file, which are told.

    Raises:
        RedppError: the file cannot be used.
    """
    command, words = options.command, options.arguments
    settings = config.read(options.config, _sections()).get(command, [])
    given = vars(parser(given_only=True).parse_args(words))
    merged = config.merge(command, settings, words, given)
    flags = dict.fromkeys(x.words[0].partition("=")[0] for x in settings if x.words and x.name not in given)
    print(f"options of {printable(options.config)}: {', '.join(flags) or 'none'}", file=sys.stderr)
    return parser().parse_args(merged, argparse.Namespace(arguments=words))


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
        (Source, PackageOptions, TargetOptions, Options, Serving, ConfigOptions),
        (
            f"package {_MODEL} --preprocess imagenet",
            f"package {_MODEL} --target macs=0.5 --out dist/half",
            "package tuned.pt --like dist/model --out dist/tuned",
            "package model.pt --config redpp.yaml",
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
        (ServerOptions, LogOptions, ObserveOptions, SystemdOptions, ConfigOptions),
        ("serve dist/model", "serve dist/model --server triton --workers 2", "serve dist/model --systemd install"),
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
        "ask the running servers for predictions; exit 1 if one is missing",
        (AnyServer, HealthOptions, Json),
        ("health dist/model", "health dist/model --json --require 'pruned_ms<=50'"),
    ),
    "compare": Command(
        commands.compare,
        "send the same inputs to both versions and say which is faster",
        (ServerOptions, ComparisonOptions, SweepOptions, RecordedOptions, ContractOptions, Json, ConfigOptions),
        (
            "compare dist/model",
            "compare dist/model --inputs images/ --rate 50",
            "compare dist/model --require 'speedup>=1.2,agreement>=0.99,p99_ms<=20' --junit compare.xml",
            "compare dist/model --sweep concurrency=1,2,4,8 --csv sweep.csv",
            "compare dist/model --from-locust locust/",
        ),
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
        (StartOptions, PilotOptions, Limits, GatewayOptions, LogOptions, ObserveOptions, SystemdOptions, ConfigOptions),
        (
            "ab start dist/model --split 90:10 --sticky-header X-User-Id",
            "ab start dist/model --shadow",
            "ab start dist/model --auto --ramp 1,5,25,50,100 --sticky-header X-User-Id",
        ),
    ),
    "ab status": Command(
        commands.ab_status,
        "show requests, times, the running verdict and advice",
        (Json, StatusOptions),
        ("ab status dist/model --watch",),
    ),
    "ab watch": Command(
        commands.ab_watch,
        "watch a deployment by what Prometheus has of it: export the verdict, and with --auto act on it",
        (WatchOptions, PilotOptions, Limits, ConfigOptions),
        (
            "ab watch --prometheus http://127.0.0.1:9090 --split 90:10",
            "ab watch --prometheus http://prometheus.monitoring:9090 --route redpp-serve/model --auto --ramp 1,10,100",
        ),
        "",
    ),
    "ab split": Command(
        commands.ab_split,
        "divide users by another split from their next request on, without losing what was counted",
        (),
        ("ab split dist/model 25", "ab split dist/model 75:25"),
        "folder and split",
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
    "config": Command(
        _config,
        "check a file with options, and print the commands that it stands for; or print its schema for editors",
        (SchemaOptions,),
        ("config redpp.yaml", "config --schema > redpp.schema.json"),
        "config file",
    ),
    "completion": Command(
        _completion, "print a completion script for a shell", (), ("completion bash >> ~/.bash_completion",), "shell"
    ),
}
_POSITIONALS = {
    "file": "state_dict (.pt, .pth, .safetensors, or the folder or index of several), an ONNX model, or with "
    "--trust-file a module, TorchScript or .pt2",
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
    options = parser().parse_args(words, argparse.Namespace(arguments=words))
    try:
        if getattr(options, "config", None):
            options = _configured(options)
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

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is unknown here, where the options that may have been meant are known."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            words = (word.partition("=")[0] for word in unknown if word.startswith("--"))
            meant = [near for word in words for near in get_close_matches(word, self._option_string_actions, 1, 0.75)]
            hint = f" (did you mean {' and '.join(meant)}?)" if meant else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. What to do: see '{self.prog} --help'.\n")


def parser(given_only: bool = False) -> argparse.ArgumentParser:
    """Build the parser of all commands; ``command`` in its result is the key in `COMMANDS`.

    Args:
        given_only: leave options that are not given out of the result.
    """
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
        elif command.positional == "config file":
            one.add_argument("file", type=Path, nargs="?", help="the file, such as redpp.yaml")
        elif command.positional == "folder and split":
            one.add_argument("folder", type=Path, help=_POSITIONALS["folder"])
            one.add_argument("split", help="per cent of users for the pruned version, or for both as in 75:25")
        elif command.positional:
            one.add_argument(command.positional, type=Path, help=_POSITIONALS[command.positional])
        for record in command.records:
            if record is Options:
                add_options(one, record, ("target_macs", "target_latency", "device"), given_only=True)
                default = argparse.SUPPRESS if given_only else None
                words = "device to prune on (default: cuda where there is one, else cpu)"
                one.add_argument("--device", default=default, help=words)
            else:
                add_options(one, record, given_only=given_only or record is Serving)
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
