"""Terminal summary and number formats; `sample_report` also feeds the tests of the page and its charts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from redpp_serve.report import formats, text

GOLDEN_SUMMARY = """\
digits: original and pruned by redpp-serve 0.1.0

                 original    pruned               ratio
parameters         1.09 M     512 k               2.13x
MACs               2.31 G    1.10 G               2.10x
multiplications    2.31 G     988 M               2.34x
additions          2.31 G    1.10 G               2.10x
stored bytes       4.4 MB  391.2 kB              11.14x
accuracy          98.40 %   98.00 %        -0.40 points
handler p50       12.3 ms   6.54 ms  1.88x [1.85, 1.91]
handler p99       18.9 ms   10.2 ms               1.85x
latency p50       15.2 ms   8.90 ms  1.71x [1.66, 1.75]
latency p95       20.4 ms   12.6 ms               1.62x
latency p99       26.1 ms   17.0 ms               1.54x
throughput         131 /s    223 /s  1.70x [1.64, 1.76]

frontier             MACs              latency    error  flag
          1.85 G (80.0 %)  85.0 % [83.5, 87.0]   1.21 %  --target macs=0.8
          1.10 G (47.6 %)  60.2 % [58.9, 61.7]   6.11 %  --target macs=0.48 (chosen)
           578 M (25.0 %)                    –  29.00 %  --target macs=0.25

hashing (kde, relative RMS 0.02)
                                        predicted  at most  measured
  relative output error                    4.12 %  18.34 %    4.37 %
  multiplications removed by splitting    10.21 %        –   10.34 %
  The measured error is within the bound.

verification (256 held-out inputs)
  exact merging, relative error                   3.1e-13
  leaving out unread channels, relative error     2.2e-16
  exact splitting, relative error                 8.4e-15
  pruned against original, relative output error   6.11 %
  same top-1 class                                99.20 %
  same top-1 class, served answers                99.44 %

skipped: distil (no time left in the budget)

channels left alone: 8 of 11 layers
  its channels feed a residual addition:
    stem.conv, blocks.0.conv2, blocks.0.shortcut.projection.conv, blocks.1.conv2,
    blocks.1.shortcut.projection.conv, blocks.2.conv2, blocks.2.shortcut.projection.conv
  network output:
    head.classifier

verdict: Faster: the pruned version answers 1.71 times as fast at the median and agrees on 99.44 % of inputs
  (interval 1.66 to 1.75)."""


def _density(spread: float, values: int) -> dict[str, Any]:
    """A bell with a small second bump, cut into `values` cells of equal width."""
    x = [spread * (i / 100 - 1) for i in range(201)]
    y = [math.exp(-8 * (v / spread) ** 2) + 0.2 * math.exp(-60 * (v / spread - 0.5) ** 2) for v in x]
    step = 2 * spread / values
    edges = [-spread + step * i for i in range(values + 1)]
    return {"x": x, "y": y, "edges": edges, "modes": [edge + step / 2 for edge in edges[:-1]]}


def _layer(name: str, shape: list[int], pruned: list[int], reason: str = "", values: int = 16) -> dict[str, Any]:
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
    layers = [_layer("stem.conv", [16, 1, 3, 3], [16, 1, 3, 3], "its channels feed a residual addition")]
    for block, (wide, narrow) in enumerate([(16, 8), (32, 16), (64, 24)]):
        into = max(16, wide // 2)
        layers += [
            _layer(f"blocks.{block}.conv1", [wide, into, 3, 3], [narrow, into, 3, 3], values=12 + 5 * block),
            _layer(
                f"blocks.{block}.conv2",
                [wide, wide, 3, 3],
                [wide, narrow, 3, 3],
                "its channels feed a residual addition",
                values=11 + 9 * block,
            ),
            _layer(
                f"blocks.{block}.shortcut.projection.conv",
                [wide, into, 1, 1],
                [wide, into, 1, 1],
                "its channels feed a residual addition",
                values=9 + block,
            ),
        ]
    head = _layer("head.classifier", [10, 64], [10, 64], "network output")
    return [*layers, {**head, "hash": None, "split": None, "error": None}]


def _point(
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
            "axes": {"macs_ratio": "MACs kept", "error": "output error", "latency_ratio": "latency kept"},
            "points": [
                _point(578_500_000, 0.25, 0.29, "--target macs=0.25"),
                _point(1_102_000_000, 0.476, 0.0611, "--target macs=0.48", (0.602, 0.589, 0.617), chosen=True),
                _point(1_851_200_000, 0.8, 0.0121, "--target macs=0.8", (0.85, 0.835, 0.87)),
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


def test_package_summary_golden() -> None:
    assert text.package_summary(sample_report()) == GOLDEN_SUMMARY


def test_summary_of_an_empty_report_shows_dashes() -> None:
    lines = text.package_summary({}).splitlines()
    assert lines[0] == "model: original and pruned by redpp-serve –"
    assert [line.split() for line in lines if line.startswith("MACs")] == [["MACs", "–", "–", "–"]]
    assert "hashing" not in "".join(lines) and "accuracy" not in "".join(lines)


@pytest.mark.parametrize(
    ("show", "value", "expected"),
    [
        (formats.count, 1_089_530, "1.09 M"),
        (formats.count, 2_314_000_000, "2.31 G"),
        (formats.count, 512, "512"),
        (formats.count, 999_999, "1.00 M"),
        (formats.count, 0, "0"),
        (formats.count, True, "–"),
        (formats.exact, 2048, "2048"),
        (formats.size, 4_200_000, "4.2 MB"),
        (formats.size, 999, "999 B"),
        (formats.size, 999_990, "1.0 MB"),
        (formats.percent, 0.984, "98.40 %"),
        (formats.percent, math.nan, "–"),
        (formats.error, 3.1e-13, "3.1e-13"),
        (formats.error, 0.0, "0"),
        (formats.error, 0.021, "2.10 %"),
        (formats.error, math.inf, "–"),
        (formats.milliseconds, 0.8312, "0.831 ms"),
        (formats.milliseconds, 12.31, "12.3 ms"),
        (formats.seconds, None, "–"),
        (formats.times, "2", "–"),
        (formats.shape, [2048, 1024, 1, 1], "2048x1024x1x1"),
        (formats.shape, [], "–"),
    ],
)
def test_formats(show: Any, value: Any, expected: str) -> None:
    assert show(value) == expected


def test_ratio_is_above_one_when_pruned_is_better() -> None:
    report = {
        "original": {"macs": 300, "throughput_rps": 10.0, "bytes": 5},
        "pruned": {"macs": 100, "throughput_rps": 20.0, "bytes": 0},
    }
    ratios = {row.label: row.ratio for row in text.summary_rows(report)}
    assert (ratios["MACs"], ratios["throughput"], ratios["stored bytes"]) == ("3.00x", "2.00x", "–")


def _frontier_lines(points: list[dict[str, Any]]) -> list[str]:
    report = {"frontier": {"points": points}}
    lines = text.package_summary(report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("frontier"))
    return lines[start : next((i for i in range(start, len(lines)) if not lines[i]), len(lines))]


def test_the_frontier_takes_six_lines_at_most_and_keeps_the_ends_and_the_chosen() -> None:
    points = [
        _point(10**9 - k, 1 - k / 100, k / 50, f"--target macs={1 - k / 100:g}", (1, 1, 1), k == 37) for k in range(90)
    ]
    lines = _frontier_lines(points)
    assert len(lines) == 6 and lines[0].startswith("frontier (5 of 90 points)")
    assert max(map(len, lines)) <= text.WIDTH
    flags = [line.split("macs=")[1] for line in lines[1:]]
    assert flags[0] == "1" and flags[-1] == "0.11" and "0.63 (chosen)" in flags


def test_a_frontier_without_latencies_has_no_column_for_them() -> None:
    head, row = _frontier_lines([_point(5, 0.5, 0.1, "--target macs=0.5")])
    assert head.split() == ["frontier", "MACs", "error", "flag"]
    assert row.split() == ["5", "(50.0", "%)", "10.00", "%", "--target", "macs=0.5"]
    assert "frontier" not in text.package_summary({"frontier": {"points": []}})


def test_measured_error_above_the_bound_is_said() -> None:
    report = sample_report()
    report["hash"]["measured_error"] = 0.5
    assert "ABOVE the predicted bound" in text.package_summary(report)


def test_layer_table_names_every_layer_and_fits() -> None:
    table = text.layer_table(sample_layers())
    lines = table.splitlines()
    assert lines[0].split() == [
        "layer",
        "op",
        "shape",
        "pruned",
        "to",
        "params",
        "MACs",
        "values",
        "bits",
        "RMS",
        "kept",
        "error",
    ]
    row = "blocks.0.conv1 conv2d 16x16x3x3 8x16x3x3 2.30 k 590 k 12 3.18 1.50 % 8/16 1.44 %"
    assert lines[2].split() == row.split()
    assert max(map(len, lines)) <= text.WIDTH


def test_wide_tables_shorten_names_only() -> None:
    layer = _layer("encoder." * 40 + "attention.out", [2048, 1024, 3, 3], [1024, 1024, 3, 3], "x" * 300, values=4096)
    lines = text.layer_table([layer] * 30).splitlines()
    assert max(map(len, lines)) <= text.WIDTH
    assert "2048x1024x3x3  1024x1024x3x3" in lines[1] and "…" in lines[1]
    assert max(map(len, text.package_summary({**sample_report(), "layers": [layer] * 30}).splitlines())) <= text.WIDTH


def test_columns_nobody_filled_are_left_out() -> None:
    bare = [{"name": "fc", "op": "linear", "shape": [10, 64], "parameters": 640, "hash": None, "merge": None}]
    assert text.layer_table(bare).splitlines()[0].split() == ["layer", "op", "shape", "params"]
    assert text.layer_table([]) == "no layers with weights"
    assert text.layer_table([{}]).splitlines()  # type: ignore[typeddict-item]


def test_layers_that_were_only_inspected_show_channels_and_whether_they_may_go() -> None:
    layers = [
        {"name": "a", "op": "conv2d", "shape": [8, 3, 3, 3], "merge": {"channels": 8, "reason": ""}},
        {"name": "b", "op": "linear", "shape": [5, 8], "merge": {"channels": 5, "reason": "is an output"}},
    ]
    head, first, second, *rest = text.layer_table(layers).splitlines()
    assert head.split() == ["layer", "op", "shape", "channels", "narrowable"]
    assert (first.split()[3:], second.split()[3:]) == (["8", "yes"], ["5", "no"])
    assert rest == ["", "channels left alone: 1 of 2 layers", "  is an output:", "    b"]


def test_reasons_group_and_count() -> None:
    layers = [_layer(f"l{i}", [8, 8, 1, 1], [8, 8, 1, 1], "rare" if i == 3 else "common") for i in range(20)]
    assert list(text.reasons(layers)) == ["common", "rare"]
    listing = text.layer_table(layers).split("channels left alone: ")[1]
    assert listing.startswith("20 of 20 layers\n  common:\n    l0, l1, l2, l4") and "and 7 more" in listing


def test_terminal_control_characters_are_replaced() -> None:
    layer = _layer("a\x1b[2J\u202eb\nc", [8, 8, 1, 1], [8, 8, 1, 1], "why\x07")
    table = text.layer_table([layer])
    assert "a\ufffd[2J\ufffdb c" in table
    assert not any(c in table for c in "\x1b\u202e\x07")
