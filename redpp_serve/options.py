"""The options of every command, each defined once: parser, Python API, help and ``options.md`` come from these records.

A field's metadata holds its help and the values it takes. ``python -m redpp_serve.documentation`` writes the
documentation. Nothing here imports torch, so that the command line answers at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from redpp_serve.errors import RedppError
from redpp_serve.requirements import COMPARED, Requirement
from redpp_serve.requirements import parse as parse_requirements

HASHES = ("kde", "kmeans", "uniform")
NO_HASH = "none"  # leave the weights as they are
AUTO = "auto"
RED = "red++"
METHODS = ("narrow", RED)
PRECISIONS = ("auto", "fp32", "tf32", "fp16", "bf16", "int8")
ENGINES = ("auto", "redpp", "openvino", "onnxruntime", "tensorrt", "torch-compile")
JSON_LINES = "json"
LOG_FORMATS = ("text", JSON_LINES)
EXPORTS = ("onnx", "openvino", "pt2", "module", "triton-onnxruntime", "triton-openvino")
SERVERS = ("torchserve", "triton")
DEFAULT_MAX_ERROR = 0.1
FLOOR_ERROR = 0.5  # what is farther from the original is not packaged unless the user says so
FLOOR_AGREEMENT = 0.3
DEFAULT_HASH_ERROR = 0.02
_WIDTHS = ("keep", "target_macs", "target_latency", "keep_point")  # at most one of them

_LARGEST = 2.0**62  # what still fits a signed integer of 64 bits

Record = TypeVar("Record")


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes: from ``low`` to ``high``, without ``low`` itself where ``above`` is set."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False
    whole: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high and value != math.inf

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.above:
            return f"{kind} above {self.low:g}" + (f" and at most {self.high:g}" if self.high < math.inf else "")
        if self.high < _LARGEST:
            return f"{kind} from {self.low:g} to {self.high:g}"
        return f"{kind} of at least {self.low:g}"

    def parse(self, text: str) -> float:
        """Read a number of this range for argparse.

        Raises:
            argparse.ArgumentTypeError: the text is no such number.
        """
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = math.nan
        if value not in self:
            raise argparse.ArgumentTypeError(f"{text!r} is not {self}")
        return value


SHARE = Range(0.0, 1.0)
RATIO = Range(0.0, 1.0, above=True)
POSITIVE = Range(above=True)
SECONDS = Range(0.0, 1e6)


@dataclass(frozen=True)
class RangeOr(Range):
    """The whole numbers that an option takes, or a word in their place."""

    word: str = ""

    def __contains__(self, value: float | str) -> bool:
        return value == self.word or (isinstance(value, int) and super().__contains__(value))

    def __str__(self) -> str:
        return f"{super().__str__()}, or {self.word}"

    def parse(self, text: str) -> Any:
        """Read such a number or the word for argparse.

        Raises:
            argparse.ArgumentTypeError: the text is neither.
        """
        return text if text == self.word else super().parse(text)


def whole(low: int, high: float = _LARGEST) -> Range:
    """Return the whole numbers from ``low`` to ``high``."""
    return Range(low, high, whole=True)


CONCURRENCY = whole(1, 1024)
_AXES = {"concurrency": CONCURRENCY, "rate": POSITIVE, "batch": whole(1, 4096)}
MOST_CELLS = 32  # of a sweep


def option(
    default: Any, text: str, *, metavar: str | None = None, takes: Any = None, flag: str | None = None, bare: Any = None
) -> Any:
    """Declare one option as a dataclass field.

    Args:
        default: its value where it is not given; a boolean makes it a switch, an empty tuple makes it repeatable.
        text: the help, to which the default is added where ``{default}`` stands.
        metavar: placeholder of its value in the help.
        takes: the values it takes: a `Range`, a tuple of choices, or a function that reads the text.
        flag: the flag, where it is not the field's name.
        bare: the value that the flag stands for without one; None where it needs one.
    """
    metadata = {"help": text, "metavar": metavar, "takes": takes, "flag": flag, "bare": bare}
    return field(default=default, metadata=metadata)


def flag_of(item: Field[Any]) -> str:
    """Return the command-line flag of an option, such as ``--round-to``."""
    return item.metadata.get("flag") or "--" + item.name.replace("_", "-")


def takes(record: type, name: str) -> Any:
    """Return the values that an option of a record takes."""
    return next(item.metadata["takes"] for item in fields(record) if item.name == name)


class Checked:
    """Refuses values that an option does not take, when the record is made."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value, takes = getattr(self, item.name), item.metadata.get("takes")
            if value is None or takes is None:
                continue
            if (isinstance(takes, Range) and value not in takes) or (isinstance(takes, tuple) and value not in takes):
                expected = str(takes) if isinstance(takes, Range) else " or ".join(takes)
                raise refusal(self, item.name, expected)


def refusal(record: object, name: str, expected: str) -> RedppError:
    """Return the error for an option's value, with its flag."""
    item = next(item for item in fields(record) if item.name == name)  # type: ignore[arg-type]
    flag, value = flag_of(item), getattr(record, name)
    found = f"{flag}{value}" if flag.endswith("=") else f"{flag} is {value}"
    return RedppError(found, expected, f"change or leave out {flag.rstrip('=')}")


@dataclass(frozen=True)
class HashTarget:
    """The aim of a codebook's search: a relative RMS ``error`` of a layer's weights, or a number of ``values``."""

    error: float | None = None
    values: int | None = None

    def __str__(self) -> str:
        return f"relative RMS {self.error:g}" if self.error is not None else f"at most {self.values} values"


@dataclass(frozen=True)
class Options(Checked):
    """How far a network is pruned, and how.

    What is pruned follows from one of ``keep``, ``target_macs``, ``target_latency`` and ``max_error``; without any of
    them the error budget is 0.1. ``min_agreement`` and ``max_accuracy_drop`` only gate.
    """

    target_macs: float | None = option(
        None, "share of the multiply-accumulates to keep", metavar="R", takes=RATIO, flag="--target macs="
    )
    target_latency: float | None = option(
        None,
        "share of the latency to keep, measured on this machine at batch 1",
        metavar="R",
        takes=RATIO,
        flag="--target latency=",
    )
    keep: float | None = option(
        None,
        "share of every set of coupled channels to keep, such as 0.5, instead of a target",
        metavar="R",
        takes=RATIO,
    )
    max_error: float | None = option(
        None,
        "limit of the relative output error on inputs that nothing was fitted to, the worst family of them; without "
        f"--target and --keep it decides how much is pruned (default: {DEFAULT_MAX_ERROR}, beside them {FLOOR_ERROR})",
        metavar="E",
        takes=Range(0.0, 10.0),
    )
    min_agreement: float | None = option(
        None,
        "gate: share of those inputs that must get the original's top-1 class, where an output is a classification "
        f"(default: {FLOOR_AGREEMENT})",
        metavar="A",
        takes=SHARE,
    )
    max_accuracy_drop: float | None = option(
        None, "gate: points of accuracy lost on --verify-data", metavar="P", takes=Range(0.0, 100.0)
    )
    method: str = option(
        "narrow",
        "narrow: remove channels that the others can reconstruct, and hash the fitted weights; red++: hash the weights "
        "as they are, merge channels that became equal, and nothing else (default: {default})",
        takes=METHODS,
    )
    hash: str = option(
        "kde",
        "method that turns weights into codebooks; with neither --method red++ nor --hash-error nor --hash-values, "
        "k-means replaces it (default: {default})",
        takes=(*HASHES, NO_HASH),
    )
    hash_error: float | None = option(
        None,
        f"relative RMS error of each layer's weights (default: {DEFAULT_HASH_ERROR} with --method red++; else the "
        "fewest values per layer, at least 16, that a tenth of the error budget allows)",
        metavar="E",
        takes=Range(1e-4, 1.0),
    )
    hash_values: int | None = option(
        None, "at most N values per layer, instead of --hash-error", metavar="N", takes=whole(2)
    )
    distil: float = option(
        60.0,
        "seconds of distillation at most, within the time budget; 0 for none (default: {default:g})",
        metavar="S",
        takes=SECONDS,
    )
    time_budget: float = option(
        300.0,
        "seconds of this machine, otherwise idle, for the whole run but the final trials (default: {default:g})",
        metavar="S",
        takes=Range(1.0),
    )
    round_to: int | str = option(
        AUTO,
        "make widths multiples of N; auto: of the step that the tiles of the engine that serves pay for, measured here "
        "once, and of 8 in networks of few channels (default: {default})",
        metavar="N",
        takes=RangeOr(1, _LARGEST, whole=True, word=AUTO),
    )
    exclude: tuple[str, ...] = option((), "leave these layers alone, such as 'layer4.*'; repeatable", metavar="PATTERN")
    accept_unmeasured: bool = option(
        False, "narrow also where inputs of the network's kind can be neither made nor were given"
    )
    keep_point: int | None = option(
        None,
        "package point K of the frontier that the last run for this folder printed, without a new search",
        metavar="K",
        takes=whole(1),
    )
    seed: int = option(0, "seed of the synthetic inputs (default: {default})", metavar="N", takes=whole(0))
    device: str = option("cpu", "device to prune on (default: cuda where there is one, else cpu)", metavar="DEVICE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hash_error is not None and self.hash_values is not None:
            raise refusal(self, "hash_values", "either --hash-error or --hash-values")
        chosen = [name for name in _WIDTHS if getattr(self, name) is not None]
        if len(chosen) > 1:
            first = next(flag_of(item) for item in fields(self) if item.name == chosen[0])
            raise refusal(self, chosen[1], f"not together with {first.rstrip('=')}")
        if self.method == RED and chosen:
            raise refusal(self, chosen[0], "no ratio with --method red++, which removes nothing but duplicates")

    @property
    def step(self) -> int:
        """The step of widths, once it is a number; `pruning.tiles.with_step` makes ``auto`` one."""
        assert isinstance(self.round_to, int)
        return self.round_to

    @property
    def hash_target(self) -> HashTarget:
        """The aim of every layer's codebook before merging."""
        if self.hash_values is not None:
            return HashTarget(values=self.hash_values)
        return HashTarget(error=DEFAULT_HASH_ERROR if self.hash_error is None else self.hash_error)

    @property
    def error_budget(self) -> float | None:
        """The held-out error that decides the widths; None where a ratio does, or nothing lossy is merged."""
        if self.method == RED or any(getattr(self, name) is not None for name in _WIDTHS):
            return None
        return DEFAULT_MAX_ERROR if self.max_error is None else self.max_error

    @property
    def floor_error(self) -> float | None:
        """The error above which a result is not packaged; None with --method red++ where no limit was given."""
        if self.max_error is not None or self.method == RED:
            return self.max_error
        return FLOOR_ERROR if self.error_budget is None else DEFAULT_MAX_ERROR

    @property
    def floor_agreement(self) -> float:
        """The agreement below which a result is not packaged."""
        if self.min_agreement is not None:
            return self.min_agreement
        return 0.0 if self.method == RED or self.max_error is not None else FLOOR_AGREEMENT

    def to_json(self) -> dict[str, Any]:
        """Return the options as plain data for report.json."""
        return {**asdict(self), "exclude": list(self.exclude)}


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


@dataclass(frozen=True)
class TargetOptions:
    """The share that `package` keeps, as one of two fields of `Options`."""

    target: dict[str, float] | None = option(
        None,
        "share to keep of the multiply-accumulates, or of the latency measured here at batch 1",
        metavar="macs=R|latency=R",
        takes=target,
    )


@dataclass(frozen=True)
class Json:
    """The form of the output."""

    json: bool = option(False, "print JSON")


@dataclass(frozen=True)
class ConfigOptions:
    """A file with options."""

    config: Path | None = option(
        None, "take options from the command's section of a YAML file; flags win over it", metavar="FILE", takes=Path
    )


@dataclass(frozen=True)
class Serving(Checked):
    """How both versions of a package are served."""

    batch_size: int = option(
        8, "requests that the server may put in one batch (default: {default})", metavar="N", takes=whole(1, 4096)
    )
    max_batch_delay_ms: int = option(
        2,
        "milliseconds that a batch waits for more requests (default: {default})",
        metavar="MS",
        takes=whole(0, 60_000),
        flag="--max-batch-delay",
    )
    threads: int = option(1, "torch threads of each worker (default: {default})", metavar="N", takes=whole(1, 1024))
    precision: str = option(
        "auto",
        "precision that both versions compute in; auto: the original in fp32, the pruned one in the fastest whose "
        "error stays within --precision-error (default: {default})",
        takes=PRECISIONS,
    )
    precision_error: float = option(
        0.1,
        "limit of the output error that --precision auto may add, on inputs that nothing was fitted to "
        "(default: {default:g})",
        metavar="E",
        takes=Range(0.0, 10.0),
    )
    engine: str = option(
        "auto",
        "engine that runs both versions: redpp is this project's own; tensorrt, for GPUs, and torch-compile take "
        "minutes to start; auto is the fastest of the others that is installed where they are served "
        "(default: {default})",
        takes=ENGINES,
    )


@dataclass(frozen=True)
class Source:
    """The file of a trained network, and what is needed to read it."""

    arch: str | None = option(
        None,
        "architecture of a state_dict: torchvision:NAME, timm:NAME, transformers:CLASS (with config.json beside the "
        "weights) or path/to/file.py:factory",
        metavar="ARCH",
    )
    arch_args: str | None = option(
        None, "keyword arguments of the architecture, such as '{{\"num_classes\": 10}}'", metavar="JSON"
    )
    weights_key: str | None = option(
        None,
        "which of several networks in a checkpoint to take: a key, with dots for one inside another, or a prefix of "
        "names such as student.",
        metavar="KEY",
    )
    input: tuple[str, ...] = option(
        (),
        "shape of one input without the batch, [NAME=]3x224x224[:dtype], and for integers their range where the "
        "network does not tell it, 20:int64:0..999; repeat it for several inputs. NAME is an argument of forward, or a "
        "key of the dict or a field of the object that it takes; a dot leads inside",
        metavar="SHAPE",
    )
    range: tuple[str, ...] = option(
        (),
        "the sizes that a letter in --input stands for, H=224..1024/32 for every 32nd from 224 to 1024; repeatable, as "
        "in --input 3xHxW --range H=224..512 --range W=224..512",
        metavar="SIZES",
    )
    input_args: str | None = option(
        None, "further arguments of forward, such as '{{\"return_dict\": true}}'; they stay as they are", metavar="JSON"
    )
    classes: tuple[str, ...] = option(
        (),
        "output that holds class scores, so that agreement means the same class; none for no output; repeatable "
        "(default: told from the network)",
        metavar="NAME",
    )
    trust_file: bool = option(False, "load a format that can run code; only for files you trust")


@dataclass(frozen=True)
class PlanOptions(Checked):
    """How `redpp-serve plan` times kernels."""

    device: str | None = option(None, "cpu or cuda:N (default: a GPU where there is one)", metavar="DEVICE")
    precision: str | None = option(None, "precision to compute in (default: the package's)", takes=PRECISIONS)
    engine: str | None = option(None, "engine to run in (default: the package's)", takes=ENGINES)
    batch_size: int | None = option(None, "largest batch (default: the package's)", metavar="N", takes=whole(1, 4096))
    threads: int | None = option(None, "torch threads (default: the package's)", metavar="N", takes=whole(1, 1024))
    time_budget: float = option(
        20.0, "seconds of timing for each version (default: {default:g})", metavar="S", takes=SECONDS
    )
    all: bool = option(False, "also time kernels that the heuristics would skip")


@dataclass(frozen=True)
class ServerOptions(Checked):
    """Which server runs, and where it listens."""

    server: str = option("torchserve", "server to run (default: {default})", takes=SERVERS)
    workers: int = option(1, "worker processes for each version (default: {default})", metavar="N", takes=whole(1))
    port: int | None = option(
        None, "first of six consecutive ports, of three for triton (default: free ones)", metavar="N", takes=whole(1)
    )
    demo_auth_off: bool = option(False, "take requests without a token")
    trust_package: bool = option(
        False, "serve the package also if the code in it is of no release of redpp-serve: you trust whoever made it"
    )


@dataclass(frozen=True)
class LogOptions(Checked):
    """How a run is logged."""

    log_format: str = option(
        "text",
        "form of the logs, whose folder is printed; json adds a file of JSON lines, NAME.jsonl, beside each text "
        "(default: {default})",
        takes=LOG_FORMATS,
    )


@dataclass(frozen=True)
class SystemdOptions(Checked):
    """Whether systemd is to run the command."""

    systemd: str | None = option(
        None,
        "do not run it: print a unit by which systemd runs it and starts it again when it was killed, or install that "
        "unit for this user",
        takes=("print", "install"),
        bare="print",
    )


@dataclass(frozen=True)
class ObserveOptions(Checked):
    """Whether a server adds up moments of what the original's layers read."""

    observe: int | None = option(
        None,
        "add up second moments of what the original's layers read, for one request in N (10 where N is left out), for "
        "'package --moments'; no input and no output is kept",
        metavar="N",
        takes=whole(1),
        bare=10,
    )
    observe_to: Path | None = option(
        None,
        "file that the moments are added to (default: FOLDER.moments.safetensors, beside the folder)",
        metavar="FILE",
        takes=Path,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observe_to is not None and self.observe is None:
            raise refusal(self, "observe_to", "--observe with it")


@dataclass(frozen=True)
class ComparisonOptions(Checked):
    """The load that `redpp-serve compare` sends."""

    inputs: Path | None = option(
        None,
        ".npz file with inputs (and labels), or a folder of images or .npy files (default: synthetic inputs kept in "
        "the package)",
        metavar="PATH",
        takes=Path,
    )
    concurrency: int = option(4, "requests in flight (default: {default})", metavar="N", takes=CONCURRENCY)
    duration: float = option(30.0, "seconds of load (default: {default:g})", metavar="S", takes=POSITIVE)
    rate: float | None = option(
        None,
        "also measure latency at R requests a second, whether or not earlier ones are answered",
        metavar="R",
        takes=POSITIVE,
    )
    margin: float = option(
        0.02, "relative difference in speed that counts as none (default: {default:g})", metavar="R", takes=POSITIVE
    )
    seed: int = option(0, "seed of the order of requests (default: {default})", metavar="N", takes=whole(0))


@dataclass(frozen=True)
class Axis:
    """Values that one setting of a comparison takes in a sweep.

    Attributes:
        name: ``concurrency``, ``rate`` or ``batch``.
        values: in the order in which they are measured.
    """

    name: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Read ``concurrency=1,2,4`` for argparse.

        Raises:
            argparse.ArgumentTypeError: another name, a value that the setting does not take, or one that comes twice.
        """
        name, _, given = text.partition("=")
        if name not in _AXES:
            names = ", ".join(f"{name}=N,N,..." for name in _AXES)
            raise argparse.ArgumentTypeError(f"{text!r} is none of {names}")
        values = tuple(_AXES[name].parse(word.strip()) for word in given.split(","))
        if len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r} has a value twice")
        return cls(name, values)


@dataclass(frozen=True)
class SweepOptions(Checked):
    """The settings that `redpp-serve compare` sweeps.

    Attributes:
        sweep: the axes, whose product is measured.
    """

    sweep: tuple[Axis, ...] = option(
        (),
        "compare at each value of a setting: concurrency=1,2,4,8, rate=10,50 or batch=1,8 (inputs in one request); "
        f"repeat it for the product, at most {MOST_CELLS} cells; each takes --duration",
        metavar="NAME=N,N,...",
        takes=Axis.parse,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [axis.name for axis in self.sweep]
        if len(set(names)) < len(names):
            raise RedppError(
                f"--sweep {names[0]} is given twice", "every setting once", f"join its values: --sweep {names[0]}=1,2"
            )
        if (cells := math.prod(len(axis.values) for axis in self.sweep)) > MOST_CELLS:
            raise RedppError(f"a sweep of {cells} cells", f"at most {MOST_CELLS}", "leave some values out of --sweep")


@dataclass(frozen=True)
class RecordedOptions(Checked):
    """What `redpp-serve compare` reads in place of sending requests itself."""

    from_locust: tuple[Path, ...] = option(
        (),
        "take what the workers of deploy/load/locustfile.py have recorded, in place of a server and load of this "
        "command: a file, or a folder of them; repeatable",
        metavar="FILE",
        takes=Path,
    )


@dataclass(frozen=True)
class ContractOptions:
    """What `redpp-serve compare` requires, and the files that it writes for a pipeline."""

    require: tuple[tuple[Requirement, ...], ...] = option(
        (),
        "exit with 3 where a figure misses its limit, such as speedup>=1.2,agreement>=0.99,p99_ms<=20; speed-ups and "
        "times must keep it with their whole interval, other figures with their value on the inputs that were sent; "
        "repeatable",
        metavar="LIMITS",
        takes=partial(parse_requirements, names=COMPARED),
    )
    junit: Path | None = option(None, "write the outcome of every requirement as JUnit XML", metavar="FILE", takes=Path)
    csv: Path | None = option(None, "write all figures as CSV", metavar="FILE", takes=Path)


@dataclass(frozen=True)
class Limits(Checked):
    """The limits that the pruned version must keep to in an A/B test.

    Attributes:
        tolerance: relative difference of outputs (Euclidean) up to which they agree; None: classes agree where the
            largest is the same, other outputs within 0.1.
    """

    tolerance: float | None = option(
        None,
        "relative difference up to which outputs agree (default: the same class; 0.1 where outputs are not classes)",
        metavar="R",
        takes=POSITIVE,
    )
    min_agreement: float = option(
        0.99, "share of shadowed requests whose outputs must agree (default: {default:g})", metavar="A", takes=SHARE
    )
    margin: float = option(
        0.02, "relative difference in speed that counts as none (default: {default:g})", metavar="R", takes=POSITIVE
    )
    max_error_rate_gap: float = option(
        0.01,
        "how far the pruned version's share of errors may exceed the original's (default: {default:g})",
        metavar="G",
        takes=SHARE,
    )
    max_p99_ratio: float = option(
        1.5,
        "how many times the original's p99 the pruned version's may be (default: {default:g})",
        metavar="R",
        takes=POSITIVE,
    )


def moment(text: str) -> float:
    """Read a date and a time for argparse, in UTC where it names no zone; return seconds since 1970.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    try:
        read = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date and a time such as 2026-01-31T12:00:00Z") from None
    return (read if read.tzinfo else read.replace(tzinfo=timezone.utc)).timestamp()


@dataclass(frozen=True)
class WatchOptions(Checked):
    """What `ab watch` reads, and where the split is."""

    prometheus: str = option(
        "http://127.0.0.1:9090", "the Prometheus that scrapes the servers (default: {default})", metavar="URL"
    )
    token_file: Path | None = option(
        None, "file with a bearer token for Prometheus, read at every request", metavar="FILE", takes=Path
    )
    model: str | None = option(
        None, "the served name (default: that of --package, else the only one that Prometheus has)", metavar="NAME"
    )
    match: str = option("", 'more label matchers of PromQL, such as namespace="a"', metavar="MATCHERS")
    package: Path | None = option(
        None, "packaged folder, whose report says how far outputs agree", metavar="FOLDER", takes=Path
    )
    route: str | None = option(
        None, "the HTTPRoute of the Gateway API whose weights divide users", metavar="NAMESPACE/NAME"
    )
    split_folder: Path | None = option(
        None,
        "in place of a route: the folder with the files split and promoted of deploy/nginx",
        metavar="FOLDER",
        takes=Path,
    )
    split: str | None = option(
        None, "the split where no route tells it: per cent for original and pruned (default: 90:10)", metavar="O:P"
    )
    test: str = option("1", "a name for this test; another one begins anew (default: {default})", metavar="NAME")
    window: float = option(
        30.0,
        "seconds in which times are compared, at least twice the time between scrapes (default: {default:g})",
        metavar="S",
        takes=Range(1.0, 3600.0),
    )
    since: float | None = option(
        None,
        "when the test began, such as 2026-01-31T12:00:00Z (default: now, or what is written down beside the split)",
        metavar="TIME",
        takes=moment,
    )
    address: str = option("127.0.0.1", "address of the verdict's metrics (default: {default})", metavar="ADDRESS")
    port: int | None = option(
        None, "port of the verdict's metrics (default: a free one)", metavar="N", takes=whole(1, 65535)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.route and self.split_folder:
            raise refusal(self, "split_folder", "one of --route and --split-folder")


def add_options(
    parser: argparse.ArgumentParser, record: type, leave_out: Sequence[str] = (), given_only: bool = False
) -> None:
    """Add the options of a record to a parser.

    Args:
        parser: gains them.
        record: the dataclass.
        leave_out: names of its fields that are no options here.
        given_only: leave an option that is not given out of the parsed arguments, so that `given` can tell.
    """
    for item in fields(record):
        if item.name in leave_out or "help" not in item.metadata:
            continue
        takes, default = item.metadata["takes"], item.default
        words: dict[str, Any] = {"help": item.metadata["help"].format(default=default), "dest": item.name}
        if default is False:
            words["action"] = "store_true"
        else:
            words |= {"default": default, "metavar": item.metadata["metavar"]}
        if default == ():
            words |= {"action": "append", "default": []} | ({"type": takes} if takes else {})
        elif isinstance(takes, tuple):
            words |= {"choices": takes, "metavar": None}
        elif takes is not None:
            words["type"] = takes.parse if isinstance(takes, Range) else takes
        if given_only:
            words["default"] = argparse.SUPPRESS
        if item.metadata["bare"] is not None:
            words |= {"nargs": "?", "const": item.metadata["bare"]}
        parser.add_argument(flag_of(item), **words)


def given(record: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a record that the command line gave; see ``given_only`` of `add_options`."""
    names = [item.name for item in fields(record)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def from_arguments(record: type[Record], arguments: argparse.Namespace, **others: Any) -> Record:
    """Make a record from parsed arguments; ``others`` are fields that no flag gives as it stands."""
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given(record, arguments).items()
    }
    return record(**{**values, **others})
