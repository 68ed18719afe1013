"""The command line: what it prints, how it refuses, and its exit codes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

import redpp_serve.packaging.package as packaging
from redpp_serve import __version__
from redpp_serve.cli import COMMANDS, main
from redpp_serve.documentation import PATH, documentation
from redpp_serve.loopback import Ports, free_ports
from redpp_serve.requirements import COMPARED, HEALTH
from tests.attacks.files import Net
from tests.support.small import ARCH, INPUT, arguments, network, write_data, write_model

Run = Callable[..., tuple[int, str, str]]
FAST = ("--method", "red++")
FRONTIER = {"cwd/dist", "cwd/dist/.small.frontier.json"}  # all that a missed gate leaves, for --keep-point


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Exit code, stdout and stderr of one command, run in an empty folder of its own."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("COLUMNS", "100")

    def command(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


@pytest.fixture(autouse=True)
def untried(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs, and no trial runs of the archives."""
    monkeypatch.setattr(packaging, "run_trials", lambda *_: [])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "in")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def steady(text: str) -> str:
    """Without what depends on the machine: paths, digests of weights, and times."""
    text = re.sub(r"\b[0-9a-f]{16,64}\b", "DIGEST", text.replace(str(ARCH.parent), "TESTS"))
    text = re.sub(r'(timed.in"?:? +"?)(openvino|onnxruntime|redpp) fp32, batch 1, [^"\n]*', r"\1TIMES", text)
    return re.sub(r'(?<="ms": )[0-9.e-]+', "0.0", re.sub(r"  0\.\d{3}  ", "  0.000  ", text))


def without_digits(text: str) -> str:
    """Without measured digits, and with every gap between columns of one width, for it depends on them."""
    measured = (
        r"multiplications|additions|stored bytes|accuracy|"
        r"  (relative|multipl|exact|leaving|pruned against|same top-1|  on )"
    )
    lines, points = [], False
    for line in text.split("\n"):
        points = line.startswith("frontier") or (points and line != "")
        if points or re.match(measured, line):
            lines.append(re.sub(r"(?<![\w-])\d[\d.]*(e-\d+)?( [kMG]?B?\b)?", "#", line))
        else:
            lines.append(line)
        lines[-1] = re.sub(r"(?<=\S) {2,}", "  ", lines[-1])
    return "\n".join(lines)


def test_help(run: Run, golden: Callable[[str, str], None]) -> None:
    for command in ("", "ab", *COMMANDS):
        code, out, err = run(*command.split(), "--help")
        assert (code, err) == (0, ""), command
        golden(f"help_{command.replace(' ', '_') or 'redpp-serve'}", out)


def test_no_word_at_all_shows_the_first_steps(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "") and "redpp-serve demo" in out and "redpp-serve --help" in out


def test_commands_that_need_no_network_start_without_torch(tmp_path: Path) -> None:
    folder = str(tmp_path)
    on_folders = ("ab status", "ab rollback", "ab stop", "health", "rollback")
    commands = [["--version"], ["--help"], ["package", "--help"], *([*words.split(), folder] for words in on_folders)]
    code = """
import json, sys
from redpp_serve.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit:
        pass
    assert not {'torch', 'tritonclient'} & set(sys.modules), words
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize("figures", [COMPARED, HEALTH])
def test_every_figure_that_can_be_required_is_documented(figures: dict[str, str]) -> None:
    cells = [line.split(" | ")[0] for line in documentation().splitlines() if line.startswith("| `")]
    assert set(figures) <= {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_the_documentation_of_options_is_what_the_records_say() -> None:
    assert PATH.read_text(encoding="utf-8") == documentation(), "run: python -m redpp_serve.documentation"


def test_completion_scripts(run: Run) -> None:
    for shell in ("bash", "zsh", "tcsh"):
        code, out, err = run("completion", shell)
        assert (code, err) == (0, "") and "package" in out and "rollback" in out, shell


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"redpp-serve {__version__}\n", "")


def test_inspect_a_file(run: Run, golden: Callable[[str, str], None]) -> None:
    save_file(network().state_dict(), "small.safetensors")
    code, out, err = run("inspect", "small.safetensors")
    assert (code, err) == (0, "")
    golden("inspect_file", steady(out))


@pytest.mark.parametrize("form", ["text", "json"])
def test_inspect_a_network(run: Run, golden: Callable[[str, str], None], form: str) -> None:
    save_file(network().state_dict(), "small.safetensors")
    words = ["inspect", "small.safetensors", "--arch", f"{ARCH}:Small", "--input", INPUT]
    code, out, err = run(*words, *(["--json"] if form == "json" else []))
    assert (code, err) == (0, "")
    golden(
        f"inspect_network_{form}",
        json.dumps(json.loads(steady(out)), indent=1) + "\n" if form == "json" else steady(out),
    )
    assert files(Path.cwd()) == {"small.safetensors"}


def test_inspect_the_channel_sets(run: Run, golden: Callable[[str, str], None]) -> None:
    save_file(network().state_dict(), "small.safetensors")
    words = [
        "inspect",
        "small.safetensors",
        "--arch",
        f"{ARCH}:Small",
        "--input",
        INPUT,
        "--channels",
        "--exclude",
        "stem.*",
    ]
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    golden("inspect_channels", steady(out))
    sets = json.loads(run(*words, "--json")[1])["channel_sets"]
    assert [(c["name"], c["channels"], c["closed"]) for c in sets] == [
        ("stem.0", 8, "excluded"),
        ("body.0", 16, ""),
        ("head", 5, "is an output of the network"),
    ]
    assert (sets[1]["producers"], sets[1]["with"], sets[1]["readers"]) == (["body.0"], ["body.1"], ["head"])


def test_the_channel_sets_need_a_captured_network(run: Run, model: Path) -> None:
    code, out, err = run("inspect", model, "--channels")
    assert (code, out) == (2, "")
    one_paragraph("inspect", err, "--channels without --input.*add --input")


def test_package_prints_results_to_stdout_and_stages_to_stderr(
    run: Run, golden: Callable[[str, str], None], tmp_path: Path
) -> None:
    save_file(network().state_dict(), "small.safetensors")
    data = write_data(tmp_path / "data.npz")
    code, out, err = run(
        "package",
        "small.safetensors",
        "--arch",
        f"{ARCH}:Small",
        "--input",
        INPUT,
        "--keep",
        "0.5",
        "--round-to",
        "4",
        "--distil",
        "0",
        "--max-error",
        "2",
        "--verify-data",
        data,
        "--preprocess",
        '{"mean": [0.5], "std": [0.25]}',
    )
    assert code == 0
    golden("package", without_digits(out))
    stages = [line.split()[:2] for line in err.splitlines() if not line.startswith(("note: ", "  "))]
    assert re.search(r"^  about \d+ (seconds|minutes) on an idle machine$", err, re.M)
    names = [
        "capture",
        "hash",
        "merge",
        "inputs",
        "reconstruct",
        "distil",
        "codebooks",
        "split",
        "verify",
        "precision",
        "package",
        "frontier",
        "try",
    ]
    assert [first for first, _ in stages] == names
    report = json.loads(Path("dist/small/report.json").read_text())
    assert [s["name"] for s in report["stages"]][:2] == ["capture", "hash"]
    assert "mean (0.5) and std (0.25)" in Path("dist/small/README.md").read_text()


def test_dry_run_says_so_and_writes_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    code, out, _ = run("package", *arguments(model), "--dry-run", "--keep", "0.5", "--max-error", "2", "--distil", "0")
    assert code == 0 and out.endswith("\ndry run: nothing was written\n") and "wrote" not in out
    assert files(tmp_path) == before


def test_a_missed_gate_is_exit_code_3(run: Run, model: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    code, out, err = run("package", *arguments(model), "--keep", "0.5", "--distil", "0", "--max-error", "0.00001")
    assert (code, out) == (3, "") and files(tmp_path) == before | FRONTIER
    assert re.search(
        r"redpp-serve package: the relative output error is \d\.\d+ on the worst family of inputs "
        r"\(measured: .*\)\. Expected: at most 1e-05",
        err,
    )


def test_a_result_far_from_the_original_is_exit_code_3_without_any_limit(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redpp_serve.options.FLOOR_ERROR", 0.01)  # which this small network surely misses
    before, words = files(tmp_path), ("--keep", "0.1", "--round-to", "1", "--distil", "0")
    code, out, err = run("package", *arguments(model), *words)
    assert (code, out) == (3, "") and files(tmp_path) == before | FRONTIER
    assert re.search(
        r"Expected: at most 0\.01 \(--max-error\)\. What to do: keep more .* fine-tune the network, or", err
    )


def test_an_interrupt_is_exit_code_130(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(packaging, "prune", interrupt)
    code, out, err = run("package", *arguments(model))
    assert (code, out) == (130, "") and err.endswith("redpp-serve package: interrupted\n")


def test_nothing_to_prune_is_exit_code_0_with_the_reason(run: Run, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(6, 4).state_dict(), "flat.pt")
    torch.save({f"only.{k}": v for k, v in torch.load("flat.pt").items()}, "flat.pt")
    code, out, _ = run("package", "flat.pt", "--arch", f"{ARCH}:Flat", "--input", "6")
    assert code == 0 and "wrote dist/flat" in out
    assert "skipped: reconstruct" in out and "is an output of the network" in out


# --- refusals: one paragraph each, exit code 2, nothing written -------------------------------------------------------


def _nan(path: Path) -> None:
    state = network().state_dict()
    state["stem.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, path)


def _truncated(path: Path) -> None:
    write_model(path.parent)
    path.write_bytes(path.with_name("small.pt").read_bytes()[:-400])
    path.with_name("small.pt").unlink()


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is an empty file.*fetch or save the file again"),
    "html": (
        lambda p: p.write_text("<!DOCTYPE html>\n<html><title>Sign in</title></html>"),
        "is an HTML or XML page.*login",
    ),
    "lfs": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "Git LFS pointer.*git lfs pull",
    ),
    "truncated": (_truncated, "truncated or damaged file.*compare its size"),
    "missing": (lambda p: None, "does not exist.*check the path"),
    "folder": (lambda p: p.mkdir(), "is a directory.*give the path of the weights file"),
    "code": (lambda p: torch.save(Net(), p), "naming .*attacks.files.Net.*--trust-file"),
    "nan": (_nan, "stem.0.weight"),
}


def one_paragraph(command: str, err: str, found: str) -> None:
    lines = [line for line in err.splitlines() if not re.match(r"(capture|merge) +done|hash +skipped|note: ", line)]
    assert len(lines) == 1 and lines[0].startswith(f"redpp-serve {command}: "), err
    assert re.search(found, lines[0]), lines[0]
    assert "Traceback" not in err and "What to do: " in lines[0] and len(lines[0]) < 1000


@pytest.mark.parametrize("command", ["inspect", "package"])
@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_networks(run: Run, tmp_path: Path, kind: str, command: str) -> None:
    path = tmp_path / "model.pt"
    FILES[kind][0](path)
    before = files(tmp_path)
    code, out, err = run(command, path, "--arch", f"{ARCH}:Small", "--input", INPUT)
    assert (code, out) == (2, "")
    one_paragraph(command, err, FILES[kind][1])
    assert files(tmp_path) == before


SMALL = ["--arch", f"{ARCH}:Small"]
WORDS: dict[str, tuple[list[str], str]] = {
    "weights without arch": (["--input", INPUT], "holds weights only.*--arch torchvision:NAME"),
    "no input": (SMALL, "no --input was given.*--input 3x224x224"),
    "other arch": (
        ["--arch", f"{ARCH}:Two", "--input", INPUT],
        r"\d+ missing: .* and \d+ more; \d+ unexpected: .* and \d+ more.*--arch-args",
    ),
    "other width": ([*SMALL, "--arch-args", '{"classes": 7}', "--input", INPUT], "head.weight is 5x16, not 7x16"),
    "unknown factory": (["--arch", f"{ARCH}:Smal", "--input", INPUT], "no function or class .* 'Smal'.*one of Small"),
    "unknown form": (["--arch", "resnet", "--input", INPUT], "--arch resnet is of no known form"),
    "no such arch file": (["--arch", "absent.py:net", "--input", INPUT], "absent.py does not exist"),
    "wrong input": ([*SMALL, "--input", "3x12x12"], "rejects a batch of inputs of shape 3x12x12.*--input"),
    "bad input": ([*SMALL, "--input", "12,12"], "--input 12,12: '12,12' is not a shape"),
    "arch-args no json": ([*SMALL, "--arch-args", "{width: 8}", "--input", INPUT], "--arch-args is no JSON"),
    "arch-args no object": (
        [*SMALL, "--arch-args", "[8]", "--input", INPUT],
        "--arch-args is .8.. Expected: a JSON object",
    ),
    "arch-args unknown": ([*SMALL, "--arch-args", '{"depth": 1}', "--input", INPUT], "depth"),
}


@pytest.mark.parametrize("kind", WORDS)
def test_words_about_the_network(run: Run, model: Path, tmp_path: Path, kind: str) -> None:
    before = files(tmp_path)
    code, out, err = run("package", model, *WORDS[kind][0])
    assert (code, out) == (2, "")
    one_paragraph("package", err, WORDS[kind][1])
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--name", "../x"], "the model name '../x'.*--name"),
        (["--name", ""], "--name"),
        (["--preprocess", "{mean: 1}"], "--preprocess is no JSON"),
        (["--preprocess", '{"mean": [1, 2]}'], "preprocessing"),
        (["--preprocess", '{"mode": 7}'], "preprocessing"),
        (["--preprocess", '{"std": 0}'], "preprocessing"),
        (["--preprocess", "imagenet"], "preprocessing"),  # three means for one channel
        (["--keep", "1.5"], "--keep: '1.5' is not a number above 0 and at most 1"),
        (["--keep", "nan"], "--keep: 'nan' is not a number above 0"),
        (["--keep", "half"], "--keep"),
        (["--keep", "0.5", "--method", "red++"], "--keep"),
        (["--target", "macs"], "--target: 'macs' is not macs=R or latency=R with a share R above 0 and at most 1"),
        (["--target", "0.5"], "--target: '0.5' is not macs=R or latency=R"),
        (["--target", "bytes=0.5"], "--target: 'bytes=0.5' is not macs=R or latency=R"),
        (["--target", "macs=half"], "--target: 'macs=half' is not"),
        (["--target", "macs=nan"], "--target: 'macs=nan' is not"),
        (["--target", "macs=0"], "--target: 'macs=0' is not"),
        (["--target", "latency=1.01"], "--target: 'latency=1.01' is not"),
        (["--target", "macs=0.5", "--keep", "0.5"], "--target macs=0.5. Expected: not together with --keep"),
        (
            ["--target", "latency=0.5", "--method", "red++"],
            "--target latency=0.5. Expected: no ratio with --method red++",
        ),
        (["--distil", "-1"], "--distil: '-1' is not a number from 0 to 1e\\+06"),
        (["--distil", "inf"], "--distil: 'inf' is not a number from 0 to"),
        (["--distil", "2e6"], "--distil: '2e6' is not a number from 0 to 1e\\+06"),
        (["--hash-error", "0.1", "--hash-values", "4"], "either --hash-error or --hash-values"),
        (["--hash-values", "1"], "--hash-values: '1' is not a whole number of at least 2"),
        (["--min-agreement", "90"], "--min-agreement: '90' is not a number from 0 to 1"),
        (["--batch-size", "0"], "--batch-size: '0' is not a whole number from 1 to 4096"),
        (["--threads", "-1"], "--threads"),
        (["--time-budget", "inf"], "--time-budget: 'inf' is not a number of at least 1"),
        (["--time-budget", "0.5"], "--time-budget: '0.5' is not a number of at least 1"),
        (["--seed", "-1"], "--seed"),
        (["--device", "tpu"], "--device tpu"),
        (["--verify-data", "absent.npz"], "--verify-data absent.npz cannot be read"),
        (["--out", "taken"], "taken .*not written by this tool.*--out"),
        (["--colour"], r"unrecognized arguments: --colour\. What"),
        (["--max-eror", "0.1"], r"unrecognized arguments: --max-eror 0.1 \(did you mean --max-error\?\)"),
    ],
)
def test_other_words(run: Run, model: Path, tmp_path: Path, words: list[str], found: str) -> None:
    Path("taken").write_text("mine")
    before = files(tmp_path)
    code, out, err = run("package", *arguments(model), *words)
    assert (code, out) == (2, "")
    one_paragraph("package", err, found)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["serve", "absent"], "absent is not a packaged model"),
        (["compare", "absent"], "absent is not a packaged model"),
        (["serve", "PACKAGE", "--workers", "0"], "--workers"),
        (["serve", "PACKAGE", "--port", "65533"], "not a port number"),
        (["compare", "PACKAGE", "--inputs", "absent.npz"], "absent.npz cannot be read"),
        (["compare", "PACKAGE", "--duration", "0"], "--duration: '0' is not a number above 0"),
        (["compare", "PACKAGE", "--concurrency", "0"], "--concurrency"),
        (["compare", "PACKAGE", "--margin", "-1"], "--margin"),
    ],
)
def test_words_about_serving(run: Run, packaged: Path, words: list[str], found: str) -> None:
    code, out, err = run(*(str(packaged) if word == "PACKAGE" else word for word in words))
    assert (code, out) == (2, "")
    one_paragraph(words[0], err, found)


@pytest.mark.parametrize("command", ["serve", "compare"])
def test_a_port_in_use(run: Run, packaged: Path, command: str) -> None:
    port = free_ports(Ports).inference
    with socket.create_server(("127.0.0.1", port)):
        code, out, err = run(command, packaged, "--port", str(port))
    assert (code, out) == (2, "")
    one_paragraph(command, err, f"port {port} for inference: Address already in use.*choose another port")
    assert not psutil.Process().children()


def test_an_action_is_needed(run: Run) -> None:
    code, out, err = run("ab")
    assert (code, out) == (2, "") and "ACTION" in err and "--help" in err


@pytest.mark.exhaustive
def test_output_survives_a_terminal_without_unicode(model: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "redpp_serve.cli", "inspect", *arguments(model)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "narrowable" in result.stdout


@pytest.mark.server
def test_compare_live_prints_json_alone(packaged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(packaged, tmp_path / "dist/small")  # what was found is written into it
    command = [sys.executable, "-m", "redpp_serve.cli", "compare", str(folder)]
    command += ["--duration", "4", "--concurrency", "2", "--sweep", "batch=1,3", "--json"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    sweep = json.loads(result.stdout)
    assert sweep["server"] == "torchserve" and sweep["sweep"] == {"batch": [1, 3]} and sweep["versions"]["torchserve"]
    document, several = sweep["cells"]
    assert several["agreement"]["inputs"] == 15 and several["agreement"]["top1"] == 1.0  # of 16, in requests of three
    for arm in ("original", "pruned"):
        assert several[arm]["errors"] == 0
        assert set(document[arm]["handler_ms"]) == {"p50", "p99"} and set(document[arm]["latency_ms"]) == {
            "p50",
            "p95",
            "p99",
        }
        assert document[arm]["throughput_rps"] > 0 and document[arm]["errors"] == 0
    assert set(document["speedup"]) == {"handler_p50", "end_to_end_p50", "throughput"}
    for ratio in document["speedup"].values():
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
    assert 0 <= document["agreement"]["top1"] <= 1 and document["verdict"] and document["pairs"] > 10
    assert "2 of 2 workers ready" in result.stderr and "Traceback" not in result.stderr
    assert files(scratch) == set()


@pytest.mark.server
def test_sigterm_while_a_server_starts_leaves_no_process(packaged: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "redpp_serve.cli", "compare", str(packaged)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr and "0 of 2 workers ready" in process.stderr.readline()
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "") and "Traceback" not in err
    assert started and not psutil.wait_procs(started, timeout=10)[1] and time.monotonic() - begun < 40
    assert files(tmp_path) == set()
