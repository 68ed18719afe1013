"""Renew what the images are made from: requirements with hashes, and the digests of base images.

``python deploy/docker/renew.py`` needs ``uv`` and, for digests, ``docker buildx``, ``crane`` or ``skopeo``. It compiles
``requirements/*.in`` for each image, and writes each image's digest behind its tag. What cannot be
reached is named, and stays as it is; then the exit code is 1. ``--requirements`` or ``--digests`` does one of the two.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Image -> the oldest Python that reads its requirements; NVIDIA's image has 3.12, the base that try.sh makes 3.11.
PYTHONS = {"torchserve": "3.11", "triton": "3.11", "tools": "3.11"}
EXTRAS = ("onnxruntime", "openvino", "cuda", "cpu")  # what the servers' build arguments choose
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Files that name images: of Dockerfiles the argument BASE, of the others the key image.
IMAGES = re.compile(
    r"^(?:ARG BASE=|\s+image: )(?P<name>[a-z0-9./-]+:[\w.-]+)(?P<digest>@sha256:[0-9a-f]{64})?", re.MULTILINE
)
OWN = "redpp-serve/"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
READERS = (
    ["docker", "buildx", "imagetools", "inspect", "{image}", "--format", "{{.Manifest.Digest}}"],
    ["crane", "digest", "{image}"],
    ["skopeo", "inspect", "--format", "{{.Digest}}", "docker://{image}"],
)


def compile_requirements(folder: Path) -> list[str]:
    """Write ``IMAGE.txt`` and ``IMAGE-EXTRA.txt``; return sentences about what could not be written."""
    problems = []
    for image, python in PYTHONS.items():
        for extra in ("", *(EXTRAS if image != "tools" else ("cpu",))):
            source = folder / f"{extra or image}.in"
            target = folder / (f"{image}-{extra}.txt" if extra else f"{image}.txt")
            command = [
                "uv",
                "pip",
                "compile",
                "--quiet",
                "--upgrade",
                "--generate-hashes",
                "--no-annotate",
                "--no-header",
            ]
            command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
            if extra:
                command += ["--constraint", str(folder / f"{image}.txt")]
            if extra == "cpu":  # the wheel alone: what it needs is in IMAGE.txt
                command += ["--no-deps", "--default-index", CPU_INDEX]
            written = target.with_suffix(".new")
            run = subprocess.run(
                [*command, str(source), "--output-file", str(written)], check=False, capture_output=True, text=True
            )
            if run.returncode:
                written.unlink(missing_ok=True)
                last = (run.stderr.strip().splitlines() or ["no reason given"])[-1].strip()
                problems.append(f"{target.name} stays as it is: {last}")
            else:
                written.replace(target)
    return problems


def digest(image: str) -> str | None:
    """Ask the image's registry for its digest, by the first program that is here and gets an answer."""
    for words in READERS:
        if shutil.which(words[0]):
            command = [word.replace("{image}", image) for word in words]
            run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
            if run.returncode == 0 and (found := DIGEST.search(run.stdout)):
                return found[0]
    return None


def renew_digests(files: list[Path]) -> list[str]:
    """Write the digests into the files; return sentences about images whose registry could not be asked."""
    problems, known = [], {}
    for path in files:
        text = path.read_text()
        for name in dict.fromkeys(
            match["name"] for match in IMAGES.finditer(text) if not match["name"].startswith(OWN)
        ):
            if name not in known:
                known[name] = digest(name)
                if known[name] is None:
                    problems.append(f"{name} keeps what it has: no program here could ask its registry for the digest")

        def pinned(match: re.Match[str]) -> str:
            found = known.get(match["name"])
            return match[0] if found is None else f"{match[0].removesuffix(match['digest'] or '')}@{found}"

        path.write_text(IMAGES.sub(pinned, text))
    return problems


def main(words: list[str]) -> int:
    problems = []
    if "--digests" not in words:
        problems += compile_requirements(HERE / "requirements") if shutil.which("uv") else ["no uv: requirements stay"]
    if "--requirements" not in words:
        problems += renew_digests([*sorted(HERE.glob("*.Dockerfile")), HERE.parent / "compose.yaml"])
    print("\n".join(problems or ["all is renewed"]), file=sys.stderr if problems else sys.stdout)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
