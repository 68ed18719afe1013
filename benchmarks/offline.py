"""Measure what packaging costs: ``python benchmarks/offline.py --out FILE.json`` (about five minutes).

Each row is one whole ``redpp-serve package`` in a process of its own: seconds from start to exit, and the peak
resident memory of its largest process. Weights are random: the exact stages' cost does not depend on training.
Every run must end with exit code 0, which means that its exactness gates and the trial of its archives passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from redpp_serve.capture.arch import build
from redpp_serve.machine import describe_machine
from redpp_serve.options import HASHES, HashTarget
from redpp_serve.pruning.hashing import hash_weight

RESNET = "torchvision:resnet50"
DEPTH, SIDE = 6, 8
TARGETS = {"resnet50_seconds": 60, "resnet50_gigabytes": 4, "hash_1e7_seconds": 1}


def convolutions(width: int) -> nn.Module:
    """``DEPTH`` 3x3 convolutions of one width with batch norm, and a classifier: 3x8x8 images to 10 classes."""
    layers: list[nn.Module] = []
    for k in range(DEPTH):
        layers += [nn.Conv2d(width if k else 3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def package_once(module: nn.Module, arch: str, arch_args: str, shape: str, extra: list[str]) -> dict[str, Any]:
    """Time one command line on a fresh file; the stages' own times come from its report."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "model.pt", Path(folder) / "dist"
        torch.save(module.state_dict(), file)
        command = [
            sys.executable,
            "-m",
            "redpp_serve.cli",
            "package",
            str(file),
            "--arch",
            arch,
            "--arch-args",
            arch_args,
            "--input",
            shape,
            "--out",
            str(out),
            *extra,
        ]
        start = time.perf_counter()
        with open(os.devnull, "wb") as nothing:
            child = subprocess.Popen(command, stdout=nothing)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        if status != 0:
            raise SystemExit(f"{' '.join(command)} ended with status {status}")
        report = json.loads((out / "report.json").read_text())
    parameters = sum(p.numel() for p in module.parameters())
    return {
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "peak_gigabytes": round(usage.ru_maxrss / 1e6, 2),
        "microseconds_per_parameter": round(1e6 * seconds / parameters, 3),
        "stages": {s["name"]: s["seconds"] for s in report["stages"]},
    }


def hash_speed(weights: int = 10**7, rounds: int = 5) -> dict[str, Any]:
    """Seconds to hash Gaussian weights to 2 % on one thread, all alternatives included; median of some rounds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weight = torch.randn(weights, generator=torch.Generator().manual_seed(0))
    rows = {}
    for method in HASHES:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            hashed = hash_weight(weight, method, HashTarget(error=0.02))
            times.append(time.perf_counter() - start)
            error = float((hashed.weight - weight).norm() / weight.norm())
            if not error <= 0.0201:
                raise SystemExit(f"{method} missed its error target: {error}")
        rows[method] = {
            "seconds": round(sorted(times)[rounds // 2], 3),
            "slowest": round(max(times), 3),
            "error": error,
            "values": hashed.codebook.size,
        }
    torch.set_num_threads(threads)
    return {"weights": weights, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/offline.json"))
    parser.add_argument(
        "--reconstruct", action="store_true", help="also ResNet-50 with reconstruction in the default time budget"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {"environment": describe_machine(), "targets": TARGETS, "hash": hash_speed()}
    print("hash", result["hash"], flush=True)
    resnet = build(RESNET, {})
    result["resnet50_exact"] = package_once(resnet, RESNET, "{}", "3x224x224", ["--method", "red++"])
    print("resnet50 exact", result["resnet50_exact"], flush=True)
    if options.reconstruct:
        result["resnet50_reconstruct"] = package_once(resnet, RESNET, "{}", "3x224x224", ["--keep", "0.5"])
        print("resnet50 reconstruct", result["resnet50_reconstruct"], flush=True)
    result["scaling"] = []
    for width in (42, 136, 430, 1360):  # 1e5 to 1e8 parameters
        row = package_once(
            convolutions(width),
            f"{__file__}:convolutions",
            json.dumps({"width": width}),
            f"3x{SIDE}x{SIDE}",
            ["--method", "red++"],
        )
        result["scaling"].append({"width": width, **row})
        print("scaling", result["scaling"][-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
