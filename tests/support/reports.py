"""A finished report of a small network, comparison included, as report.json holds it."""

from __future__ import annotations

import math
from typing import Any

from redpp_serve.report.data import Layer, Report


def read(report: dict[str, Any]) -> Report:
    """Return the report that is read from a JSON object."""
    return Report.from_json(report)


def layers(found: list[dict[str, Any]]) -> list[Layer]:
    """Return the layers that are read from JSON objects."""
    return [Layer.from_json(layer) for layer in found]


def _density(spread: float, values: int) -> dict[str, Any]:
    """A bell with a small second bump, cut into `values` cells of equal width."""
    x = [spread * (i / 100 - 1) for i in range(201)]
    y = [math.exp(-8 * (v / spread) ** 2) + 0.2 * math.exp(-60 * (v / spread - 0.5) ** 2) for v in x]
    step = 2 * spread / values
    edges = [-spread + step * i for i in range(values + 1)]
    return {"x": x, "y": y, "edges": edges, "modes": [edge + step / 2 for edge in edges[:-1]]}


def sample_layer(name: str, shape: list[int], pruned: list[int], reason: str = "", values: int = 16) -> dict[str, Any]:
    size = math.prod(shape)
    kernels = shape[0] * shape[1]
    unique = kernels - kernels // 9
    rms = 0.01 + 0.001 * (values % 7)
    return {
        "name": name,
        "op": "conv2d" if len(shape) == 4 else "linear",
        "shape": shape,
        "pruned_shape": pruned,
        "parameters": size,
        "macs": size * 256,
        "hash": {
            "values": values,
            "entropy": math.log2(values) - 0.4,
            "error": rms,
            "zero_kernels": 0.0125,
            "bandwidth": 0.0031,
            "alternatives": {
                "kde": {"values": values, "entropy": math.log2(values) - 0.4, "error": rms},
                "kmeans": {"values": values + 1, "entropy": math.log2(values) - 0.4, "error": rms * 0.97},
                "uniform": {"values": 2 * values, "entropy": math.log2(values) - 0.4, "error": rms * 1.03},
            },
            "density": _density(0.2 + 0.01 * values, values),
        },
        "merge": {"channels": shape[0], "kept": pruned[0], "error": 0.004, "reason": reason},
        "split": {
            "unique_kernels": unique,
            "kernels": kernels,
            "multiplications": [size * 256, size * 240],
            "additions": [size * 256, size * 256],
        },
        "error": 0.006 + 0.0007 * values,
    }


def sample_layers() -> list[dict[str, Any]]:
    """Eleven layers of a small residual network; the classifier is left alone altogether."""
    layers = [sample_layer("stem.conv", [16, 1, 3, 3], [16, 1, 3, 3], "its channels feed a residual addition")]
    for block, (wide, narrow) in enumerate([(16, 8), (32, 16), (64, 24)]):
        into = max(16, wide // 2)
        layers += [
            sample_layer(f"blocks.{block}.conv1", [wide, into, 3, 3], [narrow, into, 3, 3], values=12 + 5 * block),
            sample_layer(
                f"blocks.{block}.conv2",
                [wide, wide, 3, 3],
                [wide, narrow, 3, 3],
                "its channels feed a residual addition",
                values=11 + 9 * block,
            ),
            sample_layer(
                f"blocks.{block}.shortcut.projection.conv",
                [wide, into, 1, 1],
                [wide, into, 1, 1],
                "its channels feed a residual addition",
                values=9 + block,
            ),
        ]
    head = sample_layer("head.classifier", [10, 64], [10, 64], "network output")
    return [*layers, {**head, "hash": None, "split": None, "error": None}]


def sample_point(
    macs: int,
    share: float,
    error: float,
    flag: str,
    latency: tuple[float, float, float] | None = None,
    chosen: bool = False,
) -> dict[str, Any]:
    ratio, low, high = latency or (None, None, None)
    return {
        "macs": macs,
        "macs_ratio": share,
        "error": error,
        "predicted_error": 0.9 * error,
        "latency_ratio": ratio,
        "latency_low": low,
        "latency_high": high,
        "chosen": chosen,
        "flag": flag,
    }


def sample_report() -> dict[str, Any]:
    """A finished report of a small network, comparison included."""
    return {
        "tool": {"name": "redpp-serve", "version": "0.1.0"},
        "name": "digits",
        "source": {
            "file": "digits.safetensors",
            "kind": "safetensors state_dict",
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "arch": "reference:resnet20",
        },
        "options": {"target": "relative RMS 0.02", "method": "kde", "budget_seconds": 60, "verify_data": None},
        "environment": {
            "device": "Intel Xeon, 2 cores",
            "threads": 2,
            "versions": {"redpp-serve": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "numpy": "2.3.1"},
        },
        "stages": [
            {"name": "capture", "status": "done", "reason": "", "seconds": 1.24},
            {"name": "hash", "status": "done", "reason": "10 of 11 layers", "seconds": 0.41},
            {"name": "merge", "status": "done", "reason": "3 coupled classes", "seconds": 31.7},
            {"name": "distil", "status": "skipped", "reason": "no time left in the budget", "seconds": 0.0},
            {"name": "verify", "status": "done", "reason": "", "seconds": 2.2},
        ],
        "original": {
            "parameters": 1_089_530,
            "macs": 2_314_000_000,
            "multiplications": 2_314_000_000,
            "additions": 2_313_400_000,
            "bytes": 4_358_120,
            "accuracy": 0.984,
            "handler_ms": {"p50": 12.31, "p99": 18.9},
            "latency_ms": {"p50": 15.2, "p95": 20.4, "p99": 26.13},
            "throughput_rps": 131.4,
        },
        "pruned": {
            "parameters": 512_300,
            "macs": 1_102_000_000,
            "multiplications": 988_000_000,
            "additions": 1_101_700_000,
            "bytes": 391_200,
            "accuracy": 0.98,
            "handler_ms": {"p50": 6.54, "p99": 10.2},
            "latency_ms": {"p50": 8.9, "p95": 12.6, "p99": 17.02},
            "throughput_rps": 222.9,
        },
        "counting": {
            "kernel": {
                "multiplications": [1_102_000_000, 988_000_000],
                "additions": [1_101_700_000, 1_088_000_000],
                "bytes": [2_049_200, 391_200],
            },
            "weight": {
                "multiplications": [1_102_000_000, 402_000_000],
                "additions": [1_101_700_000, 1_101_700_000],
                "bytes": [2_049_200, 402_800],
            },
        },
        "hash": {
            "method": "kde",
            "target": "relative RMS 0.02",
            "predicted_error_typical": 0.0412,
            "predicted_error_bound": 0.1834,
            "measured_error": 0.0437,
            "predicted_ratio": 0.1021,
            "measured_ratio": 0.1034,
        },
        "layers": sample_layers(),
        "frontier": {
            "points": [
                sample_point(578_500_000, 0.25, 0.29, "--target macs=0.25"),
                sample_point(1_102_000_000, 0.476, 0.0611, "--target macs=0.48", (0.602, 0.589, 0.617), chosen=True),
                sample_point(1_851_200_000, 0.8, 0.0121, "--target macs=0.8", (0.85, 0.835, 0.87)),
            ],
            "latency_on": "Intel Xeon, 2 cores, batch 1",
        },
        "stages_share": [
            {"stage": "hash", "error": 0.021, "agreement": 0.9961, "macs": 2_314_000_000, "seconds": 0.41},
            {"stage": "reconstruct", "error": 0.088, "agreement": 0.981, "macs": 1_102_000_000, "seconds": 21.3},
            {"stage": "distil", "error": 0.0611, "agreement": 0.992, "macs": 1_102_000_000, "seconds": 75.0},
        ],
        "verify": {
            "merge_exact": 3.1e-13,
            "narrow_exact": 2.2e-16,
            "split_exact": 8.4e-15,
            "output_error": 0.0611,
            "agreement": 0.992,
            "images": 256,
        },
        "smoke": [{"archive": "original.mar", "milliseconds": 14.2}, {"archive": "pruned.mar", "milliseconds": 8.1}],
        "agreement": {"top1": 0.9944},
        "speedup": {
            "handler_p50": {"ratio": 1.88, "low": 1.85, "high": 1.91},
            "end_to_end_p50": {"ratio": 1.71, "low": 1.66, "high": 1.75},
            "throughput": {"ratio": 1.7, "low": 1.64, "high": 1.76},
        },
        "verdict": "Faster: the pruned version answers 1.71 times as fast at the median and agrees on 99.44 % of inputs"
        " (interval 1.66 to 1.75).",
    }


def sample_choice(name: str, batch: int, kernel: str, source: str, **times: float) -> dict[str, Any]:
    return {
        "layer": f"{name}_1",
        "name": name,
        "batch": batch,
        "kernel": kernel,
        "source": source,
        "times": times,
        "shape": f"{batch}x3x8x8",
    }


SAMPLE_PLAN = {
    "device": "some device",
    "precision": "fp32",
    "batches": [1, 8],
    "seconds": 1.25,
    "digest": "0",
    "choices": [
        sample_choice("stem", 1, "fused", "measured", dense=2e-3, fused=1e-3, split=5e-2),
        sample_choice("stem", 8, "dense", "cached", dense=4e-3, fused=4.5e-3),
        sample_choice("a", 1, "dense", "network", dense=20e-6, fused=10e-6),
        sample_choice("b", 1, "dense", "network", dense=20e-6, fused=10e-6),
        sample_choice("head", 1, "dense", "rule"),
        sample_choice("head", 8, "dense", "budget"),
    ],
}
