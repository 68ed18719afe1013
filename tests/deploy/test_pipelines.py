"""deploy/pipelines: both examples run the same lines, which run here as plain shell, from a model to an exit code."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

from redpp_serve.cli import COMMANDS, parser
from redpp_serve.config import read
from redpp_serve.options import ConfigOptions
from redpp_serve.requirements import COMPARED, parse
from tests.support.manifests import DEPLOY
from tests.support.small import ARCH, network, write_data

PIPELINES = DEPLOY / "pipelines"
GITHUB: dict[str, Any] = yaml.safe_load((PIPELINES / "github-actions.yml").read_text())
GITLAB: dict[str, Any] = yaml.safe_load((PIPELINES / "gitlab-ci.yml").read_text())["prune"]
STEPS = {step["name"]: step["run"] for step in GITHUB["jobs"]["prune"]["steps"] if "name" in step}
SECTIONS = {name: command.records for name, command in COMMANDS.items() if ConfigOptions in command.records}


def test_both_run_the_same_lines_with_the_same_variables() -> None:
    install, *steps = STEPS.values()
    assert "\n".join(steps).replace("\n\n", "\n").splitlines() == GITLAB["script"]
    assert [install] == GITLAB["before_script"] and GITHUB["env"] == GITLAB["variables"]
    assert GITHUB["jobs"]["prune"]["defaults"]["run"]["shell"] == "bash"  # with -e and -o pipefail, as GitLab's
    assert GITHUB[True]["push"]["paths"] == GITLAB["rules"][0]["changes"]  # YAML 1.1 reads `on` as true


def test_what_they_write_is_kept() -> None:
    kept = [*GITLAB["artifacts"]["paths"], GITLAB["artifacts"]["reports"]["junit"]]
    (upload,) = (step["with"]["path"] for step in GITHUB["jobs"]["prune"]["steps"] if "upload" in step.get("uses", ""))
    assert set(upload.split()) == set(kept)
    for path in kept:
        assert any(path in line for line in GITLAB["script"]), path


def test_options_and_requirements_are_good() -> None:
    found = read(PIPELINES / "redpp.yaml", SECTIONS)
    assert set(found) == {"package", "compare"}
    assert len(parse(GITHUB["env"]["REQUIRE"], COMPARED)) == 3
    for line in GITLAB["script"]:
        for words in re.findall(r"redpp-serve [^&|>;]*(?:\"pruned[^\"]*\"[^&|>;]*)?", line):
            parser().parse_args(shlex.split(words.replace("$REQUIRE", GITHUB["env"]["REQUIRE"]))[1:])


@pytest.mark.server
def test_the_lines_run_as_plain_shell(tmp_path: Path) -> None:
    """Shorter, on a network whose exact merging takes no search."""
    text = (PIPELINES / "redpp.yaml").read_text()
    for found, instead in {
        "3x32x32": "1x12x12",
        "target: macs=0.5": "method: red++\n  batch-size: 1",
        "duration: 30": "duration: 3",
    }.items():
        assert found in text
        text = text.replace(found, instead)
    (tmp_path / "redpp.yaml").write_text(text)
    (tmp_path / "model.py").write_text(f"{ARCH.read_text()}\n\nnetwork = Small\n")
    torch.save(network().state_dict(), tmp_path / "model.pt")
    write_data(tmp_path / "inputs.npz")
    programs = Path(sys.executable).parent
    environment = {**os.environ, **GITHUB["env"], "REQUIRE": "agreement>=0.9,failed<=0", "TMPDIR": str(tmp_path)}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"

    for name in list(STEPS)[1:]:
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[name]]
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{name}: {done.stdout[-1000:]}{done.stderr[-2000:]}"
    suite = ElementTree.parse(tmp_path / "compare.xml").getroot()[0]
    assert [case.attrib["name"] for case in suite] == ["agreement>=0.9", "failed<=0"]
    (server,) = json.loads((tmp_path / "health.json").read_text())
    assert server["ok"] and server["requirements"][0]["met"]
    assert "stopped" in (tmp_path / "serve.log").read_text()  # the last step has ended what it started
    assert (tmp_path / "compare.csv").read_text().count("torchserve") > 10
