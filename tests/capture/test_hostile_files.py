"""Hostile and damaged files: one paragraph, soon, in little memory, and nothing that steers a terminal."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from redpp_serve.capture.load import load_file
from redpp_serve.capture.pickles import Operation, PickleScan, scan_operations
from redpp_serve.cli import main
from redpp_serve.errors import RedppError
from tests.attacks.bombs import HOSTILE, ODD, in_zip, many_entries, many_names, saved
from tests.attacks.pickles import HARMLESS, PICKLES, colliding, numbers

SECONDS, GROWTH = 5.0, 1 << 20  # of the processor; KiB of resident memory


def assert_refused_soon(path: Path, trust: bool) -> None:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RedppError):
        load_file(path, trust=trust)
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str, trust: bool) -> None:
    if trust and name.startswith(("bytearray", "storage of 64", "tensor of 64", "new tensor", "slow codec")):
        pytest.skip("code of the file's choice, which trust allows")
    path = tmp_path / "model.pt"
    HOSTILE[name](path)
    assert_refused_soon(path, trust)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_claim_or_collide_are_refused(tmp_path: Path, name: str, trust: bool) -> None:
    path = tmp_path / "model.pt"
    PICKLES[name](path)
    assert_refused_soon(path, trust)


@pytest.mark.parametrize("name", HOSTILE)
def test_commands_end_with_one_paragraph(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "model.pt", tmp_path / "out"
    HOSTILE[name](path)
    code = main(["inspect", str(path)])
    shown = capsys.readouterr()
    assert code in (0, 2)  # the kind of a file is told from its first bytes
    text = shown.out + shown.err
    arch = ["--arch", "torchvision:resnet18", "--input", "3x8x8"]
    assert main(["package", str(path), *arch, "--out", str(out)]) == 2
    refused = capsys.readouterr().err
    assert all(character.isprintable() or character == "\n" for character in text + refused)
    assert refused.count("redpp-serve package: ") == 1 and "What to do: " in refused
    assert len(refused.strip().splitlines()) == 1
    assert "Traceback" not in text + refused and not out.exists()


@pytest.mark.parametrize("name", {**ODD, **HARMLESS})
def test_odd_files_load(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pt"
    {**ODD, **HARMLESS}[name](path)
    assert load_file(path, trust=False).state_dict


def test_entries_of_a_zip_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redpp_serve.archives.MAX_ENTRIES", 1000)
    many_entries(tmp_path / "x.pt")
    with pytest.raises(RedppError, match="2000 entries"):
        load_file(tmp_path / "x.pt", trust=False)


def test_names_of_a_header_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redpp_serve.capture.safetensors_file.MAX_NAMES", 10)
    many_names(11)(tmp_path / "x")
    with pytest.raises(RedppError, match="from 1 to 10 tensors"):
        load_file(tmp_path / "x", trust=False)


def test_operations_of_a_pickle_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redpp_serve.capture.pickles.MAX_OPERATIONS", 1000)
    in_zip(b"\x80\x02" + b"N0" * 1000 + b"N.")(tmp_path / "x.pt")
    with pytest.raises(RedppError, match="more than 1000 operations"):
        load_file(tmp_path / "x.pt", trust=False)


def test_keys_of_a_pickle_whose_hash_the_file_can_choose_are_counted(tmp_path: Path) -> None:
    """Texts and small numbers are not, so an optimizer's state and a vocabulary of pairs load."""
    body = b"\x80\x02}X\x01\x00\x00\x00w" + colliding(10_001, numbers) + b"s."
    in_zip(body)(tmp_path / "x.pt")
    with pytest.raises(RedppError, match="more than 10000 keys that are neither texts nor small numbers"):
        load_file(tmp_path / "x.pt", trust=False)
    many = range(20_000)
    beside = {"state": dict.fromkeys(many, 0), "pairs": {("a", f"{k}"): k for k in many}}
    saved({"state_dict": {"w": torch.ones(2)}, **beside})(tmp_path / "y.pt")
    assert load_file(tmp_path / "y.pt", trust=False).state_dict


def test_a_pickle_is_followed_once_until_its_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    followed = 0

    def counted(found: Iterable[Operation]) -> PickleScan:
        nonlocal followed
        followed += 1
        return scan_operations(found)

    monkeypatch.setattr("redpp_serve.capture.sniff.scan_operations", counted)
    for times, width in enumerate((2, 30), 1):
        saved({"w": torch.ones(width)})(tmp_path / "x.pt")
        for _ in range(2):
            assert load_file(tmp_path / "x.pt", trust=False).state_dict
        assert followed == times


@pytest.mark.parametrize("path", ["a\x00b", "x" * 300, "\x1b]0;x\x07", "a\nb"])
def test_names_of_files(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", path]) == 2
    assert main(["package", path, "--arch", "timm:x", "--input", "3"]) == 2
    shown = capsys.readouterr().err
    assert all(character.isprintable() or character == "\n" for character in shown)


def _a_minute() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", HOSTILE)
def test_limits_of_the_whole_process(tmp_path: Path, name: str) -> None:
    """Each command in a process of its own ends within a minute of the processor's time and 6 GB."""
    path = tmp_path / "model.pt"
    HOSTILE[name](path)
    code = (
        "import sys, resource; from redpp_serve.cli import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "package", str(path), "--arch", "torchvision:resnet18", "--input", "3x8x8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, preexec_fn=_a_minute)
    assert done.returncode == 2 and "Traceback" not in done.stderr, json.dumps(done.stderr)
    assert int(done.stdout.splitlines()[-1]) < 6 << 20
