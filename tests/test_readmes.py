"""Every code block of every README: Python runs, the command line takes the commands, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from redpp_serve.cli import main, parser
from tests.support.small import ARCH, INPUT, network

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (*ROOT.rglob("*.md"), ROOT / ".github/CONTRIBUTING.md") if "node_modules" not in p.parts)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
PROGRAMS = {
    "pip",
    "pytest",
    "python3",
    "source",
    "pre-commit",
    "docker",
    "kubectl",
    "curl",
    "tritonserver",
    "torchserve",
}


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def test_there_are_pages_to_read() -> None:
    assert len(PAGES) > 10 and blocks(ROOT / "README.md", "python") and blocks(ROOT / "README.md", "sh")


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


@pytest.mark.exhaustive
def test_python_blocks_run(tmp_path: Path) -> None:
    for page in PAGES:
        for code in blocks(page, "python"):
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, f"{page.relative_to(ROOT)}:\n{code}\n{done.stderr[-2000:]}"


def test_commands_are_taken_by_the_command_line() -> None:
    for page in PAGES:
        for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
            for words in commands(line):
                where = f"{page.relative_to(ROOT)}: {line}"
                if words[0] == "redpp-serve":
                    parser().parse_args(words[1:])
                elif words[:2] in (["python", "-m"], ["python3", "-m"]):
                    assert find_spec(words[2]), where
                elif words[0] == "python":
                    assert (ROOT / words[1]).exists(), where
                elif words[0] == "pytest":
                    assert all((ROOT / word).exists() for word in words[1:] if "/" in word), where
                else:
                    assert words[0].startswith(".") or words[0] in PROGRAMS, where


def commands(line: str) -> list[list[str]]:
    """The simple commands of a shell line, without variables that are set before them."""
    found: list[list[str]] = [[]]
    for word in shlex.split(re.sub(r"(?<!\S)>>? *\S+", "", line), comments=True):
        if word in ("&&", "|", ";"):
            found.append([])
        elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            found[-1].append(word)
    return [words for words in found if words]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        for target in LINK.findall(text):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


@pytest.mark.server
def test_the_first_pages_commands_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """With a small network in place of ResNet-50, and without those that stay until Ctrl-C."""
    monkeypatch.chdir(tmp_path)
    torch.save(network().state_dict(), "model.pt")
    use = next(block for block in blocks(ROOT / "README.md", "sh") if "redpp-serve inspect" in block)
    extra = {
        "package": ["--keep", "0.5", "--distil", "0", "--round-to", "4"],
        "plan": ["--time-budget", "1"],
        "compare": ["--duration", "4"],
    }
    for line in use.splitlines():
        words = shlex.split(line)[1:]
        if words[0] not in ("inspect", *extra):
            continue
        replaced = {
            "torchvision:resnet50": f"{ARCH}:Small",
            "3x224x224": INPUT,
            "some-images/": "dist/model/inputs.npz",
        }
        words = [replaced.get(word, word) for word in words if word not in ("--preprocess", "imagenet")]
        assert main([*words, *extra.get(words[0], [])]) == 0, line
